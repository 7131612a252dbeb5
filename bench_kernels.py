"""The kernels' rows of bench.py: each op against what a user would pick instead.

A comparison is an op at one shape: random inputs, the definition, and contenders, all called with
the same inputs. Each contender is checked against the definition in float64 on a smaller batch,
then they are timed in turns, on several sets of inputs, so that no call finds its own in a cache.
Rates count the operations that the op needs, not those that a contender spends, and stand beside
the fastest matrix product of the same run.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch._functorch import config as compiler
from torch.nn.attention import SDPBackend, sdpa_kernel

import metrics
from kernels import attention as ops
from kernels.cross_entropy import linear_cross_entropy
from parallel import AVAILABLE_CORES
from safety import BadInput

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of every output, relative
CHECKED = 1000  # positions or rows, at most, of the batch that is checked
INPUT_BYTES = 256 * 2**20  # of all sets of inputs: more than any cache holds


@dataclasses.dataclass
class Comparison:
    """An op at one shape."""

    title: str
    mode: str  # "forward", "backward" or "both"
    flops: float  # that the op needs in this mode
    shape: dict
    make: Callable  # make(device, dtype, small) -> random inputs
    exact: Callable  # the definition
    contenders: dict[str, Callable | None]  # None: only on a GPU

    def inputs(self, device, dtype, small=False):
        """A new set; unless the mode is forward, floating-point ones are differentiated by."""
        made = [tensor.detach() for tensor in self.make(device, dtype, small)]
        for tensor in made:
            tensor.requires_grad_(self.mode != "forward" and tensor.is_floating_point())
        return made

    def call(self, function, inputs):
        """What is timed, and checked: it returns the outputs, or the gradients by the inputs."""
        if self.mode == "forward":
            return torch.no_grad()(lambda: function(*inputs))
        by = [tensor for tensor in inputs if tensor.requires_grad]
        if self.mode == "both":
            return lambda: torch.autograd.grad(function(*inputs).mean(), by)
        z = function(*inputs)
        dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
        return lambda: torch.autograd.grad(z, by, dz, retain_graph=True)


def cases(what, device, wanted=("",)):
    """The comparisons of one op whose titles contain one of the texts in `wanted`."""
    every = list(COMPARISONS[what](device))
    chosen = [case for case in every if any(text in case.title for text in wanted)]
    if not chosen:
        titles = ", ".join(dict.fromkeys(f"'{case.title}'" for case in every))
        raise BadInput(f"--cases {' '.join(wanted)}: none is named so; there are {titles}")
    return chosen


def rows(comparisons, device, dtype, seconds):
    """Checks and times comparisons, sharing the seconds; yields a record for each contender."""
    torch.set_num_threads(AVAILABLE_CORES)
    compiler.donated_buffer = False  # compiled graphs go backward more than once
    ceiling = matmul_ceiling(device, dtype)
    for comparison in comparisons:
        if device.type == "cuda":
            torch.compiler.reset()  # each shape is compiled as if it were the only one
        sets, calls, errors, missing = input_sets(comparison, device, dtype), {}, {}, {}
        for name, function in comparison.contenders.items():
            try:
                errors[name] = check(comparison, function, device, dtype)
                calls[name] = [comparison.call(function, inputs) for inputs in sets]
                calls[name][0]()  # compiles
            except (RuntimeError, ImportError, AttributeError, TypeError) as error:
                if name == "ours":
                    raise
                missing[name] = "needs a GPU" if function is None else str(error) or repr(error)
        about = {"case": comparison.title, "mode": comparison.mode, "shape": comparison.shape}
        about["triton"] = importlib.metadata.version("triton") if device.type == "cuda" else None
        times = in_turns(calls, device, seconds / len(comparisons))
        for name, each in times.items():
            p20, median, p80 = np.percentile(each, [20, 50, 80])
            yield {
                "what": name,
                **about,
                "milliseconds": significant(1e3 * median),
                "p20": significant(1e3 * p20),
                "p80": significant(1e3 * p80),
                "n": len(each),
                "times_ours": significant(median / np.median(times["ours"])),
                "tflops": significant(comparison.flops / median / 1e12),
                "ceiling_tflops": significant(ceiling / 1e12),
                "of_ceiling": significant(comparison.flops / median / ceiling),
                "peak_memory_bytes": peak_memory(calls[name][0], device),
                "relative_error": significant(errors[name]),
            }
        for name, reason in missing.items():
            yield {"what": name, **about, "not_timed": " ".join(reason.split())[:300]}


def line(row):
    """A row as bench.py prints it."""
    start = f"{row['case']:<30} {row['mode']:<8} {row['what']:<26}"
    if "not_timed" in row:
        return f"{start} {row['not_timed'][:80]}"
    memory = row["peak_memory_bytes"]
    return (
        f"{start} {row['milliseconds']:>8.3g} ms ({row['p20']:.3g} to {row['p80']:.3g},"
        f" n={row['n']})  {row['times_ours']:.2f} of ours  {row['tflops']:.3g} TFLOP/s,"
        f" {row['of_ceiling']:.0%} of matmul"
        + (f"  {memory / 2**20:,.0f} MiB" if memory is not None else "")
    )


def check(comparison, function, device, dtype):
    """Largest relative error of an output against the definition in float64, on a small batch."""
    torch.manual_seed(0)
    inputs = comparison.inputs(device, dtype, small=True)
    doubles = [
        tensor.detach().double().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor
        for tensor in inputs
    ]
    outputs, exact = (
        [out] if torch.is_tensor(out) else out
        for out in (
            comparison.call(function, inputs)(),
            comparison.call(comparison.exact, doubles)(),
        )
    )
    errors = [(a.double() - e).norm() / e.norm() for a, e in zip(outputs, exact, strict=True)]
    error = torch.stack(errors).max().item()  # NaN if any is
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"wrong by {error:.1e}")
    return error


def input_sets(comparison, device, dtype):
    first = comparison.inputs(device, dtype)
    n_more = min(7, INPUT_BYTES // sum(tensor.nbytes for tensor in first))
    return [first, *(comparison.inputs(device, dtype) for _ in range(n_more))]


def in_turns(calls, device, seconds):
    """Seconds of each call, by name; in turns, so that a busy moment of the machine hits all."""
    times = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    turns = itertools.count()
    while calls and (time.perf_counter() < deadline or min(map(len, times.values())) < 5):
        turn = next(turns)
        for name, of_sets in calls.items():
            times[name].append(seconds_of(of_sets[turn % len(of_sets)], device))
    return times


def seconds_of(call, device):
    if device.type == "cpu":
        tick = time.perf_counter()
        call()
        return time.perf_counter() - tick
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # a millisecond in which the host gets ahead of the GPU
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(call, device):
    """Bytes that a call takes at its peak, its results included, its inputs not; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def matmul_ceiling(device, dtype):
    """Operations a second of a large square product of random numbers."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(in_turns({"": [lambda: a @ b]}, device, 1.0)[""])


def significant(x):
    return float(f"{x:.4g}")


# --- attention


def heads(*shape, device, dtype):
    """[..., head, pos, d_head], in memory as the model's projections lay it out."""
    *batch, n_heads, n_ctx, d_head = shape
    x = torch.randn(*batch, n_ctx, n_heads, d_head, device=device, dtype=dtype)
    return x.transpose(-3, -2)


