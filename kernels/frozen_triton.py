"""The attention pattern of another run, in Triton: applied to many value tensors at once, or
counted.

A recorded log-sum-exp turns scores into the pattern with no running maximum and no second pass:

    pattern_ij = exp(score_ij - lse_i)

so that whatever only needs the pattern is one walk along the keys, and no pattern is in memory.
`attention.py` defines the three ops; `tiles_triton.py` explains the walk.

- Frozen attention. Scores and exp are computed once for GROUP value tensors, whose sums a program
  carries side by side: with A of them, 1 + A products a tile where A runs of attention take 2 A,
  and A reads of values and writes of z, nothing else that grows with A. A group that is not full
  repeats its last tensor.
- Index patterns. All attention on one given key: rows of the values, copied.
- Head mass. Prefix matching compares token ids where the pattern is, [BLOCK_QUERY, BLOCK_KEY] at a
  time: 8192 tokens need 8192 token ids, not a mask of 67 million. The attention on the previous
  token is one product of two rows for each query.
"""

import torch
import triton
import triton.language as tl

from kernels.attention_triton import smear_keys
from kernels.tiles_triton import (
    LOG2_E,
    ROWS,
    by_size,
    empty_rows,
    key_stretches,
    launch_config,
    load_rows,
    on_their_gpu,
    padded,
    place,
    place_of_queries,
    programs,
    readable,
    row_pointers,
    rows,
    rows_inside,
    tiles,
    visible,
    window_tensor,
)

