"""Causal attention in Triton, forward and backward, with smeared keys and local windows.

The op is that of `attention.py`, which defines it:

    key'_j     = share key_j + (1 - share) key_{j-1}      share = sigmoid(alpha); key'_0 = key_0
    score_ij   = scale query_i . key'_j                   where 0 <= i - j < window, elsewhere -inf
    z_i        = sum_j exp(score_ij - lse_i) value_j      lse_i = log sum_j exp(score_ij)

Written out, the scores and the pattern are 2 T^2 numbers for each head, written once and read again
and again; q, k, v and z are 4 T d_head. So no score ever leaves the chip:

- Forward. A program owns a block of queries and walks along the keys, a tile at a time. It carries
  for each query the highest score so far, the sum of exp(score - highest) and the same sum weighted
  by the values; when a higher score turns up, both sums are scaled down to it. At the end the one
  divided by the other is z, and lse = highest + log(sum) is kept: T numbers that stand for the T^2.
- Backward. With lse the pattern is one subtraction and one exp away, in any order:

      dvalue_j = sum_i pattern_ij dz_i
      dscore_ij = pattern_ij (dz_i . value_j - delta_i)      delta_i = dz_i . z_i
      dquery_i = scale sum_j dscore_ij key'_j,    dkey'_j = scale sum_i dscore_ij query_i

  Two kernels: one owns queries and walks along keys (dquery, delta), one owns keys and walks along
  queries (dkey', dvalue). Seven matrix products for a tile where one kernel needs five, but nobody
  adds to anybody else's sums: no atomics, the same bits every run. The second works on transposed
  scores, because transposing a product's result between two products is where compilers err.
- Smeared keys are written to memory once, before (2 T d_head against T^2 d_head of work); after the
  backward pass each key collects its two shares of dkey', and alpha its gradient.

Softmax is done to base 2, as the hardware does it; lse is natural. Scores, sums and the gradients
of keys before unsmearing are float32, whatever the inputs are. How a program loads and walks is in
`tiles_triton.py`.
"""

import torch
import triton
import triton.language as tl

from kernels import refuse_second_derivatives
from kernels.tiles_triton import (
    DTYPES,
    LOG2_E,
    LOWEST,
    ROWS,
    UNLIMITED,
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
    query_stretches,
    readable,
    row_pointers,
    rows,
    rows_inside,
    tiles,
    visible,
    window_tensor,
)

LN_2 = tl.constexpr(0.6931471805599453)