def pairs(n_ctx, window=None):
    """Queries times the keys that they see."""
    window = min(window or n_ctx, n_ctx)
    return n_ctx * window - window * (window - 1) / 2


def our_attention(kernels, windows=None):
    def attend(q, k, v, alpha=None):
        return ops.attention(q, k, v, alpha, windows, kernels)

    return attend


def sdpa(q, k, v, backend=None):
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def lerp_and_sdpa(q, k, v, alpha):
    return sdpa(q, ops.smear_keys(k, alpha), v)


def flex_attention(windows):
    """FlexAttention, compiled, with a window for each head."""
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(flex.flex_attention, dynamic=False)

    @functools.cache
    def mask(n_ctx, device):
        limits = torch.tensor(windows, device=device)

        def visible(batch, head, query, key):
            return (query >= key) & (query - key < limits[head])

        return flex.create_block_mask(visible, None, len(windows), n_ctx, n_ctx, device=device)

    return lambda q, k, v: compiled(q, k, v, block_mask=mask(q.shape[2], q.device))


def attention_comparison(shape, mode, contenders, smear=False, window=None):
    batch, n_heads, n_ctx, d_head = shape
    products = {"forward": 2, "backward": 5}[mode]  # of n_ctx x n_ctx and d_head
    windows = (window,) * n_heads if window else None

    def make(device, dtype, small):
        sizes = (1, n_heads, min(CHECKED, n_ctx), d_head) if small else shape
        q, k, v = (heads(*sizes, device=device, dtype=dtype) for _ in range(3))
        return [q, k, v, torch.randn(n_heads, device=device)] if smear else [q, k, v]

    return Comparison(
        f"{'smeared' if smear else f'window {window}' if window else 'causal'}, T {n_ctx}, d_head"
        f" {d_head}",
        mode,
        2 * products * batch * n_heads * d_head * pairs(n_ctx, window),
        dict(zip(("batch", "n_heads", "n_ctx", "d_head"), shape, strict=True), window=window),
        make,
        our_attention("reference", windows),
        contenders,
    )


