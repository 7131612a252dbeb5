"""A text as a picture: its tokens in a typewriter's rows, each with a colour of its own."""

import codecs
import collections

import matplotlib
from matplotlib.collections import PolyCollection

FONT_SIZE = 8.78  # an advance of whole pixels at the 150 an inch that figures are saved with
COLUMN, ROW = 0.602 * FONT_SIZE / 72, 1.45 * FONT_SIZE / 72  # inches of a character, of a row
NEWLINE = "↵"


def spell(tokens):
    """bytes [token] -> one string for each. A character of several tokens is spelled at the last of
    them; newlines are shown, and end a row.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes(token)).replace("\n", f"{NEWLINE}\n") for token in tokens]


def lay_out(spelled, width):
    """-> ([(token, row, column, text)], rows): where every token, or part of one between newlines,
    stands in rows of `width` characters. Rows break before a space, or at a newline.
    """
    pieces, row, column = [], 0, 0
    for n, text in enumerate(spelled):
        if text[:1] == " " and column and column + _word_length(spelled, n) > width:
            row, column = row + 1, 0
        for part in text.splitlines(keepends=True):
            shown = part.rstrip("\n")
            pieces.append((n, row, column, shown))
            column += len(shown)
            if part.endswith("\n"):
                row, column = row + 1, 0
    return pieces, row + (column > 0)


def count_rows(spelled, width):
    return lay_out(spelled, width)[1]


def _word_length(spelled, n):
    """Characters from token n, with which a word begins, to the next space or newline."""
    word = "".join(spelled[n : n + 40])
    indent = len(word) - len(word.lstrip(" "))
    return indent + len(word[indent:].split(" ")[0].split("\n")[0])


def draw_text(ax, spelled, colours, width, outlined=()):
    """Writes the text into an axis of that many columns; colours: RGBA [token].

    outlined: tokens with a frame around them.
    """
    pieces, n_rows = lay_out(spelled, width)
    ax.set(xlim=(0, width), ylim=(n_rows, 0))
    ax.axis("off")
    boxes, edges = [], []
    lines = collections.defaultdict(str)  # one for every row and ink: a text costs a millisecond
    for n, row, left, text in pieces:
        right, top, bottom = left + len(text), row + 0.04, row + 0.96
        boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
        edges.append("black" if n in outlined else "none")
        ink = "white" if is_dark(colours[n]) else "black"
        lines[row, ink] = lines[row, ink].ljust(left) + text
    faces = [colours[n] for n, *_ in pieces]
    ax.add_collection(PolyCollection(boxes, fc=faces, ec=edges, lw=1.2), autolim=False)
    for (row, ink), line in lines.items():
        ax.text(
            0, row + 0.54, line, color=ink, family="monospace", fontsize=FONT_SIZE, va="center",
            parse_math=False,
        )  # fmt: skip


def is_dark(colour):
    """Of an RGBA colour on white."""
    red, green, blue, opacity = matplotlib.colors.to_rgba(colour)
    return 1 - opacity + opacity * (0.3 * red + 0.6 * green + 0.1 * blue) < 0.5


def place(figure, left, top, width, height):
    """An axis at a place given in inches from the figure's upper left corner."""
    figure_width, figure_height = figure.get_size_inches()
    bottom = figure_height - top - height
    return figure.add_axes(
        (left / figure_width, bottom / figure_height, width / figure_width, height / figure_height)
    )
