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

import sys
from pathlib import Path

import numpy as np

import loading
import machine
import metrics
from curves import nearest
from measure import copying_variants, draw_examples, measure
from parallel import Cores, Ranks
from progress import Countdown
from records import write_records
from safety import ArgumentParser, BadInput, check_out, one_line_errors, read_json, write_json
from summary import conclusion, one_line, print_copying, print_heads, summarise, window_by_hand


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run, or one snapshot")
    loading.add_flags(add)
    loading.add_snapshots_flag(add, "all")
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
    loading.check_snapshots(args)
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
    paths = loading.paths_of(args)
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


def set_window(args, ranks):
    """The run's summary anew, with the phase change where --window says."""
    summary_path = args.path / "summary.json"
    if not summary_path.exists():
        raise BadInput(f"{summary_path} is missing: its training is not finished")
    paths, records = loading.measured_snapshots(args.path)
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


def prepare(args, snapshot, ranks):
    """Draws the examples; returns the function that measures a snapshot file."""
    corpus = loading.corpus_of(args, snapshot, ranks)
    examples = draw_examples(corpus, args.examples).to(args.device)
    cores = Cores(args.device)

    def measure_file(path):
        model, about = loading.load_fitting(path, corpus, args.kernels)
        record = measure(model.to(args.device), examples, cores, ranks)
        for name in ("loss", "per_token_loss"):
            loading.check_losses(record[name], path)
        if args.copying_variants:
            record |= copying_variants(model, examples)
        return {"step": about["step"], "tokens": about["tokens"], **record}

    return measure_file


if __name__ == "__main__":
    sys.exit(main())
