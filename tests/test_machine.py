"""Which kernels and which precision a machine gets, and work spread over its cores."""

import time

import pytest
import torch

import machine
from parallel import Cores
from safety import BadInput

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "hip", "installed", "kernels", "dtype"),
    [
        ((9, 0), None, True, "triton", torch.bfloat16),
        ((8, 0), None, True, "triton", torch.bfloat16),
        ((7, 5), None, True, "torch", torch.float32),  # Turing: nothing for bfloat16
        ((9, 0), None, False, "torch", torch.bfloat16),  # Windows has no Triton
        ((9, 4), "7.0", True, "torch", torch.bfloat16),  # AMD
    ],
)
def test_kernels_and_dtype_are_what_the_gpu_has(
    monkeypatch, capability, hip, installed, kernels, dtype
):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: installed or None)
    assert machine.pick_kernels(None, gpu) == kernels
    assert machine.pick_kernels("reference", gpu) == "reference"
    assert machine.pick_dtype(None, gpu) == dtype
    assert machine.pick_dtype("float32", gpu) == torch.float32
    if dtype == torch.float32:
        with pytest.raises(BadInput, match="no matrix instructions"):
            machine.pick_dtype("bfloat16", gpu)
    if kernels != "triton":
        with pytest.raises(BadInput, match="8.0"):
            machine.pick_kernels("triton", gpu)
    assert machine.pick_kernels(None, torch.device("cpu")) == "torch"


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_cpu_multiplies_in_bfloat16_if_it_has_amx(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.pick_dtype(None, CPU) == dtype
    assert machine.pick_dtype("float32", CPU) == torch.float32
    if dtype == torch.float32:
        with pytest.raises(BadInput, match="no matrix instructions"):
            machine.pick_dtype("bfloat16", CPU)


def test_products_are_in_bfloat16_within_and_in_float32_after():
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    with machine.multiplying_in(torch.bfloat16, CPU) as dtype:
        assert dtype == torch.float32
        within = a @ b
        with machine.multiplying_in(torch.float32, CPU):
            assert torch.allclose((a @ b).double(), exact, atol=1e-3)
    assert within.dtype == torch.float32
    if machine.has_amx():  # nothing but the factors is rounded
        assert torch.allclose(within.double(), rounded, atol=1e-3)
        assert not torch.allclose(rounded, exact, atol=1e-2)
    assert torch.allclose((a @ b).double(), exact, atol=1e-3)
    with pytest.raises(KeyError), machine.multiplying_in(torch.bfloat16, CPU):
        raise KeyError
    assert torch.allclose((a @ b).double(), exact, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_jobs_of_unequal_size_come_back_in_their_order(count):
    def job(n):
        return lambda: time.sleep(0.01 * (n % 3)) or n

    groups = [[job(n) for n in some] for some in (range(5), (), range(5, 7))]
    assert Cores(CPU, count).run(*groups) == [[0, 1, 2, 3, 4], [], [5, 6]]
