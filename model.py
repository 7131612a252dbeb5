"""The transformer of the paper and its sizes.

A decoder-only, pre-LayerNorm transformer that can be attention-only (`d_mlp = 0`), as in "A
Mathematical Framework for Transformer Circuits". Two things differ from GPT-2, both because the
paper's argument needs them:

- Positions never enter the residual stream. A fixed sinusoid is added to the input of W_Q and W_K
  in every layer, after the LayerNorm (Press et al. 2020, section 5.1). Heads see where tokens are
  but cannot copy positions around, which leaves K-composition as the only way for two layers to
  build an induction head.
- Keys may be smeared (`smear`): every head mixes a share of the previous token's key into each key,
  which hands a single layer what otherwise takes a previous-token head.

Row vectors throughout: `resid @ W`. So QK = W_Q @ W_K.T and OV = W_V @ W_O for each head. Weights
have TransformerLens' names and shapes. Shapes below: resid [batch, pos, d_model]; q k v z [batch,
head, pos, d_head]; pattern [batch, head, query, key].
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import at_least_float32, attention, attention_pattern, watched_attention
from kernels.cross_entropy import linear_cross_entropy
from safety import BadInput

# what kernels count in, and float32 with room for products
LARGEST_SIZE, LARGEST_NUMBER = 2**31 - 1, 1e30


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the weights' shapes and what they mean."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int  # 0: attention-only
    n_ctx: int  # longest input, start token included
    d_vocab: int
    smear: bool = False
    # how many positions each head of a layer sees, its own included; None: every head sees all
    windows: tuple[int, ...] | None = None
    # of the sinusoid: its amplitude, and its frequencies in radians a token, from max_frequency
    # down to max_frequency / base
    position_scale: float = 1.0
    position_base: float = 10_000.0
    position_max_frequency: float = 1.0
    # deviations of the initial weights: W_E; W_V and W_O. All other matrices start with 0.02.
    init_embed: float = 0.02
    init_value: float = 0.02
    # the gain, at first, of the LayerNorm before attention in all layers but the first, whose W_O
    # is divided by it, so that what heads write does not grow
    init_gain_later: float = 1.0

    def __post_init__(self):
        for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab"):
            value, least = getattr(self, name), 0 if name == "d_mlp" else 1
            if type(value) is not int or not least <= value <= LARGEST_SIZE:
                raise BadInput(
                    f"{name} is {value!r}: a whole number from {least} to {LARGEST_SIZE} is needed"
                )
        if self.d_model % 2:
            raise BadInput(f"d_model is {self.d_model}: it must be even (half sines, half cosines)")
        for name in (f.name for f in dataclasses.fields(self) if f.type is float):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= LARGEST_NUMBER:
                raise BadInput(
                    f"{name} is {value!r}: a positive number up to {LARGEST_NUMBER} is needed"
                )
        if type(self.smear) is not bool:
            raise BadInput(f"smear is {self.smear!r}: it is on or off")
        if self.windows is not None and not (
            len(self.windows) == self.n_heads
            and all(type(w) is int and 1 <= w <= LARGEST_SIZE for w in self.windows)
        ):
            raise BadInput(
                f"windows {self.windows}: each of {self.n_heads} heads needs a whole number from 1"
                f" to {LARGEST_SIZE}"
            )


# The three sizes of the small series. mini trains in minutes on two CPU cores; small on one GPU;
# paper is the paper's own. d_head is 64 everywhere: it is the one size that the phase change
# depends on most when models shrink. mini starts so that the change comes soon. A head of the first
# layer writes about as much as an embedding holds, so that what comes later can read both. The
# first layer sees the positions best, several times as large as its input, and finds the previous
# token by them; in later layers what earlier ones wrote is as large, so that they match by it. The
# slowest wave of the positions is a little longer than the context. Embeddings and gains of that
# size need a learning rate of their own (vector_factor in train.py).
SCALES = {
    "mini": {
        "d_model": 128, "n_heads": 2, "d_head": 64, "n_ctx": 512,
        "position_scale": 4.0, "position_base": 300.0, "position_max_frequency": 2.5,
        "init_embed": 1.0, "init_value": 0.1, "init_gain_later": 4.0,
    },
    "small": {"d_model": 768, "n_heads": 12, "d_head": 64, "n_ctx": 1024},
    "paper": {"d_model": 768, "n_heads": 12, "d_head": 64, "n_ctx": 8192},
}  # fmt: skip


def config_for(scale, n_layers, d_vocab, *, attn_only=False, smear=False):
    """The model of the small series with that many layers, at one of the three scales."""
    sizes = SCALES[scale]
    return ModelConfig(
        n_layers=n_layers,
        d_mlp=0 if attn_only else 4 * sizes["d_model"],
        d_vocab=d_vocab,
        smear=smear,
        **sizes,
    )


def _full_scale(n_layers, n_heads, d_head):
    """Dense and local heads in equal number. The paper names neither their ratio nor the window:
    256 is our choice.
    """
    d_model = n_heads * d_head
    return ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=4 * d_model,
        n_ctx=8192,
        d_vocab=2**16,
        windows=(8192, 256) * (n_heads // 2),
    )


# Every model shape of the paper by name, at the paper's scale. The books series has the shapes of
# the small one.
SERIES = {
    **{f"small-attn-only-{n}": config_for("paper", n, 2**16, attn_only=True) for n in range(1, 7)},
    **{f"small-mlp-{n}": config_for("paper", n, 2**16) for n in range(1, 7)},
    **{f"smear-{n}": config_for("paper", n, 2**16, attn_only=True, smear=True) for n in (1, 2)},
    **{f"smear-control-{n}": config_for("paper", n, 2**16, attn_only=True) for n in (1, 2)},
    "full-13M": _full_scale(4, 8, 64),
    "full-42M": _full_scale(6, 12, 64),
    "full-200M": _full_scale(10, 20, 64),
    "full-810M": _full_scale(16, 32, 64),
    "full-2.7B": _full_scale(24, 48, 64),
    "full-13B": _full_scale(40, 40, 128),
}


EPSILON = 1e-5  # under the root of every LayerNorm's variance


class LayerNorm(nn.Module):
    """resid [..., d_model] -> the same shape, with gain w and bias b."""

    def __init__(self, d_model):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))

    def forward(self, resid, scale=None):
        """scale [..., 1]: divide by this instead of by resid's own deviation, which freezes the
        LayerNorm: it then is linear.
        """
        if scale is None:
            return F.layer_norm(resid, self.w.shape, self.w, self.b, EPSILON)
        return (resid - resid.mean(-1, keepdim=True)) / scale * self.w + self.b


def layer_norm_divisor(resid):
    """What a LayerNorm divides by where it reads resid [..., d_model]: [..., 1]."""
    centred = resid - resid.mean(dim=-1, keepdim=True)  # ten times as fast as resid.var
    return (centred.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()


class Attention(nn.Module):
    """All heads of a layer: x [batch, pos, d_model], what LayerNorm made of the stream -> what the
    heads together add to it, of the same shape.

    positions [pos, d_model] are added for queries and keys alone; touch: a `_Touch`; at [batch, n]:
    where the queries stand (None: everywhere), which then is the shape of the answer, too.
    """

    def __init__(self, config):
        super().__init__()
        into_head = (config.n_heads, config.d_model, config.d_head)
        self.W_Q = nn.Parameter(torch.empty(into_head))
        self.W_K = nn.Parameter(torch.empty(into_head))
        self.W_V = nn.Parameter(torch.empty(into_head))
        self.W_O = nn.Parameter(torch.empty(config.n_heads, config.d_head, config.d_model))
        # sigmoid(alpha) is the share of a token's own key. The paper names no start. From 0.27 a
        # mini model finds induction within a million tokens or two; from 0.5, where both keys
        # weigh the same, the one that was tried had not after four.
        self.alpha = nn.Parameter(torch.full((config.n_heads,), -1.0)) if config.smear else None
        self.windows = config.windows

    def forward(self, x, positions, kernels, touch, at=None):
        placed = x + positions
        if at is None:
            q, k = per_head(placed, torch.cat([self.W_Q, self.W_K])).chunk(2, dim=1)
        else:
            q, k = per_head(rows_at(placed, at), self.W_Q), per_head(placed, self.W_K)
        q, k, v = touch("q", q), touch("k", k), touch("v", per_head(x, self.W_V))
        if touch.pattern == "whole":  # somebody is looking: it has to exist
            pattern = attention_pattern(*at_least_float32(q, k), self.alpha, self.windows, at)
            z = touch("pattern", pattern).to(v.dtype) @ v
        elif touch.pattern == "tiles":
            z = watched_attention(q, k, v, touch.watch, self.alpha, self.windows)
        else:
            z = attention(q, k, v, self.alpha, self.windows, kernels, at)
        return sum_over_heads(touch("z", z), self.W_O)


class MLP(nn.Module):
    """x [batch, pos, d_model] -> what it adds to the stream, of the same shape; products in x's
    dtype.
    """

    def __init__(self, config):
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(config.d_model, config.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(config.d_mlp))
        self.W_out = nn.Parameter(torch.empty(config.d_mlp, config.d_model))
        self.b_out = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x):
        hidden = F.gelu(x @ self.W_in.to(x.dtype) + self.b_in.to(x.dtype))
        return hidden @ self.W_out.to(x.dtype) + self.b_out.to(x.dtype)


class Block(nn.Module):
    """A layer: resid [batch, pos, d_model] -> resid plus what its heads and its MLP add, [batch, n,
    d_model] if it is asked for at n positions. Products are in dtype, the stream in float32.
    """

    def __init__(self, config):
        super().__init__()
        self.ln1 = LayerNorm(config.d_model)
        self.attn = Attention(config)
        if config.d_mlp:
            self.ln2 = LayerNorm(config.d_model)
            self.mlp = MLP(config)
        else:
            self.mlp = None

    def forward(self, resid, positions, dtype, kernels, touch, at=None):
        resid = touch("resid_pre", resid)
        x = _normalise(self.ln1, resid, "ln1_scale", touch).to(dtype)
        resid = rows_at(resid, at) + self.attn(x, positions, kernels, touch, at)
        resid = touch("resid_mid", resid)
        if self.mlp:
            x = _normalise(self.ln2, resid, "ln2_scale", touch)
            resid = resid + touch("mlp_out", self.mlp(x.to(dtype)))
        return touch("resid_post", resid)


class Transformer(nn.Module):
    """`model(tokens)` -> logits; `model.losses(tokens, targets)` -> nats for each token, without
    the logits in memory.

    Both take `hook(name, layer, value)`, called on resid_pre, ln1_scale, q, k, v, pattern, z,
    resid_mid, ln2_scale, mlp_out and resid_post of every layer and on ln_final_scale and
    resid_final: what it returns replaces the value, None keeps it. (The scale of a LayerNorm is
    what it divides by.) Without a hook, or with `pattern=None`, no pattern exists in memory; with
    `pattern="tiles"` the hook sees it in passing, as "pattern_tile": (first query, pattern of some
    queries), which it cannot replace; not together with `at`.

    Both take `at` [batch, n]: the positions at which the answer is wanted, [batch, n, ...]. The
    last layer then has queries only there, and the unembedding rows.

    kernels: "reference", "torch" or "triton" (on a GPU). dtype: of the matrix products; weights and
    the residual stream stay in float32.
    """

    def __init__(self, config, kernels="torch", dtype=torch.float32):
        super().__init__()
        if kernels == "triton" and config.d_head > 128:
            raise BadInput(
                f"heads of {config.d_head}: the Triton kernels go up to 128; use --kernels torch"
            )
        self.config = config
        self.kernels = kernels
        self.dtype = dtype
        self.embed = nn.ParameterDict({"W_E": torch.empty(config.d_vocab, config.d_model)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = LayerNorm(config.d_model)
        self.unembed = nn.ParameterDict({"W_U": torch.empty(config.d_model, config.d_vocab)})
        self.register_buffer("positions", sinusoid(config), persistent=False)  # [n_ctx, d_model]

    def init_weights(self, seed):
        """Matrices normal with the configuration's deviations, gains 1 but for init_gain_later,
        biases 0; the same weights for the same seed on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        value = self.config.init_value
        deviations = {"W_E": self.config.init_embed, "W_V": value, "W_O": value}
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                deviation = deviations.get(name.split(".")[-1], 0.02)
                values = torch.randn(parameter.shape, generator=generator) * deviation
                parameter.data.copy_(values)
        for block in self.blocks[1:]:
            block.ln1.w.data.fill_(self.config.init_gain_later)
            block.attn.W_O.data /= self.config.init_gain_later
        return self

    def residual(self, tokens, hook=None, pattern="whole", at=None):
        """tokens [batch, pos] -> the residual stream after the final LayerNorm, in `dtype`."""
        n_ctx = tokens.shape[1]
        if n_ctx > self.config.n_ctx:
            raise BadInput(f"{n_ctx} tokens do not fit the model's context of {self.config.n_ctx}")
        if pattern not in ("whole", "tiles", None):
            raise ValueError(
                f"pattern={pattern!r}: a hook sees it 'whole', in 'tiles' or not (None)"
            )
        if pattern == "tiles" and at is not None:
            raise ValueError("tiles are of the pattern of all queries: leave `at` out")
        positions = self.positions[:n_ctx].to(self.dtype)
        resid = F.embedding(tokens, self.embed["W_E"])
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            touch = _Touch(hook, layer, pattern)
            rows = at if layer == last else None
            resid = block(resid, positions, self.dtype, self.kernels, touch, rows)
        touch = _Touch(hook, len(self.blocks), pattern)
        resid = _normalise(self.ln_final, resid, "ln_final_scale", touch)
        return touch("resid_final", resid.to(self.dtype))

    def activations(self, tokens, *names):
        """What a hook sees under these names in a run over tokens [batch, pos]: a list for each
        name, of its value in every layer.
        """
        seen = {name: [] for name in names}

        def keep(name, layer, value):
            if name in seen:
                seen[name].append(value)

        self.residual(tokens, keep, "whole" if "pattern" in seen else None)
        return list(seen.values())

    def forward(self, tokens, hook=None, pattern="whole", at=None):
        """tokens [batch, pos] -> logits [batch, pos, d_vocab]."""
        return self.residual(tokens, hook, pattern, at) @ self.unembed["W_U"].to(self.dtype)

    def losses(self, tokens, targets, hook=None, pattern="whole", at=None):
        """Cross-entropy in nats, float32: tokens, targets [batch, pos] -> [batch, pos]."""
        targets = targets if at is None else targets.gather(1, at)
        resid = self.residual(tokens, hook, pattern, at).flatten(0, 1)
        W_U = self.unembed["W_U"].to(self.dtype)
        losses = linear_cross_entropy(resid, W_U, targets.flatten(), self.kernels)
        return losses.view(targets.shape)


