"""What the phase change does to single tokens: a text coloured by the change of their losses, the
tokens that it helps and hurts most, and some of them through training.

    python plots/passage.py RUN [RUN ...] --out FILE.png

Figures F8b, F8c and F9 of the paper ("per-token losses"). Between the start and the end of the
phase change tokens that come again get easier, and some where another one follows than before get
harder. The words that the curves follow were chosen with the text (tasks.PASSAGES), before any
model had read it. A run without a phase change is shown from its first to its last snapshot.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

# `python plots/passage.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import style
from plots.style import plt
from plots.text import COLUMN, ROW, count_rows, draw_text, place, spell

COLUMNS = {"Python": 66, "prose": 52}  # characters in a row of each passage
MARGIN, GAP, TITLE, LEGEND, CURVES = 0.55, 0.6, 0.62, 0.9, 2.1  # inches
N_LISTED = 5
LISTS = 2 * (N_LISTED + 1) * ROW
EASIER, HARDER = "#2166ac", "#b2182b"  # the ends of the colour map
COLOURS = "RdBu_r"


def draw(runs):
    """-> a figure with a block for each run, in it a column for each passage: the text, the tokens
    whose losses change most, curves.
    """
    changes = [np.abs(change_of(run.passage, name)) for run in runs for name in COLUMNS]
    strongest = np.ceil(np.percentile(np.concatenate(changes), 95))
    colours = matplotlib.cm.ScalarMappable(plt.Normalize(-strongest, strongest), COLOURS)
    n_rows = [
        max(count_rows(spell(run.passage[f"{name}_text"]), n) for name, n in COLUMNS.items())
        for run in runs
    ]
    rest = TITLE + 0.6 + LISTS + LEGEND + CURVES + GAP  # all but the rows of text
    width = 2 * MARGIN + GAP + sum(COLUMNS.values()) * COLUMN
    figure = plt.figure(figsize=(width, sum(n_rows) * ROW + len(runs) * rest + 0.5))
    top = 0
    for run, rows in zip(runs, n_rows, strict=True):
        draw_title(figure, run, colours, top)
        left = MARGIN
        for name in COLUMNS:
            draw_passage(figure, run, name, colours, left, top + TITLE, rows)
            left += COLUMNS[name] * COLUMN + GAP
        top += rows * ROW + rest
    style.caption(
        figure,
        "F8b, F8c, F9 of the paper, on original texts that end with their first sentences once"
        " more; n = 1. The words of the curves were picked with the text, before training.",
    )
    return figure


def change_of(passage, name):
    """Nats [token] by which losses change between the two snapshots that the record compares; 0 for
    the start token, which has no loss.
    """
    before, after = passage[f"{name}_loss"][passage["compared"]].astype(float)
    return np.nan_to_num(after - before)


def draw_title(figure, run, colours, top):
    start, end = run.passage["tokens"][run.passage["compared"]] / 1e6
    what = "the phase change" if run.window else "training (there is no phase change)"
    left, width = MARGIN, figure.get_figwidth() - 2 * MARGIN
    ax = place(figure, left, top + 0.12, width - 2.6, 0.4)
    ax.axis("off")
    title = f"What {what} does to the loss of each token"
    ax.text(0, 0.75, title, fontsize=12, weight="bold", va="center")
    model = f"{run.title}, seed {run.seed}; from {start:.2f}M to {end:.2f}M training tokens"
    ax.text(0, 0.05, model, va="center", color="0.3")
    bar = place(figure, left + width - 2.3, top + 0.18, 2.3, 0.12)
    figure.colorbar(colours, cax=bar, orientation="horizontal", extend="both")
    bar.set_title("change of loss (nats)", fontsize=8, weight="normal", pad=3)
    bar.tick_params(labelsize=8)


def draw_passage(figure, run, name, colours, left, top, n_rows):
    passage, n_columns = run.passage, COLUMNS[name]
    spelled, change = spell(passage[f"{name}_text"]), change_of(run.passage, name)
    width = n_columns * COLUMN
    text = place(figure, left, top + 0.35, width, count_rows(spelled, n_columns) * ROW)
    draw_text(text, spelled, colours.to_rgba(change), n_columns)
    text.set_title(f"{name}: {change[1:].mean():+.2f} nats on average", loc="left")
    mark_rows(text, spelled, n_columns, passage[f"{name}_repeat"], "repeated")
    top += 0.6 + n_rows * ROW
    losses = np.nan_to_num(passage[f"{name}_loss"][passage["compared"]].astype(float))
    draw_list(place(figure, left, top, width, LISTS), spelled, losses, colours, n_columns)
    draw_curves(place(figure, left, top + LISTS + LEGEND, width, CURVES), run, name, spelled)


def mark_rows(ax, spelled, n_columns, start, label):
    """A line beside the rows from token `start` on."""
    first, last = count_rows(spelled[:start], n_columns), count_rows(spelled, n_columns)
    ax.plot((-0.8, -0.8), (first + 0.1, last - 0.1), color="0.5", lw=1, clip_on=False)
    middle = (first + last) / 2
    ax.text(-1.3, middle, label, rotation=90, ha="right", va="center", fontsize=8, color="0.4")


def most_changed(change, spelled):
    """-> (places whose losses fell most, places whose losses rose most): of tokens that stand in
    several places behind the same one, the most changed.
    """
    chosen = []
    for order in (change.argsort(), (-change).argsort()):
        seen = {}
        for token in order:
            seen.setdefault((spelled[token - 1], spelled[token]), token)
        chosen.append(list(seen.values())[:N_LISTED])
    return chosen


def draw_list(ax, spelled, losses, colours, n_columns):
    """The most changed tokens and what stands around them. losses: before and after, [2, token]."""
    before, after = losses
    shown, shades = [], []
    for heading, tokens in zip(
        ("easier (nats before and after)", "harder"),
        most_changed(after - before, spelled),
        strict=True,
    ):
        shown.append(f"{heading}\n")
        shades.append("none")
        for n in tokens:
            left, token, right = (
                "".join(part).replace("\n", "")
                for part in (spelled[1:n], spelled[n], spelled[n + 1 :])
            )
            left = f"{before[n]:5.1f} →{after[n]:5.1f}   {left[-22:]:>22}"
            shown += [left, token, right[:14] + "\n"]
            shades += ["none", colours.to_rgba(after[n] - before[n]), "none"]
    draw_text(ax, shown, shades, n_columns)


def draw_curves(ax, run, name, spelled):
    """Losses of the words' tokens over training, and the mean over all tokens."""
    passage, millions = run.passage, run.passage["tokens"] / 1e6
    losses = passage[f"{name}_loss"].astype(float)
    words = (passage[f"{name}_{what}"] for what in ("word", "word_token", "word_expected"))
    words = list(zip(*words, strict=True))
    # the two that are drawn bold have this name in common
    named = next(word for word, _, expected in words if not expected)
    for word, token, expected in words:
        bold = word.endswith(named)
        if expected:
            label = f"{spelled[token]!r} of the second “{word}”, which induction expects"
        else:
            label = f"{spelled[token]!r} of the first “{word}”, where it expects another"
        ax.plot(
            millions,
            losses[:, token],
            color=EASIER if expected else HARDER,
            lw=1.8 if bold else 0.8,
            alpha=1 if bold else 0.35,
            label=label if bold else None,
        )
    ax.plot(millions, losses[:, 1:].mean(axis=1), "k--", lw=1.2, label="mean of all tokens")
    style.shade_phase_change(ax, run)
    ax.set(xlabel="training tokens (millions)", xlim=(0, None), ylim=(0, 14))
    ax.set_ylabel("loss of the token (nats)")
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), alignment="left", borderaxespad=0.2,
        title="thin: other words of the passage", title_fontsize=8,
    )  # fmt: skip


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
