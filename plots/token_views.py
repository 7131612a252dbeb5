"""Token views of single heads: where they attend (red), and what that adds to the prediction of the
next token (blue).

    python plots/token_views.py RUN [RUN ...] --view copying --out FILE.png
    python plots/token_views.py RUN [RUN ...] --view translation --out FILE.png
    python plots/token_views.py RUN [RUN ...] --view patterns --out FILE.png

Figures F12, F13 and F14 of the paper ("Argument 4"), each of the head that does best on that task
of tasks.py. In the paper they are three heads of a 13B model. Small models need not show the last
two: every view tells what was measured and what chance would give.
"""

import dataclasses
import sys
from pathlib import Path

import matplotlib
import numpy as np

# `python plots/token_views.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from heads import head_named
from plots import style
from plots.runs import head_on_passage
from plots.style import plt
from plots.text import COLUMN, ROW, count_rows, draw_text, place, spell

ATTENTION, ATTRIBUTION = "#b2182b", "#2166ac"
N_HEADS = 8  # compared beside a view


def draw(runs, view):
    """-> a figure with a row for each run."""
    return VIEWS[view](runs)


def scale_of(colour, strongest):
    """From white at 0, and below, to the colour at the strongest value."""
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", colour])
    return matplotlib.cm.ScalarMappable(plt.Normalize(0, strongest, clip=True), colours)


def model_of(run):
    millions = run.summary["tokens"] / 1e6
    return f"{run.title}, seed {run.seed}, after {millions:.2f}M tokens"


# --- F12: literal copying

N_COLUMNS = 58
MARGIN, GAP, TITLE = 0.4, 0.5, 0.9  # inches


class Copied:
    """The passage of a run's kind of text and the head that copies best there."""

    def __init__(self, run):
        name = "Python" if run.made["corpus"]["data"] == "python" else "prose"
        self.run, self.measured = run, run.tasks["literal_copying"][name]
        self.best = self.measured["heads"][0]
        layer, head = head_named(self.best["head"])
        self.pattern, self.attribution = head_on_passage(run.passage, name, -1, layer, head)
        self.spelled = spell(run.passage[f"{name}_text"])
        self.start = int(run.passage[f"{name}_repeat"])
        # in the repeat, and one token further than the same place of the first copy, at 1
        self.queries = np.arange(self.start, len(self.spelled) - 1)
        self.keys = self.queries - (self.start - 1) + 1
        self.rows = count_rows(self.spelled, N_COLUMNS)
        self.rows_of_repeat = count_rows(self.spelled[self.start :], N_COLUMNS)

    def example(self):
        """A token of the repeat that came with the next one three times or more before: the one
        with most attention to that -> (its place, where the next one came behind it).
        """
        found = []
        for query in self.queries:
            pair = self.spelled[query : query + 2]
            keys = [n for n in range(1, query) if self.spelled[n - 1 : n + 1] == pair]
            found.append((len(keys) >= 3, self.pattern[query, keys].sum(), query, keys))
        return max(found)[2:]


def draw_copying(runs):
    """Above, a passage as one token of its repeat sees it; below, how much all tokens of the repeat
    see of what came next the first time.
    """
    views = [Copied(run) for run in runs]
    heights = [TITLE + 1.2 + (view.rows + view.rows_of_repeat) * ROW for view in views]
    width = 2 * MARGIN + GAP + 2 * N_COLUMNS * COLUMN
    figure = plt.figure(figsize=(width, sum(heights) + 0.6))
    top = 0
    for view, height in zip(views, heights, strict=True):
        draw_copied(figure, view, top)
        top += height
    style.caption(
        figure,
        "F12 of the paper. Framed: a token of the repeat and the next one, and where this came"
        " behind it before. By chance: what attends to the first sentences, spread over them"
        " evenly. One reading of the passage by the last snapshot. What lowers a logit is white.",
    )
    return figure


