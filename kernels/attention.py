"""Causal attention, with keys that may be smeared and heads that may be local: the definition, and
the CPU's fast path.

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
(`KEEP_PATTERN_BYTES`).
"""

import functools

import torch
import torch.nn.functional as F

TILE = 128
# beyond this the pattern of one call is not worth keeping: recomputing it (SDPA) is slower but
# takes O(T) memory
KEEP_PATTERN_BYTES = 512 * 2**20


def attention(q, k, v, alpha=None, windows=None, kernels="torch", at=None):
    """Attention output z [batch, head, pos, d_head], differentiable in q, k, v and alpha (module
    docstring: definition).

    alpha [head] smears the keys (None: not). windows: for each head the number of positions that a
    query sees, itself included (None: all). kernels: "reference" or "torch"; both mean the same up
    to rounding. at [batch, query]: where the queries stand, if there is not one at every key.
    """
    if kernels == "reference" or at is not None:  # the pattern of a few queries is small
        return attention_reference(q, k, v, alpha, windows, at)
    if alpha is not None:
        k = smear_keys(k, alpha)
    batch, n_heads, n_ctx, _ = q.shape
    pattern_bytes = batch * n_heads * n_ctx * (n_ctx + TILE) // 2 * q.element_size()
    if q.device.type == "cpu" and pattern_bytes <= KEEP_PATTERN_BYTES:
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return _TiledAttention.apply(q, k, v, windows, wanted)
    if windows is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible(torch.arange(n_ctx, device=q.device)[None], n_ctx, windows)
    )


def attention_reference(q, k, v, alpha=None, windows=None, at=None):
    """The definition, line by line; see `attention`."""
    return attention_pattern(q, k, alpha, windows, at) @ v


def attention_pattern(q, k, alpha=None, windows=None, at=None):
    """The attention pattern [batch, head, query, key]: rows sum to 1, keys after the query get
    exactly 0. `at` as in `attention`.
    """
    if alpha is not None:
        k = smear_keys(k, alpha)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if at is None:
        at = torch.arange(k.shape[-2], device=q.device)[None]
    return scores.masked_fill_(~visible(at, k.shape[-2], windows), float("-inf")).softmax(dim=-1)


def previous_token_attention(q, k, alpha=None, windows=None):
    """What each head spends on the token before the query, a mean over batch and queries: [head].

    The diagonal below the main one of `attention_pattern`, which exists here for one tile of rows
    at a time.
    """
    if alpha is not None:
        k = smear_keys(k, alpha)
    batch, n_heads, n_ctx, _ = q.shape
    total = 0
    for start, _, pattern in _patterns(q.flatten(0, 1), k.flatten(0, 1), windows):
        total += pattern.diagonal(start - 1, dim1=1, dim2=2).sum(dim=1)
    return total.view(batch, n_heads).mean(dim=0) / (n_ctx - 1)


def frozen_attention(q, k, lse, values, alpha=None, windows=None, kernels="torch"):
    """One pattern for many values, which is what pattern-preserving ablations need: values [stack,
    batch, head, pos, d_head] -> z of the same shape, with the pattern that q, k [batch, head, pos,
    d_head] make.

    The softmax is computed once for all of the stack, tile by tile. lse [batch, head, pos], the
    logarithm of each row's softmax denominator, is not needed here and may be None.
    """
    if kernels == "reference":
        return attention_pattern(q, k, alpha, windows) @ values
    if alpha is not None:
        k = smear_keys(k, alpha)
    shape, values = values.shape, values.flatten(1, 2)  # [stack, batch * head, pos, d_head]
    z = torch.empty_like(values)
    for start, stop, pattern in _patterns(q.flatten(0, 1), k.flatten(0, 1), windows):
        for value, out in zip(values, z, strict=True):
            _multiply(pattern, value[:, :stop], out=out[:, start:stop])
    return z.view(shape)


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


class _TiledAttention(torch.autograd.Function):
    """Causal attention in tiles of rows, the pattern kept for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, windows, wanted):
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [batch * head, pos, d_head]
        z = torch.empty_like(v)
        patterns = []
        for start, stop, pattern in _patterns(q, k, windows):
            _multiply(pattern, v[:, :stop], out=z[:, start:stop])
            if wanted:
                patterns.append(pattern)
        ctx.save_for_backward(q, k, v, *patterns)
        return z.view(shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *patterns = ctx.saved_tensors
        shape, scale, grad = grad.shape, q.shape[2] ** -0.5, grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop), pattern in zip(_tiles(q.shape[1]), patterns, strict=True):
            rows, keys = slice(start, stop), slice(stop)
            _multiply(pattern.transpose(1, 2), grad[:, rows], out=dv[:, keys], add=True)
            dpattern = torch.bmm(grad[:, rows], v[:, keys].transpose(1, 2))
            dscores = torch._softmax_backward_data(
                dpattern, pattern, -1, q.dtype, grad_input=dpattern
            )
            _multiply(dscores, k[:, keys], out=dq[:, rows], scale=scale)
            _multiply(dscores.transpose(1, 2), q[:, rows], dk[:, keys], scale, add=True)
        return dq.view(shape), dk.view(shape), dv.view(shape), None, None


def _patterns(q, k, windows):
    """Tile by tile of rows start..stop: start, stop and their pattern [batch * head, row, key up to
    stop].
    """
    for start, stop in _tiles(q.shape[1]):
        scores = q.new_empty(len(q), stop - start, stop)
        _multiply(q[:, start:stop], k[:, :stop].transpose(1, 2), scores, q.shape[2] ** -0.5)
        _mask(scores, start, stop, windows)
        yield start, stop, torch.softmax(scores, dim=-1, out=scores)


def _tiles(n_ctx):
    return [(start, min(start + TILE, n_ctx)) for start in range(0, n_ctx, TILE)]


def _multiply(a, b, out, scale=1.0, add=False):
    """out = scale a @ b, or out += scale a @ b: BLAS scales and adds on its way."""
    torch.baddbmm(out, a, b, beta=int(add), alpha=scale, out=out)


def _mask(scores, start, stop, windows):
    """-inf to what the rows start..stop may not see. scores [batch * head, row, key up to stop]."""
    if windows is None:  # only the diagonal tile has hidden keys
        scores[:, :, start:] += _later_keys(stop - start)
    else:
        hidden = ~visible(torch.arange(start, stop)[None], stop, windows)
        scores.view(-1, *hidden.shape[1:]).masked_fill_(hidden, float("-inf"))


@functools.cache
def _later_keys(n):
    """-inf above the diagonal, 0 elsewhere: adding it is four times as fast as masked_fill_."""
    return torch.full((n, n), float("-inf")).triu(1)
