"""What every attention head causes: in-context learning and loss without it (Argument 3).

    python ablate.py runs/NAME/snapshots/X.pt    every head of one snapshot
    python ablate.py runs/NAME                   through training, with the before-and-after vector
    python ablate.py X.pt --substitute induction a head's pattern idealised (substitute.py)

Each head is ablated by itself, and some together: unless --heads names others, the heads that match
prefixes and, for comparison, all others. What is reported is the change that the ablation makes,
ablated minus clean, on the same examples, so that errors are those of paired differences:

    ICL attribution      of the in-context learning score; positive: the head contributes to it
    band attribution     the same between bands of positions, with less noise (metrics.band_score)
    loss change          of the mean loss, estimated at one random position of each example
    before-and-after     of the per-token losses, along the vector from the start to the end of the
                         phase change, as a share of it; -1: without the head it is undone

How it is computed: sweep.py. A run's records are written after every snapshot, and the same command
goes on where an interrupted one was.
"""

import sys
from pathlib import Path

import numpy as np

import loading
import machine
import metrics
import substitute
from attribution import QUANTITIES, Ablations
from data import evaluation_rows
from heads import CLASSES, PREFIX_MATCHING, name_of, pick_heads
from measure import N_CTX
from parallel import Ranks
from plots.analysis import positive_share
from progress import Countdown
from records import difference, read_records, write_records
from safety import ArgumentParser, BadInput, check_out, one_line_errors, read_json, write_json

SNAPSHOTS = 25  # of a run that are ablated, unless told otherwise


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run, or one snapshot")
    loading.add_flags(add)
    add(
        "--heads",
        metavar="SET",
        help=f"ablated together: 1:3,1:7 or {', '.join(CLASSES)} (default: the first)",
    )
    add("--mean", action="store_true", help="replace results by their mean (default: by zero)")
    add("--full", action="store_true", help="let patterns change (default: preserved; much slower)")
    add(
        "--freeze-layernorm",
        action="store_true",
        help="keep what LayerNorms divide by: attention-only models become linear in their heads",
    )
    add(
        "--no-bands", action="store_true", help="score positions 50, 500 and one more alone: faster"
    )
    loading.add_snapshots_flag(add, SNAPSHOTS)
    add(
        "--substitute",
        choices=substitute.PATTERNS,
        help="idealise the patterns of the heads, or of those of their class, instead of ablating",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE.npz",
        help="records, and what made them in FILE.json (default: ablations.npz of a run, none of a"
        " snapshot); with --substitute FILE.json alone",
    )
    args = parser.parse_args(argv)
    check_flags(args)
    args.device = machine.pick_device(args.device)
    args.kernels = machine.pick_kernels(args.kernels, args.device)
    with Ranks(args.device) as ranks:
        if args.substitute:
            return substitute_in_snapshot(args, ranks)
        return ablate_run(args, ranks) if args.path.is_dir() else ablate_snapshot(args, ranks)


def check_flags(args):
    """Refuses flags that contradict each other, and an --out that would be overwritten."""
    is_run = args.path.is_dir()
    if args.full and (args.freeze_layernorm or args.no_bands):
        raise BadInput("--full recomputes everything: leave out --freeze-layernorm and --no-bands")
    if args.substitute and (args.mean or args.full or args.freeze_layernorm or args.no_bands):
        raise BadInput(
            "--substitute compares with ablation by zero and by mean, everything recomputed: leave"
            " out --mean, --full, --freeze-layernorm and --no-bands"
        )
    if args.substitute and is_run:
        raise BadInput(f"--substitute takes one snapshot, and {args.path} is a folder")
    loading.check_snapshots(args)
    check_out(args.out, ".json" if args.substitute else ".npz")
    beside = args.out and args.out.with_suffix(".json")
    check_out(beside, ".json")
    for file in (args.out, beside) if args.out and not is_run else ():
        if file.exists():
            raise BadInput(f"{file} exists: give --out another name")


def ablate_snapshot(args, ranks):
    setup = Ablations(args, ranks, args.path)
    model, about = setup.load(args.path)
    record = setup.record(model, Countdown(ranks.is_first, "examples"))
    if not ranks.is_first:
        return
    record = {"step": about["step"], "tokens": about["tokens"], **record}
    report(setup, [record], args.path)
    if args.out:
        write_records(args.out, [record])
        write_about(setup, args.out, answer=answer(setup, [record]))
        print(f"-> {args.out}, {args.out.with_suffix('.json')}")


