"""Do the heads that match prefixes copy? Both scores of every head of many models.

    python plots/head_scatter.py RUN [RUN ...] --out FILE.png

Figure A4 of the paper ("Appendix"): in its models heads either do neither or both. The width sweep,
which stands in for the paper's larger models, has a panel of its own.
"""

import sys
from pathlib import Path

# `python plots/head_scatter.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from heads import PREFIX_MATCHING
from plots import style
from plots.style import plt

MARKERS = {
    "attention-only": "o",
    "with MLPs": "s",
    "smeared keys": "^",
    "second corpus": "D",
    "width": "o",
}


def draw(runs):
    """-> a figure with one panel, two with a width sweep."""
    wide = [run for run in runs if run.series == "width"]
    panels = {"Models of one width": [run for run in runs if run.series != "width"]}
    if wide:
        panels["Width sweep (in place of full-scale models)"] = wide
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.4 + 4 * len(panels), 4.3), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for ax, (title, some) in zip(axes[0], panels.items(), strict=True):
        draw_heads(ax, some)
        ax.set_title(title if wide else "")
        ax.set_xlabel("prefix matching (0 to 1)")
    axes[0, 0].set(ylabel="copying (-1 to 1)", xlim=(-0.03, 1), ylim=(-1, 1))
    figure.legend(handles=legend(runs), loc="outside right center", handletextpad=0.2)
    n_heads = sum(len(run.summary["heads"]) for run in runs)
    style.caption(
        figure,
        f"Paper: figure A4. {n_heads} heads of {len(runs)} models at the end of training;"
        " 10 sequences of random tokens for each score.",
    )
    return figure


def draw_heads(ax, runs):
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    ax.axvline(PREFIX_MATCHING, color="0.85", lw=0.8, zorder=0)
    ax.text(0.99, 0.97, "induction heads", color=style.QUIET, ha="right", va="top")
    for run in runs:
        rows = run.summary["heads"]
        ax.scatter(
            [row["prefix_matching"] for row in rows],
            [row["copying"] for row in rows],
            s=32,
            color=style.depth_colour(run.n_layers),
            marker=MARKERS[run.series],
            edgecolors="white",
            linewidths=0.5,
            alpha=0.85,
            clip_on=False,
        )


def legend(runs):
    """Colours for depth, shapes for kinds of model."""
    depths = [style.depth_key(n) for n in sorted({run.n_layers for run in runs})]
    series = {run.series for run in runs} - {"width"}  # that panel's title says it
    shapes = [
        plt.Line2D([], [], ls="", marker=marker, color=style.QUIET, label=name)
        for name, marker in MARKERS.items()
        if name in series
    ]
    return depths + shapes


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
