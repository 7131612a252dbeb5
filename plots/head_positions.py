"""Where in a model the heads are that match prefixes.

    python plots/head_positions.py RUN [RUN ...] --out FILE.png

Figures A1 to A3 of the paper ("Appendix"): every head of the trained model in the order of depth,
one panel a model. In the paper's attention-only models the heads that match prefixes are in the
last layer, in deep ones with MLPs in the one before it.
"""

import sys
from pathlib import Path

# `python plots/head_positions.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from heads import PREFIX_MATCHING
from plots import style
from plots.style import plt

MOST_COLUMNS = 3


def draw(runs):
    """-> a figure with one panel a run."""
    n_columns = min(len(runs), MOST_COLUMNS)
    n_rows = -(-len(runs) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(0.8 + 2.8 * n_columns, 0.7 + 2.1 * n_rows),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for ax, run in zip(axes.flat, runs, strict=False):
        draw_heads(ax, run)
        title = run.title  # which tells the width only in a width sweep
        if run.series != "width" and any(other.series == "width" for other in runs):
            title += f", width {run.made['config']['d_model']}"
        if sum(other.title == run.title for other in runs) > 1:
            title += f", seed {run.seed}"
        ax.set_title(title)
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("prefix matching (0 to 1)")
    axes[0, 0].set_ylim(-0.04, 1)
    name = {"attention-only": "A1", "with MLPs": "A2"}
    figures = sorted({name.get(run.series, "A3") for run in runs})
    style.caption(
        figure,
        f"Paper: figure {figures[-1]}. At the end of training, 10 sequences of random tokens;"
        f" dotted: {PREFIX_MATCHING}, from where on a head is said to match prefixes.",
    )
    return figure


def draw_heads(ax, run):
    """Heads as they come in depth, layers apart."""
    ax.axhline(PREFIX_MATCHING, color=style.QUIET, lw=0.8, ls=":", zorder=0)
    n_heads = run.made["config"]["n_heads"]
    for index, row in enumerate(run.summary["heads"]):
        layer, score = index // n_heads, row["prefix_matching"]
        colour = style.depth_colour(layer + 1)
        ax.vlines(index, 0, score, color=colour, lw=1.2, alpha=0.5)
        ax.plot(index, score, "o", ms=7, color=colour, mec="white", mew=0.6, clip_on=False)
        if score >= PREFIX_MATCHING:
            ax.annotate(
                row["head"], (index, score), (0, 7), textcoords="offset points", ha="center"
            )
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    starts = [layer * n_heads - 0.5 for layer in range(run.n_layers)]
    for start in starts[1::2]:
        ax.axvspan(start, start + n_heads, color="0.96", lw=0, zorder=-1)
    ax.set_xticks([start + n_heads / 2 for start in starts], range(run.n_layers))
    ax.set_xlim(-0.5, run.n_layers * n_heads - 0.5)
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel(f"layer, {n_heads} head{'s' * (n_heads > 1)} each")


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
