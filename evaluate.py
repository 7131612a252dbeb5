"""Measures snapshots: losses, in-context learning, and what every attention head does.

    python evaluate.py runs/NAME/snapshots/X.pt   one snapshot: a table of its heads
    python evaluate.py runs/NAME                  all of a run, on more examples than training took
    python evaluate.py runs/NAME --snapshots 30   some of a run, beside what training measured
    python evaluate.py runs/NAME --window 1.4 3.1    where its phase change is, set by hand

A record holds, for one snapshot, the paper's quantities (see metrics.py): in-context learning
score, loss by position, the per-token loss vector and three scores for each head. `train.py` has
made one of each snapshot as it took it (measure.py); here more examples can be had.

A run's records go to its evaluation.npz, which figures take before measurements.npz, training's
own file; summary.json tells of them instead if they are of more examples than it told of before.
It also tells where the phase change is, to figures and to ablations; figures say if that was set by
hand.

Two columns of the table are controls. Prefix matching is attention to what followed the earlier
copies of the present token; beside it stand the attention to the *earlier copy* itself and to the
token *before it*, near 0 in a head that does nothing but induction.
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

import machine
import metrics
from corpora import BUILT_IN, open_corpus
from curves import half_way, nearest, phase_change
from heads import head_class, name_of
from measure import N_CTX, copying_variants, draw_examples, measure
from parallel import Cores, Ranks
from records import read_records, write_records
from safety import ArgumentParser, BadInput, check_out, one_line_errors, read_json, write_json
from snapshots import load_snapshot

HEAD_SCORES = ("prefix_matching", "copying", "previous_token")
PROGRESS_SECONDS = 15  # from one line of progress to the next


def find_phase_change(records):
    """(first, last) index into records, or None. Found on the band score, the less noisy form of
    the same quantity.
    """
    return phase_change([r["icl_band_score"] for r in records], [r["tokens"] for r in records])


def summarise(records, measure_again, by_hand=None):
    """What a run shows, on a page: the measured part of summary.json.

    The phase change is found in the records of all snapshots, or is `by_hand`, indices of the
    first and the last. The numbers given for its start and end and for the end of training come
    from `measure_again(index)`, which may use more examples.
    """
    last = measure_again(len(records) - 1)
    shown = {
        "examples": len(last["per_token_loss"]),
        "loss": last["loss"],
        **in_context_learning(last, "score"),
        "icl_before": None,
        "icl_after": None,
        "phase_change": None,
        "best_prefix_matching": best_head(last["prefix_matching"]),
        "best_previous_token": best_head(last["previous_token"]),
        "heads": heads_table(last),
    }
    window = by_hand or find_phase_change(records)
    if window:
        start, end = (records[n] for n in window)
        before, after = (measure_again(n) for n in window)
        shown |= {
            **in_context_learning(before, "before"),
            **in_context_learning(after, "after"),
            "best_prefix_matching_before": best_head(before["prefix_matching"]),
            "best_prefix_matching_after": best_head(after["prefix_matching"]),
        }
        shown["phase_change"] = {
            "by_hand": by_hand is not None,
            "start_step": int(start["step"]),
            "end_step": int(end["step"]),
            "start_tokens": int(start["tokens"]),
            "end_tokens": int(end["tokens"]),
            # the snapshots by which score and best head have made half their way: do they come
            # together?
            "icl_half_way_snapshot": half_way([r["icl_band_score"] for r in records]),
            "prefix_matching_half_way_snapshot": half_way(
                [r["prefix_matching"].max() for r in records]
            ),
        }
    return shown


def in_context_learning(record, when):
    """A record's in-context learning scores as a summary names them."""
    return {
        f"{kind}_{when}{error}": record[f"{kind}_score{error}"]
        for kind in ("icl", "icl_band")
        for error in ("", "_error")
    }


def best_head(scores):
    """{"head": "layer:head", "score"} of the highest score in [layer, head]."""
    place = np.unravel_index(scores.argmax(), scores.shape)
    return {"head": name_of(place), "score": round(float(scores[place]), 4)}


def heads_table(record):
    """One row for each head: its name `layer:head`, its three scores and its class."""
    rows = []
    for place in np.ndindex(record["prefix_matching"].shape):
        scores = {name: round(float(record[name][place]), 4) for name in HEAD_SCORES}
        rows.append({"head": name_of(place), **scores, "class": head_class(**scores)})
    return rows


