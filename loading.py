"""Finding and loading what scripts measure: the snapshots of a run, the text that it was trained
on, models that can be measured on it, and the flags that say which.
"""

import re

import numpy as np
import torch

import machine
from corpora import BUILT_IN, open_corpus
from measure import N_CTX
from records import read_records
from safety import BadInput, read_json
from snapshots import load_snapshot
from summary import edges_among, find_phase_change


def add_flags(add):
    """The flags of everything that is measured on held-out examples."""
    add("--examples", type=int, default=1000, help="of 512 tokens, held out (default: 1000)")
    add_corpus_flags(add)
    add("--kernels", choices=machine.KERNELS, help="default: triton on a GPU, else torch")


def add_corpus_flags(add):
    """What `corpus_of` and `machine.pick_device` need."""
    add("--data", help="corpus to measure on (default: the one trained on, if it is built in)")
    add("--vocabulary", metavar="FILE", help="gpt2 or a .tiktoken file (default: the corpus's)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")


def add_snapshots_flag(add, default):
    """What `choose_snapshots` needs; `check_snapshots` refuses what it cannot mean."""
    add(
        "--snapshots",
        type=int,
        help="so many of a run's, evenly spaced; those of the phase change are added"
        f" (default: {default})",
    )


def check_snapshots(args):
    if args.snapshots is not None and (not args.path.is_dir() or args.snapshots < 2):
        raise BadInput("--snapshots needs the folder of a run, and at least 2 of its snapshots")


def paths_of(args):
    """The snapshots to measure: so many as --snapshots says, all of a run, or the one given."""
    if args.snapshots:
        return list(choose_snapshots(args.path, args.snapshots)[0].values())
    return snapshots_of(args.path) if args.path.is_dir() else [args.path]


def snapshots_of(run):
    files = (run / "snapshots").glob("step_*.pt")
    paths = sorted(path for path in files if re.fullmatch(r"step_\d+", path.stem))
    if not paths:
        raise BadInput(f"{run}: no snapshots in this folder")
    return paths


def step_of(path):
    return int(path.stem.removeprefix("step_"))


def choose_snapshots(run, n_wanted):
    """Some snapshots of a run: n_wanted of them, evenly spaced from first to last, and those where
    its phase change starts and ends -> ({step: path}, the steps of those two, or ()).
    """
    paths, records = measured_snapshots(run)
    window = phase_change_steps(run, records)
    steps = list(paths)
    even = np.linspace(0, len(steps) - 1, min(n_wanted, len(steps))).round().astype(int)
    return {step: paths[step] for step in sorted({*(steps[n] for n in even), *window})}, window


def measured_snapshots(run):
    """-> ({step: path} of a run's snapshots, the records of those that are measured)."""
    paths = {step_of(path): path for path in snapshots_of(run)}
    # where training's own file is missing, a whole run's evaluation will do
    found = [run / name for name in ("measurements.npz", "evaluation.npz") if (run / name).exists()]
    if not found:
        raise BadInput(f"{run}: not measured yet: run python evaluate.py {run} first")
    return paths, [record for record in read_records(found[0]) if int(record["step"]) in paths]


def phase_change_steps(run, records):
    """Of its first and last snapshot: what the summary tells, once training is finished, else what
    the records show; () if there is none.
    """
    summary_path, window = run / "summary.json", None
    if summary_path.exists():
        change = read_json(summary_path)["phase_change"]
        window = edges_among(records, change) if change else ()
    if window is None:
        window = find_phase_change(records) or ()
    return tuple(int(records[n]["step"]) for n in window)


def corpus_of(args, snapshot, ranks):
    """The corpus of --data and --vocabulary; without them the one that this snapshot was trained
    on, if it is built in. A path that it tells is not followed: the file may be a stranger's.
    """
    trained_on = load_snapshot(snapshot)[1]["corpus"]
    data = args.data or trained_on["data"]
    if args.data is None and data not in BUILT_IN:
        raise BadInput(
            f"{args.path} was trained on {trained_on['name']}: pass --data with a path of that text"
        )
    corpus = ranks.first_then_all(lambda: open_corpus(data, args.vocabulary))
    if corpus.sha256 != trained_on["sha256"] and ranks.is_first:
        print(
            f"note: sha256 {corpus.sha256[:12]} is not the corpus it was trained on,"
            f" {trained_on['sha256'][:12]}: held-out text may have been seen"
        )
    return corpus


def load_fitting(path, corpus, kernels="torch"):
    """`load_snapshot`, refusing a model that cannot be measured on this corpus."""
    model, about = load_snapshot(path, kernels=kernels)
    if model.config.d_vocab != corpus.d_vocab:
        wanted, given = model.config.d_vocab, corpus.d_vocab
        raise BadInput(f"{path}: a vocabulary of {wanted}, but {corpus.name} has {given}")
    if model.config.n_ctx < N_CTX:
        raise BadInput(f"{path}: its context of {model.config.n_ctx} is shorter than {N_CTX}")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise BadInput(f"{path}: some of its weights are not numbers: its training diverged")
    return model, about


def check_losses(losses, path="this model"):
    """Refuses what a model gives whose weights are numbers, but too large ones."""
    if not torch.as_tensor(losses).isfinite().all():
        raise BadInput(f"losses that are not numbers: the training of {path} has diverged")
