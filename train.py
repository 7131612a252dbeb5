"""Trains one model of the paper, and measures it on the way.

    python train.py --layers 2 --attn-only            two layers: induction heads form
    python train.py --layers 1 --attn-only            one layer: none do
    python train.py --layers 1 --attn-only --smear    one layer, smeared keys: they do after all
    torchrun --nproc-per-node 8 train.py --scale paper --layers 2 --attn-only --data fineweb

The run's folder (records.py tells what is in it) is runs/ and a name made of the flags. Control-C
stops after the current step; the same command with --resume goes on, as it does after any other
end, to the same losses to the last bit.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import machine
from corpora import open_corpus
from data import training_batch
from measure import N_CTX, draw_examples, measure
from model import SCALES, SERIES, ModelConfig, Transformer, config_for, count_parameters
from parallel import Cores, Ranks
from progress import Clock, Progress, header
from records import RunFolder
from safety import ArgumentParser, BadInput, one_line_errors
from snapshots import load_snapshot
from summary import conclusion, summarise, window_by_hand


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the models of one scale are trained: AdamW, linear warm-up, constant learning rate."""

    n_rows: int  # rows of n_ctx tokens a step, over all processes
    n_tokens: int  # of the whole run
    learning_rate: float
    warmup_tokens: int
    weight_decay: float  # of matrices
    betas: tuple[float, float]
    n_snapshots: int
    n_examples: int  # that every snapshot is measured on
    n_final_examples: int  # the last one, and those where the phase change starts and ends
    vector_factor: float = 1.0  # on the learning rate of W_E, gains and biases
    whole: float = 1.0  # the share of examples that is measured at every position
    weight_decay_later: tuple[int, float] | None = None  # (step, weight decay from there on)

    def __post_init__(self):
        for name in (f.name for f in dataclasses.fields(self) if f.type in (int, float)):
            value = getattr(self, name)
            if not 0 < value < math.inf and not (name == "weight_decay" and value == 0):
                raise BadInput(f"{name} is {value}: a positive number is needed")
        if self.whole > 1:
            raise BadInput(f"whole is {self.whole}: it is a share, 1 at most")


RECIPES = {
    "mini": Recipe(
        n_rows=8, n_tokens=6_000_000, learning_rate=2e-3, warmup_tokens=100_000,
        weight_decay=0.01, betas=(0.9, 0.98), n_snapshots=90, n_examples=72, n_final_examples=400,
        vector_factor=40.0, whole=0.25,
    ),
    "small": Recipe(
        n_rows=32, n_tokens=500_000_000, learning_rate=1e-3, warmup_tokens=5_000_000,
        weight_decay=0.05, betas=(0.9, 0.98), n_snapshots=120,
        n_examples=10_000, n_final_examples=10_000, whole=0.1,
    ),
    # steps, warm-up, snapshots and the step of the lower weight decay are the paper's; it names no
    # other number
    "paper": Recipe(
        n_rows=128, n_tokens=10_000 * 2**20, learning_rate=1e-3, warmup_tokens=1_500_000_000,
        weight_decay=0.1, betas=(0.9, 0.98), n_snapshots=200,
        n_examples=10_000, n_final_examples=10_000, weight_decay_later=(4750, 0.01),
    ),
}  # fmt: skip
# what --set changes: all numbers of a model and a recipe that have no flag of their own
FLAGGED = {
    "n_tokens": "tokens",
    "learning_rate": "lr",
    "n_snapshots": "snapshots",
    "n_examples": "examples",
}
SETTINGS = {
    field.name: field.type
    for part, kinds in ((ModelConfig, (float,)), (Recipe, (int, float)))
    for field in dataclasses.fields(part)
    if field.type in kinds and field.name not in FLAGGED
}
GRADIENT_CLIP = 1.0  # largest norm of the gradient
# keep a GPU busy; in six layers of width 768 with MLPs their activations are 6 GB, by count
TOKENS_AT_ONCE = 2**15


def snapshot_steps(n_steps, n_snapshots):
    """The steps at which snapshots are taken, about n_snapshots of them: the start, an eighth
    log-spaced over the first 2 % of training, and the others evenly over the rest, where the
    phase change will come somewhere.
    """
    n_early = n_snapshots // 8
    n_even = n_snapshots - n_early - 2
    early_end = n_steps / 50
    early = [max(1, early_end) ** (n / n_early) for n in range(n_early)]
    even = [early_end + (n_steps - early_end) * n / n_even for n in range(n_even + 1)]
    return sorted({0, *map(round, early + even)})


