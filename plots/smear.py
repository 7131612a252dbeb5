"""What makes induction heads easier to form brings in-context learning earlier.

    python plots/smear.py RUN [RUN ...] --out FILE.png

Figure F10 of the paper ("Argument 2"): in-context learning score of models of one and two layers,
plain above and with smeared keys below, one line a seed. A smeared key holds the token before, so
that one layer is enough for induction.
"""

import sys
from pathlib import Path

import numpy as np

# `python plots/smear.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import style
from plots.panels import BANDS
from plots.runs import layers
from plots.style import plt


def draw(runs):
    """-> a figure with 2 x 2 panels."""
    records = on_the_same_examples(runs)
    figure, panels = plt.subplots(
        2, 2, figsize=(7.5, 5.4), layout="constrained", sharex=True, sharey=True
    )
    for smear, row in zip((False, True), panels, strict=True):
        for n_layers, ax in zip((1, 2), row, strict=True):
            seeds = [run for run in runs if kind(run) == (n_layers, smear)]
            draw_seeds(ax, seeds, [records[run.folder] for run in seeds])
            ax.set_title(f"{layers(n_layers)}, {'smeared keys' if smear else 'plain keys'}")
    for ax in panels[1]:
        ax.set_xlabel("training tokens (millions)")
    for ax in panels[:, 0]:
        ax.set_ylabel("in-context learning\nscore (nats)")
    n_examples = style.counted(arrays["per_token_loss"].shape[1] for arrays in records.values())
    note = (
        f"Figure F10 of the paper. Loss at {BANDS}, {n_examples} held-out examples; a line a seed."
    )
    style.caption(figure, f"{note} Shaded: from the median start of the phase change to its end.")
    return figure


def on_the_same_examples(runs):
    """{folder: measurements}: on more examples only if all have been measured on more. Other
    examples would pass for another seed.
    """
    all_on_more = all(run.has("evaluation.npz") for run in runs)
    return {run.folder: run.evaluation if all_on_more else run.measurements for run in runs}


def kind(run):
    return run.n_layers, run.made["config"]["smear"]


def draw_seeds(ax, runs, records):
    """One line a seed; shaded from the median start of their phase changes to the median end."""
    if not runs:
        return style.not_available(ax, "no run of this kind")
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    colour = style.depth_colour(runs[0].n_layers)
    for arrays in records:
        ax.plot(arrays["tokens"] / 1e6, arrays["icl_band_score"], color=colour, alpha=0.8)
    windows = [run.window for run in runs if run.window]
    if windows:
        style.shade(ax, np.median(windows, axis=0))
    ax.set_xlim(0, 1.005 * runs[0].millions[-1])


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
