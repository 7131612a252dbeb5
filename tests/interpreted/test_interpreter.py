"""The mended interpreter computes as a GPU does, and shows what it should show."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty))


@triton.jit
def double_kernel(in_ptr, out_ptr, WIDEN: tl.constexpr, N: tl.constexpr):
    x = tl.load(in_ptr + tl.arange(0, N))
    if WIDEN:
        x = x.to(tl.float32)
    tl.store(out_ptr + tl.arange(0, N), (x + x).to(out_ptr.dtype.element_ty))


@triton.jit
def running_sum_kernel(x_ptr):
    """Wrong on purpose: every program needs the one before it."""
    i = tl.program_id(0) + 1
    tl.store(x_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i - 1))


def test_bfloat16_products_are_exact_and_rounded_to_nearest():
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    dot_kernel[(1,)](a, b, product, 16)
    assert torch.equal(product, (a.float() @ b.float()).bfloat16())


def test_casts_between_float32_and_bfloat16_are_pytorchs():
    x = torch.randn(1024)
    x[:4] = torch.tensor([torch.inf, -torch.inf, 1 + 2**-8, 1e-40])
    out = torch.empty(1024, dtype=torch.bfloat16)
    double_kernel[(1,)](x, out, True, 1024)
    assert torch.equal(out, (x + x).bfloat16())
    back = torch.empty(1024)
    double_kernel[(1,)](out, back, True, 1024)
    assert torch.equal(back, 2 * out.float())


def test_bfloat16_arithmetic_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        double_kernel[(1,)](x, torch.empty_like(x), False, 16)


def test_a_kernel_that_needs_an_order_of_programs_fails():
    x = torch.ones(9)
    running_sum_kernel[(8,)](x)
    assert not torch.equal(x, torch.arange(1.0, 10.0))


def test_unwritten_memory_is_nan():
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(3).isnan().all()


@pytest.mark.parametrize("arch", [80, 100], indirect=True)
def test_the_pretended_gpu_is_what_a_launch_table_sees(arch):
    assert triton.runtime.driver.active.get_current_target().arch == arch