def parse_args(argv):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # the model
    add("--layers", type=int, help="number of layers (default: 2)")
    add("--attn-only", action="store_true", help="no MLPs")
    add("--smear", action="store_true", help="smear the keys with the previous token's")
    add("--scale", choices=SCALES, help="sizes and tokens (default: small on a GPU, else mini)")
    add("--d-model", type=int, help="width (default: the scale's)")
    add("--heads", type=int, help="heads a layer (default: as many of 64 as d_model holds)")
    add("--d-head", type=int, help="size of a head (default: d_model / heads)")
    add("--model", choices=SERIES, metavar="NAME", help=f"instead of these: {', '.join(SERIES)}")
    # the data
    add("--data", default="python", help="python, fineweb, or a path of text or token shards")
    add("--vocabulary", metavar="FILE", help="gpt2 or a .tiktoken file (default: the corpus's)")
    add("--seed", type=int, default=0, help="of initial weights and data order (default: 0)")
    # the training
    add("--tokens", type=int, help="tokens to train on (default: the scale's)")
    add("--lr", type=float, help="learning rate (default: the scale's)")
    add("--snapshots", type=int, help="that are taken, about (default: the scale's)")
    add("--examples", type=int, help="that all snapshots are measured on (default: the scale's)")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=f"other settings than the scale's, of {', '.join(SETTINGS)}",
    )
    add("--out", type=Path, help="folder of the run (default: runs/ and a name made of the flags)")
    add("--resume", action="store_true", help="go on with the run that the same command began")
    # the machine
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--kernels", choices=machine.KERNELS, help="default: triton on a GPU, else torch")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of matrix products (default: bfloat16 if the machine has instructions for them)",
    )
    args = parser.parse_args(argv)
    args.device = machine.pick_device(args.device)
    args.kernels = machine.pick_kernels(args.kernels, args.device)
    args.dtype = machine.pick_dtype(args.dtype, args.device)
    if args.model:
        sizes = (args.scale, args.layers, args.d_model, args.heads, args.d_head)
        if args.attn_only or args.smear or any(size is not None for size in sizes):
            raise BadInput(
                "--model names a whole model of the paper: leave out the other flags for its sizes"
            )
        args.scale = "paper"
    if not 0 <= args.seed < 2**63:
        raise BadInput(f"--seed {args.seed}: a whole number from 0 to {2**63 - 1} is needed")
    args.settings = dict(map(read_setting, args.set))
    args.layers = 2 if args.layers is None else args.layers
    args.scale = args.scale or ("small" if args.device.type == "cuda" else "mini")
    return args


def read_setting(text):
    """NAME=VALUE -> (name, number)."""
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise BadInput(f"--set {text}: NAME=VALUE is needed, with one of {', '.join(SETTINGS)}")
    try:
        return name, SETTINGS[name](value)
    except ValueError:
        kind = "whole number" if SETTINGS[name] is int else "number"
        raise BadInput(f"--set {text}: {value!r} is not a {kind}") from None


def with_settings(part, settings):
    """A model's configuration or a recipe, with those of the settings that it has."""
    own = {name: value for name, value in settings.items() if hasattr(part, name)}
    return dataclasses.replace(part, **own)


