"""Training as a path: per-token losses of all models in the plane of their first two principal
components.

    python plots/trajectories.py RUN [RUN ...] --out FILE.png
    python plots/trajectories.py RUN [RUN ...] --plane RUN [RUN ...] --out FILE.png

Figure F7 of the paper ("Argument 1"): each snapshot of a model is a point, its losses at one token
of each example. All plain models of a corpus, with and without MLPs, share one plane; smeared keys
and other widths are projected into it. A second corpus has other examples and so a plane of its
own. In the phase change models of two layers and more turn. On a second corpus, without one, models
turn, too: what is learned last is not what is learned first.
"""

import sys
from pathlib import Path

import numpy as np

# `python plots/trajectories.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from curves import nearest
from plots import style
from plots.pca import by_examples, joint_pca, losses_through_training, pivots
from plots.runs import load_run
from plots.style import plt


def draw_path(ax, run, plane, others=()):
    """The run's path in the plane, with its phase change, A to B, outlined; those of others in
    grey.
    """
    for other in others:
        ax.plot(*plane.project(losses_through_training(other)[1]).T, color="0.88", lw=1, zorder=0)
    millions, losses = losses_through_training(run)
    points = plane.project(losses)
    if run.window:
        first, last = (nearest(millions, edge) for edge in run.window)
        ax.plot(*points[first : last + 1].T, color=style.WINDOW_COLOUR, lw=7, alpha=0.45, zorder=1)
        for name, edge in ("A", first), ("B", last):
            ax.annotate(
                name, points[edge], xytext=(9, -4), textcoords="offset points", weight="bold"
            )
    colour = style.depth_colour(run.n_layers)
    ax.plot(*points.T, color=colour, lw=1.6, marker=".", ms=4)
    ax.plot(*points[0], marker="o", ms=6, mfc="white", mec=colour, ls="", label="first snapshot")
    ax.plot(*points[-1], marker="s", ms=6, mfc=colour, mec=colour, ls="", label="last snapshot")
    tip = quarter_way(points)
    arrow = {"arrowstyle": "-|>", "color": colour, "mutation_scale": 16, "shrinkB": 0}
    ax.annotate("", points[tip], points[tip - 1], arrowprops=arrow)
    ax.margins(0.08)


def quarter_way(points):
    """The snapshot at which a quarter of the path's length lies behind."""
    way = np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()
    return 1 + int(np.searchsorted(way, way[-1] / 4))


def label_axes(ax, plane):
    for set_label, name, share in zip(
        (ax.set_xlabel, ax.set_ylabel), ("PC 1", "PC 2"), plane.explained, strict=True
    ):
        set_label(f"{name} (nats; {share:.0%} of variance)")


def draw(runs, plane=()):
    """-> a figure with one panel a run, in rows by series; plane: folders of other runs that share
    the plane.
    """
    drawn = {run.folder for run in runs}
    every = [*runs, *(load_run(folder) for folder in plane if folder not in drawn)]
    turns, rows = pivots(every), []
    for group in by_examples(every):
        shown = [run for run in group if run.folder in drawn]
        series = dict.fromkeys(run.series for run in shown)
        members = [[run for run in shown if run.series == one] for one in series]
        rows += [(joint_pca(group), group, some) for some in members]
    n_columns = max(len(row[-1]) for row in rows)
    figure, axes = plt.subplots(
        len(rows), n_columns, figsize=(1 + 2.6 * max(n_columns, 3), 0.6 + 2.9 * len(rows)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for panels, (plane, group, members) in zip(axes, rows, strict=True):
        for ax, run in zip(panels, members, strict=False):
            ax.sharex(panels[0])
            ax.sharey(panels[0])
            draw_path(ax, run, plane, [other for other in group if other is not run])
            ax.set_title(style.column_title(run) + pivot_label(turns.get(run.name)), fontsize=8.5)
            ax.set_xlabel("PC 1 (nats)")
        label_axes(panels[0], plane)
        for ax in panels[len(members) :]:
            ax.set_axis_off()
    axes[0, 0].legend(loc="best")
    style.caption(
        figure,
        "Figures F7 and F8 (A, B) of the paper: losses at one token of each of"
        f" {style.examples_note(runs)}. Orange, A to B: the phase change. Grey: the other models."
        " Angle, as if both axes had one scale: between the mean velocity until the change begins"
        " and that within it; of a run without one, in the others' median window.",
    )
    return figure


def pivot_label(pivot):
    if pivot is None:
        return ""
    return f"\nturns by {pivot.within:.0f}°" + ("" if pivot.own_window else " (no window)")


def add_plane_flag(add):
    more = {"nargs": "+", "type": Path, "default": (), "metavar": "RUN"}
    add("--plane", **more, help="other runs, which take part in the principal components")


main = style.script(__doc__, draw, add_plane_flag)

if __name__ == "__main__":
    sys.exit(main())
