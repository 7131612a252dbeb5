"""Ablations: exact values that need no second implementation, then the sweep against two passes
with hooks.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import sweep
from model import ModelConfig, Transformer
from sweep import CleanRun, ablation, mean_results, preserving_patterns

N_CTX = 60
SMALL = ModelConfig(
    n_layers=2, d_model=32, n_heads=3, d_head=8, d_mlp=0, n_ctx=N_CTX, d_vocab=40, position_scale=2
)


def make(**changes):
    """A model with every parameter away from its start: gains, biases and smears too."""
    model = Transformer(dataclasses.replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * (0.3 if parameter.dim() > 1 else 0.5))
    return model


@pytest.fixture(scope="module")
def rows():
    tokens = torch.randint(40, (5, N_CTX + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def two_passes(model, rows, heads, means=None, freeze_layernorm=False):
    hook = preserving_patterns(model, rows[0], ablation(heads, means), freeze_layernorm)
    return model.losses(*rows, hook)


def every_head(model):
    sizes = model.config.n_layers, model.config.n_heads
    return [(layer, head) for layer in range(sizes[0]) for head in range(sizes[1])]


# what an ablation is


def test_ablating_nothing_changes_nothing(rows):
    model = make(d_mlp=64)
    assert torch.allclose(two_passes(model, rows, []), model.losses(*rows), atol=1e-5)


def test_a_head_named_twice_is_ablated_once(rows):
    model, at = make(), torch.tensor([[5, 50]]).expand(5, -1)
    once, twice = sweep.sweep(model, *rows, at, [[(0, 1)], [(0, 1), (0, 1)]])
    assert torch.equal(once, twice)


def test_a_full_ablation_is_the_model_without_those_weights(rows):
    model, cut = make(n_layers=3, d_mlp=64), make(n_layers=3, d_mlp=64)
    cut.blocks[1].attn.W_O[2] = 0
    cut.blocks[0].attn.W_O[0] = 0
    ablated = model.losses(*rows, ablation([(1, 2), (0, 0)]))
    assert torch.allclose(ablated, cut.losses(*rows), atol=1e-5)


def test_patterns_matter_below_the_last_layer_only(rows):
    model = make()
    for heads, same in (([(1, 0)], True), ([(0, 0)], False)):
        full = model.losses(*rows, ablation(heads))
        difference = (two_passes(model, rows, heads) - full).abs().max()
        assert difference < 1e-5 if same else difference > 0.1


def test_an_ablated_run_keeps_the_patterns_of_the_clean_run(rows):
    """The patterns are forced, so what queries and keys become is of no consequence."""
    model, seen, kept = make(), {}, {}

    def look(into, then=lambda *_: None):
        def hook(name, layer, value):
            replacement = then(name, layer, value)
            if name in ("pattern", "z"):
                into[name, layer] = value if replacement is None else replacement
            return replacement

        return hook

    model.residual(rows[0], look(seen))
    hook = preserving_patterns(model, rows[0], ablation([(0, 1)]))
    model.residual(rows[0], look(kept, hook))
    assert torch.equal(seen["pattern", 1], kept["pattern", 1])
    assert kept["z", 0][:, 1].abs().max() == 0
    assert torch.equal(seen["z", 0][:, 0], kept["z", 0][:, 0])


def test_frozen_the_logits_lose_exactly_the_paths_through_the_head(rows):
    """With patterns and LayerNorms frozen, an attention-only model is a sum over paths: those of
    head 0:1 go straight to the logits, and through each head of the next layer.
    """
    model, seen = make(), {}
    model.residual(rows[0], lambda *point: seen.update({point[:2]: point[2]}))
    hook = preserving_patterns(model, rows[0], ablation([(0, 1)]), freeze_layernorm=True)
    lost = model(rows[0]) - model(rows[0], hook)
    attn, ln1, W_U = model.blocks[1].attn, model.blocks[1].ln1, model.unembed["W_U"]

    def through(ln, scale, x):
        return (x - x.mean(-1, keepdim=True)) / scale * ln.w

    head = seen["z", 0][:, 1] @ model.blocks[0].attn.W_O[1]
    paths = [head]
    for later in range(3):
        read = through(ln1, seen["ln1_scale", 1], head) @ attn.W_V[later]
        paths.append(seen["pattern", 1][:, later] @ read @ attn.W_O[later])
    logits = [through(model.ln_final, seen["ln_final_scale", 2], path) @ W_U for path in paths]
    assert torch.allclose(lost, sum(logits), atol=1e-4)
    assert min(path.abs().max() for path in logits) > 0.01  # every path carries something


def test_without_heads_only_the_direct_path_is_left(rows):
    model = make(n_layers=3)
    direct = model.ln_final(F.embedding(rows[0], model.embed["W_E"])) @ model.unembed["W_U"]
    expected = F.cross_entropy(direct.transpose(1, 2), rows[1], reduction="none")
    assert torch.allclose(two_passes(model, rows, every_head(model)), expected, atol=1e-5)
    # which is a function of the present token and the next: the same wherever they stand
    constant = torch.full_like(rows[0], 7)
    losses = two_passes(model, (constant, constant), every_head(model))
    assert torch.allclose(losses, losses[0, 0], atol=1e-5)


def test_the_mean_is_over_all_positions_of_all_examples(rows):
    model, seen = make(), {}
    model.residual(rows[0], lambda *point: seen.update({point[:2]: point[2]}))
    means = mean_results(model, rows[0])
    by_hand = sum(seen["z", 1][n, 2, i] for n in range(5) for i in range(N_CTX)) / (5 * N_CTX)
    assert torch.allclose(means[1, 2], by_hand, atol=1e-5)
    # replacing by the mean is the bias that it adds, once the head writes nothing
    biased = make()
    biased.blocks[1].attn.W_O[2] = 0

    def add_mean(name, layer, value):
        if name == "resid_mid" and layer == 1:
            return value + by_hand @ model.blocks[1].attn.W_O[2]

    expected = biased.losses(*rows, add_mean)
    assert torch.allclose(two_passes(model, rows, [(1, 2)], means), expected, atol=1e-5)


# the sweep

MODELS = {
    f"{n_layers} layers{', MLPs' if d_mlp else ''}{', smeared' if smear else ''}": dict(
        n_layers=n_layers, d_mlp=d_mlp, smear=smear
    )
    for n_layers in range(1, 7)
    for d_mlp in (0, 64)
    for smear in (False, True)
}
MODELS["3 layers, local heads"] = dict(n_layers=3, windows=(4, N_CTX, 17))
each_model = pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)


def scored_positions(rows):
    generator = torch.Generator().manual_seed(2)
    places = torch.randint(N_CTX, (len(rows[0]), 1), generator=generator)
    return torch.cat([torch.tensor([[0, 9, N_CTX - 1]]).expand(len(rows[0]), -1), places], dim=1)


def largest_difference(model, rows, ablations, means=None, freeze_layernorm=False):
    positions = scored_positions(rows)
    fast = sweep.sweep(model, *rows, positions, ablations, means, freeze_layernorm)
    slow = [
        two_passes(model, rows, heads, means, freeze_layernorm).gather(1, positions)
        for heads in ablations
    ]
    return (fast - torch.stack(slow)).abs().max()


@each_model
@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_the_sweep_equals_two_passes(sizes, replacement, rows):
    model = make(**sizes)
    means = mean_results(model, rows[0]) if replacement == "mean" else None
    heads = every_head(model)
    together = [heads[::2], [heads[-1], heads[0]], heads, []]
    assert largest_difference(model, rows, [[head] for head in heads] + together, means) < 1e-5


@each_model
def test_the_sweep_equals_two_passes_with_layernorm_frozen(sizes, rows):
    model = make(**sizes)
    ablations = [[head] for head in every_head(model)]
    assert largest_difference(model, rows, ablations, freeze_layernorm=True) < 1e-5


@pytest.mark.parametrize("n_scored", [1, N_CTX])
def test_few_and_many_scored_positions(n_scored, rows):
    """Fewer are mixed before they are projected, more after."""
    model = make(n_layers=3, smear=True)
    positions = torch.arange(n_scored).expand(5, -1)
    for heads in [(0, 1)], [(1, 2)], [(2, 0)]:
        fast = sweep.sweep(model, *rows, positions, [heads])[0]
        slow = two_passes(model, rows, heads)[:, :n_scored]
        assert (fast - slow).abs().max() < 1e-5


def test_a_stack_cut_in_pieces_is_the_same_stack(rows, monkeypatch):
    model = make(n_layers=3)
    ablations = [[head] for head in every_head(model)]
    whole = sweep.sweep(model, *rows, scored_positions(rows), ablations)
    monkeypatch.setitem(sweep.STACK_BYTES, "cpu", 1)
    pieces = sweep.sweep(model, *rows, scored_positions(rows), ablations)
    assert torch.allclose(whole, pieces, atol=1e-5)


# each of these slips would be seen


class NeighbouringHead(CleanRun):
    def without(self, ablations, layer, means=None):
        moved = [[(below, (head + 1) % 3) for below, head in heads] for heads in ablations]
        return super().without(moved, layer, means)


class PatternOfAnotherExample(CleanRun):
    def fix_pattern(self, layer, x):
        super().fix_pattern(layer, x.flip(0))


class ForgottenMLP(CleanRun):
    """Of the ablated layer, which reads what the head wrote."""

    forgotten = None

    def without(self, ablations, layer, means=None):
        self.forgotten = layer
        return super().without(ablations, layer, means)

    def add_mlp(self, layer, resid):
        return resid if layer == self.forgotten else super().add_mlp(layer, resid)


class ForgottenSmear(CleanRun):
    def fix_pattern(self, layer, x):
        attn = self.model.blocks[layer].attn
        alpha, attn.alpha = attn.alpha, None
        super().fix_pattern(layer, x)
        attn.alpha = alpha


@pytest.mark.parametrize(
    "slip", [NeighbouringHead, PatternOfAnotherExample, ForgottenMLP, ForgottenSmear]
)
def test_a_slip_is_seen(slip, rows, monkeypatch):
    model = make(n_layers=3, d_mlp=64, smear=True)
    monkeypatch.setattr(sweep, "CleanRun", slip)
    for head in every_head(model):
        assert largest_difference(model, rows, [[head]]) > 1e-2


# an oracle that is not ours


def test_transformer_lens_says_the_same(rows):
    from bench import transformer_lens_ablation, transformer_lens_twin

    model, inputs = make(n_layers=2), rows[0]
    targets = inputs[:, 1:]
    twin, patterns = transformer_lens_twin(model), {}
    if twin is None:
        pytest.skip("needs TransformerLens before version 4")

    def keep(name, layer, value):
        if name == "pattern":
            patterns[layer] = value

    logits, cache = twin.run_with_cache(inputs)
    assert torch.allclose(model(inputs, keep), logits, atol=1e-4)
    for layer in range(2):
        assert torch.allclose(patterns[layer], cache["pattern", layer], atol=1e-4)
    without = transformer_lens_ablation(twin, inputs)
    positions = torch.arange(N_CTX - 1).expand(len(inputs), -1)
    padded = torch.cat([targets, targets[:, :1]], dim=1)
    ours = sweep.sweep(model, inputs, padded, positions, [[h] for h in every_head(model)])
    for losses, head in zip(ours, every_head(model), strict=True):
        assert torch.allclose(losses, without(head), atol=1e-4)