def print_heads(record):
    print("  head  prefix matching  earlier copy  before it  copying  previous token  class")
    controls = (record[name].flat for name in ("match_itself", "match_before"))
    for row, itself, before in zip(heads_table(record), *controls, strict=True):
        print(
            f"{row['head']:>6}  {row['prefix_matching']:>15.3f}  {itself:>12.3f}  {before:>9.3f}"
            f"  {row['copying']:>+7.2f}  {row['previous_token']:>14.3f}  {row['class']}"
        )


def print_copying(record):
    names = [name for name in record if name.startswith("copying")]
    titles = [name.removeprefix("copying_").replace("_", " ") for name in names]
    print("  ".join(["  head", *titles]))
    for place in np.ndindex(record["copying"].shape):
        scores = (f"{record[n][place]:>+{len(t)}.2f}" for n, t in zip(names, titles, strict=True))
        print("  ".join([f"{name_of(place):>6}", *scores]))


def one_line(record):
    """A record's three most telling numbers."""
    matching, previous = best_head(record["prefix_matching"]), best_head(record["previous_token"])
    return (
        f"ICL {record['icl_band_score']:+.2f}"
        f"  prefix matching {matching['head']} {matching['score']:.2f}"
        f"  previous token {previous['head']} {previous['score']:.2f}"
    )


def conclusion(summary):
    """The sentence that a run ends with."""
    matching, previous = summary["best_prefix_matching"], summary["best_previous_token"]
    heads = (
        f"best prefix-matching head {matching['head']} ({matching['score']:.2f}), best"
        f" previous-token head {previous['head']} ({previous['score']:.2f})"
    )
    band, score = (
        f"{summary[name]:+.2f} +- {summary[f'{name}_error']:.2f}"
        for name in ("icl_band_score", "icl_score")
    )
    at_end = (
        f"{band} (token {metrics.LATE} minus token {metrics.EARLY} {score}) on"
        f" {summary['examples']:,} examples; {heads}"
    )
    change = summary["phase_change"]
    if change is None:
        return f"no phase change; in-context learning between bands {at_end}"
    start, end = (change[edge] / 1e6 for edge in ("start_tokens", "end_tokens"))
    before, after = summary["icl_band_before"], summary["icl_band_after"]
    by_hand = ", set by hand," * change["by_hand"]
    return (
        f"phase change{by_hand} from {start:.2f}M to {end:.2f}M tokens: in-context learning"
        f" between bands {before:+.2f} -> {after:+.2f}, at the end {at_end}"
    )


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


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run, or one snapshot")
    add_flags(add)
    add_snapshots_flag(add, "all")
    add(
        "--window",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="of a run: sets its phase change by hand, in millions of tokens, at the nearest"
        " snapshots, and measures these and the last",
    )
    add(
        "--copying-variants",
        action="store_true",
        help="of a snapshot: the copying score after a start token and by destination, too",
    )
    add(
        "--out",
        type=Path,
        help="file for the records (default: evaluation.npz of a run, none of a snapshot)",
    )
    args = parser.parse_args(argv)
    check_snapshots(args)
    if args.window and (not args.path.is_dir() or args.snapshots or args.out):
        raise BadInput("--window needs the folder of a run, and neither --snapshots nor --out")
    if args.copying_variants and args.path.is_dir():
        raise BadInput(f"--copying-variants takes one snapshot, and {args.path} is a folder")
    args.device = machine.pick_device(args.device)
    args.kernels = machine.pick_kernels(args.kernels, args.device)
    with Ranks(args.device) as ranks:
        if args.window:
            return set_window(args, ranks)
        return evaluate_run(args, ranks) if args.path.is_dir() else evaluate_snapshot(args, ranks)


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


def evaluate_snapshot(args, ranks):
    check_out(args.out, ".npz")
    measure_file = prepare(args, args.path, ranks)
    record = measure_file(args.path)
    if not ranks.is_first:
        return
    print(
        f"{args.path}: after {record['step']:,} steps, {record['tokens'] / 1e6:.2f}M tokens;"
        f" measured on {args.examples:,} examples, kernels {args.kernels}\n"
        f"loss {record['loss']:.3f} nats\n"
        f"in-context learning score {record['icl_score']:+.3f} +- {record['icl_score_error']:.3f}"
        f" nats (token {metrics.LATE} minus token {metrics.EARLY}); between bands"
        f" {record['icl_band_score']:+.3f} +- {record['icl_band_score_error']:.3f}"
    )
    print_heads(record)
    if args.copying_variants:
        print_copying(record)
    if args.out:
        write_records(args.out, [record])
        print(f"-> {args.out}")