def ablate_run(args, ranks):
    paths, window = loading.choose_snapshots(args.path, args.snapshots or SNAPSHOTS)
    setup = Ablations(args, ranks, paths[max(paths)])
    if window:
        setup.find_vector(*(paths[step] for step in window))
    out = args.out or args.path / "ablations.npz"
    unfinished = out.with_name(f"{out.stem}-unfinished.npz")
    records = take_up(setup, out, unfinished)
    done = {int(record["step"]) for record in records}
    left = [step for step in paths if step not in done]
    progress = Countdown(ranks.is_first, "snapshots")
    for n, step in enumerate(left):
        model, about = setup.load(paths[step])
        record = setup.record(model, lambda part, whole, n=n: progress(n + part / whole, len(left)))
        records.append({"step": step, "tokens": about["tokens"], **record})
        records.sort(key=lambda record: record["step"])
        if ranks.is_first:
            write_records(unfinished, records)
    if ranks.is_first:
        report(setup, records, args.path)
        write_records(out, records)
        write_about(setup, out, answer=answer(setup, records))
        for path in (unfinished, unfinished.with_suffix(".json")):
            path.unlink(missing_ok=True)
        print(f"-> {out}, {out.with_suffix('.json')}")


def substitute_in_snapshot(args, ranks):
    setup = Ablations(args, ranks, args.path)
    model, about = setup.load(args.path)
    wanted = args.heads or substitute.CLASS[args.substitute]
    heads = pick_heads(setup.table, wanted)
    table = substitution_table(setup, model, heads) if heads else []
    if not ranks.is_first:
        return
    print(f"{args.path}: after {about['step']:,} steps, {about['tokens'] / 1e6:.2f}M tokens")
    n = args.examples
    if heads:
        print(
            f"pattern replaced by {args.substitute}, everything after it recomputed; mean loss in"
            f" nats over all positions of {n:,} examples; fitted on"
            f" {substitute.FIT_EXAMPLES} others"
        )
        substitute.print_rows(table)
    else:
        print(f"this model has no {wanted} head: nothing to substitute; --heads takes others")
    if args.out:
        content = {"pattern": args.substitute, "examples": n, "corpus": setup.corpus.sha256}
        write_json(args.out, content | {"machine": setup.machine(), "rows": table})
        print(f"-> {args.out}")


def substitution_table(setup, model, heads):
    """A row for each of the heads, and one for all of them together."""
    args, ranks, n = setup.args, setup.ranks, setup.args.examples
    rows = evaluation_rows(setup.corpus, N_CTX, n + substitute.FIT_EXAMPLES)
    measured, others = (
        [x[some].to(args.device) for x in rows] for some in (slice(n), slice(n, None))
    )
    means = setup.means(model, ranks.share(measured[0]))
    sets = [[head] for head in heads] + [heads] * (len(heads) > 1)
    progress = Countdown(ranks.is_first, "sets of heads")
    table = []
    for some in sets:
        table.append(
            substitute.substitute(
                model, args.substitute, some, measured, others, means, setup.cores, ranks
            )
        )
        progress(len(table), len(sets))
    return table


def take_up(setup, out, unfinished):
    """What a sweep with the same settings has finished, whether it was interrupted or not. Refuses
    records made with others.
    """
    began = unfinished if unfinished.exists() else out
    about, settings = began.with_suffix(".json"), setup.settings()
    if began.exists() or about.exists():
        before = read_json(about).get("settings") if about.exists() else None
        if before and "model" not in before:  # records made before models were told apart
            before = {"model": settings["model"]} | before
        if before != settings:
            how = difference(before, settings) if before else "they are not told beside it"
            raise BadInput(
                f"{began} was made with other settings ({how}): repeat the flags that made it,"
                " delete it, or write elsewhere with --out FILE.npz"
            )
    records = read_records(began) if began.exists() else []
    setup.ranks.wait()  # until all have looked: what the first writes is not what they look for
    if setup.ranks.is_first and began != unfinished:
        write_about(setup, unfinished)
    return records


def write_about(setup, out, **more):
    content = {"settings": setup.settings(), "machine": setup.machine(), "heads": setup.table}
    write_json(out.with_suffix(".json"), content | more)


# what is printed