def model_config(args, d_vocab):
    """The sizes that the flags ask for."""
    if args.model:
        return with_settings(
            dataclasses.replace(SERIES[args.model], d_vocab=d_vocab), args.settings
        )
    config = config_for(
        args.scale, args.layers, d_vocab, attn_only=args.attn_only, smear=args.smear
    )
    d_model = config.d_model if args.d_model is None else args.d_model
    heads, d_head = args.heads, args.d_head
    if heads is None:
        heads = max(1, d_model // (d_head or config.d_head))
    if d_head is None:
        if heads < 1 or d_model % heads:
            raise BadInput(f"--d-model {d_model} cannot be divided among {heads} heads")
        d_head = d_model // heads
    sizes = {"d_model": d_model, "n_heads": heads, "d_head": d_head}
    sizes["d_mlp"] = 4 * d_model if config.d_mlp else 0
    return with_settings(dataclasses.replace(config, **sizes), args.settings)


def training_recipe(args, n_ctx, world):
    """The scale's recipe with what the flags change in it."""
    flags = {name: getattr(args, flag) for name, flag in FLAGGED.items()}
    flags["n_final_examples"] = args.examples
    given = {name: value for name, value in flags.items() if value is not None}
    # the settings last: --set n_final_examples is for itself
    recipe = with_settings(RECIPES[args.scale], given | args.settings)
    if recipe.n_tokens < recipe.n_rows * n_ctx:
        raise BadInput(
            f"--tokens {recipe.n_tokens}: one step alone is {recipe.n_rows * n_ctx:,} tokens"
        )
    if recipe.n_snapshots < 3:
        raise BadInput(f"--snapshots {recipe.n_snapshots}: at least 3 are needed")
    if recipe.n_rows % world:
        raise BadInput(f"{world} processes cannot share the {recipe.n_rows} rows of a step evenly")
    return recipe


def default_name(args):
    """What makes this run differ from others, as a folder's name."""
    parts = (
        args.model or f"{args.scale}-{args.layers}-layer",
        args.attn_only and "attn-only",
        args.smear and "smear",
        args.d_model and f"d{args.d_model}",
        args.heads and f"h{args.heads}",
        args.d_head and f"e{args.d_head}",
        args.data != "python" and Path(os.path.abspath(args.data)).stem,
        *(setting.replace("=", "-") for setting in args.set),
        args.lr and f"lr-{args.lr}",
        args.tokens and f"tokens-{args.tokens}",
        f"seed-{args.seed}",
    )
    return "-".join(part for part in parts if part)


def check_space(folder, n_snapshots, n_bytes):
    """Refuses a run of so many snapshots of so many bytes that will not fit on its disk."""
    left = n_snapshots - len([*(folder / "snapshots").glob("step_*.pt")])
    needed = (left + 6) * n_bytes  # state.pt has the optimizer's two moments, too, and is replaced
    at = folder.absolute()
    there = next(path for path in (at, *at.parents) if path.is_dir())
    if needed > shutil.disk_usage(there).free:
        raise BadInput(
            f"{folder}: {left} snapshots of {n_bytes / 1e9:.2f} GB and the state to resume from"
            f" need {needed / 1e9:.0f} GB, more than is free there: take fewer (--snapshots), or"
            " write elsewhere (--out DIR)"
        )


def loss_and_gradient(model, parameters, inputs, targets, n_tokens, cores, ranks):
    """Mean loss over the n_tokens of a step, then its gradient: one vector, summed over cores and
    processes. Rows that would not fit into memory together come one after the other.
    """

    def of_rows(inputs, targets):
        loss = model.losses(inputs, targets).sum() / n_tokens
        gradient = torch.autograd.grad(loss, parameters)
        return torch.cat([loss.detach()[None], *(part.flatten() for part in gradient)])

    at_once = max(1, TOKENS_AT_ONCE // inputs.shape[1])
    pieces = zip(inputs.split(at_once), targets.split(at_once), strict=True)
    parts = (part for piece in pieces for part in cores(of_rows, *piece))
    total = next(parts)
    for part in parts:
        total += part
    ranks.sum(total)
    return total


def make_optimizer(model, recipe):
    """AdamW with three groups, in the order that `update` and state.pt know: matrices; W_E, at
    vector_factor times their learning rate; gains and biases, at the same and without decay.
    """
    embed = model.embed["W_E"]
    matrices = [p for p in model.parameters() if p.dim() > 1 and p is not embed]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay, "factor": 1.0},
        {"params": [embed], "weight_decay": recipe.weight_decay, "factor": recipe.vector_factor},
        {"params": vectors, "weight_decay": 0.0, "factor": recipe.vector_factor},
    ]
    return torch.optim.AdamW(groups, betas=recipe.betas, eps=1e-8, fused=True)


