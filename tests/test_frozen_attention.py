"""What is done with a recorded pattern: the torch path against the explicit pattern, and both
against hand-computed cases and mutants.
"""

import math

import pytest
import torch

import metrics
from kernels import attention as module
from kernels.attention import (
    attention_and_lse,
    attention_pattern,
    attention_reference,
    frozen_attention,
    head_mass,
    head_statistics,
    index_attention,
    seen_before,
    smear_keys,
    visible,
)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

ALPHA, WINDOWS = torch.tensor([-10.0, 0.3, 10.0]), (1, 5, 1000)
KINDS = pytest.mark.parametrize(
    "alpha, windows", [(None, None), (ALPHA, WINDOWS)], ids=["plain", "smeared and local"]
)


def recorded_run(n_ctx, alpha=None, windows=None, dtype=torch.float32):
    """q, k, lse of a run of two texts and three heads, and other values [4, ...]."""
    generator = torch.Generator().manual_seed(0)
    q, k, *values = torch.randn(6, 2, 3, n_ctx, 8, generator=generator).to(dtype)
    lse = attention_and_lse(q, k, k, alpha, windows)[1]
    return q, k, lse, torch.stack(values)


@pytest.mark.parametrize("n_ctx", [1, 2, 127, 128, 300])
@KINDS
def test_frozen_attention_is_the_pattern_times_the_values(n_ctx, alpha, windows):
    q, k, lse, values = recorded_run(n_ctx, alpha, windows)
    expected = attention_pattern(q, k, alpha, windows) @ values
    for kernels in ("reference", "torch"):
        z = frozen_attention(q, k, lse, values, alpha, windows, kernels)
        assert torch.allclose(z, expected, atol=1e-5)


def test_a_frozen_pattern_does_not_follow_the_queries():
    q, k, lse, values = recorded_run(20)
    assert not torch.allclose(
        frozen_attention(q, k.flip(2), lse, values), frozen_attention(q, k, lse, values), atol=0.1
    )


def test_log_sum_exp_by_hand():
    q, k = torch.tensor([[[[5.0], [1.0]]]]), torch.tensor([[[[math.log(3)], [0.0]]]])
    z, lse = attention_and_lse(q, k, k)
    assert torch.allclose(lse, torch.tensor([[[5 * math.log(3), math.log(4)]]]))
    assert torch.equal(z, attention_and_lse(q, k, k)[0])


@KINDS
def test_attention_and_lse_gives_the_reference_output(alpha, windows):
    q, k, lse, (v, *_) = recorded_run(130, alpha, windows)
    z, of_torch = attention_and_lse(q, k, v, alpha, windows)
    assert torch.allclose(z, attention_reference(q, k, v, alpha, windows), atol=1e-5)
    scores = module.attention_scores(q, k, alpha, windows)
    assert torch.allclose(of_torch, scores.logsumexp(-1), atol=1e-5)


MISTAKES = {
    "fewer keys": ({"k": (2, 3, 8, 8)}, "one shape"),
    "another lse": ({"lse": (2, 3, 8)}, "lse .2, 3, 8.*each query"),
    "too few shares": ({"alpha": (1,)}, "each of 3 heads"),
    "too few windows": ({"windows": (1, 5)}, "each of 3 heads"),
}


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
@pytest.mark.parametrize("mistake", [*MISTAKES, "other values", "other tokens"])
def test_what_does_not_go_together_is_refused_in_a_line(kernels, mistake):
    changes, fault = MISTAKES.get(mistake, ({}, "shape of q|tokens"))
    run = {"q": (2, 3, 9, 8), "k": (2, 3, 9, 8), "lse": (2, 3, 9)} | changes
    run = {name: x if name == "windows" else torch.zeros(x) for name, x in run.items()}
    values = torch.zeros(4, 2, 3, 8 if mistake == "other values" else 9, 8)
    tokens = torch.zeros(2, 8 if mistake == "other tokens" else 9, dtype=torch.long)
    if mistake != "other tokens":
        with pytest.raises(ValueError, match=fault):
            frozen_attention(**run, values=values, kernels=kernels)
    if mistake != "other values":
        with pytest.raises(ValueError, match=fault):
            head_statistics(**run, tokens=tokens, kernels=kernels)


def test_index_patterns_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3, 1)
    index = torch.tensor([[[-1, 0, 1]]])  # attend to the token before
    assert index_attention(index, values).flatten().tolist() == [0, 1, 2]
    values[..., 0, :] = math.nan  # nobody's
    assert index_attention(torch.tensor([[[-1, 2, 1]]]), values).flatten().tolist() == [0, 4, 2]


def test_tokens_seen_before_by_hand():
    tokens = torch.tensor([[7, 5, 5, 7, 6, 5, 7]])  # the 7 in front is the start token
    assert seen_before(tokens).tolist() == [[False, False, True, False, False, True, True]]


@pytest.mark.parametrize("n_ctx", [2, 3, 127, 128, 300])
@KINDS
def test_head_statistics_are_the_scores_of_the_explicit_pattern(n_ctx, alpha, windows):
    q, k, lse, _ = recorded_run(n_ctx, alpha, windows)
    tokens = torch.randint(5, (2, n_ctx), generator=torch.Generator().manual_seed(1))
    pattern = attention_pattern(q, k, alpha, windows)
    for offset, known in ((1, lse), (1, None), (0, lse), (-1, None)):
        matching, previous = head_statistics(q, k, known, tokens, alpha, windows, offset)
        expected = metrics.prefix_matching_score(pattern, tokens, offset)
        assert torch.allclose(matching, expected, atol=1e-6, equal_nan=True)
        assert torch.allclose(previous, metrics.previous_token_score(pattern), atol=1e-6)


def test_uniform_attention_has_the_mass_that_was_counted_by_hand():
    q = torch.zeros(1, 1, 4, 8)
    lse = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().view(1, 1, 4)
    tokens = torch.tensor([[0, 5, 6, 5]])  # query 3 matches key 2, which follows the 5 at 1
    assert torch.allclose(head_mass(q, q, lse, tokens)[0], torch.tensor(1 / 4))
    assert torch.allclose(head_mass(q, q, lse, tokens)[1], torch.tensor(1 / 2 + 1 / 3 + 1 / 4))


@pytest.mark.parametrize(
    "name, mutant",
    [
        ("visible", lambda n, m, w=None, device=None: visible(n, m, [x + 1 for x in w])),
        ("smear_keys", lambda k, alpha: k),
        ("smear_keys", lambda k, alpha: smear_keys(k, alpha) * (torch.arange(300) != 0)[:, None]),
        ("_tiles", lambda n_ctx: [(0, 128), (128, 256), (256, 299)]),
    ],
    ids=["wrong window", "dropped smear", "first key smeared", "forgotten row"],
)
def test_these_tests_notice_a_mutant(monkeypatch, name, mutant):
    run = recorded_run(300, ALPHA, WINDOWS)
    pattern = attention_pattern(*run[:2], ALPHA, WINDOWS)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, mutant)
        z = frozen_attention(*run, ALPHA, WINDOWS)
        mass = head_mass(*run[:3], torch.ones(2, 300, dtype=torch.long), ALPHA, WINDOWS)
    assert not torch.allclose(z, pattern @ run[3], atol=1e-5)
    expected = head_mass(*run[:3], torch.ones(2, 300, dtype=torch.long), ALPHA, WINDOWS)
    assert not torch.allclose(mass, expected, rtol=1e-5)