def draw_copied(figure, view, top):
    query, keys = view.example()
    attention, nats = (x[view.queries, view.keys] for x in (view.pattern, view.attribution))
    of_repeat = np.zeros((2, len(view.spelled)))
    of_repeat[0, view.queries] = attention
    of_repeat[1, view.queries + 1] = nats  # blue is a matter of the token that is predicted
    red = scale_of(ATTENTION, 1)
    blue = scale_of(ATTRIBUTION, max(nats.max(), view.attribution[query].max()))
    token, following = (view.spelled[n].replace("\n", "") for n in (query, query + 1))

    best, losses = view.best, (view.measured[f"loss_{when}"] for when in ("first", "repeat"))
    heading = place(figure, MARGIN, top + 0.1, 5, 0.7)
    heading.axis("off")
    heading.text(0, 0.85, f"Literal copying: head {best['head']}", fontsize=12, weight="bold")
    heading.text(0, 0.5, model_of(view.run), color="0.3")
    told = "first sentences {:.2f} nats a token, their repeat {:.2f}".format(*losses)
    heading.text(0, 0.2, told, color="0.3")

    width, bar_left = N_COLUMNS * COLUMN, figure.get_figwidth() - MARGIN - 4.0
    titles = (
        f"where it attends from {token!r}",
        f"attention to what came next: {best['attention']:.3f} (chance {best['chance']:.3f})",
        f"what this adds to the logit of {following!r}",
        f"its nats for the token that comes: {best['logit']:+.2f}",
    )
    for n, (colours, label, seen) in enumerate(
        ((red, "attention", view.pattern), (blue, "logit attribution (nats)", view.attribution))
    ):
        bar = place(figure, bar_left + 2.25 * n, top + 0.3, 1.75, 0.12)
        figure.colorbar(colours, cax=bar, orientation="horizontal")
        bar.set_title(label, fontsize=8, weight="normal", pad=3)
        left, below = MARGIN + n * (width + GAP), top + TITLE + 0.25
        whole = place(figure, left, below, width, view.rows * ROW)
        framed = (query, query + 1, *keys)
        draw_text(whole, view.spelled, colours.to_rgba(seen[query]), N_COLUMNS, framed)
        whole.set_title(titles[2 * n], loc="left")
        below += view.rows * ROW + 0.5
        repeat = place(figure, left, below, width, view.rows_of_repeat * ROW)
        shades = colours.to_rgba(of_repeat[n, view.start :])
        draw_text(repeat, view.spelled[view.start :], shades, N_COLUMNS)
        repeat.set_title(titles[2 * n + 1], loc="left")


# --- F13 and F14: matrices of words and of lines


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which tokens of a text the rows and columns of a matrix stand for."""

    labels: list[str]  # of rows and columns
    row_of: dict[int, int]  # of a query
    column_of: dict[int, int]  # of a key

    def matrices(self, edges):
        """Attention and nats from the queries to the keys, each summed: [row, column]."""
        sums = np.zeros((2, len(self.labels), len(self.labels)))
        for query, key, *values in edges:
            if query in self.row_of and key in self.column_of:
                sums[:, self.row_of[query], self.column_of[key]] += values
        return sums

    def cells(self, pairs):
        """The (row, column) of pairs of a query and a key."""
        return {(self.row_of[query], self.column_of[key]) for query, key in pairs}


def words_of(spelled):
    """Rows: the last token of every word but its punctuation; columns: all tokens of the words."""
    words = []
    for n, text in enumerate(spelled):
        if n < 2 or text[:1] == " " or "\n" in spelled[n - 1]:
            words.append([])
        words[-1].append(n)
    row_of = {max(n for n in word if is_word(spelled[n])): row for row, word in enumerate(words)}
    column_of = {token: column for column, word in enumerate(words) for token in word}
    labels = ["".join(spelled[n] for n in word).strip() for word in words[1:]]
    return Grid(["(start)", *labels], row_of, column_of)


def is_word(text):
    return any(c.isalnum() for c in text)


def lines_of(spelled):
    """Rows: the token before every line's label; columns: the labels."""
    lines = "".join(spelled[1:]).splitlines()
    labels = [n for n, text in enumerate(spelled) if text.strip() in tuple("0123")]
    row_of = {token - 1: row for row, token in enumerate(labels)}
    column_of = {token: column for column, token in enumerate(labels)}
    return Grid(lines, row_of, column_of)


