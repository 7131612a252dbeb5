"""Frozen attention, index patterns and head mass in Triton, interpreted, against the explicit
pattern; and these tests against planted faults.
"""

import contextlib

import pytest
import torch
import triton

import metrics
from kernels import frozen_triton as module
from kernels.attention import (
    attention,
    attention_and_lse,
    attention_pattern,
    frozen_attention,
    frozen_pattern,
    head_mass,
    head_statistics,
    index_attention,
)
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig, Transformer
from sweep import sweep

ALPHA, WINDOWS = torch.tensor([[-1.0, 9.0], [0.5, 9.0]])[:, 0], (5, 1000)  # strided


def recorded_run(n_ctx, d_head=16, batch=1, alpha=None, windows=None, dtype=torch.float16):
    """q, k, lse of a run of two heads."""
    q, k = torch.randn(2, batch, 2, n_ctx, d_head, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    return q, k, attention_and_lse(q, k, k, alpha, windows)[1].float()


def stacked(n_values, q):
    shape = (n_values, *q.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(q.dtype)


def few_tokens(n_ctx, batch=1, n_tokens=7):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(n_tokens, (batch, n_ctx), generator=generator)


@pytest.fixture(autouse=True)
def square_tiles(request, monkeypatch):
    """Tiles of 64, where those of float32 are smaller, or as parametrized: fewer steps."""
    size = getattr(request, "param", 64)
    table = {key: dict.fromkeys(row, (size, size, 4, 2, 2)) for key, row in module.CONFIGS.items()}
    monkeypatch.setattr(module, "CONFIGS", table)


def compare_frozen(n_ctx, n_values, alpha=None, windows=None, d_head=16, dtype=torch.float16):
    """As exact, against float64, as twice the same-precision definition, plus one rounding."""
    q, k, lse = recorded_run(n_ctx, d_head, 1, alpha, windows, dtype)
    values = stacked(n_values, q)
    kernel = frozen_attention(q, k, lse, values, alpha, windows, "triton")
    reference = frozen_attention(q, k, lse, values, alpha, windows, "reference")
    pattern = frozen_pattern(q.double(), k.double(), lse.double(), alpha, windows)
    exact = pattern @ values.double()
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    budget = 2 * ((reference.double() - exact).abs().max() + rounding)
    assert (kernel.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids=["pointers", "descriptors"])
@pytest.mark.parametrize("n_ctx", [1, 63, 64, 127])
@pytest.mark.parametrize("alpha, windows", [(None, None), (ALPHA, WINDOWS)], ids=["plain", "all"])
def test_frozen_attention_applies_the_recorded_pattern(arch, n_ctx, alpha, windows):
    compare_frozen(n_ctx, 3, alpha, windows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_attention_of_other_precisions(dtype):
    compare_frozen(130, 2, ALPHA, WINDOWS, 64, dtype)


@pytest.mark.parametrize("n_values", [1, 2, 5, 8])
def test_frozen_attention_takes_any_number_of_values(n_values):
    compare_frozen(70, n_values, ALPHA, WINDOWS, 24)


@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids=["pointers", "descriptors"])
def test_frozen_attention_takes_strided_and_repeated_values(arch):
    q, k, lse = recorded_run(40, batch=2)
    lse = lse.mT.contiguous().mT
    values = torch.randn(2, 40, 2, 2, 16).half().permute(3, 0, 2, 1, 4)  # [batch, pos, head, a, d]
    repeated = values[:1].expand(3, -1, -1, -1, -1)
    pattern = attention_pattern(q, k)
    for x in (values, repeated):
        z = frozen_attention(q, k, lse, x, kernels="triton")
        assert torch.allclose(z, pattern @ x, atol=1e-2)


@pytest.mark.parametrize("n_values, batch", [(0, 2), (3, 0)])
def test_of_nothing_comes_nothing(n_values, batch):
    q, values = torch.zeros(batch, 2, 9, 16), torch.zeros(n_values, batch, 2, 9, 16)
    lse = attention_and_lse(q, q, q, ALPHA, WINDOWS, "triton")[1]
    assert lse.shape == (batch, 2, 9)
    for known in (lse, None):
        z = frozen_attention(q, q, known, values, ALPHA, WINDOWS, "triton")
        assert z.shape == values.shape
    index = torch.zeros(batch, 2, 9, dtype=torch.long)
    assert index_attention(index, values, "triton").shape == values.shape
    if not batch:
        mass = head_mass(q, q, None, index[:, 0], ALPHA, WINDOWS, kernels="triton")
        assert mass.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("n_ctx", [1, 63, 130])
@pytest.mark.parametrize("d_head", [16, 24])
def test_index_patterns_copy_rows_exactly(n_ctx, d_head):
    values = torch.randn(3, 2, 2, n_ctx, d_head)
    index = torch.randint(-1, n_ctx, (2, 2, n_ctx))
    previous = (torch.arange(n_ctx) - 1).expand(2, 2, n_ctx)
    for chosen in (index, previous):
        z = index_attention(chosen, values, "triton")
        assert torch.equal(z, index_attention(chosen, values, "reference"))


@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids=["pointers", "descriptors"])
@pytest.mark.parametrize("n_ctx", [2, 63, 64, 127])
@pytest.mark.parametrize("alpha, windows", [(None, None), (ALPHA, WINDOWS)], ids=["plain", "all"])
def test_head_statistics_are_the_scores_of_the_explicit_pattern(arch, n_ctx, alpha, windows):
    compare_statistics(n_ctx, alpha, windows)


@pytest.mark.parametrize("windows", [(1, 5), (5, 1)])
def test_head_statistics_of_two_texts_and_padded_heads(windows):
    compare_statistics(63, ALPHA, windows, 24, 2)


def compare_statistics(n_ctx, alpha, windows, d_head=16, batch=1):
    q, k, lse = recorded_run(n_ctx, d_head, batch, alpha, windows)
    tokens = few_tokens(n_ctx, batch)
    tokens[:, -1] = tokens[:, 1] = 0  # however short, one token has an earlier copy, if it can
    lse, tokens = lse.mT.contiguous().mT, tokens.T.contiguous().T
    pattern = attention_pattern(q.float(), k.float(), alpha, windows)
    tolerance = 1e-6 if alpha is None else 1e-3  # smeared keys are rounded to 16 bits
    for offset in (1, 0, -1):
        actual = head_statistics(q, k, lse, tokens, alpha, windows, offset, "triton")
        expected = (
            metrics.prefix_matching_score(pattern, tokens, offset),
            metrics.previous_token_score(pattern),
        )
        for a, e in zip(actual, expected, strict=True):
            assert torch.allclose(a, e, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("square_tiles", [256], indirect=True)
def test_head_statistics_of_4097_tokens():
    q, k, lse = recorded_run(4097, dtype=torch.bfloat16)
    q, k, lse = q[:, :1], k[:, :1], lse[:, :1]
    tokens = few_tokens(4097, n_tokens=500)
    actual = head_statistics(q, k, lse, tokens, kernels="triton")
    pattern = attention_pattern(q.float(), k.float())
    assert torch.allclose(actual[0], metrics.prefix_matching_score(pattern, tokens), atol=1e-6)
    assert torch.allclose(actual[1], metrics.previous_token_score(pattern), atol=1e-6)


@triton.jit
def shifted_mask(queries, keys, window):
    return (keys <= queries - 1) & (keys > queries - window) | (keys == 0)


@triton.jit
def wrong_window(queries, keys, window):
    return (keys <= queries) & (keys >= queries - window)


def smear_the_first_key_too(k, alpha):
    return correct_smear_keys(k, alpha) * (torch.arange(k.shape[2]) != 0)[:, None]


correct_smear_keys = module.smear_keys
FAULTS = {
    "shifted mask": ("visible", shifted_mask),
    "wrong window": ("visible", wrong_window),
    "dropped smear": ("smear_keys", lambda k, alpha: k),
    "first key smeared": ("smear_keys", smear_the_first_key_too),
}


@pytest.mark.parametrize("name, fault", FAULTS.values(), ids=FAULTS)
def test_these_tests_notice_a_planted_fault(monkeypatch, name, fault):
    compare_frozen(60, 2, ALPHA, WINDOWS)
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        compare_frozen(60, 2, ALPHA, WINDOWS)
    with pytest.raises(AssertionError):
        test_head_statistics_are_the_scores_of_the_explicit_pattern(90, 63, ALPHA, WINDOWS)


@pytest.mark.parametrize("smear", [False, True], ids=["plain", "smeared"])
def test_the_sweep_of_a_gpu_is_that_of_the_cpu(smear):
    """Ablations of heads of three layers, with MLPs, windows and chosen positions."""
    config = ModelConfig(3, 32, 2, 16, 64, 40, 50, smear=smear, windows=(5, 40))
    tokens = torch.randint(50, (2, 41), generator=torch.Generator().manual_seed(4))
    at = torch.tensor([[3, 39, 20], [3, 39, 7]])
    heads = [[], *([(layer, head)] for layer in range(3) for head in range(2))]
    losses = []
    for kernels in ("torch", "triton"):
        model = Transformer(config, kernels).init_weights(0)
        with torch.no_grad():
            for block in model.blocks:  # large enough for every head to matter
                block.attn.W_V.mul_(5)
                block.attn.W_O.mul_(5)
            losses.append(sweep(model, tokens[:, :-1], tokens[:, 1:], at, heads))
    cpu, gpu = losses
    assert (cpu[1:] - cpu[0]).abs().amax(dim=(1, 2)).min() > 1e-3
    assert torch.allclose(cpu, gpu, atol=1e-5)


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    """Which need not be the current one."""
    q, k, lse = recorded_run(16)
    values, index = stacked(2, q), torch.zeros(1, 2, 16, dtype=torch.int32)
    rows, W_U, targets = q.flatten(0, 2), k.flatten(0, 2).T, torch.zeros(32, dtype=torch.long)
    ops = (
        lambda: attention(q, k, k, kernels="triton"),
        lambda: frozen_attention(q, k, lse, values, kernels="triton"),
        lambda: index_attention(index, values, "triton"),
        lambda: head_mass(q, k, lse, few_tokens(16), kernels="triton"),
        lambda: linear_cross_entropy(rows, W_U, targets, "triton"),
    )
    made_current = []

    @contextlib.contextmanager
    def device_of(x):
        made_current.append(x)
        yield
        made_current.append(None)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for op in ops:
        made_current.clear()
        op()
        assert len(made_current) == 2 and isinstance(made_current[0], torch.Tensor)
