"""Do the weights say what the heads do? Scores of heads against eigenvalues of OV and QK.

    python plots/eigenvalues.py RUN [RUN ...] --out FILE.png

Figures A5 and A6 of the paper ("Appendix"), from circuits.json: weights on the direct path from the
embedding (circuits.py).
"""

import sys
from pathlib import Path

import numpy as np

# `python plots/eigenvalues.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import analysis, style
from plots.style import plt

# (figure of the paper, score of a head, its range, number of its weights): panels
COMPARED = (
    ("A5", "copying", "copying (-1 to 1)", "ov_copying_direct"),
    ("A6", "prefix_matching", "prefix matching (0 to 1)", "qk_match_direct"),
)
WEIGHTS = {
    "ov_copying_direct": "OV: sum of eigenvalues / sum of their moduli (-1 to 1)",
    "qk_match_direct": "QK through previous-token heads: trace / vocabulary (nats)",
}


def draw(runs):
    """-> a figure with two panels."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, (name, score, score_label, weights) in zip(axes, COMPARED, strict=True):
        x, y = draw_heads(ax, runs, weights, score)
        ax.set(title=name, xlabel=WEIGHTS[weights], ylabel=score_label)
        coefficients = analysis.pearson(x, y), analysis.spearman(x, y)
        text = "n = {} heads\nPearson {:+.2f}\nSpearman {:+.2f}".format(len(x), *coefficients)
        ax.text(0.02, 0.98, text.replace("+nan", "N/A"), transform=ax.transAxes, va="top")
    axes[0].set(xlim=(-1, 1), ylim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
    axes[1].set_ylim(-0.04, 1)
    axes[1].locator_params(axis="x", nbins=5)
    handles = [style.depth_key(n) for n in sorted({run.n_layers for run in runs})]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    style.caption(
        figure,
        f"Paper: figures A5 and A6. All heads of {len(runs)} models at the end of training; QK"
        " only where an earlier layer tells what came before. Direct path from the embedding.",
    )
    return figure


def draw_heads(ax, runs, weights, score):
    """-> the x and the y of all points."""
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    ax.axvline(0, color="0.85", lw=0.8, zorder=0)
    points = []
    for run in runs:
        rows = run.circuits["snapshots"][-1]["heads"]
        some = np.array([(r[weights], r[score]) for r in rows if r[weights] is not None])
        some = some.reshape(-1, 2)
        ax.scatter(
            *some.T, s=36, color=style.depth_colour(run.n_layers), edgecolors="white",
            linewidths=0.5, alpha=0.9, clip_on=False,
        )  # fmt: skip
        points.append(some)
    return np.concatenate(points).T


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
