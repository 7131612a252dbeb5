"""The fast path against the definition, the definition against hand-computed cases, and the tests
against mutants.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import attention as module
from kernels.attention import (
    attention,
    attention_pattern,
    attention_reference,
    frozen_attention,
    smear_keys,
    visible,
    watched_attention,
)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def inputs(n_ctx, d_head=16, n_heads=3, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, n_heads, n_ctx, d_head)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def output_and_gradients(function, tensors, *args):
    """z and the gradient of a random weighting of it for every tensor."""
    z = function(*tensors, *args)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(9)).to(z)
    return [z.detach(), *torch.autograd.grad((z * weight).sum(), tensors)]


def assert_as_exact_as_the_reference(actual, reference, exact, dq_roundings=1):
    """No further from float64 than twice the same-precision reference is, plus one rounding of z's
    precision: ten for dalpha, a single sum of thousands of terms that cancel, where the reference
    may be lucky.
    """
    roundings = {"dalpha": 10, "dq": dq_roundings}
    eps = torch.finfo(actual[0].dtype).eps
    for name, a, r, e in zip(
        ("z", "dq", "dk", "dv", "dalpha"), actual, reference, exact, strict=False
    ):
        rounding = eps * e.abs().max() * roundings.get(name, 1)
        budget = 2 * ((r.double() - e).abs().max() + rounding)
        assert (a.double() - e).abs().max() <= budget, name


LENGTHS = [1, 2, 63, 127, 128, 129, 300]


@pytest.mark.parametrize("n_ctx", LENGTHS)
@pytest.mark.parametrize("windows", [None, (1, 5, 1000)], ids=["full", "local"])
@pytest.mark.parametrize("alpha", [None, (-10.0, 0.3, 10.0)], ids=["plain", "smeared"])
def test_fast_path_is_as_exact_as_the_reference(n_ctx, windows, alpha):
    tensors = inputs(n_ctx)
    if alpha:
        tensors.append(torch.tensor(alpha, requires_grad=True))
    doubles = [t.detach().double().requires_grad_() for t in tensors]

    def run(tensors, kernels):
        def op(q, k, v, alpha=None):
            return attention(q, k, v, alpha, windows, kernels)

        return output_and_gradients(op, tensors)

    exact = run(doubles, "reference")
    assert_as_exact_as_the_reference(run(tensors, "torch"), run(tensors, "reference"), exact)


@pytest.mark.parametrize("n_ctx", [255, 256, 257, 600])
@pytest.mark.parametrize("windows", [None, (1, 300, 1000)], ids=["full", "local"])
def test_tiles_may_be_wide(monkeypatch, n_ctx, windows):
    """As they are where products are in bfloat16; here what they multiply stays exact."""
    monkeypatch.setattr(module, "tile", lambda: module.TILE["bfloat16"])
    tensors, doubles = inputs(n_ctx), inputs(n_ctx, dtype=torch.float64)
    actual, reference, exact = (
        output_and_gradients(lambda *t, k=kernels: attention(*t, None, windows, k), some)
        for some, kernels in ((tensors, "torch"), (tensors, "reference"), (doubles, "reference"))
    )
    assert_as_exact_as_the_reference(actual, reference, exact)


def test_long_inputs_take_the_path_that_keeps_no_pattern(monkeypatch):
    tensors, doubles = inputs(200), inputs(200, dtype=torch.float64)
    monkeypatch.setattr(module, "KEEP_PATTERN_BYTES", 0)
    for windows in (None, (1, 5, 1000)):
        actual = output_and_gradients(lambda *t, w=windows: attention(*t, None, w), tensors)
        reference = output_and_gradients(
            lambda *t, w=windows: attention_reference(*t, None, w), tensors
        )
        exact = output_and_gradients(
            lambda *t, w=windows: attention_reference(*t, None, w), doubles
        )
        assert_as_exact_as_the_reference(actual, reference, exact)


def test_second_derivatives_are_the_references_alone():
    q, k, v = inputs(3, 4, 1, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(attention_reference, (q, k, v))
    with pytest.raises(RuntimeError, match="no second derivatives: use kernels='reference'"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


@pytest.mark.parametrize("windows", [None, (3, 1)])
def test_gradients_by_finite_differences(windows):
    q, k, v = (t.detach().requires_grad_() for t in inputs(7, 4, 2, 1, dtype=torch.float64))
    alpha = torch.tensor([0.4, -1.3], dtype=torch.float64, requires_grad=True)
    for kernels in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda *t, kernels=kernels: attention(*t, windows, kernels), (q, k, v, alpha)
        )


def test_patterns_that_are_measured_are_exact_in_16_bits():
    """As exact as the kernels': only pattern and z are rounded."""
    q, k, v = (4 * x.detach() for x in inputs(200, dtype=torch.bfloat16))  # scores of up to 60
    alpha, tiles = torch.tensor([0.0, 1.0, -1.0]), []
    exact = attention_reference(q.double(), k.double(), v.double(), alpha.double())
    everywhere = torch.arange(200).expand(len(q), -1)

    def error(z):
        return (z - exact).abs().max() / v.abs().max() / torch.finfo(v.dtype).eps

    assert error(attention(q, k, v, alpha, at=everywhere)) < 1
    assert error(watched_attention(q, k, v, lambda *tile: tiles.append(tile), alpha)) < 1
    assert tiles[1][1].sum(dim=-1) == pytest.approx(1, abs=1e-5)
    assert error(attention_reference(q, k, v, alpha)) > 4


