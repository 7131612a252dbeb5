"""Losses straight from the residual stream on a GPU: what kernels/cross_entropy.py defines, in
Triton. The logits of one step at the paper's sizes would fill 128 GiB; here they never leave the
chip.

Both kernels walk alike. A program owns a block of rows and a stretch of the vocabulary, and goes
along it tile by tile:

    logits of a tile = sum over slices of d_model of  resid [ROWS, DEPTH] @ W_U [DEPTH, COLUMNS]

Forward (`statistics_kernel`): of all its tiles a row keeps three numbers: the largest logit so far,
the sum of exp(logit - largest), rescaled whenever a larger one turns up, and the target's logit.
Programs that share the vocabulary each write their own three, which are put together at the end:

    loss = (largest - target's) + log(sum)

Backward (`dlogits_kernel`): a second pass over the same tiles gives the gradient by the logits,

    weight exp(logit - largest) / sum - weight [column is the target]

written in the type of the inputs for one chunk of rows at a time. Two library products turn the
chunk into its rows of dresid and its share of dW_U, which adds up in float32. Fusing these as well
would have every program add to one dresid and one dW_U in memory: six times the traffic of the
chunks, in an order that differs from run to run. Computing the logits twice costs a third more
arithmetic than keeping them, and no memory.

What decides the speed is how often a number that was fetched is used. A tile of 128 x 256 takes 50
million operations for 0.6 MB, nearly all of it from the second-level cache, because programs that
run together read the same columns of W_U; with smaller tiles that cache would be the limit. With
`flatten` the compiler makes one loop of the loops over tiles and slices: the next tile is on its
way while this one is reduced.

Hopper and later fetch tiles with their copy engine, through TMA descriptors; Ampere, later chips
with no more shared memory than it has, and float32, which has to pass through registers, by
pointers.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import refuse_second_derivatives
from kernels.cross_entropy import IGNORED
from kernels.tiles_triton import (
    DTYPES,
    LOWEST,
    architecture,
    on_their_gpu,
    readable,
)

# of the gradient by the logits in memory at once: 4096 rows of 2^16 in bfloat16, for which the
# library's products fill a chip
CHUNK_BYTES = 512 * 2**20
# programs that share the vocabulary until there are this many: about four for each multiprocessor
PROGRAMS = 512
# matrices are padded with zeros to rows of that many elements: TMA needs them to start at multiples
# of 16 bytes, and pointers are fast only there
ALIGNMENT = 16

# ROWS, COLUMNS, DEPTH, warps, stages: for 16-bit numbers by generation (`architecture`); float32 is
# exact and slow everywhere, for no matrix instruction multiplies it
TILES = {
    80: (128, 128, 32, 8, 4),
    90: (128, 256, 64, 8, 3),
    100: (128, 128, 64, 8, 4),
    "float32": (64, 64, 16, 4, 3),
}


@on_their_gpu
def linear_cross_entropy(resid, W_U, targets):
    """Cross-entropy of every row in nats, float32: resid [row, d_model], W_U [d_model, d_vocab],
    targets [row] -> [row]; differentiable in resid and W_U, both float32, float16 or bfloat16.

    A target of -100 costs 0; another that is no token costs infinity.
    """
    if resid.dtype != W_U.dtype or resid.dtype not in DTYPES:
        raise TypeError(f"{resid.dtype} @ {W_U.dtype}: both float32, float16 or bfloat16 needed")
    d_model, d_vocab = W_U.shape
    to_width, to_depth = -d_vocab % ALIGNMENT, -d_model % ALIGNMENT
    resid, W_U = _padded(resid, to_depth, 0), _padded(W_U, to_width, to_depth)
    return _LinearCrossEntropy.apply(resid, W_U, targets.contiguous(), d_vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    """Of matrices that are padded already; autograd takes the padding off the gradients again."""

    @staticmethod
    def forward(ctx, resid, W_U, targets, d_vocab):
        n_shares = triton.cdiv(d_vocab, _share(resid, d_vocab))
        parts = resid.new_empty(3, n_shares, len(resid), dtype=torch.float32)
        _launch(statistics_kernel, resid, W_U, d_vocab, (targets, *parts))
        part_largest, part_sum, part_chosen = parts
        largest = part_largest.amax(0)
        total = (part_sum * (part_largest - largest).exp()).sum(0)
        losses = (largest - part_chosen.amax(0)) + total.log()
        ctx.save_for_backward(resid, W_U, targets, largest, total)
        ctx.d_vocab = d_vocab
        return losses.masked_fill_(targets == IGNORED, 0.0)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        resid, W_U, targets, largest, total = ctx.saved_tensors
        weight = torch.where(targets == IGNORED, 0.0, grad)
        per_row = (targets, largest, weight / total, weight)
        for_resid, for_W_U = ctx.needs_input_grad[:2]
        dresid = torch.empty_like(resid) if for_resid else None
        dW_U = torch.zeros_like(W_U, dtype=torch.float32) if for_W_U else None
        size = _chunk(len(resid), W_U, tile=_tile(resid)[0])
        buffer = resid.new_empty(min(size, len(resid)), W_U.shape[1])
        for start in range(0, len(resid), size):
            rows = slice(start, min(start + size, len(resid)))
            dlogits = buffer[: rows.stop - start]
            of_rows = (numbers[rows] for numbers in per_row)
            _launch(dlogits_kernel, resid[rows], W_U, ctx.d_vocab, of_rows, dlogits)
            if for_resid:
                torch.mm(dlogits, W_U.T, out=dresid[rows])
            if for_W_U:
                _add_product(dW_U, resid[rows].T, dlogits)
        return dresid, dW_U.to(W_U.dtype) if for_W_U else None, None, None


def _chunk(n_rows, W_U, tile):
    """Rows whose gradient by the logits is in memory at once: about equal chunks, of whole tiles if
    one fits. A last chunk of few rows would cost a product as large as any other's.
    """
    most = max(1, CHUNK_BYTES // (W_U.shape[1] * W_U.itemsize))
    if most < tile:
        return most
    most -= most % tile
    equal = triton.cdiv(n_rows, triton.cdiv(n_rows, most))
    return triton.cdiv(equal, tile) * tile


def _padded(matrix, columns, rows):
    if columns or rows:
        return F.pad(matrix, (0, columns, 0, rows))
    return readable(matrix.contiguous())


def _add_product(total, a, b):
    """total += a @ b, in float32 whatever a and b are; in two steps, because addmm with a float32
    total of 16-bit products does not work in every PyTorch (pytorch#154086).
    """
    if a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:  # the interpreter's tests
        total += a.float() @ b.float()


def _tile(resid):
    return TILES["float32" if resid.dtype == torch.float32 else architecture()]


def _share(resid, d_vocab):
    """Columns for each program, so that there are about PROGRAMS of them."""
    n_rows, n_columns, *_ = _tile(resid)
    n_tiles = triton.cdiv(d_vocab, n_columns)
    n_shares = min(n_tiles, triton.cdiv(PROGRAMS, triton.cdiv(len(resid), n_rows)))
    return triton.cdiv(n_tiles, n_shares) * n_columns


def _launch(kernel, resid, W_U, d_vocab, per_row, dlogits=None):
    """Runs one of the kernels below."""
    n_rows, n_columns, depth, warps, stages = _tile(resid)
    by_descriptor = architecture() >= 90 and resid.dtype != torch.float32

    def tiled(matrix, *tile):
        return TensorDescriptor.from_tensor(matrix, list(tile)) if by_descriptor else matrix

    share = _share(resid, d_vocab)
    outputs = [] if dlogits is None else [tiled(dlogits, n_rows, n_columns)]
    kernel[triton.cdiv(len(resid), n_rows), triton.cdiv(d_vocab, share)](
        tiled(resid, n_rows, depth), tiled(W_U, depth, n_columns), *per_row, *outputs,
        len(resid), *W_U.shape, d_vocab, share,
        ROWS=n_rows, COLUMNS=n_columns, DEPTH=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "d_vocab"])
def statistics_kernel(
    resid, W_U, targets, largest_ptr, sum_ptr, chosen_ptr,
    n_rows, d_model, width, d_vocab, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Largest logit, sum of exponentials and target's logit of a block of rows in one share of the
    vocabulary; each output [share of the vocabulary, row].
    """
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    target = load_targets(targets, rows, n_rows, d_vocab)
    columns = tl.arange(0, COLUMNS)[None, :]  # of a tile
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    chosen = tl.full([ROWS], float("-inf"), tl.float32)
    start = tl.program_id(1) * share
    for column in tl.range(start, tl.minimum(start + share, d_vocab), COLUMNS, flatten=True):
        logits = logits_of_tile(
            resid, W_U, row, column, n_rows, d_model, width, ROWS, COLUMNS, DEPTH
        )
        logits = tl.where(columns < d_vocab - column, logits, float("-inf"))
        of_target = tl.where(columns == target - column, logits, float("-inf"))
        chosen = tl.maximum(chosen, tl.max(of_target, axis=1))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        total *= tl.exp(largest - larger)
        total += tl.sum(tl.exp(logits - larger[:, None]), axis=1)
        largest = larger
    at = tl.program_id(1) * n_rows + rows
    tl.store(largest_ptr + at, largest, mask=rows < n_rows)
    tl.store(sum_ptr + at, total, mask=rows < n_rows)
    tl.store(chosen_ptr + at, chosen, mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "d_vocab"])
