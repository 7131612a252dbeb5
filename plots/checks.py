"""What a claim is made of: which runs it is about, what is checked, and the verdict.

A claim's function looks at the runs and yields `Check`s: a quantity, its value in every model, and
where it holds. The verdict follows from them and is typed nowhere:

    reproduced                    every check holds in every model
    partly                        at least half of them hold
    not reproduced                fewer do
    not testable at this scale    none of the models is one that the claim is about, or differences
                                  are within their noise
    no records                    what it needs has not been measured

Without some of what it needs a claim is reproduced in part at best.
"""

import dataclasses
import math
from collections.abc import Callable

CLAIMS = []
ENOUGH = 300  # examples for a curve over the context
WITHIN_NOISE = "differences within their noise"
NONE = math.nan  # what a model without a phase change has: no comparison with it holds


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table."""

    name: str
    words: str
    counts: str  # what counts as reproducing it
    paper: str
    figure: str  # without .png; empty if there is none
    command: str  # {runs}: the folder of all records
    judge: Callable  # {name: Run} -> an iterator of Checks


def claim(**row):
    """Puts the decorated function into the table."""

    def add(judge):
        CLAIMS.append(Claim(**row, judge=judge))
        return judge

    return add


@dataclasses.dataclass(frozen=True)
class Check:
    what: str
    values: dict  # {model, or head of a model: number}; empty without records
    holds: dict  # {the same: bool}; empty where the value is told and not judged
    form: str  # of a value; none: the words tell it
    of_large: bool = False  # judged in large models alone
    missing: str = "no records"  # why there are no values

    def __str__(self):
        if not self.values:
            return f"{self.what}: {self.missing}"
        numbers = [value for value in self.values.values() if not math.isnan(value)]
        told = self.what
        if self.form:
            ends = [format(end(numbers), self.form) for end in (min, max) if numbers] or ["none"]
            told += " " + " to ".join(dict.fromkeys(ends))  # one number where both are the same
        if not self.holds:
            return told
        failing = [name for name, holds in self.holds.items() if not holds]
        if len(self.holds) == 1:
            names = "".join(f"{name}: " for name in self.holds if name)
            return f"{told} ({names}{'fails' if failing else 'holds'})"
        few = f", not {', '.join(failing)}" if 0 < len(failing) <= 3 else ""
        return f"{told} ({len(self.holds) - len(failing)} of {len(self.holds)}{few})"


def check(what, values, holds=None, form="+.2f", **more):
    """A `Check` whose condition is on the value alone; without one the value is only told."""
    judged = {name: bool(holds(value)) for name, value in values.items()} if holds else {}
    return Check(what, values, judged, form, **more)


def verdict(checks):
    if not any(check.values for check in checks):
        recorded = any(check.missing == WITHIN_NOISE for check in checks)
        return "not testable at this scale" if recorded else "no records"
    judged = [holds for check in checks for holds in check.holds.values()]
    if not judged:
        of_large = any(check.of_large for check in checks)
        return "not testable at this scale" if of_large else "no records"
    if all(judged) and all(check.values for check in checks):
        return "reproduced"
    return "partly" if sum(judged) >= len(judged) / 2 else "not reproduced"


# --- which runs a claim is about


def small(runs, *series):
    """Plain models of one width and corpus: attention-only and with MLPs, or the series named."""
    series = series or ("attention-only", "with MLPs")
    return [run for run in runs.values() if run.series in series]


def deep(runs, *series):
    return [run for run in small(runs, *series) if run.n_layers > 1]


def shallow(runs, *series):
    return [run for run in small(runs, *series) if run.n_layers == 1]


def having(models, *files):
    return [run for run in models if all(run.has(name) for name in files)]


def evaluated(models):
    """Those whose losses at every position are of enough examples, in training or measured again
    (evaluate.py --snapshots).
    """
    return [run for run in models if run.has("evaluation.npz") or run.n_whole >= ENOUGH]


def families(runs, least=2):
    """Models that differ in size alone, smallest first, one layer left out: {what differs: runs};
    none of them if they are fewer than `least`.
    """
    plain = [run for run in settled(deep(runs)) if run.seed == 0]
    wide = settled([run for run in runs.values() if run.series == "width"])
    shapes = {shape(run) for run in wide}
    found = {
        "depth": [run for run in plain if run.series == "attention-only"],
        "depth, with MLPs": [run for run in plain if run.series == "with MLPs"],
        "width": wide + [run for run in plain if shape(run) in shapes],
    }
    return {
        name: sorted(some, key=size) if len(some) >= least else [] for name, some in found.items()
    }


def shape(run):
    return run.n_layers, run.made["config"]["d_mlp"] > 0


def size(run):
    return run.summary["parameters"]


# --- their numbers, by name


def by_name(models, value):
    return {run.name: value(run) for run in models}


def scores(models, when):
    """In-context learning between bands: "before" and "after" the window, or "score", the end."""
    found = by_name(models, lambda run: run.summary.get(f"icl_band_{when}"))
    return {name: NONE if score is None else score for name, score in found.items()}


def examples(models):
    return check("examples", by_name(models, lambda run: run.summary["examples"]), form=",")


def is_over(run):
    """Whether its phase change has an afterwards: training went on."""
    return run.window is not None and run.window[1] < run.millions[-1]


def settled(models):
    """Those that training did not leave in the middle of their phase change: of the others nothing
    is known of its end, nor of what comes after.
    """
    return [run for run in models if run.window is None or is_over(run)]


def loss_curve(run):
    return run.millions, run.measurements["loss"]
