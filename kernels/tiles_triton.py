"""What the attention kernels share: how a program finds its place, loads rows and walks along keys
or queries, and how it is launched.

Tensors are [batch, head, pos, d_head], with any strides between rows. The block of rows that a
program owns it reads by pointers; what it walks along, tile by tile, may be a tensor descriptor
(`tiles`). A walk has three stretches: only the tiles that the window's left edge or the diagonal
crosses are compared with the query's position; those between are visible whole.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = torch.float32, torch.float16, torch.bfloat16  # that kernels take
LOG2_E = tl.constexpr(1.4426950408889634)
# below any score or logit, but finite: all of a tile may be hidden, and inf - inf is NaN
LOWEST = tl.constexpr(-1e30)
UNLIMITED = tl.constexpr(2**30)  # a window longer than any text
ROWS = 64  # of a block in kernels that only read and write


@triton.jit
def place(n_heads, n_ctx, BLOCK: tl.constexpr):
    """This program's block, batch row and head."""
    n_blocks = tl.cdiv(n_ctx, BLOCK)
    row = tl.program_id(0) // n_blocks
    return tl.program_id(0) % n_blocks, row // n_heads, row % n_heads


@triton.jit
def place_of_queries(windows, n_heads, n_ctx, BLOCK_QUERY: tl.constexpr):
    """This program's batch row, head, first query and window. The longest walks along the keys
    start first, so that none is left over at the end.
    """
    block, batch, head = place(n_heads, n_ctx, BLOCK_QUERY)
    first_query = (tl.cdiv(n_ctx, BLOCK_QUERY) - 1 - block) * BLOCK_QUERY
    window = UNLIMITED if windows is None else tl.load(windows + head)
    return batch, head, first_query, window


@triton.jit
def row_pointers(x, strides, batch, head, first, BLOCK: tl.constexpr, D_HEAD: tl.constexpr):
    """Pointers to BLOCK rows of a head from position `first` on, [BLOCK, D_HEAD]."""
    x += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    pos = first + tl.arange(0, BLOCK)
    return x + pos[:, None] * strides[2] + tl.arange(0, D_HEAD)[None, :]


@triton.jit
def rows_inside(first, n_ctx, BLOCK: tl.constexpr):
    """Which of the positions from `first` on exist, [BLOCK, 1]."""
    pos = first + tl.arange(0, BLOCK)[:, None]
    return (pos >= 0) & (pos < n_ctx)


@triton.jit
def load_rows(x, strides, batch, head, first, n_ctx, BLOCK: tl.constexpr, D_HEAD: tl.constexpr):
    """Those rows; 0 where there is no such position. x: a pointer or a tensor descriptor."""
    if isinstance(x, tl.tensor_descriptor):
        return x.load([batch, head, first, 0]).reshape(BLOCK, D_HEAD)
    else:
        at = row_pointers(x, strides, batch, head, first, BLOCK, D_HEAD)
        return tl.load(at, mask=rows_inside(first, n_ctx, BLOCK), other=0.0)


@triton.jit
def visible(queries, keys, window):
    return (keys <= queries) & (keys > queries - window)


@triton.jit
def key_stretches(first_query, window, n_ctx, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr):
    """Where the three stretches of a walk along the keys begin and end: left edge, whole, diagonal.

    The second is the tiles of which every query of the block sees every key.
    """
    start = tl.maximum(first_query - window + 1, 0) // BLOCK_KEY * BLOCK_KEY
    stop = tl.minimum(first_query + BLOCK_QUERY, n_ctx)
    whole_stop = first_query // BLOCK_KEY * BLOCK_KEY
    last_left_edge = tl.maximum(first_query + BLOCK_QUERY - window, 0)
    whole_start = tl.minimum(tl.cdiv(last_left_edge, BLOCK_KEY) * BLOCK_KEY, whole_stop)
    return start, tl.maximum(whole_start, start), whole_stop, stop


