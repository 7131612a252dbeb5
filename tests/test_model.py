"""The model's promises: causal, the same through every path, sized as the paper says; its
snapshots' promises.
"""

import dataclasses

import pytest
import torch

from model import (
    SERIES,
    ModelConfig,
    Transformer,
    config_for,
    count_parameters,
    sinusoid,
)
from safety import BadInput

SMALL = ModelConfig(
    n_layers=3, d_model=32, n_heads=2, d_head=8, d_mlp=64, n_ctx=200, d_vocab=50, position_scale=2.0
)
VARIANTS = {
    "mlp": SMALL,
    "attention-only": dataclasses.replace(SMALL, d_mlp=0),
    "smeared": dataclasses.replace(SMALL, smear=True),
    "local": dataclasses.replace(SMALL, windows=(200, 5)),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def make(config, seed=0, **options):
    """A model with every parameter away from its start, gains and biases too."""
    model = Transformer(config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * (0.3 if parameter.dim() > 1 else 0.5))
    return model


def tokens(batch=2, n_ctx=150):
    return torch.randint(50, (batch, n_ctx), generator=torch.Generator().manual_seed(1))


@each_variant
def test_model_is_causal(config):
    model, changed = make(config), tokens()
    changed[:, 100:] = (changed[:, 100:] + 1) % 50
    before, after = model(tokens()), model(changed)
    assert torch.allclose(before[:, :100], after[:, :100], atol=1e-5)
    assert not torch.allclose(before[:, 100], after[:, 100], atol=1e-2)


@each_variant
def test_the_hooked_path_computes_what_the_fused_path_does(config):
    model = make(config)
    seen = []
    hooked = model(tokens(), hook=lambda name, layer, value: seen.append((layer, name)))
    assert torch.allclose(hooked, model(tokens()), atol=1e-4)
    names = ["resid_pre", "ln1_scale", "q", "k", "v", "pattern", "z", "resid_mid", "resid_post"]
    if config.d_mlp:
        names[8:8] = ["ln2_scale", "mlp_out"]
    expected = [(layer, name) for layer in range(3) for name in names]
    assert seen == [*expected, (3, "ln_final_scale"), (3, "resid_final")]


@each_variant
def test_a_hook_need_not_look_at_the_pattern(config):
    model = make(config)
    everything, fused = {}, {}
    model(tokens(), lambda name, layer, x: everything.update({(name, layer): x}))
    model(tokens(), lambda name, layer, x: fused.update({(name, layer): x}), pattern=None)
    assert everything.keys() - fused.keys() == {("pattern", layer) for layer in range(3)}
    for key, value in fused.items():
        assert torch.allclose(value, everything[key], atol=1e-4)


@each_variant
def test_a_hook_sees_the_pattern_in_passing(config):
    model = make(config)
    patterns, tiles = {}, {}

    def look(name, layer, value):
        if name == "pattern":
            patterns[layer] = value
        if name == "pattern_tile":
            tiles.setdefault(layer, []).append(value)

    with torch.no_grad():
        model(tokens(), look)
        passing = model(tokens(), look, pattern="tiles")
        assert torch.allclose(passing, model(tokens()), atol=1e-4)
    for layer, pattern in patterns.items():
        for first, tile in tiles[layer]:
            rows = pattern[:, :, first : first + tile.shape[2]]
            assert torch.allclose(tile, rows[..., : tile.shape[3]], atol=1e-5)
        assert sum(tile.shape[2] for _, tile in tiles[layer]) == pattern.shape[2]


@pytest.mark.parametrize("pattern", [True, False, "tile"])
def test_a_pattern_is_seen_whole_or_in_tiles_or_not(pattern):
    with pytest.raises(ValueError, match="a hook sees it"):
        make(SMALL).residual(tokens(), lambda *_: None, pattern)


def test_activations_are_what_a_hook_sees():
    model, seen = make(SMALL), {}
    model(tokens(), lambda name, layer, x: seen.update({(name, layer): x}))
    for names in (("v", "pattern"), ("q", "k")):
        for name, values in zip(names, model.activations(tokens(), *names), strict=True):
            for layer in range(3):
                assert torch.allclose(values[layer], seen[name, layer], atol=1e-4)


def test_tiles_are_refused_where_queries_are_chosen():
    with pytest.raises(ValueError, match="leave `at` out"):
        make(SMALL).residual(tokens(), lambda *_: None, "tiles", at=torch.tensor([[3], [5]]))


@each_variant
def test_a_hook_that_only_looks_changes_no_bit(config):
    model = make(config)
    looked = model(tokens(), lambda name, layer, x: None, pattern=None)
    assert torch.equal(looked, model(tokens()))


@each_variant
def test_losses_at_some_positions_are_those_of_all(config):
    model, targets = make(config), tokens().roll(-1, 1)
    at = torch.tensor([[0, 149, 7, 7], [148, 3, 2, 1]])
    everywhere = model.losses(tokens(), targets)
    some = model.losses(tokens(), targets, at=at)
    assert torch.allclose(some, everywhere.gather(1, at), atol=1e-4)
    assert torch.allclose(model(tokens(), at=at)[1, 1], model(tokens())[1, 3], atol=1e-4)


@each_variant
def test_fast_kernels_agree_with_the_reference_in_float64(config):
    exact = make(config, kernels="reference", dtype=torch.float64).double()
    targets = tokens().roll(-1, 1)
    reference = make(config, kernels="reference").losses(tokens(), targets)
    fast = make(config).losses(tokens(), targets)
    error = (reference - exact.losses(tokens(), targets)).abs().max()
    assert (fast - exact.losses(tokens(), targets)).abs().max() <= 2 * error + 1e-6


def test_a_hook_replaces_what_it_returns():
    model = make(SMALL)

    def silence_head(name, layer, value):
        if name == "z" and layer == 1:
            value = value.clone()
            value[:, 1] = 0
            return value

    ablated = model(tokens(), hook=silence_head)
    with torch.no_grad():
        model.blocks[1].attn.W_O[1] = 0
    assert torch.allclose(ablated, model(tokens()), atol=1e-4)
    assert not torch.allclose(ablated, make(SMALL)(tokens()), atol=1e-2)


def test_losses_are_cross_entropies_of_the_logits():
    model, targets = make(SMALL), tokens().roll(-1, 1)
    log_probability = model(tokens()).log_softmax(-1)
    by_hand = -log_probability.gather(2, targets[:, :, None]).squeeze(2)
    assert torch.allclose(model.losses(tokens(), targets), by_hand, atol=1e-4)


def test_positions_reach_queries_and_keys_but_never_the_residual_stream():
    config = dataclasses.replace(SMALL, n_layers=1, d_mlp=0)
    model = make(config)
    moved = make(config)
    moved.positions += 1.0
    seen = {}
    model(tokens(), hook=lambda name, layer, value: seen.update({("here", name): value}))
    moved(tokens(), hook=lambda name, layer, value: seen.update({("moved", name): value}))
    for name in ("resid_pre", "v"):
        assert torch.equal(seen["here", name], seen["moved", name])
    for name in ("q", "k", "pattern"):
        assert not torch.allclose(seen["here", name], seen["moved", name], atol=1e-2)


def test_a_shift_of_positions_is_one_rotation():
    config = config_for("mini", 2, 1024, attn_only=True)
    signal = sinusoid(config)
    half = config.d_model // 2
    sine, cosine = signal[:, :half], signal[:, half:]
    assert torch.allclose(
        sine**2 + cosine**2, torch.full_like(sine, config.position_scale**2), atol=1e-4
    )
    turn_sine, turn_cosine = sine[1] / config.position_scale, cosine[1] / config.position_scale
    assert torch.allclose(sine[1:], sine[:-1] * turn_cosine + cosine[:-1] * turn_sine, atol=1e-4)


def test_initial_weights_depend_on_the_seed_alone():
    weights = [Transformer(SMALL).init_weights(seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["embed.W_E"], weights[2]["embed.W_E"])
    assert weights[0]["blocks.1.attn.W_Q"].std() == pytest.approx(0.02, rel=0.1)


def test_initial_weights_have_the_deviations_of_the_configuration():
    config = dataclasses.replace(SMALL, init_embed=0.5, init_value=2.0, init_gain_later=4.0)
    model = Transformer(config).init_weights(0)
    expected = {
        "embed.W_E": 0.5, "unembed.W_U": 0.02,
        "blocks.0.attn.W_Q": 0.02, "blocks.0.attn.W_V": 2.0, "blocks.0.attn.W_O": 2.0,
        "blocks.1.attn.W_K": 0.02, "blocks.1.attn.W_V": 2.0, "blocks.1.attn.W_O": 0.5,
        "blocks.1.mlp.W_in": 0.02,
    }  # fmt: skip
    for name, deviation in expected.items():
        assert model.state_dict()[name].std() == pytest.approx(deviation, rel=0.1), name
    later = {"blocks.1.ln1.w", "blocks.2.ln1.w"}
    for name, gains in model.state_dict().items():
        if name.endswith(".w"):
            assert set(gains.tolist()) == {4.0 if name in later else 1.0}, name


def test_weights_have_the_names_and_shapes_of_transformer_lens():
    shapes = {name: tuple(w.shape) for name, w in Transformer(SMALL).state_dict().items()}
    block = {
        "ln1.w": (32,), "ln1.b": (32,), "ln2.w": (32,), "ln2.b": (32,),
        "attn.W_Q": (2, 32, 8), "attn.W_K": (2, 32, 8), "attn.W_V": (2, 32, 8),
        "attn.W_O": (2, 8, 32),
        "mlp.W_in": (32, 64), "mlp.b_in": (64,), "mlp.W_out": (64, 32), "mlp.b_out": (32,),
    }  # fmt: skip
    outside = {
        "embed.W_E": (50, 32),
        "unembed.W_U": (32, 50),
        "ln_final.w": (32,),
        "ln_final.b": (32,),
    }
    assert shapes == outside | {
        f"blocks.{n}.{name}": s for n in range(3) for name, s in block.items()
    }


# the paper's models

FULL_SCALE = {
    "full-13M": (4, 512, 8, 64, 13e6),
    "full-42M": (6, 768, 12, 64, 42e6),
    "full-200M": (10, 1280, 20, 64, 200e6),
    "full-810M": (16, 2048, 32, 64, 810e6),
    "full-2.7B": (24, 3072, 48, 64, 2.7e9),
    "full-13B": (40, 5120, 40, 128, 13e9),
}


@pytest.mark.parametrize("name", FULL_SCALE)
def test_full_scale_models_have_the_sizes_of_the_papers_table(name):
    n_layers, d_model, n_heads, d_head, non_embedding = FULL_SCALE[name]
    config = SERIES[name]
    assert (config.n_layers, config.d_model, config.n_heads, config.d_head) == (
        n_layers,
        d_model,
        n_heads,
        d_head,
    )
    assert (config.n_ctx, config.d_vocab) == (8192, 2**16)
    with torch.device("meta"):
        counted = count_parameters(Transformer(config))[1]
    assert counted == 12 * n_layers * d_model**2
    assert counted == pytest.approx(non_embedding, rel=0.05)  # the table has two digits


@pytest.mark.parametrize("n_layers", range(1, 7))
def test_small_models_have_the_sizes_of_the_paper(n_layers):
    for name, per_layer in (("attn-only", 4 * 768**2), ("mlp", 12 * 768**2)):
        config = SERIES[f"small-{name}-{n_layers}"]
        assert (config.n_layers, config.n_heads, config.d_head) == (n_layers, 12, 64)
        with torch.device("meta"):
            assert count_parameters(Transformer(config))[1] == n_layers * per_layer


def test_the_smeared_series_differs_from_its_controls_by_one_number_a_head():
    for n_layers in (1, 2):
        smeared, control = SERIES[f"smear-{n_layers}"], SERIES[f"smear-control-{n_layers}"]
        assert control == SERIES[f"small-attn-only-{n_layers}"]
        with torch.device("meta"):
            more = (
                count_parameters(Transformer(smeared))[0]
                - count_parameters(Transformer(control))[0]
            )
        assert more == 12 * n_layers
    assert len(SERIES) == 12 + 4 + 6


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 0}, {"d_head": -1}, {"n_heads": 1.5}, {"d_model": 33}, {"d_mlp": -4},
        {"windows": (1,)}, {"windows": (0, 3)}, {"windows": ()}, {"windows": (2.5, 3)},
        {"d_vocab": 0}, {"n_heads": 10**9, "windows": (1, 1)}, {"n_heads": 2**31}, {"smear": 1},
        {"position_scale": float("inf")}, {"init_embed": 1e31}, {"init_value": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_sizes_are_refused(change):
    with pytest.raises(BadInput):
        dataclasses.replace(SMALL, **change)


def test_inputs_beyond_the_context_are_refused():
    with pytest.raises(BadInput, match="context of 200"):
        make(SMALL)(tokens(1, 201))


def test_heads_beyond_the_kernels_are_refused_in_one_line():
    with pytest.raises(BadInput, match="heads of 256.*--kernels torch"):
        Transformer(dataclasses.replace(SMALL, d_head=256), kernels="triton")
