"""The loss kernels on a GPU: every shipped configuration, memory, the same bits every time, and
training.
"""

import shutil
import subprocess
import sys

import pytest
import torch

from kernels.cross_entropy import IGNORED, linear_cross_entropy

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = [(1, 16, 1), (130, 70, 257), (1000, 768, 5000), (4097, 256, 50257)]


def on_gpu(*sizes, **options):
    from tests.interpreted.test_cross_entropy import inputs

    return [tensor.cuda() for tensor in inputs(*sizes, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_exact_as_the_reference(dtype, sizes):
    from tests.interpreted.test_cross_entropy import assert_as_exact_as_the_reference

    resid, W_U, targets = on_gpu(*sizes, dtype=dtype)
    targets[3::7] = IGNORED
    assert_as_exact_as_the_reference(resid, W_U, targets)


@pytest.mark.parametrize("chunk", [2**20, 2**29])
def test_the_same_bits_every_time(monkeypatch, chunk):
    from kernels import cross_entropy_triton
    from tests.interpreted.test_cross_entropy import losses_and_gradients

    monkeypatch.setattr(cross_entropy_triton, "CHUNK_BYTES", chunk)
    tensors = on_gpu(3000, 768, 20000, dtype=torch.bfloat16)
    first, *others = (losses_and_gradients("triton", *tensors) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_memory_is_a_chunk_and_the_gradients():
    """At the paper's vocabulary, where the logits would be 4 GiB in bfloat16 alone."""
    from kernels import cross_entropy_triton as module

    resid, W_U, targets = on_gpu(2**15, 768, 2**16, dtype=torch.bfloat16)
    resid.requires_grad_()
    W_U.requires_grad_()
    linear_cross_entropy(resid[:128], W_U, targets[:128], "triton").sum().backward()  # compiles
    resid.grad = W_U.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = linear_cross_entropy(resid, W_U, targets, "triton")
    assert torch.cuda.max_memory_allocated() - before < 2**20 * 4
    losses.mean().backward()
    gradients = resid.nbytes + 5 * W_U.nbytes  # dW_U, its sum and a chunk's share in float32
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra < 1.1 * module.CHUNK_BYTES


def test_fifty_steps_of_training_give_the_same_curve(corpus):
    import train
    from data import training_batch
    from model import Transformer, config_for
    from parallel import Cores, Ranks

    gpu = torch.device("cuda")
    recipe, curves = train.RECIPES["mini"], []
    for kernels in ("torch", "triton"):
        model = Transformer(config_for("mini", 2, 1024, attn_only=True, smear=True), kernels)
        model.init_weights(0).to(gpu)
        parameters = list(model.parameters())
        optimizer, losses = train.make_optimizer(model, recipe), []
        for step in range(50):
            batch = [part.to(gpu) for part in training_batch(corpus, 512, 8, seed=0, step=step)]
            total = train.loss_and_gradient(
                model, parameters, *batch, 8 * 512, Cores(gpu), Ranks(gpu)
            )
            train.update(optimizer, parameters, total[1:], recipe, step, (step + 1) * 8 * 512)
            losses.append(total[0].item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[0][-1] < curves[0][0] - 1


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer")
def test_no_access_outside_of_memory():
    run = subprocess.run(
        ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-m", "pytest", __file__]
        + ["-k", "as_exact and (130 or 1000)"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]