MISTAKES = {
    "fewer keys": ({"k": (2, 3, 8, 16)}, "q .* one shape"),
    "one head of keys for all": ({"k": (2, 1, 9, 16)}, "k .2, 1, 9, 16.*one shape"),
    "more keys": ({"k": (2, 3, 18, 16), "v": (2, 3, 18, 16)}, "one shape"),
    "wider values": ({"v": (2, 3, 9, 32)}, "v .*one shape"),
    "places of other queries": ({"q": (2, 3, 4, 16), "at": (2, 5)}, "at .2, 5.*each query"),
    "too few shares": ({"alpha": (1,)}, "alpha .1..*each of 3 heads"),
    "too few windows": ({"windows": (1, 5)}, "windows .1, 5.*each of 3 heads"),
    "an empty window": ({"windows": (0, 1, 5)}, "windows .0, 1, 5.*at least 1"),
}


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_go_together_is_refused_in_a_line(kernels, mistake):
    changes, fault = MISTAKES[mistake]
    arguments = {name: torch.zeros(2, 3, 9, 16) for name in ("q", "k", "v")}
    for name, value in changes.items():
        arguments[name] = value if name == "windows" else torch.zeros(value)
    with pytest.raises(ValueError, match=fault):
        attention(**arguments, kernels=kernels)


def test_pattern_by_hand():
    # two positions, d_head 1: query 1 scores keys 0 and 1 with ln 3 and 0
    q, k = torch.tensor([[[[5.0], [1.0]]]]), torch.tensor([[[[math.log(3)], [0.0]]]])
    expected = torch.tensor([[[[1.0, 0.0], [0.75, 0.25]]]])
    assert torch.allclose(attention_pattern(q, k), expected)


def test_scores_are_divided_by_the_root_of_d_head():
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    k[:, :, 0] *= math.log(3) / 2  # 4 ln(3) / 2 / sqrt(4) = ln 3; key 1 scores 4 / 2 = 2
    k[:, :, 1] = 0
    assert torch.allclose(attention_pattern(q, k)[0, 0, 1], torch.tensor([0.75, 0.25]))


def test_patterns_are_causal_and_sum_to_one():
    q, k, _ = inputs(40)
    pattern = attention_pattern(q, k)
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 3, 40))
    assert (pattern.triu(1) == 0).all()


def test_windows_count_the_query_itself():
    mask = visible(torch.arange(6)[None], 6, windows=(1, 2, 6))[0]
    assert torch.equal(mask[0], torch.eye(6).bool())
    assert torch.equal(mask[1], torch.eye(6).bool() | torch.ones(5).diag(-1).bool())
    assert torch.equal(mask[2], torch.ones(6, 6).tril().bool())


@pytest.mark.parametrize("windows", [None, (1, 5, 1000)], ids=["full", "local"])
@pytest.mark.parametrize("alpha", [None, torch.tensor([-2.0, 0.3, 2.0])], ids=["plain", "smeared"])
def test_queries_may_stand_anywhere(windows, alpha):
    q, k, v = (x.detach() for x in inputs(140))
    at = torch.tensor([[139, 0, 77, 77], [3, 2, 1, 130]])
    some = torch.stack([q[row, :, at[row]] for row in range(2)])
    z = attention(some, k, v, alpha, windows, at=at)
    everywhere = attention(q, k, v, alpha, windows)
    for row in range(2):
        assert torch.allclose(z[row], everywhere[row, :, at[row]], atol=1e-5)


