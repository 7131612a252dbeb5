"""Causal attention, with keys that may be smeared and heads that may be local, and what is done
with its pattern later: the definitions, the CPU's fast path, and the choice of implementation.

    key'_j     = sigmoid(alpha) key_j + (1 - sigmoid(alpha)) key_{j-1}    smeared; not the first
    score_ij   = query_i . key'_j / sqrt(d_head)   where 0 <= i - j < window, elsewhere -inf
    pattern_ij = softmax over j of score_ij
    z_i        = sum_j pattern_ij value_j

Shapes: q, k, v, z [batch, head, pos, d_head]; alpha [head]; pattern [batch, head, query, key];
windows one number a head.

The plain way (`attention_reference`) writes and reads the T x T pattern half a dozen times and
multiplies its empty upper half too. The CPU path (`_TiledAttention`) goes down the rows in tiles of
128 queries and multiplies only the keys that a tile can see: at T = 512 that is 62 % of the square,
in matrix products large enough to run at the speed of the machine. It keeps the pattern for the
backward pass, which then needs no second softmax; that is the bargain that
`F.scaled_dot_product_attention` does not offer, and right as long as the pattern fits
(`KEEP_PATTERN_BYTES`). Where products are in bfloat16 (`machine.multiplying_in`) they are so fast
that tiles of 256 queries are better, 75 % of the square.

A run that is to be repeated with its pattern frozen is remembered by q, k and

    lse_i      = log sum_j exp(score_ij)               so that pattern_ij = exp(score_ij - lse_i)

which is O(T) memory: the pattern comes back a tile at a time, to be applied to other values
(`frozen_attention`) or counted (`head_mass`, `head_statistics`). An explicit pattern needs no
function: `pattern @ values`.

kernels: "reference" (the definition, line by line), "torch" (what a CPU uses) or "triton"
(`attention_triton.py`, `frozen_triton.py`; imported only then). All mean the same up to rounding.
"""

import importlib

import torch
import torch.nn.functional as F

from kernels import refuse_second_derivatives

TILE = {"float32": 128, "bfloat16": 256}  # queries at a time, by what products are in
# beyond this the pattern of one call is not worth keeping: recomputing it (SDPA) is slower but
# takes O(T) memory
KEEP_PATTERN_BYTES = 512 * 2**20


def attention(q, k, v, alpha=None, windows=None, kernels="torch", at=None):
    """Attention output z [batch, head, pos, d_head], differentiable in q, k, v and alpha (module
    docstring: definition), twice with "reference" alone.

    alpha [head] smears the keys (None: not). windows: for each head the number of positions that a
    query sees, itself included (None: all). at [batch, query]: where the queries stand, if there is
    not one at every key.
    """
    _check(q, k, v, alpha, windows, at=at)
    if at is not None:  # the pattern of a few queries is small
        pattern = attention_pattern(*at_least_float32(q, k), alpha, windows, at)
        return pattern.to(v.dtype) @ v
    if kernels == "reference" or not q.numel():  # nothing to start a kernel for
        return attention_reference(q, k, v, alpha, windows)
    if kernels == "triton":
        return _triton().attention(q, k, v, alpha, windows)[0]
    if alpha is not None:
        k = smear_keys(k, alpha)
    batch, n_heads, n_ctx, _ = q.shape
    pattern_bytes = batch * n_heads * n_ctx * (n_ctx + tile()) // 2 * q.element_size()
    if q.device.type == "cpu" and pattern_bytes <= KEEP_PATTERN_BYTES:
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return _TiledAttention.apply(q, k, v, windows, wanted)
    if windows is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible(torch.arange(n_ctx, device=q.device)[None], n_ctx, windows)
    )


def attention_reference(q, k, v, alpha=None, windows=None):
    """The definition, line by line; see `attention`."""
    return attention_pattern(q, k, alpha, windows) @ v


def attention_pattern(q, k, alpha=None, windows=None, at=None):
    """The attention pattern [batch, head, query, key]: rows sum to 1, keys after the query get
    exactly 0. `at` as in `attention`. In 16 bits it has errors of per cents, which those of the
    scores become under exp: see `at_least_float32`.
    """
    return attention_scores(q, k, alpha, windows, at).softmax(dim=-1)