def update(optimizer, parameters, gradient, recipe, step, tokens):
    """One step of the optimizer along the gradient of all parameters in a row; returns its norm
    before clipping.
    """
    norm = gradient.norm()
    gradient *= (GRADIENT_CLIP / norm).clamp(max=1)
    for parameter, part in zip(
        parameters, gradient.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = part.view_as(parameter)
    learning_rate = recipe.learning_rate * min(1, tokens / recipe.warmup_tokens)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
    if recipe.weight_decay_later and step >= recipe.weight_decay_later[0]:
        for group in optimizer.param_groups[:2]:  # those of matrices
            group["weight_decay"] = recipe.weight_decay_later[1]
    optimizer.step()
    return norm.item()


def train_step(model, optimizer, corpus, recipe, seed, step, cores, ranks):
    """One step, counted from 0: draws its batch, follows the gradient -> (mean loss before it, nats
    a token; norm of the gradient before clipping), the same in every process.
    """
    n_ctx, device = model.config.n_ctx, model.positions.device
    batch = training_batch(corpus, n_ctx, recipe.n_rows, seed, step, ranks.rank, ranks.world)
    inputs, targets = (part.to(device) for part in batch)
    parameters, n_tokens = list(model.parameters()), recipe.n_rows * n_ctx
    total = loss_and_gradient(model, parameters, inputs, targets, n_tokens, cores, ranks)
    norm = update(optimizer, parameters, total[1:], recipe, step, (step + 1) * n_tokens)
    return total[0].item(), norm


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    with Ranks(args.device) as ranks, machine.multiplying_in(args.dtype, args.device) as dtype:
        return train(args, ranks, dtype)


def train(args, ranks, dtype):
    clock = Clock()
    say = functools.partial(print, flush=True) if ranks.is_first else lambda *_: None
    cores = Cores(args.device)
    n_tokens = args.tokens or RECIPES[args.scale].n_tokens
    corpus = ranks.first_then_all(lambda: open_corpus(args.data, args.vocabulary, n_tokens))
    config = model_config(args, corpus.d_vocab)
    recipe = training_recipe(args, config.n_ctx, ranks.world)
    tokens_per_step = recipe.n_rows * config.n_ctx
    n_steps = recipe.n_tokens // tokens_per_step
    schedule = set(snapshot_steps(n_steps, recipe.n_snapshots))
    examples = draw_examples(corpus, recipe.n_examples, recipe.whole).to(args.device)
    # now, since what is wrong with them should not be found at the end; a small text has fewer
    n_final_examples = min(recipe.n_final_examples, corpus.rows("val", N_CTX))
    final_examples = draw_examples(corpus, n_final_examples, recipe.whole)
    model = Transformer(config, args.kernels, dtype).init_weights(args.seed).to(args.device)
    optimizer = make_optimizer(model, recipe)

    # the losses follow from these, but for rounding: that is the machine's and its settings'
    identity = {
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "seed": args.seed,
        "corpus": {"data": args.data, "name": corpus.name, "sha256": corpus.sha256},
    }
    about = {
        "scale": args.scale,
        "machine": machine.describe(args.device, cores, ranks.world, args.dtype, args.kernels),
    }
    folder = args.out or Path("runs") / default_name(args)
    check_space(folder, len(schedule), 4 * count_parameters(model)[0])
    run = RunFolder(folder, identity, about, args.resume, ranks)
    first_step = run.restore(model, optimizer, clock, n_steps)
    say(header(args, model, corpus, recipe, n_steps, len(schedule), about["machine"]))
    say(f"-> {folder}" + (f", going on from step {first_step:,}" if first_step else ""))

    progress = Progress(say, run.records, first_step, n_steps)
    gc.freeze()  # what lives now lives to the end: no garbage collection needs to look at it again
    with noted_interrupts() as interrupts:
        for step in range(first_step, n_steps + 1):
            tokens = step * tokens_per_step
            if step in schedule and not run.has_record_of(step):
                with clock("evaluation"):
                    record = measure(model, examples, cores, ranks)
                stop_if_not_finite(record["loss"], run, step)
                with clock("saving"):
                    run.write_snapshot(model, {"step": step, "tokens": tokens, **record})
                run.write_state(step, model, optimizer, clock, now=step == n_steps)
                progress.after_snapshot()
            if step == n_steps or interrupts:
                break
            with clock("training"):
                loss, norm = train_step(
                    model, optimizer, corpus, recipe, args.seed, step, cores, ranks
                )
                stop_if_not_finite(loss, run, step)
                tokens += tokens_per_step
                run.write_step(step=step + 1, tokens=tokens, loss=loss, gradient_norm=norm)
            progress.after_step(step + 1, tokens, loss)

    if step < n_steps:
        run.write_state(step, model, optimizer, clock)
        say(f"stopped after step {step:,}; the same command with --resume goes on from there")
        return 130
    with clock("evaluation"):
        examples = final_examples.to(args.device)
        shown = what_it_shows(run, examples, args.kernels, dtype, cores, ranks)
    seconds = clock.read()
    summary = {
        "tokens": tokens,
        "steps": n_steps,
        "parameters": count_parameters(model)[0],
        "corpus_sha256": corpus.sha256,
        "seconds": round(seconds["total"], 1),
        "training_seconds": round(seconds["training"], 1),
        "evaluation_seconds": round(seconds["evaluation"], 1),
        "tokens_per_second": round(tokens / seconds["training"]),
        **shown,
    }
    run.write_summary(summary)
    say(conclusion(summary))
    say(f"{summary['seconds']:.0f} s, {summary['tokens_per_second']:,} tokens/s -> {folder}")


def what_it_shows(run, examples, kernels, dtype, cores, ranks):
    """`summarise` of a finished run, its telling snapshots measured again on examples."""
    ranks.wait()  # until the first process has written the last snapshot

    def measure_again(index):
        path = run.snapshot_path(int(run.records[index]["step"]))
        model, _ = load_snapshot(path, kernels=kernels, dtype=dtype)
        return measure(model.to(examples.inputs.device), examples, cores, ranks)

    by_hand = window_by_hand(run.read_summary(), run.records)
    return summarise(run.records, measure_again, by_hand)


def stop_if_not_finite(loss, run, step):
    if not math.isfinite(loss):
        good = run.snapshot_path(run.records[-1]["step"]) if run.records else "none"
        raise BadInput(
            f"the loss is {loss} at step {step:,}; try a lower --lr; last good snapshot: {good}"
        )


@contextlib.contextmanager
def noted_interrupts():
    """A list that control-C appends to instead of raising, so that a step is never left half done.
    Twice still raises.
    """
    interrupts = []

    def note(signal_number, frame):
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(signal_number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