def evaluate_run(args, ranks):
    out = args.out or args.path / "evaluation.npz"
    check_out(out, ".npz")
    paths = paths_of(args)
    if ranks.is_first and out.exists():
        print(f"{out} will be replaced when all {len(paths)} snapshots are measured", flush=True)
    measure_file = prepare(args, paths[0], ranks)
    records, countdown = [], Countdown(ranks.is_first, "snapshots")
    for path in paths:
        records.append(measure_file(path))
        countdown(len(records), len(paths), f"  {one_line(records[-1])}")
    if not ranks.is_first:
        return
    write_records(out, records)
    if args.snapshots:  # too few to find the phase change on
        print_heads(records[-1])
        print(f"{one_line(records[-1])}\n-> {out}")
        return
    summary_path = args.path / "summary.json"  # there once training is finished
    before = read_json(summary_path) if summary_path.exists() else {}
    summary = summarise(records, records.__getitem__, window_by_hand(before, records))
    print_heads(records[-1])
    print(conclusion(summary))
    if args.out is None and before and summary["examples"] > before.get("examples", 0):
        write_json(summary_path, before | summary)
        out = f"{out}, {summary_path}"
    print(f"-> {out}")


class Countdown:
    """Of long work: now and then a line with how much is done, and how long the rest will take."""

    def __init__(self, says, what):
        self.says, self.what = says, what
        self.started = self.shown = time.time()

    def __call__(self, done, total, more=""):
        now = time.time()
        if self.says and done < total and now - self.shown > PROGRESS_SECONDS:
            minutes, seconds = divmod(round((now - self.started) / done * (total - done)), 60)
            left = f"{minutes}:{seconds:02d} left"
            print(f"{round(done, 1):,} of {total:,} {self.what}  {left}{more}", flush=True)
            self.shown = now


def set_window(args, ranks):
    """The run's summary anew, with the phase change where --window says."""
    summary_path = args.path / "summary.json"
    if not summary_path.exists():
        raise BadInput(f"{summary_path} is missing: its training is not finished")
    paths, records = measured_snapshots(args.path)
    millions = np.array([record["tokens"] for record in records]) / 1e6
    start, end = args.window
    by_hand = [nearest(millions, edge) for edge in args.window]
    if not (end <= millions[-1] and 0 < by_hand[0] < by_hand[1]):  # something is before it
        raise BadInput(
            f"--window {start:g} {end:g}: two snapshots are needed, the first before the second, in"
            f" millions of tokens from {millions[:2][-1]:.2f} to {millions[-1]:.2f}"
        )
    measure_file = prepare(args, paths[max(paths)], ranks)
    summary = summarise(
        records, lambda index: measure_file(paths[int(records[index]["step"])]), by_hand
    )
    if ranks.is_first:
        write_json(summary_path, read_json(summary_path) | summary)
        print(f"{conclusion(summary)}\n-> {summary_path}")


def window_by_hand(summary, records):
    """Where among the records the phase change is that the summary has by hand; None if it has
    none.
    """
    change = summary.get("phase_change")
    return edges_among(records, change) if change and change.get("by_hand") else None


def edges_among(records, change):
    """Indices of the records where a summary's phase change starts and ends; None if they are not
    there.
    """
    steps = [int(record["step"]) for record in records]
    edges = change["start_step"], change["end_step"]
    return [steps.index(edge) for edge in edges] if {*edges} <= {*steps} else None


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


def prepare(args, snapshot, ranks):
    """Draws the examples; returns the function that measures a snapshot file."""
    corpus = corpus_of(args, snapshot, ranks)
    examples = draw_examples(corpus, args.examples).to(args.device)
    cores = Cores(args.device)

    def measure_file(path):
        model, about = load_fitting(path, corpus, args.kernels)
        record = measure(model.to(args.device), examples, cores, ranks)
        for name in ("loss", "per_token_loss"):
            check_losses(record[name], path)
        if args.copying_variants:
            record |= copying_variants(model, examples)
        return {"step": about["step"], "tokens": about["tokens"], **record}

    return measure_file


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


if __name__ == "__main__":
    sys.exit(main())