def report(setup, records, path):
    """The last snapshot's table, the way through training if there are more, and the answer."""
    last, settings = records[-1], setup.settings()
    print(
        f"{path}: after {last['step']:,} steps, {last['tokens'] / 1e6:.2f}M tokens\n"
        f"patterns {settings['patterns']}, results replaced by {settings['replacement']},"
        f" LayerNorm {settings['layernorm']}; {last['examples']:,} examples; nats"
        f"{', before and after as a share' if 'before_and_after' in last else ''}, +- standard"
        " error of the paired difference\n"
        f"clean   loss {last['loss']:.3f} +- {last['loss_error']:.3f} at one random position each\n"
        f"        in-context learning score {pair(last, 'icl_score')}"
        f" (token {metrics.LATE} minus token {metrics.EARLY})"
    )
    if "icl_band_score" in last:
        late, early = ("{}-{}".format(*b) for b in (metrics.LATE_BAND, metrics.EARLY_BAND))
        print(f"        between bands {pair(last, 'icl_band_score')} ({late} minus {early})")
    if "before_and_after" not in last:
        reason = "no phase change" if path.is_dir() else "a run is needed, and its phase change"
        print(f"before-and-after attribution: N/A ({reason})")
    print_table(last, setup.table, setup.sets)
    if len(records) > 1 and setup.sets:
        print_training(records, setup.sets)
    print(answer(setup, records))


def print_table(record, table, sets):
    shown = [name for name in QUANTITIES if name in record]
    titles = "".join(f"{name.replace('_', ' '):>20}" for name in shown)
    print(f"{'head':>6}  {'class':<15}  {'prefix matching':>15}{titles}")

    def values(place, prefix=""):
        return "".join(f"{pair(record, prefix + name, place):>20}" for name in shown)

    rows = zip(np.ndindex(record["icl_attribution"].shape), table, strict=True)
    for place, row in sorted(rows, key=lambda item: -record["icl_attribution"][item[0]]):
        print(
            f"{row['head']:>6}  {row['class']:<15}  {row['prefix_matching']:>15.3f}{values(place)}"
        )
    for what, title in ("sum_", "sum over"), ("together_", "together,"):
        for n, name in enumerate(sets):
            print(f"{f'{title} {name}':<40}{values(n, what)}")


def print_training(records, sets):
    names = [name for name in QUANTITIES if name in records[0] and name != "loss_change"]
    width = 18 * len(names)
    print("\nthrough training, summed over the heads of a set:")
    print(" " * 20 + "".join(f"{some:>{width}}" for some in sets))
    titles = "".join(f"{name.replace('_', ' '):>18}" for name in names)
    print(f"{'tokens':>8}  {'ICL score':>10}{titles * len(sets)}")
    for record in records:
        sums = [record[f"sum_{name}"][n] for n in range(len(sets)) for name in names]
        print(f"{record['tokens'] / 1e6:>7.2f}M  {record['icl_score']:>+10.3f}", end="")
        print("".join(f"{value:>+18.3f}" for value in sums))
    print()


def pair(record, name, place=()):
    return f"{record[name][place]:+.3f} +- {record[f'{name}_error'][place]:.3f}"


def answer(setup, records):
    """What the records say, in a sentence or two: how much of in-context learning the first set of
    heads carries, from the start of the phase change on, and what is left without it.
    """
    last = records[-1]
    if not setup.sets:
        place = np.unravel_index(last["icl_attribution"].argmax(), last["icl_attribution"].shape)
        return (
            f"no head matches prefixes (score {PREFIX_MATCHING} or more); the"
            f" largest ICL attribution is that of {name_of(place)},"
            f" {pair(last, 'icl_attribution', place)}"
        )
    (name, heads), *_ = setup.sets.items()
    since = [r for r in records if r["step"] >= min(setup.window, default=last["step"])]
    shares = [f"{share(since, 'icl_attribution', heads)} of the positive ICL attribution"]
    if "band_attribution" in last:
        shares.append(f"{share(since, 'band_attribution', heads)} between bands")
    left = [
        f"{last['icl_score'] + last['together_icl_attribution'][n]:+.3f}"
        f" ({pair(last, 'together_icl_attribution', n)}) without {some}"
        for n, some in enumerate(setup.sets)
    ]
    sentences = [
        f"{name} {'carry' if len(heads) > 1 else 'carries'} {', '.join(shares)}"
        + (f", at {len(since)} snapshots from the phase change on" if len(since) > 1 else ""),
        f"the {'final ' if len(since) > 1 else ''}in-context learning score of"
        f" {last['icl_score']:+.3f} becomes {', and '.join(left)} (n = {last['examples']:,})",
    ]
    if setup.window:
        after = next(record for record in records if record["step"] == setup.window[1])
        undone, error = (after[f"together_before_and_after{end}"][0] for end in ("", "_error"))
        sentences.append(
            f"at the end of the phase change, ablating {name} undoes {-undone:.0%} +- {error:.0%}"
            " of what it did to the per-token losses"
        )
    return "; ".join(sentences)


def share(records, name, heads):
    found = positive_share([record[name] for record in records], heads)
    return "none" if np.isnan(found) else f"{found:.0%}"


if __name__ == "__main__":
    sys.exit(main())