def sinusoid(config):
    """The position signal added to the inputs of W_Q and W_K, [n_ctx, d_model]: sines, cosines.

    A shift by any number of positions is one rotation of this vector, which W_Q W_K^T can learn: so
    a head can look at "one token back" wherever it stands.
    """
    if torch.get_default_device().type == "meta":  # arithmetic there imports PyTorch's compiler
        return torch.empty(config.n_ctx, config.d_model)
    position = torch.arange(config.n_ctx, dtype=torch.float64)[:, None]
    exponent = torch.arange(config.d_model // 2, dtype=torch.float64) / (config.d_model / 2)
    angle = position * config.position_max_frequency * config.position_base**-exponent
    return (config.position_scale * torch.cat([angle.sin(), angle.cos()], dim=1)).float()


def count_parameters(model):
    """-> (all parameters, the blocks' matrices alone: the paper's "non-embedding" parameters)."""
    everything = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() > 1)
    return everything, matrices


def per_head(x, W):
    """x [..., pos, d_model] @ W [head, d_model, d_head] -> [..., head, pos, d_head]."""
    n_heads, d_model, d_head = W.shape
    flat = W.transpose(0, 1).reshape(d_model, n_heads * d_head).to(x.dtype)
    return (x @ flat).unflatten(-1, (n_heads, d_head)).transpose(-3, -2)


