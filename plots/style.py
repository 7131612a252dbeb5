"""What all figures share: reading a run's records, colours, and the look of an axis. Needs numpy
and matplotlib only.
"""

import dataclasses
import json
import zipfile

import matplotlib
import numpy as np

from safety import BadInput

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# one colour for each depth, and for each layer within a model, in every figure: dark to light, so
# that they stay apart for every kind of colour vision and in grey
DEPTH_COLOURS = ("#2a2a6b", "#2c7fb8", "#2fa392", "#7fb241", "#c9a227", "#d98092")
CLASS_COLOURS = {"induction": "#7a0177", "previous token": "#f768a1", "other": "#b2b04a"}
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


@dataclasses.dataclass(frozen=True)
class Run:
    """The records of a run: run.json, summary.json, and the arrays of measurements.npz, [snapshot,
    ...] each.
    """

    name: str
    made: dict
    summary: dict
    measurements: dict

    @property
    def millions(self):
        """Training tokens of every snapshot, in millions: the x-axis of everything."""
        return self.measurements["tokens"] / 1e6

    @property
    def n_layers(self):
        return self.made["config"]["n_layers"]

    @property
    def title(self):
        config = self.made["config"]
        kind = "attention-only" if config["d_mlp"] == 0 else "with MLPs"
        layers = "1 layer" if self.n_layers == 1 else f"{self.n_layers} layers"
        return f"{layers}, {kind}{', smeared keys' if config['smear'] else ''}"

    @property
    def colour(self):
        return depth_colour(self.n_layers)

    @property
    def is_plain_one_layer(self):
        return self.n_layers == 1 and not self.made["config"]["smear"]


def depth_colour(n_layers):
    return DEPTH_COLOURS[min(n_layers, len(DEPTH_COLOURS)) - 1]


def load_run(folder):
    """The records in a run's folder; BadInput if they are missing or damaged."""
    try:
        with np.load(folder / "measurements.npz", allow_pickle=False) as file:
            measurements = dict(file)
        made, summary = (
            json.loads((folder / name).read_text()) for name in ("run.json", "summary.json")
        )
        return Run(folder.name, made, summary, measurements)
    except FileNotFoundError as error:
        raise BadInput(
            f"{folder}: {error.filename} is missing; is this the folder of a finished run?"
        ) from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{folder}: damaged records ({error})") from None


def shade_phase_change(ax, run):
    """Marks the stretch of training in which in-context learning appears, if the run has one."""
    change = run.summary["phase_change"]
    if change:
        ax.axvspan(
            change["start_tokens"] / 1e6,
            change["end_tokens"] / 1e6,
            color=WINDOW_COLOUR,
            alpha=0.2,
            lw=0,
        )


def save(figure, path):
    figure.savefig(path, bbox_inches="tight", format="png")
    plt.close(figure)
