"""The loss of every token straight from the residual stream, without all the logits in memory.

    logits_n = resid_n @ W_U                          [vocabulary]
    loss_n   = log(sum_v exp logits_nv) - logits_n[target_n]        nats

Shapes: resid [row, d_model], W_U [d_model, d_vocab], targets [row] -> losses [row], float32. A row
whose target is -100 is ignored: its loss is 0 and it has no gradient.

The plain way (`linear_cross_entropy_reference`) keeps logits, their log-softmax and its gradient:
three arrays of row x d_vocab. Here the logits exist for one chunk of rows at a time, in one buffer
that stays in the cache, and become their own gradient there, softmax minus one-hot. Its two matrix
products, for dresid and dW_U, follow at once, in the forward pass, as if every row's loss had
weight 1. The backward pass then only has to scale them, if all weights turn out to be the same, as
they are in a mean or a sum; else it computes dW_U again.
"""

import torch
import torch.nn.functional as F

from kernels import refuse_second_derivatives

# logits in memory at once: large enough for full-speed matrix products, small enough to stay in a
# CPU's cache
CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
# but not with fewer rows than this: reading W_U, as every chunk does, would take longer than the
# product
LEAST_ROWS = 128
IGNORED = -100  # as in F.cross_entropy


def linear_cross_entropy(resid, W_U, targets, kernels="torch", rows=None):
    """Cross-entropy of every row in nats, [row], float32; differentiable in resid and W_U (module
    docstring), twice with "reference" alone.

    rows: indices of the rows of resid that are asked for, in the order of their targets (default:
    all). No others cost anything. kernels: "reference", "torch" or "triton" (on a GPU); all mean
    the same up to rounding.
    """
    if rows is not None:
        resid = resid[rows]
    if W_U.shape[:1] != resid.shape[1:] or targets.shape != resid.shape[:1]:
        shapes = f"resid {[*resid.shape]} @ W_U {[*W_U.shape]}, targets {[*targets.shape]}"
        raise ValueError(f"{shapes}: [row, d_model] @ [d_model, d_vocab], [row] are needed")
    if kernels == "reference" or not len(resid):
        return linear_cross_entropy_reference(resid, W_U, targets)
    if kernels == "triton":
        from kernels import cross_entropy_triton

        return cross_entropy_triton.linear_cross_entropy(resid, W_U, targets)
    asked = targets != IGNORED
    if not asked.all():
        losses = linear_cross_entropy(resid, W_U, targets[asked], kernels, rows=asked)
        return losses.new_zeros(len(targets)).masked_scatter(asked, losses)
    wanted = torch.is_grad_enabled() and (resid.requires_grad or W_U.requires_grad)
    return _LinearCrossEntropy.apply(resid, W_U, targets, wanted)


def linear_cross_entropy_reference(resid, W_U, targets):
    """The definition; see `linear_cross_entropy`."""
    logits = _at_least_float32(resid @ W_U)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, resid, W_U, targets, wanted):
        dresid, dW_U = (torch.empty_like(resid), torch.zeros_like(W_U)) if wanted else (None, None)
        losses = _at_least_float32(resid.new_empty(len(resid)))
        for rows, of_rows, dlogits in _chunks(resid, W_U, targets):
            losses[rows] = of_rows.squeeze(1)
            if wanted:
                dlogits = dlogits.to(resid.dtype)
                torch.mm(dlogits, W_U.T, out=dresid[rows])
                dW_U.addmm_(resid[rows].T, dlogits)
        ctx.save_for_backward(resid, W_U, targets, dresid, dW_U)
        return losses

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        resid, W_U, targets, dresid, dW_U = ctx.saved_tensors
        dresid = dresid * grad[:, None].to(dresid.dtype)
        if (grad == grad[0]).all():  # a mean or a sum
            return dresid, dW_U * grad[0].to(dW_U.dtype), None, None
        dW_U = torch.zeros_like(W_U)
        for rows, _, dlogits in _chunks(resid, W_U, targets):
            dlogits *= grad[rows, None]
            dW_U.addmm_(resid[rows].T, dlogits.to(resid.dtype))
        return dresid, dW_U, None, None


def _chunks(resid, W_U, targets):
    """For each chunk of rows: its slice, its losses [row, 1] and their gradient by the logits
    [row, d_vocab], in a buffer that the next chunk overwrites.
    """
    d_vocab = W_U.shape[1]
    size = max(LEAST_ROWS, CHUNK_BYTES[resid.device.type] // (4 * d_vocab))
    buffer = resid.new_empty(min(size, len(resid)), d_vocab)
    for start in range(0, len(resid), size):
        rows = slice(start, min(start + size, len(resid)))
        chosen = targets[rows, None]
        logits = torch.mm(resid[rows], W_U, out=buffer[: rows.stop - start])
        logits = _at_least_float32(logits)
        behind = logits.amax(dim=1, keepdim=True) - logits.gather(1, chosen)
        softmax = torch.softmax(logits, dim=1, out=logits)
        # the target's own probability may be 0 in float32, the largest one never is
        losses = behind - softmax.amax(dim=1, keepdim=True).log()
        yield rows, losses, softmax.scatter_add_(1, chosen, -torch.ones_like(losses))


def _at_least_float32(logits):
    """A softmax in 16 bits would lose the losses' last digits; float64 stays for tests."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
