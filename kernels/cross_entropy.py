"""The loss of every token straight from the residual stream, without all the logits in memory.

    logits_n = resid_n @ W_U                          [vocabulary]
    loss_n   = log(sum_v exp logits_nv) - logits_n[target_n]        nats

Shapes: resid [row, d_model], W_U [d_model, d_vocab], targets [row] -> losses [row], float32.

The plain way (`linear_cross_entropy_reference`) keeps logits, their log-softmax and its gradient:
three arrays of row x d_vocab. Here they exist for one chunk of rows at a time, and the chunk's one
array is turned in place from logits into exponentials (forward) and into gradients (backward).
Small problems keep the exponentials, large ones compute them again.
"""

import torch
import torch.nn.functional as F

# logits in memory at once: large enough for full-speed matrix products, small enough to stay in a
# CPU's cache
CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
# exponentials kept for the backward pass instead of recomputed
KEEP_BYTES = {"cpu": 256 * 2**20, "cuda": 0}


def linear_cross_entropy(resid, W_U, targets, kernels="torch"):
    """Cross-entropy of every row in nats, [row], float32; differentiable in resid and W_U (module
    docstring).
    """
    if kernels == "reference":
        return linear_cross_entropy_reference(resid, W_U, targets)
    return _LinearCrossEntropy.apply(resid, W_U, targets)


def linear_cross_entropy_reference(resid, W_U, targets):
    """The definition; see `linear_cross_entropy`."""
    return F.cross_entropy(_at_least_float32(resid @ W_U), targets, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, resid, W_U, targets):
        chunk = max(1, CHUNK_BYTES[resid.device.type] // (4 * W_U.shape[1]))
        keep = (
            any(ctx.needs_input_grad)
            and 4 * resid.shape[0] * W_U.shape[1] <= KEEP_BYTES[resid.device.type]
        )
        losses, kept = [], []
        for rows, target in zip(resid.split(chunk), targets.split(chunk), strict=True):
            loss, *exponentials = _chunk_forward(rows, W_U, target)
            losses.append(loss)
            if keep:
                kept += exponentials
        ctx.save_for_backward(resid, W_U, targets, *kept)
        ctx.chunk = chunk
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad):
        resid, W_U, targets, *kept = ctx.saved_tensors
        dresid, dW_U = torch.empty_like(resid), torch.zeros_like(W_U)
        for n, start in enumerate(range(0, len(resid), ctx.chunk)):
            stop = start + ctx.chunk
            rows, target, weight = (
                resid[start:stop],
                targets[start:stop, None],
                grad[start:stop, None],
            )
            exponentials, total = (
                kept[2 * n : 2 * n + 2] or _chunk_forward(rows, W_U, target[:, 0])[1:]
            )
            # dloss/dlogits = softmax - one-hot, times the weight that this row's loss has further
            # on
            dlogits = (
                exponentials.mul_(weight / total).scatter_add_(1, target, -weight).to(resid.dtype)
            )
            dresid[start:stop] = dlogits @ W_U.T
            dW_U.addmm_(rows.T, dlogits)
        return dresid, dW_U, None


def _chunk_forward(rows, W_U, target):
    """losses [row], exp(logits - largest) [row, d_vocab] and its row sums [row, 1]."""
    logits = _at_least_float32(rows @ W_U)
    logits -= logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, target[:, None])
    exponentials = logits.exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    return (total.log() - chosen).squeeze(1), exponentials, total


def _at_least_float32(logits):
    """A softmax in 16 bits would lose the losses' last digits; float64 stays for tests."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
