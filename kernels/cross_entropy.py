"""The loss of every token straight from the residual stream, without all the logits in memory.

    logits_n = resid_n @ W_U                          [vocabulary]
    loss_n   = log(sum_v exp logits_nv) - logits_n[target_n]        nats

Shapes: resid [row, d_model], W_U [d_model, d_vocab], targets [row] -> losses [row], float32.

The plain way (`linear_cross_entropy_reference`) keeps logits, their log-softmax and its gradient:
three arrays of row x d_vocab. Here the logits exist for one chunk of rows at a time, in one buffer
that stays in the cache, and become their own gradient there, softmax minus one-hot. Its two matrix
products, for dresid and dW_U, follow at once, in the forward pass, as if every row's loss had
weight 1. The backward pass then only has to scale them, if all weights turn out to be the same, as
they are in a mean or a sum; else it computes dW_U again.
"""

import torch
import torch.nn.functional as F

# logits in memory at once: large enough for full-speed matrix products, small enough to stay in a
# CPU's cache
CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
# but not fewer rows than this, or W_U, which every chunk reads, takes longer than the product: with
# 50,257 tokens 10 rows at a time take three times as long as 128
CHUNK_ROWS = 128


def linear_cross_entropy(resid, W_U, targets, kernels="torch"):
    """Cross-entropy of every row in nats, [row], float32; differentiable in resid and W_U (module
    docstring).
    """
    if kernels == "reference":
        return linear_cross_entropy_reference(resid, W_U, targets)
    wanted = torch.is_grad_enabled() and (resid.requires_grad or W_U.requires_grad)
    return _LinearCrossEntropy.apply(resid, W_U, targets, wanted)


def linear_cross_entropy_reference(resid, W_U, targets):
    """The definition; see `linear_cross_entropy`."""
    return F.cross_entropy(_at_least_float32(resid @ W_U), targets, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, resid, W_U, targets, wanted):
        dresid, dW_U = (torch.empty_like(resid), torch.zeros_like(W_U)) if wanted else (None, None)
        losses = []
        for rows, of_rows, dlogits in _chunks(resid, W_U, targets):
            losses.append(of_rows)
            if wanted:
                dlogits = dlogits.to(resid.dtype)
                torch.mm(dlogits, W_U.T, out=dresid[rows])
                dW_U.addmm_(resid[rows].T, dlogits)
        ctx.save_for_backward(resid, W_U, targets, dresid, dW_U)
        return torch.cat(losses).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        resid, W_U, targets, dresid, dW_U = ctx.saved_tensors
        dresid = dresid * grad[:, None].to(dresid.dtype)
        if grad.stride() == (0,):  # one number, expanded: what a mean or a sum sends back
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
    size = max(CHUNK_ROWS, CHUNK_BYTES[resid.device.type] // (4 * d_vocab))
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