# as in attention_triton.py, but on 90 only heads of 64 were measured; the fifth number of a frozen
# row is GROUP
CONFIGS = {
    (80, "frozen"): by_size(
        (64, 64, 4, 2, 2), (64, 64, 4, 2, 2), (128, 64, 8, 2, 2), (64, 64, 8, 2, 2)
    ),
    (80, "mass"): by_size((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    (90, "frozen"): by_size(
        (64, 64, 4, 2, 4), (64, 64, 4, 2, 4), (64, 64, 4, 2, 4), (128, 64, 8, 2, 2)
    ),
    (90, "mass"): by_size((64, 32, 4, 4), (64, 32, 4, 4), (64, 32, 4, 4), (128, 64, 8, 3)),
    (100, "frozen"): by_size(
        (128, 64, 8, 3, 2), (128, 64, 8, 3, 2), (128, 64, 8, 3, 2), (128, 32, 8, 3, 2)
    ),
    (100, "mass"): by_size((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("float32", "frozen"): by_size(
        (16, 32, 4, 2, 2), (16, 32, 4, 2, 2), (16, 32, 4, 2, 2), (16, 16, 8, 2, 1)
    ),
    ("float32", "mass"): by_size((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 8, 2)),
}  # fmt: skip


@triton.jit
def _load_values(
    x, strides, a, batch, head, first, n_ctx, BLOCK: tl.constexpr, D_HEAD: tl.constexpr
):
    """`load_rows` of the a-th of stacked tensors [a, batch, head, pos, d_head]."""
    if isinstance(x, tl.tensor_descriptor):
        return x.load([a, batch, head, first, 0]).reshape(BLOCK, D_HEAD)
    else:
        x += a.to(tl.int64) * strides[0]
        of_one = (strides[1], strides[2], strides[3])
        return load_rows(x, of_one, batch, head, first, n_ctx, BLOCK, D_HEAD)


@triton.jit
def _frozen_kernel(
    q, q_strides, k, k_strides, values, values_strides, z, z_strides, lse, windows,
    n_values, n_heads, n_ctx, scale,
    D_HEAD: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """z of a block of queries for GROUP of the value tensors."""
    batch, head, first_query, window = place_of_queries(windows, n_heads, n_ctx, BLOCK_QUERY)
    queries = first_query + tl.arange(0, BLOCK_QUERY)
    first_value = tl.program_id(1) * GROUP

    q = load_rows(q, q_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD)
    lse += (batch.to(tl.int64) * n_heads + head) * n_ctx
    lse = tl.load(lse + queries, mask=queries < n_ctx, other=0.0) * LOG2_E
    sums = ()
    for _ in tl.static_range(GROUP):
        sums = sums + (tl.zeros([BLOCK_QUERY, D_HEAD], tl.float32),)
    bounds = key_stretches(first_query, window, n_ctx, BLOCK_QUERY, BLOCK_KEY)
    for stretch in tl.static_range(1 if windows is None else 0, 3):
        for first_key in tl.range(bounds[stretch], bounds[stretch + 1], BLOCK_KEY):
            keys = first_key + tl.arange(0, BLOCK_KEY)
            k_tile = load_rows(k, k_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD)
            scores = tl.dot(q, k_tile.T, input_precision="ieee")
            pattern = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
            if stretch != 1:
                seen = visible(queries[:, None], keys[None, :], window)
                pattern = tl.where(seen, pattern, 0.0)
            pattern = pattern.to(k_tile.dtype)
            new_sums = ()
            for i in tl.static_range(GROUP):
                a = tl.minimum(first_value + i, n_values - 1)
                v_tile = _load_values(
                    values, values_strides, a, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD
                )
                new_sums = new_sums + (tl.dot(pattern, v_tile, sums[i], input_precision="ieee"),)
            sums = new_sums

    of_one = (z_strides[1], z_strides[2], z_strides[3])
    for i in tl.static_range(GROUP):
        a = tl.minimum(first_value + i, n_values - 1).to(tl.int64)
        to = z + a * z_strides[0]
        at = row_pointers(to, of_one, batch, head, first_query, BLOCK_QUERY, D_HEAD)
        inside = rows_inside(first_query, n_ctx, BLOCK_QUERY)
        tl.store(at, sums[i].to(z.dtype.element_ty), mask=inside)


@triton.jit
def _index_kernel(
    index, index_strides, values, values_strides, z, z_strides, n_heads, n_ctx,
    D_HEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block, batch, head = place(n_heads, n_ctx, ROWS)
    a = tl.program_id(1).to(tl.int64)
    queries = block * ROWS + tl.arange(0, ROWS)
    index += batch.to(tl.int64) * index_strides[0] + head.to(tl.int64) * index_strides[1]
    key = tl.load(index + queries * index_strides[2], mask=queries < n_ctx, other=-1)[:, None]
    values += a * values_strides[0] + batch.to(tl.int64) * values_strides[1]
    values += head.to(tl.int64) * values_strides[2]
    at = values + key * values_strides[3] + tl.arange(0, D_HEAD)[None, :]
    chosen = tl.load(at, mask=(key >= 0) & (key < n_ctx), other=0.0)
    of_one = (z_strides[1], z_strides[2], z_strides[3])
    at = row_pointers(z + a * z_strides[0], of_one, batch, head, block * ROWS, ROWS, D_HEAD)
    tl.store(at, chosen, mask=rows_inside(block * ROWS, n_ctx, ROWS))


@triton.jit
def _mass_kernel(
    q, q_strides, k, k_strides, k_tiles, k_tile_strides, lse, windows, tokens, mass,
    offset, n_heads, n_ctx, scale,
    D_HEAD: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """Attention of a block of queries on matching keys and on the previous token: two numbers."""
    batch, head, first_query, window = place_of_queries(windows, n_heads, n_ctx, BLOCK_QUERY)
    queries = first_query + tl.arange(0, BLOCK_QUERY)
    scale *= LOG2_E

    q = load_rows(q, q_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD)
    lse += (batch.to(tl.int64) * n_heads + head) * n_ctx
    # a query past the end has no pattern: exp(score - inf) = 0
    lse = tl.load(lse + queries, mask=queries < n_ctx, other=float("inf")) * LOG2_E
    tokens += batch.to(tl.int64) * n_ctx
    token = tl.load(tokens + queries, mask=queries < n_ctx, other=-1)

    before = load_rows(k, k_strides, batch, head, first_query - 1, n_ctx, BLOCK_QUERY, D_HEAD)
    score_before = tl.sum(q.to(tl.float32) * before.to(tl.float32), axis=1)
    previous = tl.exp2(score_before * scale - lse)
    previous = tl.sum(tl.where((queries > 0) & (window > 1), previous, 0.0))

    matching = tl.zeros([BLOCK_QUERY], tl.float32)
    bounds = key_stretches(first_query, window, n_ctx, BLOCK_QUERY, BLOCK_KEY)
    for stretch in tl.static_range(1 if windows is None else 0, 3):
        for first_key in tl.range(bounds[stretch], bounds[stretch + 1], BLOCK_KEY):
            keys = first_key + tl.arange(0, BLOCK_KEY)
            copies = keys - offset  # position 0, the start token, is nobody's copy
            copied = tl.load(tokens + copies, mask=(copies >= 1) & (copies < n_ctx), other=-2)
            counts = (copied[None, :] == token[:, None]) & (copies[None, :] < queries[:, None])
            if stretch != 1:
                counts = counts & visible(queries[:, None], keys[None, :], window)
            k_tile = load_rows(
                k_tiles, k_tile_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD
            )
            scores = tl.dot(q, k_tile.T, input_precision="ieee")
            pattern = tl.exp2(scores * scale - lse[:, None])
            matching += tl.sum(tl.where(counts, pattern, 0.0), axis=1)

    tl.store(mass + tl.program_id(0), tl.sum(matching))
    tl.store(mass + tl.num_programs(0) + tl.program_id(0), previous)


@on_their_gpu
def frozen_attention(q, k, lse, values, alpha=None, windows=None):
    """See `attention.frozen_attention`; values of the dtype of q and k."""
    d_head, n_values = q.shape[3], len(values)
    q, k, values = (readable(padded(x)) for x in (q, k, values))
    keys = k if alpha is None else smear_keys(k, alpha)
    z = empty_rows(values)
    config = launch_config(CONFIGS, "frozen", q)
    config["GROUP"] = min(config["GROUP"], triton.next_power_of_2(n_values))
    blocks, block_key = programs(q, config["BLOCK_QUERY"]), config["BLOCK_KEY"]
    _frozen_kernel[*blocks, triton.cdiv(n_values, config["GROUP"])](
        *rows(q), *tiles(keys, block_key), *tiles(values, block_key), *rows(z), lse.contiguous(),
        window_tensor(windows, q), n_values, *q.shape[1:3], d_head**-0.5, q.shape[3], **config,
    )  # fmt: skip
    return z[..., :d_head]


@on_their_gpu
def index_attention(index, values):
    """See `attention.index_attention`."""
    d_head = values.shape[4]
    values = readable(padded(values))
    z = empty_rows(values)
    _index_kernel[*programs(values, ROWS), len(values)](
        index, index.stride(), *rows(values), *rows(z), *values.shape[2:4], values.shape[4], ROWS
    )
    return z[..., :d_head]


@on_their_gpu
def head_mass(q, k, lse, tokens, alpha=None, windows=None, offset=1):
    """See `attention.head_mass`."""
    batch, n_heads, n_ctx, d_head = q.shape
    q, k = readable(padded(q)), readable(padded(k))
    keys = k if alpha is None else smear_keys(k, alpha)
    config = launch_config(CONFIGS, "mass", q)
    grid = programs(q, config["BLOCK_QUERY"])
    mass = q.new_empty(2, batch, n_heads, grid[0] // (batch * n_heads), dtype=torch.float32)
    _mass_kernel[grid](
        *rows(q), *rows(keys), *tiles(keys, config["BLOCK_KEY"]), lse.contiguous(),
        window_tensor(windows, q), tokens.to(torch.int32).contiguous(), mass,
        offset, n_heads, n_ctx, d_head**-0.5, q.shape[3], **config,
    )  # fmt: skip
    return mass.sum(dim=(1, 3))