# BLOCK_QUERY, BLOCK_KEY, num_warps, num_stages. 90: of those that do not spill the fastest, as seen
# on an H200 (heads of 16 and 32 among a few); small tiles win there, of which several programs
# share a multiprocessor. Not yet measured are 80 and 100: the largest tiles whose sums stay in
# registers, and on 80 whose stages fit the 99 KB of shared memory of consumer chips (86, 89, 120).
# float32, which has no tensor cores, goes by small ones on all of them.
CONFIGS = {
    (80, "forward"): by_size((64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 3)),
    (80, "dquery"): by_size((64, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    (80, "dkey"): by_size((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
    (90, "forward"): by_size((64, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 1)),
    (90, "dquery"): by_size((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
    (90, "dkey"): by_size((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 4)),
    (100, "forward"): by_size(
        (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2)
    ),
    (100, "dquery"): by_size((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    (100, "dkey"): by_size((64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 3)),
    ("float32", "forward"): by_size((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 8, 2)),
    ("float32", "dquery"): by_size((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 8, 2)),
    ("float32", "dkey"): by_size((32, 32, 4, 2), (32, 16, 4, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
}  # fmt: skip


@triton.jit
def _forward_kernel(
    q, q_strides, k, k_strides, v, v_strides, z, z_strides, lse, windows,
    n_heads, n_ctx, scale,
    D_HEAD: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """z and lse of a block of queries."""
    batch, head, first_query, window = place_of_queries(windows, n_heads, n_ctx, BLOCK_QUERY)
    queries = first_query + tl.arange(0, BLOCK_QUERY)
    scale *= LOG2_E

    q = load_rows(q, q_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD)
    highest = tl.full([BLOCK_QUERY], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_QUERY], tl.float32)
    weighted = tl.zeros([BLOCK_QUERY, D_HEAD], tl.float32)
    bounds = key_stretches(first_query, window, n_ctx, BLOCK_QUERY, BLOCK_KEY)
    for stretch in tl.static_range(1 if windows is None else 0, 3):
        for first_key in tl.range(bounds[stretch], bounds[stretch + 1], BLOCK_KEY):
            keys = first_key + tl.arange(0, BLOCK_KEY)
            k_tile = load_rows(k, k_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD)
            scores = tl.dot(q, k_tile.T, input_precision="ieee")
            if stretch != 1:
                seen = visible(queries[:, None], keys[None, :], window)
                scores = tl.where(seen, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
            pattern = tl.exp2(scores * scale - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(pattern, axis=1)
            v_tile = load_rows(v, v_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD)
            weighted *= shrink[:, None]
            weighted = tl.dot(pattern.to(v_tile.dtype), v_tile, weighted, input_precision="ieee")
            highest = new_highest

    at = row_pointers(z, z_strides, batch, head, first_query, BLOCK_QUERY, D_HEAD)
    weighted /= total[:, None]
    tl.store(at, weighted.to(z.dtype.element_ty), mask=rows_inside(first_query, n_ctx, BLOCK_QUERY))
    lse += (batch.to(tl.int64) * n_heads + head) * n_ctx
    tl.store(lse + queries, (highest + tl.log2(total)) * LN_2, mask=queries < n_ctx)


@triton.jit
def _dquery_kernel(
    q, q_strides, k, k_strides, v, v_strides, z, z_strides, dz, dz_strides, dq, dq_strides,
    lse, delta, windows, n_heads, n_ctx, scale,
    D_HEAD: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """dquery and delta of a block of queries."""
    batch, head, first_query, window = place_of_queries(windows, n_heads, n_ctx, BLOCK_QUERY)
    queries = first_query + tl.arange(0, BLOCK_QUERY)

    q = load_rows(q, q_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD)
    dz = load_rows(dz, dz_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD)
    z = load_rows(z, z_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD)
    row = (batch.to(tl.int64) * n_heads + head) * n_ctx
    lse = tl.load(lse + row + queries, mask=queries < n_ctx, other=0.0) * LOG2_E
    own_delta = tl.sum(dz.to(tl.float32) * z.to(tl.float32), axis=1)
    tl.store(delta + row + queries, own_delta, mask=queries < n_ctx)

    dq_tile = tl.zeros([BLOCK_QUERY, D_HEAD], tl.float32)
    bounds = key_stretches(first_query, window, n_ctx, BLOCK_QUERY, BLOCK_KEY)
    for stretch in tl.static_range(1 if windows is None else 0, 3):
        for first_key in tl.range(bounds[stretch], bounds[stretch + 1], BLOCK_KEY):
            keys = first_key + tl.arange(0, BLOCK_KEY)
            k_tile = load_rows(k, k_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD)
            v_tile = load_rows(v, v_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD)
            scores = tl.dot(q, k_tile.T, input_precision="ieee")
            pattern = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
            if stretch != 1:
                seen = visible(queries[:, None], keys[None, :], window)
                pattern = tl.where(seen, pattern, 0.0)
            dpattern = tl.dot(dz, v_tile.T, input_precision="ieee")
            dscores = (pattern * (dpattern - own_delta[:, None])).to(k_tile.dtype)
            dq_tile = tl.dot(dscores, k_tile, dq_tile, input_precision="ieee")

    at = row_pointers(dq, dq_strides, batch, head, first_query, BLOCK_QUERY, D_HEAD)
    dq_tile *= scale
    tl.store(at, dq_tile.to(dq.dtype.element_ty), mask=rows_inside(first_query, n_ctx, BLOCK_QUERY))


@triton.jit
def _dkey_kernel(
    q, q_strides, k, k_strides, v, v_strides, dz, dz_strides, dk, dk_strides, dv, dv_strides,
    lse, delta, windows, n_heads, n_ctx, scale,
    D_HEAD: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """dkey' and dvalue of a block of keys. Scores are [key, query] here."""
    block, batch, head = place(n_heads, n_ctx, BLOCK_KEY)
    first_key = block * BLOCK_KEY
    keys = first_key + tl.arange(0, BLOCK_KEY)
    window = UNLIMITED if windows is None else tl.load(windows + head)
    row = (batch.to(tl.int64) * n_heads + head) * n_ctx

    k = load_rows(k, k_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD)
    v = load_rows(v, v_strides, batch, head, first_key, n_ctx, BLOCK_KEY, D_HEAD)
    dk_tile = tl.zeros([BLOCK_KEY, D_HEAD], tl.float32)
    dv_tile = tl.zeros([BLOCK_KEY, D_HEAD], tl.float32)
    bounds = query_stretches(first_key, window, n_ctx, BLOCK_QUERY, BLOCK_KEY)
    for stretch in tl.static_range(3):
        for first_query in tl.range(bounds[stretch], bounds[stretch + 1], BLOCK_QUERY):
            queries = first_query + tl.arange(0, BLOCK_QUERY)
            q_tile = load_rows(q, q_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD)
            dz_tile = load_rows(
                dz, dz_strides, batch, head, first_query, n_ctx, BLOCK_QUERY, D_HEAD
            )
            # a query past the end adds nothing: its dz and delta are 0
            lse_tile = tl.load(lse + row + queries, mask=queries < n_ctx, other=0.0)
            delta_tile = tl.load(delta + row + queries, mask=queries < n_ctx, other=0.0)
            scores = tl.dot(k, q_tile.T, input_precision="ieee")
            pattern = tl.exp2(scores * (scale * LOG2_E) - lse_tile[None, :] * LOG2_E)
            if stretch != 1:
                seen = visible(queries[None, :], keys[:, None], window)
                pattern = tl.where(seen, pattern, 0.0)
            dv_tile = tl.dot(pattern.to(dz_tile.dtype), dz_tile, dv_tile, input_precision="ieee")
            dpattern = tl.dot(v, dz_tile.T, input_precision="ieee")
            dscores = (pattern * (dpattern - delta_tile[None, :])).to(q_tile.dtype)
            dk_tile = tl.dot(dscores, q_tile, dk_tile, input_precision="ieee")

    inside = rows_inside(first_key, n_ctx, BLOCK_KEY)
    at = row_pointers(dk, dk_strides, batch, head, first_key, BLOCK_KEY, D_HEAD)
    tl.store(at, (dk_tile * scale).to(dk.dtype.element_ty), mask=inside)
    at = row_pointers(dv, dv_strides, batch, head, first_key, BLOCK_KEY, D_HEAD)
    tl.store(at, dv_tile.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _smear_kernel(
    k, k_strides, smeared, smeared_strides, alpha, n_heads, n_ctx,
    D_HEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """key' of a block of keys; one before the first is 0 and has no share."""
    block, batch, head = place(n_heads, n_ctx, ROWS)
    first = block * ROWS
    share = tl.sigmoid(tl.load(alpha + head).to(tl.float32))
    key = load_rows(k, k_strides, batch, head, first, n_ctx, ROWS, D_HEAD).to(tl.float32)
    before = load_rows(k, k_strides, batch, head, first - 1, n_ctx, ROWS, D_HEAD).to(tl.float32)
    own = tl.where(first + tl.arange(0, ROWS) == 0, 1.0, share)[:, None]
    blend = before + own * (key - before)
    at = row_pointers(smeared, smeared_strides, batch, head, first, ROWS, D_HEAD)
    tl.store(at, blend.to(smeared.dtype.element_ty), mask=rows_inside(first, n_ctx, ROWS))


@triton.jit
def _unsmear_kernel(
    k, k_strides, dsmeared, dsmeared_strides, dk, dk_strides, dalpha, alpha, n_heads, n_ctx,
    D_HEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A key's gradient from the two smeared keys it is part of, and the block's part of alpha's."""
    block, batch, head = place(n_heads, n_ctx, ROWS)
    first = block * ROWS
    share = tl.sigmoid(tl.load(alpha + head).to(tl.float32))
    untouched = (first + tl.arange(0, ROWS) == 0)[:, None]
    here = load_rows(dsmeared, dsmeared_strides, batch, head, first, n_ctx, ROWS, D_HEAD)
    after = load_rows(dsmeared, dsmeared_strides, batch, head, first + 1, n_ctx, ROWS, D_HEAD)
    gradient = tl.where(untouched, 1.0, share) * here + (1 - share) * after
    at = row_pointers(dk, dk_strides, batch, head, first, ROWS, D_HEAD)
    tl.store(at, gradient.to(dk.dtype.element_ty), mask=rows_inside(first, n_ctx, ROWS))

    key = load_rows(k, k_strides, batch, head, first, n_ctx, ROWS, D_HEAD).to(tl.float32)
    before = load_rows(k, k_strides, batch, head, first - 1, n_ctx, ROWS, D_HEAD).to(tl.float32)
    by_share = tl.sum(tl.where(untouched, 0.0, here * (key - before)))
    tl.store(dalpha + tl.program_id(0), by_share * share * (1 - share))


@on_their_gpu
def attention(q, k, v, alpha=None, windows=None):
    """-> z [batch, head, pos, d_head], and lse [batch, head, pos], float32, which has no gradient;
    see `attention.attention`.

    q, k, v: float32, float16 or bfloat16, all three the same; head sizes up to 128.
    """
    d_head = q.shape[3]
    if d_head > 128:
        raise ValueError(f"d_head is {d_head}: the Triton kernels go up to 128")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(f"{q.dtype}, {k.dtype}, {v.dtype}: all float32, float16 or bfloat16 needed")
    q, k, v = (padded(x) for x in (q, k, v))
    z, lse = _Attention.apply(q, k, v, alpha, windows, d_head**-0.5)
    return z[..., :d_head], lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, alpha, windows, scale):
        q, k, v = readable(q), readable(k), readable(v)
        _, n_heads, n_ctx, d_head = q.shape
        ctx.windows, ctx.scale = window_tensor(windows, q), scale
        keys = k if alpha is None else smear_keys(k, alpha)
        z, lse = empty_rows(v), v.new_empty(v.shape[:3], dtype=torch.float32)
        config = launch_config(CONFIGS, "forward", q)
        _forward_kernel[programs(q, config["BLOCK_QUERY"])](
            *rows(q), *tiles(keys, config["BLOCK_KEY"]), *tiles(v, config["BLOCK_KEY"]), *rows(z),
            lse, ctx.windows, n_heads, n_ctx, scale, d_head,
            **config,
        )  # fmt: skip
        ctx.save_for_backward(q, k, keys, v, alpha, z, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return z, lse

    @staticmethod
    def backward(ctx, dz, _):
        refuse_second_derivatives()
        if dz is None:  # only lse was used
            return (None,) * 6
        q, k, keys, v, alpha, z, lse = ctx.saved_tensors
        _, n_heads, n_ctx, d_head = q.shape
        dz = readable(dz)
        dq, dv, delta = empty_rows(q), empty_rows(v), torch.empty_like(lse)
        # alpha's gradient is a sum of products of these that cancel
        dkeys = empty_rows(k, k.dtype if alpha is None else torch.float32)
        sizes = ctx.windows, n_heads, n_ctx, ctx.scale, d_head

        config = launch_config(CONFIGS, "dquery", q)
        _dquery_kernel[programs(q, config["BLOCK_QUERY"])](
            *rows(q), *tiles(keys, config["BLOCK_KEY"]), *tiles(v, config["BLOCK_KEY"]), *rows(z),
            *rows(dz), *rows(dq), lse, delta, *sizes, **config,
        )  # fmt: skip
        config = launch_config(CONFIGS, "dkey", q)
        _dkey_kernel[programs(q, config["BLOCK_KEY"])](
            *tiles(q, config["BLOCK_QUERY"]), *rows(keys), *rows(v),
            *tiles(dz, config["BLOCK_QUERY"]), *rows(dkeys), *rows(dv), lse, delta, *sizes,
            **config,
        )  # fmt: skip
        if alpha is None:
            return dq, dkeys, dv, None, None, None

        grid, dk = programs(k, ROWS), empty_rows(k)
        parts = dkeys.new_empty(grid)
        _unsmear_kernel[grid](
            *rows(k), *rows(dkeys), *rows(dk), parts, alpha.contiguous(), n_heads, n_ctx, d_head,
            ROWS,
        )  # fmt: skip
        dalpha = parts.view(len(k), n_heads, -1).sum(dim=(0, 2)).to(alpha.dtype)
        return dq, dk, dv, dalpha, None, None


def smear_keys(k, alpha):
    """`attention.smear_keys`, without a gradient."""
    smeared = empty_rows(k)
    _, n_heads, n_ctx, d_head = k.shape
    _smear_kernel[programs(k, ROWS)](
        *rows(k), *rows(smeared), alpha.contiguous(), n_heads, n_ctx, d_head, ROWS
    )
    return smeared