@triton.jit
def query_stretches(first_key, window, n_ctx, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr):
    """The same for a walk along the queries: diagonal, whole, and the right edge, which is the
    window's or the end of the text.
    """
    start = first_key // BLOCK_QUERY * BLOCK_QUERY
    stop = tl.minimum(first_key + BLOCK_KEY - 1 + window, n_ctx)
    below = tl.cdiv(first_key + BLOCK_KEY, BLOCK_QUERY) * BLOCK_QUERY
    whole_start = tl.minimum(below, n_ctx)
    whole_stop = tl.minimum(first_key + window, n_ctx) // BLOCK_QUERY * BLOCK_QUERY
    return start, whole_start, tl.maximum(whole_stop, whole_start), stop


def on_their_gpu(op):
    """Decorator: launches kernels on the GPU of the first argument, which Triton by itself does on
    the current one.
    """

    @functools.wraps(op)
    def launched(x, *more):
        with torch.cuda.device_of(x):
            return op(x, *more)

    return launched


def by_size(*configs):
    """A row of a launch table: {d_head: configuration}."""
    return dict(zip((16, 32, 64, 128), configs, strict=True))


def launch_config(configs, kernel, x):
    """How to start a kernel on this GPU for heads like those of x: block sizes, warps, stages."""
    on = "float32" if x.dtype == torch.float32 else architecture()
    names = "BLOCK_QUERY", "BLOCK_KEY", "num_warps", "num_stages", "GROUP"
    return dict(zip(names, configs[on, kernel][x.shape[-1]], strict=False))


def architecture():
    """Whose configurations suit the GPU in use: 80, 90 or 100. Consumer chips have Ampere's matrix
    instructions, but less shared memory.
    """
    arch = triton.runtime.driver.active.get_current_target().arch
    return 100 if 100 <= arch < 120 else 90 if arch == 90 else 80


def programs(x, block):
    """The grid: a program for each block of each head of x [batch, head, pos, d_head]."""
    batch, n_heads, n_ctx, _ = x.shape[-4:]
    return (batch * n_heads * triton.cdiv(n_ctx, block),)


def rows(x):
    """x as a kernel takes it: itself and its strides over batch, head and pos."""
    return x, x.stride()[:-1]


def tiles(x, block):
    """The same for what a kernel walks along, `block` rows at a time. From sm_90 on a tensor
    descriptor lets the hardware bring tiles to the tensor cores on its own; before, and in float32,
    whose products are made in registers, descriptors cost more of those than they save.
    """
    if architecture() < 90 or x.dtype == torch.float32:
        return rows(x)
    block_shape = [1] * (x.dim() - 2) + [block, x.shape[-1]]
    return TensorDescriptor(x, x.shape, x.stride(), block_shape), x.stride()[:-1]


def readable(x):
    """x if tensor descriptors can describe it (whole rows, all strides multiples of 16 bytes), else
    a copy.
    """
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def padded(x):
    """Head sizes between the powers of two, with zeros up to the next."""
    missing = max(16, triton.next_power_of_2(x.shape[-1])) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x  # F.pad copies, even to add nothing


def empty_rows(x, dtype=None):
    """Memory for a [batch, head, pos, d_head], laid out [batch, pos, head, d_head]: as projections
    make their inputs and want their outputs.
    """
    *batch, n_heads, n_ctx, d_head = x.shape
    return x.new_empty(*batch, n_ctx, n_heads, d_head, dtype=dtype).transpose(-3, -2)


def window_tensor(windows, q):
    """Each head's window on the device, int32; None if every head sees everything."""
    if windows is None or min(windows) >= q.shape[2]:
        return None
    return _on_device(tuple(windows), q.device)


@functools.lru_cache  # a copy to the device makes the host wait
def _on_device(windows, device):
    return torch.tensor([min(w, UNLIMITED.value) for w in windows], dtype=torch.int32).to(device)
