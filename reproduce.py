"""The whole paper, as the list of commands that reproduce it.

    python reproduce.py                                   the miniature, for two CPU cores
    python reproduce.py --second-corpus books.txt.xz      with the models that read only prose
    python reproduce.py --scale small --data fineweb      the same list of larger models, for a GPU

Read `models`, `measurements` and FIGURES: they are its table of contents. Every command is printed
before it runs and can be given by hand. What is there already is not made again, so that the same
command goes on after control-C or a crash. Snapshots and full records stay in runs/SCALE; what
figures and tables need goes to results/SCALE, pictures to results/SCALE/figures.
"""

import dataclasses
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safety import ArgumentParser, BadInput, one_line_errors, read_json, write_json, write_whole

ROOT = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything."""

    name: str  # train.py's
    tokens: int  # that each model is trained on
    tokens_per_step: int
    d_model: int
    d_vocab: int
    widths: tuple[int, ...]  # other d_model, standing in for the paper's full-scale models
    snapshots: int  # of a run that are measured again, and whose weights are read
    examples: int  # that they are measured on; 0: training measured all of them on enough
    ablated: int  # snapshots whose heads are ablated
    ablation_examples: int  # on so many examples
    in_training: int = 0  # examples that training measures on; 0: train.py's own
    rules: tuple[str, ...] = ("previous", "induction", "induction2")  # that replace patterns
    only: tuple[str, ...] = ()  # the models, if not all


SCALES = {
    "mini": Scale(
        "mini", 6_000_000, 8 * 512, d_model=128, d_vocab=1024, widths=(64, 192),
        snapshots=24, examples=300, ablated=10, ablation_examples=200,
    ),
    "small": Scale(
        "small", 500_000_000, 32 * 1024, d_model=768, d_vocab=50257, widths=(384, 1536),
        snapshots=30, examples=0, ablated=12, ablation_examples=1000,
    ),
    # every kind of command once or twice, on too little to learn from
    "smoke": Scale(
        "mini", 4 * 8 * 512, 8 * 512, d_model=128, d_vocab=1024, widths=(),
        snapshots=3, examples=8, ablated=2, ablation_examples=8, in_training=8,
        rules=("induction",), only=("2L", "1L-books"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    """One model to train: what train.py's flags for it are, and what its run is called."""

    layers: int
    mlp: bool = False
    smear: bool = False
    d_model: int | None = None  # None: the scale's
    books: bool = False  # trained on the second corpus
    seed: int = 0

    @property
    def name(self):
        """2L, 2L-mlp, 1L-smear, 2L-d64, 1L-books; with another seed than 0 1L-smear-1."""
        parts = (
            f"{self.layers}L",
            self.mlp and "mlp",
            self.smear and "smear",
            self.d_model and f"d{self.d_model}",
            self.books and "books",
            self.seed and str(self.seed),
        )
        return "-".join(part for part in parts if part)

    @property
    def flags(self):
        sizes = None
        if self.d_model:  # two heads a layer at least, one of them for what is not induction
            heads = max(2, self.d_model // 64)
            sizes = f"--d-model {self.d_model} --heads {heads} --d-head 64"
        parts = (
            f"--layers {self.layers}",
            not self.mlp and "--attn-only",
            self.smear and "--smear",
            sizes,
            f"--seed {self.seed}",
        )
        return " ".join(part for part in parts if part)

    def seconds(self, scale):
        """That two cores need for one token's way through it: at 41e9 multiply-adds a second."""
        d_model = self.d_model or scale.d_model
        layer = 4 * d_model**2 + 512 * d_model + self.mlp * 8 * d_model**2
        return (d_model * scale.d_vocab + self.layers * layer) / 41e9


def models(scale):
    """Every model of the paper, and more seeds of the three that its argument rests on."""
    attention_only = [Model(n) for n in range(1, 7)]
    with_mlps = [Model(n, mlp=True) for n in range(1, 7)]
    smeared = [Model(n, smear=True) for n in (1, 2)]
    key = [Model(1), Model(2), Model(1, smear=True)]
    seeds = [dataclasses.replace(model, seed=seed) for model in key for seed in (1, 2)]
    widths = [Model(2, d_model=width) for width in scale.widths]
    books = [dataclasses.replace(model, books=True) for model in key]
    every = [*attention_only, *with_mlps, *smeared, *seeds, *widths, *books]
    return [model for model in every if not scale.only or model.name in scale.only]


PASSAGE = ("1L", "2L", "1L-smear")  # models whose every token and head on a text is recorded
SUBSTITUTED = ("2L",)  # models whose heads' patterns are replaced by rules

ATTENTION_ONLY = "1L 2L 3L 4L 5L 6L"
WITH_MLPS = "1L-mlp 2L-mlp 3L-mlp 4L-mlp 5L-mlp 6L-mlp"
SMEARED = "1L 1L-smear 2L 2L-smear"
SEEDS = "1L-1 1L-2 2L-1 2L-2"
SMEARED_SEEDS = "1L-smear-1 1L-smear-2 2L-smear-1 2L-smear-2"
BOOKS = "1L-books 1L-smear-books 2L-books"
WIDTHS = "2L-d64 2L 2L-d192 2L-d384 2L-d1536"
# name of the picture: its script in plots/ and flags; the runs that it shows, if they are there;
# other runs that share the plane of its paths
FIGURES = {
    "phase-change": ("phase_change.py", "1L 2L 1L-smear"),
    "phase-change-attention-only": ("phase_change.py", ATTENTION_ONLY),
    "phase-change-mlp": ("phase_change.py", WITH_MLPS),
    "trajectories": ("trajectories.py", f"{ATTENTION_ONLY} {WITH_MLPS}", SEEDS),
    "trajectories-smear-books": (
        "trajectories.py",
        f"{SMEARED} {BOOKS}",
        f"{ATTENTION_ONLY} {WITH_MLPS}",
    ),
    "passage": ("passage.py", "2L"),
    "passage-smear": ("passage.py", "1L-smear"),
    "smear": ("smear.py", f"{SMEARED} {SEEDS} {SMEARED_SEEDS}"),
    "ablations": ("ablations.py", ATTENTION_ONLY),
    "ablations-mlp": ("ablations.py", WITH_MLPS),
    "token-views-copying": ("token_views.py --view copying", "2L"),
    "token-views-translation": ("token_views.py --view translation", "2L"),
    "token-views-patterns": ("token_views.py --view patterns", "2L"),
    "analysis-attention-only": ("analysis_table.py", ATTENTION_ONLY, WITH_MLPS),
    "analysis-mlp": ("analysis_table.py", WITH_MLPS, ATTENTION_ONLY),
    "analysis-smear": ("analysis_table.py --rows R2,R3,R4,R5", SMEARED),
    "analysis-books": ("analysis_table.py --rows R2,R3,R4,R5", BOOKS),
    "sizes-depth": ("sizes.py", "2L 3L 4L 5L 6L"),
    "sizes-width": ("sizes.py", WIDTHS),
    "head-positions": ("head_positions.py", ATTENTION_ONLY),
    "head-positions-mlp": ("head_positions.py", WITH_MLPS),
    "head-positions-width": ("head_positions.py", WIDTHS),
    "head-scatter": ("head_scatter.py", f"{ATTENTION_ONLY} {WITH_MLPS} {SMEARED} {WIDTHS}"),
    "eigenvalues": ("eigenvalues.py", f"{ATTENTION_ONLY} {SEEDS}"),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A command as the README would give it, without `python`."""

    command: str
    outputs: tuple[Path, ...]  # there when it is done; none: it only prints
    seconds: float  # to expect on two cores of an AMD EPYC
    reads: tuple[Path, ...] = ()  # folders of records that no output may be older than

    @property
    def script(self):
        return self.command.split()[0]

    def done(self):
        if not (self.outputs and all(path.exists() for path in self.outputs)):
            return False
        read = [path.stat().st_mtime for folder in self.reads for path in folder.glob("*")]
        return min(path.stat().st_mtime for path in self.outputs) >= max(read, default=0)

    def carry_out(self):
        """Exit code. Control-C ends the command, too; a training then goes on from its last
        snapshot.
        """
        script, *arguments = shlex.split(self.command)
        if script == "train.py" and self.outputs[0].exists():
            arguments.append("--resume")
        # control-C would have it print a traceback: in a session of its own it does not see it
        process = subprocess.Popen(
            [sys.executable, ROOT / script, *arguments], start_new_session=True
        )
        try:
            return process.wait()
        finally:
            process.terminate()
            process.wait()


def measurements(args, scale, chosen):
    """Trains every model, then measures what it learned, what each head causes, what its weights
    say, what its heads do on given texts, and how much of a head is a rule.
    """
    runs, text = Path("runs") / args.scale, corpus_flags(args.data, args.vocabulary)
    second_text = corpus_flags(args.second_corpus, args.vocabulary)
    if args.second_corpus and scale.name == "mini":
        vocabulary = runs / "second-corpus.tiktoken"
        learn = f"vocabulary.py {corpus_flags(args.second_corpus)} --size {scale.d_vocab}"
        yield Step(f"{learn} --out {vocabulary}", (vocabulary,), 60)
        second_text = corpus_flags(args.second_corpus, vocabulary)

    def each(some):
        """Where the run of each model is, the flags of its text, and the model."""
        for model in some:
            yield runs / model.name, second_text if model.books else text, model

    few = f" --examples {scale.in_training}" if scale.in_training else ""
    for run, flags, model in each(chosen):
        sizes = f"--scale {scale.name} --tokens {scale.tokens} {model.flags}{few}"
        records = (run / "run.json", run / "measurements.npz", run / "summary.json")
        # back is twice the way; measuring the snapshots takes a fifth of the time
        seconds = 10 + 3 * 1.25 * model.seconds(scale) * scale.tokens
        yield Step(f"train.py {sizes} {flags} --out {run}", records, seconds)

    for run, flags, model in each(chosen if scale.examples else ()):
        how = f"--snapshots {scale.snapshots} --examples {scale.examples}"
        seconds = 5 + model.seconds(scale) * (scale.snapshots + 2) * scale.examples * 512
        yield Step(f"evaluate.py {run} {how} {flags}", (run / "evaluation.npz",), seconds)

    # the paper does not open up its full-scale and its second-corpus models
    opened = [model for model in chosen if not (model.books or model.d_model)]
    for run, flags, model in each(opened):
        how = f"--snapshots {scale.ablated} --examples {scale.ablation_examples}"
        records = (run / "ablations.npz", run / "ablations.json")
        # 0.8 ways through a model of one layer, 1.4 through one of two: each head is ablated
        ways = (scale.ablated + 2) * scale.ablation_examples * 512 * (0.2 + 0.6 * model.layers)
        seconds = 10 + ways * model.seconds(scale)
        yield Step(f"ablate.py {run} {how} {flags}", records, seconds)

    for run, flags, model in each(opened):
        command = f"circuits.py {run} --snapshots {scale.snapshots} {flags}"
        seconds = 5 + 0.2 * scale.snapshots * model.layers
        yield Step(command, (run / "circuits.json",), seconds)

    steps = scale.tokens // scale.tokens_per_step
    for run, flags, _ in each(opened):
        last, out = run / "snapshots" / f"step_{steps:07d}.pt", run / "tasks.json"
        yield Step(f"tasks.py {last} --out {out} {flags}", (out,), 10)

    for run, flags, _ in each(model for model in opened if model.name in PASSAGE):
        yield Step(f"passage.py {run} {flags}", (run / "passage.npz",), 20)

    for run, flags, _ in each(model for model in opened if model.name in SUBSTITUTED):
        last = run / "snapshots" / f"step_{steps:07d}.pt"
        for rule in scale.rules:
            out = run / f"substitute-{rule}.json"
            how = f"--substitute {rule} --examples {min(150, scale.ablation_examples)}"
            yield Step(f"ablate.py {last} {how} --out {out} {flags}", (out,), 30)


def corpus_flags(data, vocabulary=None):
    flags = ["--data", str(data)]
    if vocabulary:
        flags += ["--vocabulary", str(vocabulary)]
    return shlex.join(flags)


def drawings(args, scale, chosen):
    """Figures, report and tables, from the copies of the records: they need no runs."""
    results, names = Path("results") / args.scale, {model.name for model in chosen}

    def folders(some):
        return tuple(results / run for run in dict.fromkeys(some.split()) if run in names)

    drawn = set()
    for name, (script, *runs) in FIGURES.items():
        shown, in_plane = (folders(some) for some in (*runs, "")[:2])
        kind = script.split()[0]
        if not shown or (scale.only and kind in drawn):  # `smoke` draws one of each
            continue
        drawn.add(kind)
        out = results / "figures" / f"{name}.png"
        plane = ("--plane", *in_plane) if in_plane else ()
        words = [f"plots/{script}", *shown, *plane, "--out", out]
        yield Step(" ".join(map(str, words)), (out,), 5, reads=(*shown, *in_plane))
    everything = (*(results / name for name in sorted(names)), results / "figures")
    out = results / "report.html"
    yield Step(f"plots/report.py {results} --out {out}", (out,), 15, reads=everything)
    yield Step(f"plots/tables.py {results}", (), 5)


def copy_records(step, runs, results):
    """What figures and tables read of it, if it is the command of a run."""
    for source in step.outputs:
        if source.is_relative_to(runs):
            target = results / source.relative_to(runs)
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(exist_ok=True)
                write_whole(target, lambda path, source=source: shutil.copyfile(source, path))


class Schedule:
    """Carries steps out unless they are done, and tells how long the others will take.

    Beside the times, in commands.json, is the command that made each file.
    """

    def __init__(self, steps, path):
        self.steps, self.path, self.made_by_path = steps, path, path.with_name("commands.json")
        self.times, self.made_by = (
            read_json(path) if path.exists() else {} for path in (path, self.made_by_path)
        )

    def check(self):
        """Refuses to take what another command has made, of other texts say, for what a step would
        make. Pictures are made of the records that are there, whichever those are.
        """
        for step in self.steps:
            for output in step.outputs if step.done() and not step.reads else ():
                before = self.made_by.get(str(output), step.command)  # older runs do not tell
                if before != step.command:
                    raise BadInput(
                        f"{output} was made by another command, python {before}: give the same"
                        f" --data, --vocabulary and --second-corpus, or move {self.path.parent} and"
                        " its results away"
                    )

    def carry_out(self, step):
        if step.done():
            return
        left = [other for other in self.steps if not other.done()]
        print(
            f"\n{len(left)} of {len(self.steps)} commands left, about"
            f" {duration(self.seconds(left))}:\npython {step.command}",
            flush=True,
        )
        began = time.time()
        try:
            code = step.carry_out()
        finally:
            spent = self.times.get(step.command, 0) + time.time() - began
            self.times[step.command] = round(spent, 1)
            write_json(self.path, self.times)
        if code:
            raise subprocess.CalledProcessError(code, f"python {step.command}")
        self.made_by |= {str(output): step.command for output in step.outputs}
        write_json(self.made_by_path, self.made_by)

    def seconds(self, left):
        """To expect for the steps that are left: their own estimates, corrected by what the
        finished ones of the same script (if there are none: all finished ones) took beside theirs.
        """
        done = [step for step in self.steps if step.command in self.times and step not in left]

        def pace(some):
            expected = sum(step.seconds for step in some)
            return expected and sum(self.times[step.command] for step in some) / expected

        return sum(
            step.seconds * (pace([s for s in done if s.script == step.script]) or pace(done) or 1)
            for step in left
        )


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="mini", help="default: mini; smoke is for tests")
    add("--data", default="python", help="python, fineweb, or a path of text or token shards")
    add("--vocabulary", metavar="FILE", help="gpt2 or a .tiktoken file (default: the corpus's)")
    add("--second-corpus", metavar="PATH", help="a text of prose: .txt, .gz, .xz or a folder")
    args = parser.parse_args(argv)
    if args.second_corpus and not Path(args.second_corpus).exists():
        raise BadInput(f"--second-corpus {args.second_corpus}: no such file or folder")
    scale = SCALES[args.scale]
    chosen = models(scale)
    if not args.second_corpus:
        left_out = ", ".join(model.name for model in chosen if model.books)
        print(f"left out for want of a text of prose (--second-corpus PATH): {left_out}")
        chosen = [model for model in chosen if not model.books]

    runs, results = Path("runs") / args.scale, Path("results") / args.scale
    runs.mkdir(parents=True, exist_ok=True)
    (results / "figures").mkdir(parents=True, exist_ok=True)
    steps = [*measurements(args, scale, chosen), *drawings(args, scale, chosen)]
    schedule = Schedule(steps, runs / "times.json")
    schedule.check()
    # end the command that runs, as control-C does; Windows has no SIGHUP
    for ending in signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    try:
        for step in steps:
            schedule.carry_out(step)
            copy_records(step, runs, results)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return 130
    except subprocess.CalledProcessError as error:
        print(f"reproduce.py: error: exit code {error.returncode}: {error.cmd}", file=sys.stderr)
        return error.returncode
    took = duration(sum(schedule.times.values()))
    size = sum(path.stat().st_size for path in results.rglob("*") if path.is_file()) / 1e6
    print(f"\nall {len(steps)} commands are done; they took {took} -> {results}, {size:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