def dlogits_kernel(
    resid, W_U, targets, largest_ptr, scale_ptr, weight_ptr, dlogits,
    n_rows, d_model, width, d_vocab, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient by the logits, [row, width], 0 in the padding; scale is weight / sum."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]  # of a tile
    inside = rows < n_rows
    target = load_targets(targets, rows, n_rows, d_vocab)
    largest = tl.load(largest_ptr + rows, mask=inside, other=0.0)[:, None]
    scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)[:, None]
    weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)[:, None]
    start = tl.program_id(1) * share
    for column in tl.range(start, tl.minimum(start + share, d_vocab), COLUMNS, flatten=True):
        logits = logits_of_tile(
            resid, W_U, row, column, n_rows, d_model, width, ROWS, COLUMNS, DEPTH
        )
        gradient = tl.exp(logits - largest) * scale
        gradient = tl.where(columns == target - column, gradient - weight, gradient)
        gradient = tl.where(columns < d_vocab - column, gradient, 0.0)
        if isinstance(dlogits, tl.tensor_descriptor):
            dlogits.store([row, column], gradient.to(dlogits.dtype))
        else:
            at = dlogits + rows[:, None].to(tl.int64) * width + column + columns
            stored = inside[:, None] & (column + columns < width)
            tl.store(at, gradient.to(dlogits.dtype.element_ty), mask=stored)