def draw_translation(runs):
    return draw_grids(
        runs,
        "translation",
        words_of,
        ("from the last token of each word (row)", "Translation"),
        "F13 of the paper, where a head of a 13B model does this: framed is the English word after"
        " the translation of the row's. One sentence; attention of 0.05 and more is drawn. Nothing"
        " says that models this small, trained on one language, should know the words.",
    )


def draw_patterns(runs):
    return draw_grids(
        runs,
        "pattern_matching",
        lines_of,
        ("from before the label of each line (row)", "Pattern matching"),
        "F14 of the paper, where a head of a 13B model has about 65 % of its attention on the right"
        " labels: framed, those of earlier lines of the same kind (month or colour, animal or"
        " fruit). The first of 20 problems; the means on the right are over all.",
    )


def draw_grids(runs, task, grid_of, titles, caption):
    """Attention, logit attribution and how all heads do on the task, a row for each run."""
    figure = plt.figure(figsize=(14, 6.2 * len(runs) + 0.3), layout="constrained")
    rows = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
    for run, row in zip(runs, rows, strict=True):
        measured = run.tasks[task]
        grid = grid_of(measured["view"]["tokens"])
        axes = row.subplots(1, 3, width_ratios=(1, 1, 0.42))
        attention, nats = grid.matrices(measured["view"]["edges"])
        draw_matrix(axes[0], attention, scale_of(ATTENTION, 1), grid, f"attention {titles[0]}")
        blue = scale_of(ATTRIBUTION, max(nats.max(), 0.1))
        draw_matrix(
            axes[1], nats, blue, grid, "what this adds to the logit of the next token (nats)"
        )
        for ax in axes[:2]:
            for line, column in grid.cells(measured["view"]["right"]):
                cell = (column - 0.5, line - 0.5)
                ax.add_patch(plt.Rectangle(cell, 1, 1, fc="none", ec="0.35", lw=0.5))
        axes[1].set_yticklabels([])
        draw_heads(axes[2], measured)
        best = measured["heads"][0]["head"]
        row.suptitle(
            f"{titles[1]}: head {best}  ({model_of(run)})", weight="bold", x=0.01, ha="left"
        )
    style.caption(figure, caption)
    return figure


def draw_matrix(ax, values, colours, grid, title):
    ax.imshow(values, cmap=colours.cmap, norm=colours.norm, interpolation="nearest")
    places = range(len(grid.labels))
    ax.set_xticks(places, grid.labels, rotation=90, fontsize=8)
    ax.set_yticks(places, grid.labels, fontsize=8)
    ax.tick_params(length=1.5, pad=1)
    ax.set_title(title)
    ax.figure.colorbar(colours, ax=ax, shrink=0.5, aspect=25, pad=0.01)


def draw_heads(ax, measured):
    """The heads' attention to the right keys and what it would be by chance."""
    rows = measured["heads"][:N_HEADS]
    places = np.arange(len(rows))
    errors = [row.get("above_chance_error", 0) for row in rows]
    ax.errorbar(
        [row["attention"] for row in rows], places, xerr=errors, fmt="o", color=ATTENTION, ms=5,
        label="measured",
    )  # fmt: skip
    ax.plot([row["chance"] for row in rows], places, "|", color="black", ms=14, label="by chance")
    ax.set_yticks(places, [row["head"] for row in rows])
    ax.set(xlabel="attention to the right keys", ylabel="head", ylim=(len(rows) - 0.4, -0.6))
    ax.set_xlim(0, 1.15 * max(max(row["attention"], row["chance"]) for row in rows) + 0.005)
    ax.legend(loc="lower right")
    title = "all heads" if len(rows) == len(measured["heads"]) else f"best {len(rows)} heads"
    if "right_labels" in measured:
        share, error = (100 * measured[name] for name in ("right_labels", "right_labels_error"))
        title += f"\nright label likeliest: {share:.0f} ± {error:.0f} %\n(by chance 25 %)"
    ax.set_title(title)


VIEWS = {"copying": draw_copying, "translation": draw_translation, "patterns": draw_patterns}


def add_flags(add):
    add("--view", choices=VIEWS, required=True, help="which of the three figures")


main = style.script(__doc__, draw, add_flags)

if __name__ == "__main__":
    sys.exit(main())
