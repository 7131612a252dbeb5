"""The Triton attention, interpreted, against its definition: output and every gradient, three ways;
and these tests against planted faults.
"""

import pytest
import torch
import triton
import triton.language as tl

from kernels import attention_triton as module
from kernels.attention import attention, attention_and_lse, attention_reference
from kernels.tiles_triton import architecture, key_stretches, padded, readable, tiles
from tests.test_attention import (
    assert_as_exact_as_the_reference,
    inputs,
    output_and_gradients,
)

ALPHA = (-10.0, 10.0)


@pytest.fixture
def square_tiles(request, monkeypatch):
    """Tiles of 32, so that a short text has all three stretches, or as parametrized."""
    size = getattr(request, "param", 32)
    table = {key: dict.fromkeys(row, (size, size, 4, 2)) for key, row in module.CONFIGS.items()}
    monkeypatch.setattr(module, "CONFIGS", table)


def compare(tensors, windows=None):
    """Asserts that z and every gradient are as exact as the reference's."""

    def kernel(q, k, v, alpha=None):
        return module.attention(q, k, v, alpha, windows)[0]

    def reference(q, k, v, alpha=None):
        return attention_reference(q, k, v, alpha, windows)

    doubles = [t.detach().double().requires_grad_() for t in tensors]
    assert_as_exact_as_the_reference(
        output_and_gradients(kernel, tensors),
        output_and_gradients(reference, tensors),
        output_and_gradients(reference, doubles),
    )


def smeared(tensors, alpha=ALPHA):
    return [*tensors, torch.tensor(alpha, requires_grad=True)]


@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids=["pointers", "descriptors"])
@pytest.mark.parametrize("square_tiles", [64], indirect=True)
@pytest.mark.parametrize("n_ctx", [63, 64, 127])
@pytest.mark.parametrize("windows", [None, (1, 5)], ids=["full", "local"])
def test_lengths_that_are_and_are_not_whole_tiles(square_tiles, n_ctx, windows, arch):
    compare(smeared(inputs(n_ctx, 16, 2, 1, dtype=torch.float16)), windows)


def test_a_single_position_copies_its_value():
    tensors = smeared(inputs(1, n_heads=2))
    z, dq, dk, dv, dalpha = output_and_gradients(
        lambda *t: attention(*t, kernels="triton"), tensors
    )
    assert torch.equal(z, tensors[2]) and dv.any() and not dalpha.any()
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5  # 0 up to rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs(dtype):
    compare(smeared(inputs(100, 64, 2, 1, dtype=dtype), (-1.0, 2.0)), (70, 200))


@pytest.mark.parametrize("alpha", [None, (-10.0, 0.3), (10.0, -1.0)])
def test_every_share_of_smearing(square_tiles, alpha):
    tensors = inputs(70, 16, 2)  # two texts: alpha's gradient is the sum of theirs
    compare(smeared(tensors, alpha) if alpha else tensors, (5, 70))


def test_windows_that_end_inside_at_and_beyond_tiles(square_tiles):
    compare(inputs(129, 16, 5, 1), (1, 32, 34, 63, 127))


@pytest.mark.parametrize("d_head", [8, 24, 32, 128])
def test_head_sizes(d_head):
    compare(smeared(inputs(40, d_head, 2, 1)))


def test_a_thousand_positions():
    compare(smeared(inputs(1000, 16, 1, 1, dtype=torch.bfloat16), (0.5,)), (300,))