def attention_comparisons(device):
    """On a GPU 16384 tokens of width 2048, as in FlashAttention's figures; on a CPU a batch of a
    mini model.
    """
    gpu = device.type == "cuda"
    kernels = "triton" if gpu else "torch"
    plain = {
        "ours": our_attention(kernels),
        "SDPA": sdpa,
        "SDPA, cuDNN": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION) if gpu else None,
        "SDPA, Flash": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION) if gpu else None,
    }
    smeared = {
        "ours": our_attention(kernels),
        "lerp + SDPA": lerp_and_sdpa,
        "lerp + SDPA, compiled": torch.compile(lerp_and_sdpa, dynamic=False) if gpu else None,
    }
    for d_head, n_ctx, mode in itertools.product(
        (64, 128) if gpu else (64,),
        (512, 1024, 2048, 4096, 8192) if gpu else (512,),
        ("forward", "backward"),
    ):
        shape = (16384 // n_ctx, 2048 // d_head, n_ctx, d_head) if gpu else (4, 2, n_ctx, d_head)
        yield attention_comparison(shape, mode, plain)
        yield attention_comparison(shape, mode, smeared, smear=True)
        for window in (w for w in (128, 256, 1024) if w < n_ctx):
            windows = (window,) * shape[1]
            local = {
                "ours": our_attention(kernels, windows),
                "FlexAttention, compiled": flex_attention(windows) if gpu else None,
            }
            yield attention_comparison(shape, mode, local, window=window)


# --- what is done with a recorded pattern


def frozen_comparisons(device):
    """The pattern of a run applied to the values of 8 others."""
    gpu = device.type == "cuda"
    kernels = "triton" if gpu else "torch"
    n_values, shape = 8, (64 if gpu else 2, 12, 512, 64)
    batch, n_heads, n_ctx, d_head = shape

    def make(device, dtype, small):
        sizes = (1, n_heads, min(CHECKED, n_ctx), d_head) if small else shape
        q, k = (heads(*sizes, device=device, dtype=dtype) for _ in range(2))
        _, lse = ops.attention_and_lse(q, k, k, kernels="torch")
        values = heads(n_values, *sizes, device=device, dtype=dtype)
        return q, k, lse, values, ops.frozen_pattern(q.float(), k.float(), lse).to(dtype)

    def frozen(q, k, lse, values, pattern, kernels=kernels):
        return ops.frozen_attention(q, k, lse, values, kernels=kernels)

    def one_by_one(q, k, lse, values, pattern):
        return torch.stack([sdpa(q, k, v) for v in values])

    def cached(q, k, lse, values, pattern):
        return pattern @ values

    yield Comparison(
        f"frozen, {n_values} values, T {n_ctx}",
        "forward",
        2 * (1 + n_values) * batch * n_heads * d_head * pairs(n_ctx),
        {"values": n_values, "batch": batch, "n_heads": n_heads, "n_ctx": n_ctx, "d_head": d_head},
        make,
        functools.partial(frozen, kernels="reference"),
        {"ours": frozen, "a call of SDPA for each": one_by_one, "bmm, pattern in memory": cached},
    )


def statistics_comparisons(device):
    """Prefix matching and previous token, of the heads of a layer."""
    if device.type == "cuda":
        sizes = [(8192 // n_ctx, 12, n_ctx, 64) for n_ctx in (512, 2048, 8192)]
    else:
        sizes = [(1, 12, n_ctx, 64) for n_ctx in (512, 2048)]
    return [statistics_comparison(shape, device) for shape in sizes]


def statistics_comparison(shape, device):
    batch, n_heads, n_ctx, d_head = shape
    kernels = "triton" if device.type == "cuda" else "torch"

    def make(device, dtype, small):
        sizes = (1, n_heads, min(CHECKED, n_ctx), d_head) if small else shape
        q, k = (heads(*sizes, device=device, dtype=dtype) for _ in range(2))
        _, lse = ops.attention_and_lse(q, k, k, kernels="torch")
        return q, k, lse, torch.randint(200, (sizes[0], sizes[2]), device=device)

    def mass(q, k, lse, tokens):
        return ops.head_mass(q, k, lse, tokens, kernels=kernels)

    return Comparison(
        f"statistics, T {n_ctx}",
        "forward",
        2 * batch * n_heads * d_head * pairs(n_ctx),
        dict(zip(("batch", "n_heads", "n_ctx", "d_head"), shape, strict=True)),
        make,
        mass_of_pattern,
        {"ours": mass, "from the whole pattern": mass_of_pattern},
    )


def mass_of_pattern(q, k, lse, tokens):
    """As anybody would write it: the pattern and a mask of matching keys in memory."""
    pattern = ops.frozen_pattern(q, k, lse)
    keys = metrics.prefix_matching_keys(tokens)
    matching = (pattern * keys[:, None]).sum(dim=(0, 2, 3))
    return torch.stack([matching, pattern.diagonal(-1, 2, 3).sum(dim=(0, 2))])


# --- losses


def eager_loss(resid, W_U, targets):
    return F.cross_entropy((resid @ W_U).float(), targets, reduction="none")


def pytorch_loss(resid, W_U, targets):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(resid, W_U.T, targets, reduction="none", options=options)


def liger_loss(resid, W_U, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(resid, W_U.T, targets, reduction="none")


def loss_comparisons(device):
    """On a GPU as many rows as the vocabulary of the paper has tokens."""
    if device.type == "cuda":
        shapes = [(2**16, 768, 2**16), (2**16, 768, 50257)]
    else:
        shapes = [(2048, 128, 1024), (512, 768, 50257)]
    return [loss_comparison(s, mode, device) for s in shapes for mode in ("forward", "both")]


def loss_comparison(shape, mode, device):
    gpu = device.type == "cuda"
    n_rows, d_model, d_vocab = shape

    def make(device, dtype, small):
        rows = min(CHECKED, n_rows) if small else n_rows
        resid = torch.randn(rows, d_model, device=device, dtype=dtype)
        W_U = torch.randn(d_model, d_vocab, device=device, dtype=dtype) * d_model**-0.5
        return resid, W_U, torch.randint(d_vocab, (rows,), device=device)

    return Comparison(
        f"loss, {n_rows} x {d_model} x {d_vocab}",
        mode,
        2 * {"forward": 1, "both": 3}[mode] * n_rows * d_model * d_vocab,
        dict(zip(("n_rows", "d_model", "d_vocab"), shape, strict=True)),
        make,
        functools.partial(linear_cross_entropy, kernels="reference"),
        {
            "ours": functools.partial(linear_cross_entropy, kernels="triton" if gpu else "torch"),
            "cross-entropy, eager": eager_loss,
            "cross-entropy, compiled": torch.compile(eager_loss, dynamic=False) if gpu else None,
            "F.linear_cross_entropy": pytorch_loss,
            "Liger": liger_loss if gpu else None,
        },
    )


COMPARISONS = {
    "attention": attention_comparisons,
    "frozen": frozen_comparisons,
    "statistics": statistics_comparisons,
    "loss": loss_comparisons,
}
