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

import dataclasses
import sys
from pathlib import Path

import numpy as np

# `python plots/trajectories.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from curves import nearest
from plots import style
from plots.runs import load_run
from plots.style import plt
from safety import BadInput


@dataclasses.dataclass(frozen=True)
class Plane:
    """The first two principal components of per-token losses."""

    centre: np.ndarray  # [token]
    axes: np.ndarray  # [token, 2], orthonormal
    explained: np.ndarray  # [2]: shares of the variance

    def project(self, losses):
        """losses [snapshot, token] -> points [snapshot, 2], nats."""
        return (losses[:, : len(self.centre)] - self.centre) @ self.axes


def losses_through_training(run):
    """(millions of training tokens [snapshot], per-token losses [snapshot, token]), without the
    untrained model.
    """
    trained = run.evaluation["tokens"] > 0
    if trained.sum() < 2:
        raise BadInput(f"{run.folder}: a path needs two snapshots of the trained model, or more")
    losses = run.evaluation["per_token_loss"][trained].astype(np.float64)
    return run.evaluation["tokens"][trained] / 1e6, losses


def principal_plane(losses):
    """The plane of losses [snapshot, token], centred and not scaled.

    From the Gram matrix [snapshot, snapshot], which is small for any number of tokens. The signs of
    the axes are such that the first snapshot lies to the left and above: training moves right.
    Snapshots on one line have no second axis: it is 0.
    """
    centre = losses.mean(axis=0)
    offsets = losses - centre
    variances, vectors = np.linalg.eigh(offsets @ offsets.T)  # ascending
    of_both, first_two = variances[:-3:-1].clip(min=0), vectors[:, :-3:-1]
    lengths = np.where(of_both > 1e-12 * of_both[0], of_both**0.5, np.inf)
    axes = offsets.T @ first_two / lengths
    axes *= np.where(offsets[0] @ axes * (-1, 1) < 0, -1, 1)
    return Plane(centre, axes, of_both / variances.sum())


def joint_pca(runs):
    """The `Plane` of all snapshots of those of the runs that are plain (of all, if none is).

    The examples of a run are the first of a list that never changes: of runs measured on different
    numbers of them the common ones count.
    """
    some = [run for run in runs if is_plain(run)] or runs
    losses = [losses_through_training(run)[1] for run in some]
    n_tokens = min(part.shape[1] for part in losses)
    return principal_plane(np.concatenate([part[:, :n_tokens] for part in losses]))


def is_plain(run):
    return not run.made["config"]["smear"] and run.series != "width"


def pivot_angles(points, tokens, window):
    """By how much a path turns: the angles, 0 to 180 degrees, of its mean velocities in the window
    and after it with that until it begins. nan if one of the two is zero.

    points [snapshot, dimension] at `tokens` [snapshot]; window: (start, end), in the same unit. A
    mean velocity is the way from one snapshot to another by the tokens between, so only the
    snapshots next to 0, start, end and the last count. A straight path has 0 and the paper's
    "orthogonal pivot" 90.
    """
    start, end = (nearest(tokens, edge) for edge in window)
    before, within = points[start] - points[0], points[end] - points[start]
    return angle(before, within), angle(before, points[-1] - points[end])


def angle(one, other):
    length = np.linalg.norm(one) * np.linalg.norm(other)
    cosine = np.clip(one @ other / length, -1, 1) if length else np.nan
    return float(np.degrees(np.arccos(cosine)))


@dataclasses.dataclass(frozen=True)
class Pivot:
    """How one run's path in the plane turns, degrees."""

    window: tuple  # millions of tokens
    own_window: bool  # a run without one is judged in the median window of the others
    within: float  # in the window
    after: float


def pivots(runs):
    """{name: Pivot}, in the joint plane of the runs on the same examples; empty if none of the runs
    has a phase change.
    """
    windows = [run.window for run in runs if run.window and is_plain(run)]
    windows = windows or [run.window for run in runs if run.window]
    if not windows:
        return {}
    usual, found = tuple(np.median(windows, axis=0).tolist()), {}
    for group in by_examples(runs):
        plane = joint_pca(group)
        for run in group:
            millions, losses = losses_through_training(run)
            window = run.window or usual
            angles = pivot_angles(plane.project(losses), millions, window)
            found[run.name] = Pivot(window, run.window is not None, *angles)
    return found


def by_examples(runs):
    """The runs, in lists of those that are measured on the same examples."""
    groups = {}
    for run in runs:
        groups.setdefault(run.made["corpus"]["sha256"], []).append(run)
    return list(groups.values())


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