def sum_over_heads(z, W_O):
    """z [..., head, pos, d_head] @ W_O [head, d_head, d_model] -> [..., pos, d_model]."""
    return z.transpose(-3, -2).flatten(-2) @ W_O.flatten(0, 1).to(z.dtype)


def _normalise(ln, resid, name, touch):
    if touch.hook is None:
        return ln(resid)
    divisor = layer_norm_divisor(resid)
    touched = touch(name, divisor)
    return ln(resid) if touched is divisor else ln(resid, touched)


def rows_at(x, at):
    """x [..., batch, pos, d_model] at the positions `at` [batch, n]; all of it if None."""
    return x if at is None else x[..., torch.arange(len(at), device=x.device)[:, None], at, :]


class _Touch:
    """The user's `hook(name, layer, value)`, which may return nothing, as `touch(name, value)`.

    pattern: how the hook looks at the attention pattern: "whole", in "tiles", or None, not at all.
    """

    def __init__(self, hook, layer, pattern):
        self.hook, self.layer = hook, layer
        self.pattern = pattern if hook else None

    def watch(self, first_query, tile):
        self("pattern_tile", (first_query, tile))

    def __call__(self, name, value):
        replacement = self.hook and self.hook(name, self.layer, value)
        return value if replacement is None else replacement