def attention_scores(q, k, alpha=None, windows=None, at=None):
    """[batch, head, query, key], -inf where a query may not look. `at` as in `attention`."""
    if alpha is not None:
        k = smear_keys(k, alpha)
    if at is None:
        at = torch.arange(k.shape[-2], device=q.device)[None]
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    # adding is four times as fast as masked_fill_
    return scores.add_(torch.where(visible(at, k.shape[-2], windows), 0.0, float("-inf")))


@torch.no_grad()
def watched_attention(q, k, v, watch, alpha=None, windows=None):
    """`attention` that shows its pattern on the way: watch(first query, pattern [batch, head,
    query, key up to the last of these queries]), one tile of queries at a time. No gradient.
    """
    wide = at_least_float32(q, k, v)
    if alpha is not None:
        wide[1] = smear_keys(wide[1], alpha)

    def of_heads(first_query, pattern):
        watch(first_query, pattern.unflatten(0, q.shape[:2]))

    z = _tiled(*(x.flatten(0, 1) for x in wide), windows, of_heads)
    return z.view(q.shape).to(v.dtype)


def at_least_float32(*tensors):
    """What scores have to be computed in for a pattern as exact as the kernels'."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def smear_keys(k, alpha):
    """k_j <- sigmoid(alpha) k_j + (1 - sigmoid(alpha)) k_{j-1}, head by head; the first key is
    unchanged.

    This is the paper's architectural perturbation (Argument 2): induction without a previous-token
    head.
    """
    share = torch.sigmoid(alpha).to(k.dtype)[:, None, None]  # [head, 1, 1]
    return torch.cat([k[:, :, :1], torch.lerp(k[:, :, :-1], k[:, :, 1:], share)], dim=2)


def visible(at, n_keys, windows=None):
    """Which keys the queries that stand `at` [batch, query] may see: bool [batch, 1, query, key],
    or [batch, head, query, key] with a window for each head.
    """
    query, key = at[:, None, :, None], torch.arange(n_keys, device=at.device)
    if windows is None:
        return key <= query
    return (key <= query) & (key > query - torch.tensor(windows, device=at.device)[:, None, None])


def attention_and_lse(q, k, v, alpha=None, windows=None, kernels="torch"):
    """-> z as of `attention`, and lse [batch, head, pos], nats, at least float32, without a
    gradient: with q and k what `frozen_attention` and `head_mass` need.
    """
    if kernels == "triton" and q.numel():
        _check(q, k, v, alpha, windows)
        return _triton().attention(q, k, v, alpha, windows)
    z = attention(q, k, v, alpha, windows, kernels)
    with torch.no_grad():
        return z, torch.cat([s.logsumexp(-1) for _, s in _score_tiles(q, k, alpha, windows)], dim=2)


@torch.no_grad()
def frozen_attention(q, k, lse, values, alpha=None, windows=None, kernels="torch"):
    """The pattern of the run that q, k and lse [batch, head, pos] were recorded from, applied to A
    stacked tensors: values [A, batch, head, pos, d_head] -> the same shape. No gradient.

    lse may be None: "triton" then finds it again, and the CPU has no use for it.
    """
    _check(q, k, k, alpha, windows, lse)
    if values.shape[1:] != q.shape:
        raise ValueError(f"values {[*values.shape]}: a stack of the shape of q is needed")
    if kernels == "triton" and values.numel():
        if lse is None:
            lse = attention_and_lse(q, k, values[0], alpha, windows, kernels)[1]
        return _triton("frozen").frozen_attention(q, k, lse, values, alpha, windows)
    if kernels == "reference":
        pattern = attention_pattern(q, k, alpha, windows)
        if lse is not None:
            pattern = frozen_pattern(q, k, lse, alpha, windows)
        return pattern.to(values.dtype) @ values
    q, k = at_least_float32(q, k)
    if alpha is not None:
        k = smear_keys(k, alpha)
    shape, values = values.shape, values.flatten(1, 2)  # [A, batch * head, pos, d_head]
    z = torch.empty_like(values)
    for start, stop, pattern in _patterns(q.flatten(0, 1), k.flatten(0, 1), windows):
        pattern = pattern.to(values.dtype)
        for value, out in zip(values, z, strict=True):
            _multiply(pattern, value[:, :stop], out=out[:, start:stop])
    return z.view(shape)


def frozen_pattern(q, k, lse, alpha=None, windows=None):
    """`attention_pattern` from a recorded lse."""
    return torch.exp(attention_scores(q, k, alpha, windows) - lse[..., None])


@torch.no_grad()
def index_attention(index, values, kernels="torch"):
    """All attention on one given key: index [batch, head, query] of keys, values [A, batch, head,
    pos, d_head] -> z_i = value_{index_i} of the same shape; 0 where the index is negative.
    """
    if kernels == "triton" and values.numel():
        return _triton("frozen").index_attention(index, values)
    chosen = values.gather(3, index.clamp(min=0).long()[None, ..., None].expand_as(values))
    return chosen.masked_fill(index[None, ..., None] < 0, 0)


def head_statistics(q, k, lse, tokens, alpha=None, windows=None, offset=1, kernels="torch"):
    """`metrics.prefix_matching_score` (with that offset) and `metrics.previous_token_score` of each
    head, without its pattern: two [head], 0 to 1, float32.

    tokens [batch, pos], a start token first; q, k and lse of the run over them. lse may be None: it
    is then found again.
    """
    batch, n_ctx = tokens.shape
    matching, previous = head_mass(q, k, lse, tokens, alpha, windows, offset, kernels)
    return matching / seen_before(tokens).sum(), previous / (batch * (n_ctx - 1))


@torch.no_grad()
def head_mass(q, k, lse, tokens, alpha=None, windows=None, offset=1, kernels="torch"):
    """Attention mass [2, head], summed over batch and queries: on the prefix-matching keys, and on
    the previous token.

    Key k matches query q if the token at k - offset is q's own and 1 <= k - offset < q
    (`metrics.prefix_matching_keys`). lse may be None.
    """
    _check(q, k, k, alpha, windows, lse)
    if tokens.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"tokens {[*tokens.shape]}: one is needed for each key of k {[*k.shape]}")
    if lse is None:  # the values do not matter
        lse = attention_and_lse(q, k, k, alpha, windows, kernels)[1]
    if kernels == "triton" and q.numel():
        return _triton("frozen").head_mass(q, k, lse, tokens, alpha, windows, offset)
    n_ctx = tokens.shape[1]
    copy = torch.arange(n_ctx, device=tokens.device) - offset
    copied = tokens[:, copy.clamp(0, n_ctx - 1)]
    mass = lse.new_zeros(2, q.shape[1])
    for queries, scores in _score_tiles(q, k, alpha, windows):
        pattern = torch.exp(scores - lse[:, :, queries, None])
        query = torch.arange(queries.start, queries.stop, device=tokens.device)[:, None]
        matches = tokens[:, queries, None] == copied[:, None, : queries.stop]
        matches &= (copy[: queries.stop] >= 1) & (copy[: queries.stop] < query)
        mass[0] += (pattern * matches[:, None]).sum(dim=(0, 2, 3))
        mass[1] += pattern.diagonal(queries.start - 1, dim1=2, dim2=3).sum(dim=(0, 2))
    return mass


def seen_before(tokens):
    """Which tokens have an earlier copy, the start token at position 0 apart: bool [batch, pos].
    These are the queries with prefix-matching keys, found in O(T) memory.
    """
    in_order, position = tokens[:, 1:].sort(dim=1, stable=True)
    again = F.pad(in_order[:, 1:] == in_order[:, :-1], (1, 0))
    return torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, position + 1, again)


def _score_tiles(q, k, alpha, windows):
    """For each tile of queries: its slice, and its scores [batch, head, query, key up to the
    tile's last] in at least float32, -inf where hidden.
    """
    q, k = at_least_float32(q, k)
    if alpha is not None:
        k = smear_keys(k, alpha)
    for start, stop in _tiles(q.shape[2]):
        at = torch.arange(start, stop, device=q.device)[None]
        scores = attention_scores(q[:, :, start:stop], k[:, :, :stop], windows=windows, at=at)
        yield slice(start, stop), scores


def _check(q, k, v, alpha, windows, lse=None, at=None):
    """Refuses, in a line, what does not go together: a kernel would read other memory."""
    batch, n_heads, n_queries, d_head = q.shape
    of_keys = batch, n_heads, n_queries if at is None else k.shape[2], d_head
    if not of_keys == k.shape == v.shape:
        shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
        raise ValueError(f"{shapes}: one shape, [batch, head, pos, d_head], is needed")
    if at is not None and at.shape != (batch, n_queries):
        raise ValueError(f"at {[*at.shape]}: one is needed for each query of q {[*q.shape]}")
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"lse {[*lse.shape]}: one is needed for each query of q {[*q.shape]}")
    if alpha is not None and alpha.shape != (n_heads,):
        raise ValueError(f"alpha {[*alpha.shape]}: one is needed for each of {n_heads} heads")
    if windows is not None and (len(windows) != n_heads or min(windows) < 1):
        raise ValueError(f"windows {windows}: each of {n_heads} heads needs one of at least 1")


def _triton(module="attention"):
    return importlib.import_module(f"kernels.{module}_triton")


class _TiledAttention(torch.autograd.Function):
    """Causal attention in tiles of rows, the pattern kept for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, windows, wanted):
        patterns, flat = [], [x.flatten(0, 1) for x in (q, k, v)]  # [batch * head, pos, d_head]

        def keep(start, pattern):
            if wanted:
                patterns.append(pattern)

        ctx.tiles = _tiles(q.shape[2])
        z = _tiled(*flat, windows, keep)
        ctx.save_for_backward(*flat, *patterns)
        return z.view(q.shape)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        q, k, v, *patterns = ctx.saved_tensors
        shape, scale, n_ctx = grad.shape, q.shape[-1] ** -0.5, q.shape[1]
        grad = grad.flatten(0, 1)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        # the last tile sees all keys: what it writes, the others add to
        for (start, stop), pattern in zip(ctx.tiles[::-1], patterns[::-1], strict=True):
            rows, keys, add = slice(start, stop), slice(stop), stop < n_ctx
            _multiply(pattern.transpose(1, 2), grad[:, rows], dv[:, keys], add=add)
            dpattern = torch.bmm(grad[:, rows], v[:, keys].transpose(1, 2))
            dscores = torch._softmax_backward_data(
                dpattern, pattern, -1, q.dtype, grad_input=dpattern
            )
            _multiply(dscores, k[:, keys], dq[:, rows], scale)
            _multiply(dscores.transpose(1, 2), q[:, rows], dk[:, keys], scale, add=add)
        return dq.view(shape), dk.view(shape), dv.view(shape), None, None


