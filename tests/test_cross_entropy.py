"""Losses without the logits in memory, against the definition and against numbers known by hand."""

import math

import pytest
import torch

from kernels import cross_entropy as module
from kernels.cross_entropy import IGNORED, linear_cross_entropy


def inputs(n_rows, d_model, d_vocab, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(n_rows, d_model, generator=generator).to(dtype).requires_grad_()
    W_U = torch.randn(d_model, d_vocab, generator=generator).to(dtype).requires_grad_()
    return resid, W_U, torch.randint(d_vocab, (n_rows,), generator=generator)


def losses_and_gradients(kernels, resid, W_U, targets, each_its_weight=True):
    losses = linear_cross_entropy(resid, W_U, targets, kernels)
    weight = torch.linspace(-1, 2, len(losses), dtype=losses.dtype) if each_its_weight else 1 / 7
    return [losses.detach(), *torch.autograd.grad((losses * weight).sum(), (resid, W_U))]


@pytest.mark.parametrize("n_rows, d_model, d_vocab", [(1, 4, 3), (7, 16, 50), (127, 32, 1023)])
@pytest.mark.parametrize("chunk", [1, 2**16, 2**30], ids=["one row", "some rows", "all rows"])
@pytest.mark.parametrize("weights", [True, False], ids=["each its weight", "same weight"])
def test_fast_path_is_as_exact_as_the_reference(
    monkeypatch, n_rows, d_model, d_vocab, chunk, weights
):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    tensors = inputs(n_rows, d_model, d_vocab)
    doubles = inputs(n_rows, d_model, d_vocab, torch.float64)
    exact = losses_and_gradients("reference", *doubles, weights)
    reference = losses_and_gradients("reference", *tensors, weights)
    actual = losses_and_gradients("torch", *tensors, weights)
    for a, r, e in zip(actual, reference, exact, strict=True):
        e = e.double()
        budget = 2 * ((r.double() - e).abs().max() + torch.finfo(a.dtype).eps * e.abs().max())
        assert (a.double() - e).abs().max() <= budget


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    "sizes", [((4, 8), (16, 9), 4), ((4, 8), (8, 9), 3), ((2, 2, 8), (8, 9), 4)]
)
def test_what_does_not_go_together_is_refused_in_a_line(kernels, sizes):
    resid, W_U, n_targets = sizes
    targets = torch.zeros(n_targets, dtype=torch.long)
    with pytest.raises(ValueError, match="resid .* @ W_U .* targets"):
        linear_cross_entropy(torch.zeros(resid), torch.zeros(W_U), targets, kernels)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    losses = linear_cross_entropy(torch.zeros(3, 8), torch.randn(8, 100), torch.tensor([0, 50, 99]))
    assert torch.allclose(losses, torch.full((3,), math.log(100)))


def test_loss_by_hand():
    # logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8
    W_U = torch.tensor([[0.0, math.log(2), math.log(5)]])
    losses = linear_cross_entropy(torch.ones(3, 1), W_U, torch.tensor([0, 1, 2]))
    assert torch.allclose(losses, torch.tensor([math.log(8), math.log(4), math.log(8 / 5)]))


def test_large_logits_do_not_overflow():
    resid, W_U = torch.full((2, 1), 300.0), torch.tensor([[1.0, -1.0]])
    losses = linear_cross_entropy(resid, W_U, torch.tensor([0, 1]))
    assert losses.tolist() == [0.0, 600.0]


def test_sixteen_bit_inputs_give_float32_losses_and_gradients_of_their_own_type():
    resid, W_U, targets = inputs(64, 32, 200, torch.bfloat16)
    losses, dresid, dW_U = losses_and_gradients("torch", resid, W_U, targets)
    assert losses.dtype == torch.float32
    assert dresid.dtype == dW_U.dtype == torch.bfloat16
    exact = linear_cross_entropy(resid.double(), W_U.double(), targets, "reference")
    reference = linear_cross_entropy(resid, W_U, targets, "reference")
    assert (losses - exact).abs().max() <= 2 * (reference - exact).abs().max()


@pytest.mark.parametrize("ignored", [0, 2], ids=["all", "some ignored"])
@pytest.mark.parametrize("mean", [torch.mean, lambda losses: losses.view(7, 1).sum() / 7])
def test_same_weights_need_no_second_pass(monkeypatch, mean, ignored):
    resid, W_U, targets = inputs(7, 16, 50)
    targets[:ignored] = IGNORED
    of_reference = mean(linear_cross_entropy(resid, W_U, targets, "reference"))
    expected = torch.autograd.grad(of_reference, (resid, W_U))
    loss = mean(linear_cross_entropy(resid, W_U, targets))
    monkeypatch.setattr(module, "_chunks", None)
    for a, e in zip(torch.autograd.grad(loss, (resid, W_U)), expected, strict=True):
        assert torch.allclose(a, e, atol=1e-6)


def test_second_derivatives_are_the_references_alone():
    resid, W_U, targets = inputs(4, 3, 5, torch.float64)

    def of_reference(resid, W_U):
        return linear_cross_entropy(resid, W_U, targets, "reference")

    assert torch.autograd.gradgradcheck(of_reference, (resid, W_U))
    with pytest.raises(RuntimeError, match="no second derivatives: use kernels='reference'"):
        losses = linear_cross_entropy(resid, W_U, targets)
        torch.autograd.grad(losses.sum(), resid, create_graph=True)


def test_without_gradients_there_is_no_gradient_to_compute(monkeypatch):
    """A measurement does a third of the work of a training step."""
    resid, W_U, targets = inputs(7, 16, 50)
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    with torch.no_grad():
        linear_cross_entropy(resid, W_U, targets)


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_chosen_rows_are_those_rows(kernels):
    """In any order and any number of times; the gradient of a row is the sum of its uses."""
    resid, W_U, targets = inputs(7, 16, 50, torch.float64)
    rows = torch.tensor([5, 0, 5])
    losses = linear_cross_entropy(resid, W_U, targets[rows], kernels, rows)
    every = linear_cross_entropy(resid, W_U, targets, "reference")
    assert torch.allclose(losses, every[rows])
    weight = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    chosen = torch.autograd.grad((losses * weight).sum(), (resid, W_U))
    of_all = torch.autograd.grad(3 * every[5] + 3 * every[0], (resid, W_U))
    for a, b in zip(chosen, of_all, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("ignored", [[], [0, 3, 6], range(7)], ids=["none", "some", "all"])
def test_ignored_targets_cost_nothing(kernels, ignored):
    resid, W_U, targets = inputs(7, 16, 50)
    kept = torch.tensor([n for n in range(7) if n not in ignored], dtype=torch.long)
    with_ignored = targets.index_fill(0, torch.tensor([*ignored], dtype=torch.long), IGNORED)
    losses, dresid, dW_U = losses_and_gradients(kernels, resid, W_U, with_ignored)
    weight = torch.linspace(-1, 2, 7)[kept]
    expected = linear_cross_entropy(resid[kept], W_U, targets[kept], "reference")
    assert torch.allclose(losses[kept], expected) and losses.count_nonzero() == len(kept)
    gradient = torch.autograd.grad((expected * weight).sum(), (resid, W_U))
    for a, b in zip((dresid, dW_U), gradient, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
