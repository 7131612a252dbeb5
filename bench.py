"""Times what the project is fast for against what a user would pick instead: checks first, then
times, in one run.

    python bench.py train        a training step, against nanoGPT's recipe at the same shape
    python bench.py ablate       every head ablated, against two passes with hooks and others'
    python bench.py attention    causal, smeared, local: against SDPA and FlexAttention
    python bench.py frozen       a recorded pattern on many values, against SDPA and bmm
    python bench.py statistics   prefix matching and previous token, against the whole pattern
    python bench.py loss         losses from the residual stream, against PyTorch's and Liger's

All but the second run on the GPU if there is one; the last four are in bench_kernels.py. Every row
is printed and appended to results/bench.jsonl with all that it takes to repeat it.
"""

import dataclasses
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import bench_kernels
import machine
import train
from model import ModelConfig, Transformer, config_for
from parallel import AVAILABLE_CORES, Cores, Ranks
from safety import ArgumentParser, BadInput, one_line_errors
from sweep import ablation, preserving_patterns, sweep

CPU = torch.device("cpu")
DTYPE_OF_NANOGPT = {"cpu": torch.float32, "cuda": torch.bfloat16}


def measure(function, seconds):
    """Calls function until that many seconds have passed, at least five times; seconds of each
    call.
    """
    times = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 5:
        tick = time.perf_counter()
        function()
        times.append(time.perf_counter() - tick)
    return times


# --- a training step


