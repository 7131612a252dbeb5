"""What all figures share: colours, the look of an axis, the command line."""

import io
import shlex
import sys
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image  # comes with matplotlib

from plots.runs import layers, load_run
from safety import ArgumentParser, check_out, one_line_errors, write_whole

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# one colour for each depth, and for each layer within a model, in every figure: dark to light, so
# that they stay apart for every kind of colour vision and in grey
DEPTH_COLOURS = ("#2a2a6b", "#2c7fb8", "#2fa392", "#7fb241", "#c9a227", "#d98092")
# the classes of heads.head_class, but that heads that match prefixes are of one: whether a small
# model's copies, too, is a matter of hundredths
HEAD_COLOURS = {"matches prefixes": "#7a0177", "previous token": "#f768a1", "other": "#b2b04a"}
WINDOW_COLOUR = "#e69f00"
QUIET = "0.6"  # grey of what is there for comparison

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "legend.fontsize": 8,
        "figure.dpi": 100,
        "savefig.dpi": 150,
    }
)


def depth_colour(n_layers):
    """Of a model of that many layers, and of the layer with that number, counted from 1."""
    return DEPTH_COLOURS[min(n_layers, len(DEPTH_COLOURS)) - 1]


def depth_key(n_layers):
    """What a legend shows for models of that depth, drawn as points."""
    return plt.Line2D(
        [], [], ls="", marker="o", color=depth_colour(n_layers), mec="white",
        label=layers(n_layers),
    )  # fmt: skip


def shade_phase_change(ax, run):
    """Marks the stretch of training in which in-context learning appears, if the run has one."""
    if run.window:
        shade(ax, run.window)


def shade(ax, window):
    ax.axvspan(*window, color=WINDOW_COLOUR, alpha=0.2, lw=0)


def save(figure, path):
    """Writes the .png whole or not at all, closes the figure, says where it is."""
    drawn = io.BytesIO()
    figure.savefig(drawn, bbox_inches="tight", format="png")
    image = Image.open(drawn).convert("RGB")
    palette = image.quantize(255, Image.Quantize.MAXCOVERAGE)
    palette.putpalette([255, 255, 255, *palette.getpalette()[: 3 * 255]])
    image = image.quantize(palette=palette)  # dithered: looks the same at less than half the size
    colours, ground = image.getpalette(), 3 * image.getpixel((0, 0))
    colours[ground : ground + 3] = 255, 255, 255  # of near colours PIL may take another than white
    image.putpalette(colours)
    write_whole(path, lambda temporary: image.save(temporary, "png", optimize=True))
    plt.close(figure)
    print(f"-> {path}")


def caption(figure, text):
    """Small grey lines under the figure, below those that are there: its number in the paper, on
    how many examples. `script` adds the command.
    """
    filled = textwrap.fill(text, int(16 * figure.get_figwidth()), break_on_hyphens=False)
    above = figure.get_supxlabel()
    text = f"{above}\n{filled}" if above else filled
    figure.supxlabel(text, x=0.005, ha="left", fontsize=7.5, color="0.4")


def examples_note(runs):
    """What captions say of the examples that snapshots are measured on."""
    n_examples = counted(run.evaluation["per_token_loss"].shape[1] for run in runs)
    note = f"{n_examples} held-out examples of 512 tokens"
    if any(run.evaluation is run.measurements for run in runs):
        note += " (some only at the positions of the score)"
    return note


def counted(numbers):
    """One number, or the range of several."""
    different = sorted(set(numbers))
    return " to ".join(f"{n:,}" for n in (different[0], different[-1])[: len(different)])


def column_title(run):
    depth, kind, *more = run.title.split(", ")
    lines = [f"{depth}, seed {run.seed}", kind, *[", ".join(more)] * bool(more)]
    return "\n".join(lines).replace("; ", "\n")


def not_available(ax, why):
    """An empty panel that says so."""
    text = f"N/A\n{why}"
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.4")
    ax.set_facecolor("0.97")


def script(doc, draw, add_flags=lambda add: None):
    """The main(argv) of a figure: RUN [RUN ...] --out FILE.png, drawn by draw(runs).

    add_flags(add): more flags, which draw takes by name.
    """
    name = Path(draw.__code__.co_filename).name

    def main(argv=None):
        parser = ArgumentParser(doc)
        add = parser.add_argument
        add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
        add("--out", type=Path, required=True, help="the picture to write (.png)")
        add_flags(add)
        argv = sys.argv[1:] if argv is None else argv
        flags = vars(parser.parse_args(argv))
        runs, out = flags.pop("runs"), flags.pop("out")
        check_out(out, ".png")
        figure = draw([load_run(folder) for folder in dict.fromkeys(runs)], **flags)
        caption(figure, shlex.join(["python", f"plots/{name}", *argv]))
        save(figure, out)

    return one_line_errors(main, script=name)