@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids=["pointers", "descriptors"])
def test_strided_inputs_and_several_batch_rows(arch):
    qkv = torch.randn(2, 40, 3, 3, 16).half().requires_grad_()  # [batch, pos, q k v, head, d_head]
    odd = torch.randn(2, 3, 40, 17).half().requires_grad_()  # rows that no descriptor can describe
    q, k, _ = qkv.unbind(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), odd[..., 1:]
    assert not q.is_contiguous() and v.stride(2) == 17
    assert readable(padded(q)) is q and readable(v) is not v  # only what has to be is copied
    weight = torch.randn(2, 3, 40, 1).half()  # z's gradient is expanded: no memory of its own
    z = module.attention(q, k, v)[0]
    gradients = torch.autograd.grad((z * weight).sum(), (qkv, odd))
    expected_z = attention_reference(q, k, v)
    expected = torch.autograd.grad((expected_z * weight).sum(), (qkv, odd))
    for actual, e in zip((z, *gradients), (expected_z, *expected), strict=True):
        assert torch.allclose(actual, e, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("batch, n_ctx", [(0, 5), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_of_nothing_comes_nothing(batch, n_ctx, dtype):
    tensors = smeared(inputs(n_ctx, 16, 2, batch, dtype=dtype))
    z, *gradients = output_and_gradients(lambda *t: attention(*t, kernels="triton"), tensors)
    assert z.shape == (batch, 2, n_ctx, 16) and z.dtype == dtype
    assert [g.shape for g in gradients] == [t.shape for t in tensors] and not gradients[-1].any()


def test_log_sum_exp_is_the_references_and_has_no_gradient():
    q, k, v = inputs(70, n_heads=2, batch=1)
    alpha, windows = torch.tensor([[0.4, 9.0], [-2.0, 9.0]])[:, 0], (7, 1000)  # strided
    z, lse = attention_and_lse(q, k, v, alpha, windows, "triton")
    expected_z, expected = attention_and_lse(q, k, v, alpha, windows, "reference")
    assert torch.allclose(lse, expected, atol=1e-5) and torch.allclose(z, expected_z, atol=1e-5)
    assert z.requires_grad and not lse.requires_grad


def test_second_derivatives_are_refused():
    q, k, v = inputs(5, n_heads=1, batch=1)
    with pytest.raises(RuntimeError, match="no second derivatives: use kernels='reference'"):
        torch.autograd.grad(attention(q, k, v, kernels="triton").sum(), q, create_graph=True)


def test_large_scores_do_not_overflow():
    q, k, v = (100 * t.detach() for t in inputs(40, n_heads=2, batch=1))
    z = attention(q, k, v, None, (3, 40), "triton")
    assert torch.allclose(z, attention_reference(q, k, v, None, (3, 40)), atol=1e-3)


def test_the_same_bits_every_time_and_only_finite_numbers():
    tensors = smeared(inputs(70, n_heads=2, dtype=torch.float16))

    def run():
        return output_and_gradients(lambda *t: attention(*t, (5, 60), "triton"), tensors)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second) and first.isfinite().all()


def test_too_large_heads_are_refused():
    with pytest.raises(ValueError, match="d_head is 129"):
        attention(*inputs(4, 129), kernels="triton")


def test_types_that_no_kernel_is_made_for_are_refused():
    q, k, v = inputs(4)
    for wrong in (q.double(), k.double(), v.double()), (q, k, v.half()), (q, k.bfloat16(), v):
        with pytest.raises(TypeError, match="all float32, float16 or bfloat16 needed"):
            attention(*wrong, kernels="triton")


def test_an_output_without_a_gradient_has_none_to_pass_on():
    class Cut(torch.autograd.Function):
        forward = staticmethod(lambda ctx, z: z.sum())
        backward = staticmethod(lambda ctx, grad: None)

    q, k, v = inputs(4)
    loss = Cut.apply(attention(q, k, v, kernels="triton")) + q.sum()
    dq, dk = torch.autograd.grad(loss, (q, k), allow_unused=True)
    assert dq.eq(1).all() and dk is None


def test_what_no_descriptor_can_describe_is_copied():
    x = torch.zeros(2, 2, 8, 16).half()
    shifted = torch.zeros(x.numel() + 1).half()[1:].view(x.shape)
    assert readable(x) is x
    for other in (shifted, x[:1].expand(2, -1, -1, -1), x.transpose(2, 3)):
        assert readable(other) is not other and torch.equal(readable(other), other)


FAMILIES = [(86, 80), (90, 90), (103, 100), (120, 80)]


@pytest.mark.parametrize("arch, family", FAMILIES, indirect=["arch"])
def test_every_gpu_has_its_family_and_descriptors_from_hopper_on(arch, family):
    assert architecture() == family
    assert torch.is_tensor(tiles(torch.zeros(1, 1, 16, 16).half(), 16)[0]) == (family == 80)
    assert torch.is_tensor(tiles(torch.zeros(1, 1, 16, 16), 16)[0])


@triton.jit
def shifted_mask(queries, keys, window):
    return (keys <= queries - 1) & (keys > queries - window) | (keys == 0)


@triton.jit
def wrong_window(queries, keys, window):
    return (keys <= queries) & (keys >= queries - window)


@triton.jit
def forgotten_left_edge(
    first_query, window, n_ctx, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr
):
    start, whole_start, whole_stop, stop = key_stretches(
        first_query, window, n_ctx, BLOCK_QUERY, BLOCK_KEY
    )
    return start, start, whole_stop, stop


def smear_the_first_key_too(k, alpha):
    return module_smear_keys(k, alpha) * torch.where(
        torch.arange(k.shape[2]) == 0, torch.sigmoid(alpha)[:, None], 1.0
    ).unsqueeze(-1).to(k.dtype)


module_smear_keys = module.smear_keys
FAULTS = {
    "shifted mask": ("visible", shifted_mask),
    "wrong window": ("visible", wrong_window),
    "forgotten left edge": ("key_stretches", forgotten_left_edge),
    "dropped smear": ("smear_keys", lambda k, alpha: k),
    "first key smeared": ("smear_keys", smear_the_first_key_too),
}


@pytest.mark.parametrize("name, fault", FAULTS.values(), ids=FAULTS)
def test_these_tests_notice_a_planted_fault(square_tiles, monkeypatch, name, fault):
    tensors = smeared(inputs(70, n_heads=2, batch=1), (0.0, 1.0))
    compare(tensors, (5, 40))
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        compare(tensors, (5, 40))