@triton.jit
def load_targets(targets, rows, n_rows, d_vocab):
    """[row, 1]; -1 for what is no token: 64 bits are compared before they become 32."""
    target = tl.load(targets + rows, mask=rows < n_rows, other=-1)
    is_token = (target >= 0) & (target < d_vocab)
    return tl.where(is_token, target, -1).to(tl.int32)[:, None]


@triton.jit
def logits_of_tile(
    resid, W_U, row, column, n_rows, d_model, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """resid @ W_U at [row, column] on: [ROWS, COLUMNS], float32."""
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for depth in tl.range(0, d_model, DEPTH):
        x = load_tile(resid, row, depth, n_rows, d_model, ROWS, DEPTH)
        w = load_tile(W_U, depth, column, d_model, width, DEPTH, COLUMNS)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    return logits


@triton.jit
def load_tile(
    matrix, row, column, n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile at [row, column] of a matrix [n_rows, n_columns], zeros outside it. matrix: a
    descriptor or a pointer.
    """
    if isinstance(matrix, tl.tensor_descriptor):
        tile = matrix.load([row, column])
    else:
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (row + rows < n_rows) & (column + columns < n_columns)
        start = matrix + tl.cast(row, tl.int64) * n_columns + column
        tile = tl.load(start + rows * n_columns + columns, mask=inside, other=0.0)
    return tile
