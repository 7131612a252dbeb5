"""What a head causes: the loss without it, by two passes with hooks and by a sweep that is exact
and cheap (Argument 3, "Ablations").

Pattern-preserving ablation, as the paper says it: run 1 records every attention pattern; run 2
replaces the result z of the ablated heads by zero, with every pattern forced to run 1's. What the
heads write then reaches the loss only through values (and MLPs), never by changing where a later
head looks. The hooks at the top of this file do just that and define the rest of it. Replacing z by
its mean instead, or letting patterns change ("full" ablation), are the usual variants.

`sweep` computes the same for all heads at once:

- layers below the ablated head are the clean run's, and so is its own layer but for z W_O;
- in the layers between, only values change: no Q, no K, no softmax, one frozen pattern for all
  ablations of a layer;
- in the last layer only scored positions are queries, and with the pattern fixed mixing can go
  before projecting: z = (pattern x) W_V is a handful of rows instead of all of them, which is
  cheaper while positions are fewer than 70 of 768 dimensions;
- logits exist at scored positions alone.

Operations for one ablated head and one example of a two-layer attention-only model (T positions, S
of them scored, H heads, width d, d_head e, vocabulary V):

    2 T d e        z W_O of the ablated head, at every position
    2 S H T d      mixing
    4 S H d e      projecting what was mixed: W_V, W_O
    2 S d V        logits

At d = 768, H = 12, T = 512, V = 50,257 and S = 3 these are 0.32e9, three quarters of them logits,
and 0.1e9 more is each head's share of the clean run; a forward pass takes 45e9 (`ablation_flops` in
bench.py counts any model).
"""

import torch
import torch.nn.functional as F

from kernels.attention import attention_and_lse, attention_pattern, frozen_attention
from kernels.cross_entropy import linear_cross_entropy
from model import layer_norm_divisor, per_head, rows_at, sum_over_heads

# of the residual streams of the ablations that are computed at once, for each core
STACK_BYTES = {"cpu": 8 * 2**20, "cuda": 2 * 2**30}


def ablation(heads, means=None):
    """A hook that replaces the result z of these heads, [(layer, head)], by zero, or by means
    [layer, head, d_head]. By itself it is a full ablation: later patterns change.
    """

    def hook(name, layer, value):
        if name == "z":
            return silence(value.clone(), heads, layer, means)

    return hook


def preserving_patterns(model, inputs, hook, freeze_layernorm=False):
    """Run 1: the same hook with every pattern of the clean run forced on it. With freeze_layernorm
    also what every LayerNorm divides by, which makes an attention-only model linear in z.
    """
    clean = {}

    def record(name, layer, value):
        if name == "pattern" or (freeze_layernorm and name.endswith("_scale")):
            clean[name, layer] = value

    model.residual(inputs, record)
    return lambda name, layer, value: clean.get((name, layer), hook(name, layer, value))


def silence(z, heads, layer, means=None):
    """Replaces, in place, the results of those of the heads that are in this layer. z [batch, head,
    pos, d_head].
    """
    for head in heads_in(heads, layer):
        z[:, head] = 0 if means is None else means[layer, head]
    return z


def heads_in(heads, layer):
    return sorted({head for layer_of_head, head in heads if layer_of_head == layer})