class NanoGPT(nn.Module):
    """nanoGPT's published recipe without its MLPs: learned positions, LayerNorm without biases, one
    linear layer for q, k and v, SDPA, tied embeddings, cross-entropy of all logits.
    """

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.n_heads * config.d_head
        self.wte = nn.Embedding(config.d_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.norms = nn.ParameterList(
            torch.ones(config.d_model) for _ in range(config.n_layers + 1)
        )
        self.c_attn = nn.ModuleList(
            nn.Linear(config.d_model, 3 * width, bias=False) for _ in range(config.n_layers)
        )
        self.c_proj = nn.ModuleList(
            nn.Linear(width, config.d_model, bias=False) for _ in range(config.n_layers)
        )
        self.lm_head = nn.Linear(config.d_model, config.d_vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(matrix, std=0.02)

    def norm(self, x, layer):
        return F.layer_norm(x, (self.config.d_model,), self.norms[layer], None)

    def forward(self, tokens, targets):
        batch, n_ctx = tokens.shape
        x = self.wte(tokens) + self.wpe(torch.arange(n_ctx, device=tokens.device))
        for layer in range(self.config.n_layers):
            q, k, v = self.c_attn[layer](self.norm(x, layer)).chunk(3, dim=2)
            q, k, v = (
                t.view(batch, n_ctx, self.config.n_heads, -1).transpose(1, 2) for t in (q, k, v)
            )
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.c_proj[layer](z.transpose(1, 2).contiguous().view(batch, n_ctx, -1))
        logits = self.lm_head(self.norm(x, -1))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def nanogpt_step(config, n_rows, tokens, device):
    """On a GPU compiled, in bfloat16 by autocast, and with the fused optimizer: its defaults."""
    gpu = device.type == "cuda"
    model = NanoGPT(config).to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=gpu)
    forward = torch.compile(model) if gpu else model

    def rows_at(places):
        rows = [tokens[i : i + config.n_ctx].astype(np.int64) for i in places]
        rows = torch.stack([torch.from_numpy(row) for row in rows])
        return rows.pin_memory().to(device, non_blocking=True) if gpu else rows

    def step():
        places = torch.randint(len(tokens) - config.n_ctx, (n_rows,))
        x, y = rows_at(places), rows_at(places + 1)
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(config, recipe, corpus, cores, device, dtype):
    """`train.train_step` on one batch after the other; returns its loss."""
    kernels = machine.pick_kernels(None, device)
    with machine.multiplying_in(dtype, device) as dtype:
        model = Transformer(config, kernels, dtype).init_weights(0).to(device)
    optimizer, ranks = train.make_optimizer(model, recipe), Ranks(device)
    steps = itertools.count()

    def step():
        return train.train_step(model, optimizer, corpus, recipe, 0, next(steps), cores, ranks)[0]

    return step


def training_flops(config):
    """Multiply-adds of a token, forward and backward, times two: matrix products only, attention
    counted causal.
    """
    width = config.n_heads * config.d_head
    projections = 4 * config.d_model * width + 2 * config.d_model * config.d_mlp
    attention = 2 * width * (config.n_ctx + 1) / 2
    return 3 * 2 * (config.n_layers * (projections + attention) + config.d_model * config.d_vocab)


@dataclasses.dataclass
class Trainer:
    """A training step as its users run it."""

    name: str
    threads: int  # for each operation
    dtype: torch.dtype  # of products
    step: Callable  # -> loss

    def run(self, n_steps, device):
        """-> the last step's loss, for which a GPU has to finish all of them."""
        torch.set_num_threads(self.threads)
        with machine.multiplying_in(self.dtype, device):
            for _ in range(n_steps):
                loss = self.step()
            return float(loss)


def trainers(config, recipe, corpus, cores, device):
    """nanoGPT's step, then ours in the machine's dtype and, if that is another, in nanoGPT's."""
    usual = DTYPE_OF_NANOGPT[device.type]
    baseline = nanogpt_step(config, recipe.n_rows, corpus.train[0], device)
    yield Trainer("nanoGPT's recipe", AVAILABLE_CORES, usual, baseline)
    for dtype in dict.fromkeys((machine.pick_dtype(None, device), usual)):
        ours = our_step(config, recipe, corpus, cores, device, dtype)
        yield Trainer(f"train.py, {str(dtype).removeprefix('torch.')}", 1, dtype, ours)


def bench_train(seconds, device):
    """Rows for a step of `python train.py --layers 2 --attn-only`; on a GPU with the vocabulary of
    GPT-2, whatever the text is, and ten steps at a time: nanoGPT does not wait for each to end.
    """
    from corpora import GPT2_TOKENS, open_corpus

    gpu = device.type == "cuda"
    scale, turns, at_once = ("small", 2, 10) if gpu else ("mini", 8, 1)
    corpus, recipe, cores = open_corpus(), train.RECIPES[scale], Cores(device)
    config = config_for(scale, 2, GPT2_TOKENS if gpu else corpus.d_vocab, attn_only=True)
    compared = list(trainers(config, recipe, corpus, cores, device))
    check_gradient(config, recipe, corpus, cores, device)
    gc.freeze()  # as train.py does
    for trainer in compared:
        losses = [trainer.run(at_once, device) for _ in range(30 // at_once)]
        if not losses[-1] < losses[0]:
            raise BadInput(f"a step that does not learn is not worth timing: losses {losses}")
    times = {trainer.name: [] for trainer in compared}
    share = seconds / turns / len(compared)
    for _ in range(turns):  # so that a busy moment of the machine hits all
        for trainer in compared:
            some_steps = functools.partial(trainer.run, at_once, device)
            times[trainer.name] += measure(some_steps, share)
    ceilings = {trainer.dtype: matmul_ceiling(trainer.dtype, device) for trainer in compared}
    n_tokens = at_once * recipe.n_rows * config.n_ctx
    baseline = np.median(times["nanoGPT's recipe"])
    for trainer in compared:
        ceiling = ceilings[trainer.dtype]
        p20, median, p80 = np.percentile(times[trainer.name], [20, 50, 80])
        flops = training_flops(config) * n_tokens / median
        yield {
            "what": trainer.name,
            "dtype": str(trainer.dtype).removeprefix("torch."),
            "tokens_per_second": round(n_tokens / median),
            "p20": round(n_tokens / p80),
            "p80": round(n_tokens / p20),
            "n": len(times[trainer.name]),
            "speedup": round(baseline / median, 3),
            "gflops": round(flops / 1e9, 1),
            "ceiling_gflops": round(ceiling / 1e9, 1),
            "of_ceiling": round(flops / ceiling, 3),
            "shape": dataclasses.asdict(config) | {"rows": recipe.n_rows},
        }


def matmul_ceiling(dtype, device):
    """Operations a second of a large square product: what no training step can exceed."""
    torch.set_num_threads(AVAILABLE_CORES)
    with machine.multiplying_in(dtype, device) as dtype:
        return bench_kernels.matmul_ceiling(device, dtype)


def train_line(row):
    return (
        f"{row['what']:>19}  {row['tokens_per_second']:>7,} tokens/s"
        f" ({row['p20']:,} to {row['p80']:,}, n={row['n']})  {row['speedup']:.2f}x"
        f"  {row['of_ceiling']:.0%} of the matmul ceiling, {row['ceiling_gflops']:.0f} GFLOP/s"
    )


def check_gradient(config, recipe, corpus, cores, device):
    """The fast step's gradient against the definition's, in float32, of a few rows."""
    batch = train.training_batch(corpus, config.n_ctx, min(8, recipe.n_rows), 0, 0)
    batch = [part.to(device) for part in batch]
    gradients = []
    for kernels in ("reference", machine.pick_kernels(None, device)):
        model = Transformer(config, kernels).init_weights(0).to(device)
        total = train.loss_and_gradient(
            model, list(model.parameters()), *batch, batch[0].numel(), cores, Ranks(device)
        )
        gradients.append(total)
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    if not difference <= 1e-5:
        raise BadInput(f"the fast gradient is off by {difference:.1e}; nothing was timed")


# --- every head ablated


def ablation_flops(config, scored):
    """Operations for one example, matrix products only, attention counted causal: (a forward pass,
    two passes for one ablation, the mean ablation of one head in the sweep, its share of the clean
    run included). All ablations keep the patterns.
    """
    n_ctx, n_layers, n_heads = config.n_ctx, config.n_layers, config.n_heads
    d_model, width = config.d_model, config.n_heads * config.d_head
    projection, mixing = 2 * d_model * width, width * (n_ctx + 1)  # for each position
    mlp, unembedding = 4 * d_model * config.d_mlp, 2 * d_model * config.d_vocab
    residual = n_ctx * n_layers * (4 * projection + 2 * mixing + mlp)
    forward = residual + n_ctx * unembedding
    two_passes = residual + forward  # the first is over when all patterns are known
    last = scored * (2 * n_ctx * n_heads * d_model + 2 * projection + mlp)
    clean = n_ctx * ((n_layers - 1) * (4 * projection + 2 * mixing + mlp) + projection) + last
    ablations = scored * (2 * d_model * config.d_head + mlp)  # of the last layer
    for layer in range(n_layers - 1):
        between = n_layers - 2 - layer
        ablations += n_ctx * (2 * d_model * config.d_head + mlp)
        ablations += between * n_ctx * (2 * projection + mixing + mlp) + last
    mean = ablations / n_layers + clean / (n_layers * n_heads) + scored * unembedding
    return forward, two_passes, mean


def transformer_lens_twin(model):
    """The same weights in TransformerLens, or None if it is not installed; its version 4 no longer
    has the class.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return None
    config = model.config
    shape = {name: getattr(config, name) for name in ("n_layers", "d_model", "n_heads", "d_head")}
    twin = HookedTransformer(
        HookedTransformerConfig(
            **shape,
            n_ctx=config.n_ctx,
            d_vocab=config.d_vocab,
            d_mlp=config.d_mlp or None,
            attn_only=not config.d_mlp,
            act_fn="gelu",
            normalization_type="LN",
            positional_embedding_type="shortformer",
            device="cpu",
        )
    )
    with torch.no_grad():  # the biases that our model does not have start at 0
        weights = dict(twin.named_parameters())
        for name, weight in model.named_parameters():
            weights[name].copy_(weight)
        weights["pos_embed.W_pos"].copy_(model.positions)
    return twin


def transformer_lens_ablation(twin, inputs):
    """A function of (layer, head): losses [example, pos - 1] by run_with_hooks, with the patterns
    of a clean run that is cached once for all heads.
    """

    def is_pattern(name):
        return name.endswith("hook_pattern")

    patterns = twin.run_with_cache(inputs, names_filter=is_pattern)[1]

    def without(head):
        layer, head = head

        def zero(z, hook):
            z[:, :, head] = 0  # [example, pos, head, d_head]
            return z

        return twin.run_with_hooks(
            inputs,
            return_type="loss",
            loss_per_token=True,
            fwd_hooks=[
                (is_pattern, lambda _, hook: patterns[hook.name]),
                (f"blocks.{layer}.attn.hook_z", zero),
            ],
        )

    return without


@torch.no_grad()
def bench_ablate(seconds, device):
    """Rows for ablating every head at the paper's width on a CPU, in turns: seconds for one head
    and one example.
    """
    for n_layers, n_examples in (2, 4), (6, 2):
        config = ModelConfig(
            n_layers, d_model=768, n_heads=12, d_head=64, d_mlp=0, n_ctx=512, d_vocab=50_257
        )
        model = Transformer(config).init_weights(0)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(50_257, (n_examples, 513), generator=generator)
        at = torch.tensor([49, 499, 299]).expand(n_examples, -1)  # the paper's two, and any other
        rows, heads = (tokens[:, :-1], tokens[:, 1:]), list(np.ndindex(n_layers, 12))
        calls = ablation_calls(model, rows, at, heads)
        check_ablations(calls, at, heads)
        times = {name: [] for name in calls}
        deadline = time.perf_counter() + seconds / 2
        while time.perf_counter() < deadline or len(times["sweep"]) < 3:
            # by hooks it costs the same whichever head it is: another one each turn
            head = heads[5 * len(times["sweep"]) % len(heads)]
            for name, call in calls.items():
                tick = time.perf_counter()
                call(head)
                times[name].append((time.perf_counter() - tick) / len(tokens))
        times["sweep"] = [every / len(heads) for every in times["sweep"]]
        forward, two_passes, ablated = ablation_flops(config, at.shape[1])
        flops = {"sweep": ablated, "two passes with hooks": two_passes}
        base = np.median(times["sweep"])
        for name, each in times.items():
            p20, median, p80 = np.percentile(each, [20, 50, 80])
            predicted = flops.get(name, forward)
            yield {
                "what": f"{n_layers} layers, {name}",
                "milliseconds": round(1e3 * median, 2),
                "p20": round(1e3 * p20, 2),
                "p80": round(1e3 * p80, 2),
                "n": len(each),
                "times_sweep": round(median / base, 2),
                "predicted_gflop": round(predicted / 1e9, 3),
                "predicted_times_sweep": round(predicted / ablated, 1),
                "gflops": round(predicted / median / 1e9, 1),
                "shape": dataclasses.asdict(config) | {"examples": len(tokens)},
            }


def ablation_calls(model, rows, at, heads):
    """{name: function(head) -> losses}, ours with examples spread over the cores as in our scripts.
    The sweep does all heads, whichever is asked for: [example, head, scored].
    """
    cores = Cores(CPU)

    def spread(function):
        def call(head):
            torch.set_num_threads(1)
            of_rows = torch.no_grad()(lambda *rows: function(head, *rows))
            losses = torch.cat(cores(of_rows, *rows, at))
            torch.set_num_threads(AVAILABLE_CORES)
            return losses

        return call

    def every_head(_, inputs, targets, at):
        return sweep(model, inputs, targets, at, [[head] for head in heads]).transpose(0, 1)

    def two_passes(head, inputs, targets, _):
        hook = preserving_patterns(model, inputs, ablation([head]))
        return model.losses(inputs, targets, hook)

    calls = {
        "sweep": spread(every_head),
        "forward pass": spread(lambda _, inputs, targets, at: model.losses(inputs, targets)),
        "two passes with hooks": spread(two_passes),
    }
    twin = transformer_lens_twin(model)
    if twin:
        calls["TransformerLens"] = transformer_lens_ablation(twin, rows[0])
    else:
        print("no TransformerLens before version 4 is installed: not compared")
    return calls


def check_ablations(calls, at, heads):
    one = calls["sweep"](None)[:, 1]
    for name in calls.keys() - {"sweep", "forward pass"}:
        difference = (calls[name](heads[1]).gather(1, at) - one).abs().max()
        if difference > 1e-4:
            raise BadInput(f"{name} and the sweep differ by {difference:.1e}; nothing was timed")


def ablate_line(row):
    return (
        f"{row['what']:>31}  {row['milliseconds']:>9,.1f} ms"
        f" ({row['p20']:,.1f} to {row['p80']:,.1f}, n={row['n']}) {row['times_sweep']:>6.1f} times"
        f" the sweep; predicted {row['predicted_gflop']:>7.2f} GFLOP,"
        f" {row['predicted_times_sweep']:.0f} times; {row['gflops']:.0f} GFLOP/s"
    )


MODEL_BENCHES = {"train": (bench_train, train_line), "ablate": (bench_ablate, ablate_line)}


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("what", choices=(*MODEL_BENCHES, *bench_kernels.COMPARISONS))
    parser.add_argument(
        "--seconds", type=float, default=60, help="time for each comparison (default: 60)"
    )
    parser.add_argument(
        "--cases",
        metavar="TEXT",
        nargs="+",
        default=[""],
        help="only cases of a kernel that have one of these in their name, such as 'T 2048'",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("results/bench.jsonl"),
        help="default: results/bench.jsonl",
    )
    args = parser.parse_args(argv)
    device = CPU if args.what == "ablate" else machine.pick_device(None)
    # on a CPU tensors are float32; what bench_train multiplies in stands in its rows
    dtype = torch.float32 if device == CPU else machine.pick_dtype(None, device)
    kernels = machine.pick_kernels(None, device)
    made_on = machine.describe(device, Cores(CPU), 1, dtype, kernels)
    print("{device}, torch {torch}, commit {commit}".format(**made_on), flush=True)
    if args.what in MODEL_BENCHES:
        rows, line = MODEL_BENCHES[args.what]
        rows = rows(args.seconds, device)
    else:
        chosen = bench_kernels.cases(args.what, device, args.cases)
        rows, line = bench_kernels.rows(chosen, device, dtype, args.seconds), bench_kernels.line
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        print(line(row), flush=True)
        record = {"bench": args.what, **row, "machine": made_on, "date": time.strftime("%Y-%m-%d")}
        with open(args.json, "a") as file:
            file.write(json.dumps(record) + "\n")
    print(f"-> {args.json}")


if __name__ == "__main__":
    sys.exit(main())