def _tiled(q, k, v, windows, watch):
    """z [batch * head, pos, d_head], as are q, k and v; watch(start, pattern) for each tile."""
    z = torch.empty_like(v, memory_format=torch.contiguous_format)
    for start, stop, pattern in _patterns(q, k, windows):
        watch(start, pattern)
        _multiply(pattern, v[:, :stop], out=z[:, start:stop])
    return z


def _patterns(q, k, windows):
    """Tile by tile of rows start..stop: start, stop and their pattern [batch * head, row, key up to
    stop].
    """
    rows = min(tile(), q.shape[1])
    later = q.new_full((rows, rows), float("-inf")).triu_(1)  # what a query may not see
    for start, stop in _tiles(q.shape[1]):
        scores = q.new_empty(len(q), stop - start, stop)
        _multiply(q[:, start:stop], k[:, :stop].transpose(1, 2), scores, q.shape[2] ** -0.5)
        if windows is None:  # only the diagonal tile has hidden keys
            scores[:, :, start:] += later[: stop - start, : stop - start]
        else:
            at = torch.arange(start, stop, device=q.device)[None]
            hidden = ~visible(at, stop, windows)
            scores.view(-1, *hidden.shape[1:]).masked_fill_(hidden, float("-inf"))
        yield start, stop, torch.softmax(scores, dim=-1, out=scores)


def _tiles(n_ctx):
    rows = tile()
    return [(start, min(start + rows, n_ctx)) for start in range(0, n_ctx, rows)]


def tile():
    in_bfloat16 = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    return TILE["bfloat16" if in_bfloat16 else "float32"]


def _multiply(a, b, out, scale=1.0, add=False):
    """out = scale a @ b, or out += scale a @ b: BLAS scales and adds on its way."""
    torch.baddbmm(out, a, b, beta=int(add), alpha=scale, out=out)
