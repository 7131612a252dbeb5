"""The records of runs, as figures and tables read them: numpy alone, no model, no torch.

A run's folder in runs/, or its copy in results/, holds

    run.json, summary.json   what made it and what it shows
    measurements.npz         every snapshot, as training measured it
    evaluation.npz           all or some of them, on more examples
    ablations.npz, .json     what each head causes
    circuits.json            what is read off the weights
    tasks.json               literal copying, translation, pattern matching
    passage.npz              a text through training
    substitute-RULE.json     heads replaced by a rule

The first two lines are there after training; of the others a figure says which it needs. WRITERS
tells which script writes it.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from heads import head_named
from safety import BadInput, read_arrays, read_json, read_snapshots

WRITERS = {
    "run.json": "train.py",
    "summary.json": "train.py",
    "measurements.npz": "train.py",
    "evaluation.npz": "evaluate.py RUN",
    "ablations.npz": "ablate.py RUN",
    "circuits.json": "circuits.py RUN",
    "tasks.json": "tasks.py SNAPSHOT --out RUN/tasks.json",
    "passage.npz": "passage.py RUN",
}
SUBSTITUTION = "ablate.py SNAPSHOT --substitute RULE --out RUN/substitute-RULE.json"
# what a run of each scale has unless its flags say otherwise: others belong to the width sweep
WIDTHS = {"mini": 128, "small": 768, "paper": 768}

# what the other words of a title do not tell
SERIES_IN_TITLES = {"second corpus": ", second corpus", "width": ", width {d_model}"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One model's records. Arrays are [snapshot, ...]; their names are those of measure.py
    and attribution.py. What is missing raises BadInput when it is asked for.
    """

    folder: Path
    made: dict  # run.json
    summary: dict
    measurements: dict

    @property
    def name(self):
        return self.folder.name

    @functools.cached_property
    def evaluation(self):
        """The measurements on more examples; those of training where there are no others."""
        path = self.folder / "evaluation.npz"
        if not path.exists():
            return self.measurements
        found = read_snapshots(path)
        if found["tokens"][-1] < self.measurements["tokens"][-1]:
            raise BadInput(f"{path}: training has gone on since: run evaluate.py again")
        return found

    @functools.cached_property
    def ablations(self):
        return read_snapshots(self.file("ablations.npz"))

    @functools.cached_property
    def circuits(self):
        return read_json(self.file("circuits.json"))

    @functools.cached_property
    def tasks(self):
        return read_json(self.file("tasks.json"))

    @functools.cached_property
    def passage(self):
        return read_arrays(self.file("passage.npz"))

    def substituted(self, rule):
        """Rows of losses and recovered shares, for each head or set of heads (substitute.py)."""
        return read_json(self.file(f"substitute-{rule}.json"))["rows"]

    def file(self, name):
        """Its path; BadInput if it is not among the records."""
        return existing(self.folder / name)

    def has(self, name):
        """Is that file among the records?"""
        return (self.folder / name).exists()

    @property
    def millions(self):
        """Training tokens of every snapshot of the measurements, in millions."""
        return self.measurements["tokens"] / 1e6

    @property
    def n_whole(self):
        """On how many examples training measured every position, and so the loss."""
        recipe = self.made["recipe"]
        return round(recipe.get("whole", 0) * recipe["n_examples"])

    @property
    def window(self):
        """Where the phase change starts and ends, in millions of tokens; None without one."""
        change = self.summary["phase_change"]
        return change and (change["start_tokens"] / 1e6, change["end_tokens"] / 1e6)

    @property
    def window_is_by_hand(self):
        """Was it set by `evaluate.py --window`, not found?"""
        return bool(self.summary["phase_change"] and self.summary["phase_change"].get("by_hand"))

    @property
    def n_layers(self):
        return self.made["config"]["n_layers"]

    @property
    def seed(self):
        return self.made["seed"]

    @property
    def series(self):
        """attention-only, with MLPs, smeared keys, second corpus, or width (a stand-in for the
        paper's larger models).
        """
        config = self.made["config"]
        if "books" in self.name.split("-"):  # reproduce.py's name for it; the first can be any
            return "second corpus"
        if config["d_model"] != WIDTHS[self.made["scale"]]:
            return "width"
        if config["smear"]:
            return "smeared keys"
        return "with MLPs" if config["d_mlp"] else "attention-only"

    def head_classes(self):
        """The class of every head (heads.head_class), by (layer, head)."""
        return {head_named(row["head"]): row["class"] for row in self.summary["heads"]}

    def heads_that_match(self):
        """The heads that match prefixes, whether or not they copy cleanly: [(layer, head)]."""
        matching = ("induction", "prefix matching")
        return [head for head, kind in self.head_classes().items() if kind in matching]

    @property
    def title(self):
        config = self.made["config"]
        kind = "attention-only" if config["d_mlp"] == 0 else "with MLPs"
        smear = ", smeared keys" if config["smear"] else ""
        series = SERIES_IN_TITLES.get(self.series, "").format(**config)
        by_hand = "; window set by hand" if self.window_is_by_hand else ""
        return f"{layers(self.n_layers)}, {kind}{smear}{series}{by_hand}"

    @property
    def is_plain_one_layer(self):
        return self.n_layers == 1 and not self.made["config"]["smear"]


def layers(n_layers):
    return "1 layer" if n_layers == 1 else f"{n_layers} layers"


def load_run(folder):
    """The records in a run's folder; BadInput if they are missing or damaged."""
    made, summary = (read_json(existing(folder / name)) for name in ("run.json", "summary.json"))
    return Run(folder, made, summary, read_snapshots(existing(folder / "measurements.npz")))


def load_all(folder):
    """Every run in a folder of runs, by name."""
    folders = sorted(path.parent for path in folder.glob("*/summary.json"))
    if not folders:
        raise BadInput(f"{folder}: no runs in this folder: python reproduce.py makes them")
    return {path.name: load_run(path) for path in folders}


def existing(path):
    """path; BadInput if there is no such file."""
    if not path.exists():
        script = WRITERS.get(path.name, SUBSTITUTION)
        raise BadInput(f"{path} is missing: python {script} writes it")
    return path


def head_on_passage(passage, name, shown, layer, head):
    """A head on one text of passage.npz (passage.py) -> pattern, 0 to 1, and logit attribution,
    nats, each [query, key]. shown: which of the snapshots that are shown.
    """
    steps = [passage[f"{name}_{what}"][shown, layer, head] for what in ("pattern", "attribution")]
    scale = passage[f"{name}_attribution_scale"][shown, layer, head]
    n_tokens = int((2 * len(steps[0])) ** 0.5)  # there are n (n + 1) / 2 pairs of n tokens
    pattern, attribution = np.zeros((2, n_tokens, n_tokens))
    pairs = np.tril_indices(n_tokens)
    pattern[pairs], attribution[pairs] = steps[0] / 255, steps[1] * scale
    return pattern, attribution