@torch.no_grad()
def sweep(model, inputs, targets, positions, ablations, means=None, freeze_layernorm=False):
    """Losses in nats at the scored positions under each pattern-preserving ablation, float32.

    inputs, targets [example, pos]; positions [example, scored], counted from 0; ablations: lists of
    (layer, head) that are ablated together, an empty list for the clean run; means as for
    `ablation`. -> [ablation, example, scored]. Equal to the hooks above up to rounding.
    """
    clean = CleanRun(model, inputs, positions, freeze_layernorm)
    resid = clean.resid_final.repeat(len(ablations), 1, 1, 1)
    n_bytes = 4 * inputs.numel() * model.config.d_model  # of one ablation's residual stream
    at_once = max(1, STACK_BYTES[inputs.device.type] // n_bytes)
    for layer in range(model.config.n_layers):
        # a set of heads is ablated from its lowest layer on
        group = [n for n, heads in enumerate(ablations) if heads and min(heads)[0] == layer]
        for start in range(0, len(group), at_once):
            some = group[start : start + at_once]
            resid[some] = clean.without([ablations[n] for n in some], layer, means)
    targets = targets.gather(1, positions).repeat(len(ablations), 1, 1)
    W_U = model.unembed["W_U"]
    losses = linear_cross_entropy(resid.flatten(0, 2), W_U, targets.flatten(), model.kernels)
    return losses.view(targets.shape)


class CleanRun:
    """The clean run over some examples and what ablated runs take from it: where the heads look,
    z and the residual stream after every attention, and, if LayerNorm is frozen, what it divides
    by. The last layer is computed for the scored positions alone.

    The residual stream is a stack of runs, [run, example, pos, d_model]; here of one run.
    """

    def __init__(self, model, inputs, positions, freeze_layernorm=False):
        self.model, self.positions = model, positions
        self.scales = {} if freeze_layernorm else None
        self.where_heads_look, self.z, self.resid_mid = [], [], []
        resid = F.embedding(inputs, model.embed["W_E"])[None]
        for layer, block in enumerate(model.blocks):
            x = self.normalise(block.ln1, resid)
            self.fix_pattern(layer, x[0])
            z = self.attend(layer, x)
            resid = self.add_heads(layer, resid, z)
            self.z.append(z[0])
            self.resid_mid.append(resid[0])
            resid = self.add_mlp(layer, resid)
        self.resid_final = self.normalise(model.ln_final, resid)[0]  # [example, scored, d_model]

    def without(self, ablations, layer, means=None):
        """-> the final residual stream [ablation, example, scored, d_model] under ablations whose
        lowest head is in this layer.
        """
        resid = self.resid_mid[layer].repeat(len(ablations), 1, 1, 1)
        for run, heads in zip(resid, ablations, strict=True):
            for head in heads_in(heads, layer):
                z = self.z[layer][:, head]
                lost = z if means is None else z - means[layer, head]
                W_O = self.model.blocks[layer].attn.W_O[head]
                run.baddbmm_(lost, W_O.expand(len(run), -1, -1), alpha=-1)
        resid = self.add_mlp(layer, resid)
        for later in range(layer + 1, len(self.model.blocks)):
            z = self.attend(later, self.normalise(self.model.blocks[later].ln1, resid))
            for run, heads in zip(z, ablations, strict=True):
                silence(run, heads, later, means)
            resid = self.add_mlp(later, self.add_heads(later, resid, z))
        return self.normalise(self.model.ln_final, resid)

    def fix_pattern(self, layer, x):
        """Keeps where the heads of this layer look in the clean run. x [example, pos, d_model]."""
        attn = self.model.blocks[layer].attn
        x = x + self.model.positions[: x.shape[1]]
        k = per_head(x, attn.W_K)
        if self.is_last(layer):
            q = per_head(rows_at(x, self.positions), attn.W_Q)
            self.pattern = attention_pattern(q, k, attn.alpha, attn.windows, self.positions)
        else:
            q, lse = per_head(x, attn.W_Q), None
            if self.model.kernels == "triton":  # the others have no use for it
                _, lse = attention_and_lse(q, k, k, attn.alpha, attn.windows, "triton")
            self.where_heads_look.append((q, k, lse))

    def attend(self, layer, x):
        """z [run, example, head, pos, d_head] of normalised x, with the clean run's pattern."""
        attn = self.model.blocks[layer].attn
        if not self.is_last(layer):
            v = per_head(x, attn.W_V)
            how = attn.alpha, attn.windows, self.model.kernels
            return frozen_attention(*self.where_heads_look[layer], v, *how)
        n_heads, d_model, d_head = attn.W_V.shape
        n_scored = self.positions.shape[1]
        if n_scored * (d_model - d_head) < d_model * d_head:  # mixing first costs less
            mixed = (self.pattern.flatten(1, 2) @ x).unflatten(2, (n_heads, n_scored))
            return torch.einsum("rbhsd,hde->rbhse", mixed, attn.W_V)
        return torch.stack([self.pattern @ v for v in per_head(x, attn.W_V)])

    def add_heads(self, layer, resid, z):
        if self.is_last(layer):
            resid = rows_at(resid, self.positions)
        return resid + sum_over_heads(z, self.model.blocks[layer].attn.W_O)

    def add_mlp(self, layer, resid):
        block = self.model.blocks[layer]
        return resid + block.mlp(self.normalise(block.ln2, resid)) if block.mlp else resid

    def normalise(self, ln, resid):
        if self.scales is None:
            return ln(resid)
        if ln not in self.scales:  # the clean run comes by first
            self.scales[ln] = layer_norm_divisor(resid)
        return ln(resid, self.scales[ln])

    def is_last(self, layer):
        return layer == len(self.model.blocks) - 1


@torch.no_grad()
def mean_results(model, inputs):
    """Mean z over all positions of all inputs, [layer, head, d_head]."""
    means = []

    def add(name, layer, value):
        if name == "z":
            means.append(value.mean(dim=(0, 2)))

    model.residual(inputs, add, pattern=None)
    return torch.stack(means)