@pytest.mark.parametrize("windows", [None, (1, 2, 1000)], ids=["full", "local"])
@pytest.mark.parametrize("alpha", [None, torch.tensor([-2.0, 0.3, 2.0])], ids=["plain", "smeared"])
@pytest.mark.parametrize("n_ctx", [2, 128, 300])
def test_a_watcher_sees_the_whole_pattern_tile_by_tile(n_ctx, windows, alpha):
    q, k, v = (x.detach() for x in inputs(n_ctx))
    pattern = attention_pattern(q, k, alpha, windows)
    seen = torch.zeros_like(pattern)

    def watch(first, tile):
        assert not seen[:, :, first:].any()
        seen[:, :, first : first + tile.shape[2], : tile.shape[3]] = tile

    z = watched_attention(q, k, v, watch, alpha, windows)
    assert torch.allclose(z, attention(q, k, v, alpha, windows), atol=1e-6)
    assert torch.allclose(seen, pattern, atol=1e-6)


def test_shapes_may_be_tried_without_numbers():
    with FakeTensorMode():
        q = torch.empty(1, 1, 130, 4)
        assert attention(q, q, q).shape == q.shape
    q = torch.randn(1, 1, 130, 4)
    assert torch.allclose(attention(q, q, q), attention_reference(q, q, q), atol=1e-6)


@pytest.mark.parametrize("windows", [None, (1, 5, 1000)], ids=["full", "local"])
def test_tiles_are_on_the_device_of_the_queries(windows):
    q, k, v = (x.detach().to("meta") for x in inputs(140))
    assert watched_attention(q, k, v, lambda first, tile: None, windows=windows).is_meta


@pytest.mark.parametrize("windows", [None, (1, 5, 1000)], ids=["full", "local"])
@pytest.mark.parametrize("alpha", [None, torch.tensor([-2.0, 0.3, 2.0])], ids=["plain", "smeared"])
@pytest.mark.parametrize("n_ctx", [1, 128, 300])
@torch.no_grad()
def test_a_frozen_pattern_mixes_every_value_of_a_stack(n_ctx, windows, alpha):
    q, k, _ = inputs(n_ctx)
    values = torch.stack([inputs(n_ctx, seed=seed)[2] for seed in (1, 2, 3, 4)])
    z = frozen_attention(q, k, None, values, alpha, windows)
    expected = frozen_attention(q, k, None, values, alpha, windows, "reference")
    assert torch.allclose(z, expected, atol=1e-5)
    for value, one in zip(values, expected, strict=True):
        assert torch.allclose(attention_reference(q, k, value, alpha, windows), one, atol=1e-5)


def test_smearing_by_hand():
    k = torch.tensor([[[[1.0], [10.0], [100.0]]]])
    share = torch.tensor([math.log(3)])  # sigmoid = 3/4
    assert torch.allclose(smear_keys(k, share).flatten(), torch.tensor([1.0, 7.75, 77.5]))


def test_fully_own_keys_are_vanilla_and_fully_smeared_keys_are_shifted():
    _, k, _ = inputs(9)
    own, shifted = torch.full((3,), 50.0), torch.full((3,), -50.0)
    assert torch.allclose(smear_keys(k, own), k)
    assert torch.allclose(smear_keys(k, shifted)[:, :, 1:], k[:, :, :-1])
    assert torch.equal(smear_keys(k, shifted)[:, :, 0], k[:, :, 0])


def shifted_mask(at, n_keys, windows=None):
    return visible(at - 1, n_keys, windows) | (torch.arange(n_keys) == 0)


def wrong_window(at, n_keys, windows=None):
    return visible(at, n_keys, windows and tuple(w + 1 for w in windows))


def smear_the_first_key_too(k, alpha):
    share = torch.sigmoid(alpha)[:, None, None]
    return torch.cat([share * k[:, :, :1], smear_keys(k, alpha)[:, :, 1:]], dim=2)


@pytest.mark.parametrize(
    "name, mutant",
    [
        ("visible", shifted_mask),
        ("visible", wrong_window),
        ("smear_keys", lambda k, alpha: k + 0 * alpha.sum()),
        ("smear_keys", smear_the_first_key_too),
    ],
    ids=["shifted mask", "wrong window", "dropped smear", "first key smeared"],
)
def test_these_tests_notice_a_mutant(monkeypatch, name, mutant):
    tensors = [*inputs(130), torch.tensor([0.0, 1.0, -1.0], requires_grad=True)]
    windows = (2, 7, 60)
    exact = output_and_gradients(
        lambda *t: attention_reference(*t, windows),
        [t.detach().double().requires_grad_() for t in tensors],
    )
    reference = output_and_gradients(lambda *t: attention_reference(*t, windows), tensors)
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        actual = output_and_gradients(lambda *t: attention(*t, windows), tensors)
        assert_as_exact_as_the_reference(actual, reference, exact)
