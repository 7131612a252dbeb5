"""The Triton losses and gradients against float64, as exact as the definition in the same type; and
these tests against faults.

But for one test of the tiles that are shipped, tiles are small, so that small matrices have many.
"""

import types

import pytest
import torch

from kernels import cross_entropy_triton as module
from kernels.cross_entropy import IGNORED, linear_cross_entropy

SHIPPED_TILES = module.TILES


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILES", dict.fromkeys(SHIPPED_TILES, (16, 32, 16, 4, 1)))
    monkeypatch.setattr(module, "PROGRAMS", 8)


def inputs(n_rows, d_model, d_vocab, dtype=torch.float32, scale=1.0):
    """For logits of about that size."""
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(n_rows, d_model, generator=generator).to(dtype)
    W_U = torch.randn(d_model, d_vocab, generator=generator) * scale * d_model**-0.5
    return resid, W_U.to(dtype), torch.randint(d_vocab, (n_rows,), generator=generator)


def losses_and_gradients(kernels, resid, W_U, targets, rows=None):
    """Losses, dresid and dW_U of a sum in which every row has a weight of its own."""
    resid, W_U = (matrix.detach().requires_grad_() for matrix in (resid, W_U))
    losses = linear_cross_entropy(resid, W_U, targets, kernels, rows)
    weight = torch.linspace(-1, 2, len(losses)).to(losses)
    return [losses.detach(), *torch.autograd.grad((losses * weight).sum(), (resid, W_U))]


def assert_as_exact_as_the_reference(resid, W_U, targets, rows=None):
    """No further from float64 than twice the reference in the same type, plus one rounding."""
    exact = losses_and_gradients("reference", resid.double(), W_U.double(), targets, rows)
    reference = losses_and_gradients("reference", resid, W_U, targets, rows)
    actual = losses_and_gradients("triton", resid, W_U, targets, rows)
    for name, a, r, e in zip(("loss", "dresid", "dW_U"), actual, reference, exact, strict=True):
        assert a.dtype == r.dtype, name
        rounding = torch.finfo(a.dtype).eps * e.abs().max()
        budget = 2 * ((r.double() - e).abs().max() + rounding)
        assert (a.double() - e).abs().max() <= budget, name


@pytest.mark.parametrize("arch", [80, 90, 100], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shipped_tiles(arch, dtype, monkeypatch):
    """Two blocks of rows, a program for each or one for both of the vocabulary's tiles."""
    monkeypatch.setattr(module, "TILES", SHIPPED_TILES)
    monkeypatch.setattr(module, "PROGRAMS", 2)
    rows, columns, depth, *_ = module._tile(torch.empty(0, dtype=dtype))
    assert_as_exact_as_the_reference(*inputs(rows + 2, depth + 16, columns + 40, dtype))


@pytest.mark.parametrize("arch", [80, 90], indirect=True)
@pytest.mark.parametrize("sizes", [(1, 16, 1), (3, 2, 5), (33, 40, 131)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_sizes(arch, sizes, dtype):
    assert_as_exact_as_the_reference(*inputs(*sizes, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype):
    assert_as_exact_as_the_reference(*inputs(40, 64, 300, dtype, scale=100.0))


@pytest.mark.parametrize("n_hidden", [40, 90, 99])
def test_tokens_that_are_ruled_out(n_hidden):
    """Whole tiles and shares of the vocabulary of them."""
    resid, W_U, targets = inputs(32, 16, 100)
    resid[:, 0], W_U[0, :n_hidden], targets[0] = 1, -torch.inf, 99
    losses = [linear_cross_entropy(resid, W_U, targets, k) for k in ("triton", "reference")]
    assert torch.allclose(*losses, atol=1e-5) and losses[0].isfinite().any()


@pytest.mark.filterwarnings("ignore:overflow")  # of what the mask throws away
def test_logits_far_below_zero():
    """Where the columns that pad the vocabulary, of logit 0, would be the largest."""
    resid, W_U, targets = inputs(20, 16, 100)
    assert_as_exact_as_the_reference(resid + 3, W_U / 100 - 4, targets)


def test_one_logit_above_all_others_by_hand():
    """300 and -300: the losses are 0 and 600, no exponential overflows, the gradients are exact."""
    W_U = torch.zeros(16, 2).index_put_((torch.tensor(0),), torch.tensor([1.0, -1.0]))
    resid = torch.zeros(2, 16)
    resid[:, 0] = 300
    losses, dresid, _ = losses_and_gradients("triton", resid, W_U, torch.tensor([0, 1]))
    assert losses.tolist() == [0.0, 600.0]
    assert dresid[:, 0].tolist() == [0.0, 4.0]  # weights -1 and 2; 2 (W_U[0, 0] - W_U[0, 1])


def test_chosen_rows():
    """Three positions of each example, one of them twice."""
    resid, W_U, _ = inputs(64, 32, 100, torch.bfloat16)
    rows = torch.tensor([3, 50, 17, 63, 0, 17])
    targets = torch.tensor([5, 99, 0, 7, 7, 8])
    assert_as_exact_as_the_reference(resid, W_U, targets, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_ignored_targets(dtype, every):
    resid, W_U, targets = inputs(40, 32, 100, dtype)
    targets[::every] = IGNORED
    assert_as_exact_as_the_reference(resid, W_U, targets)
    losses, dresid, _ = losses_and_gradients("triton", resid, W_U, targets)
    assert (losses[::every] == 0).all() and (dresid[::every] == 0).all()


def test_of_nothing_comes_nothing():
    resid, W_U, targets = inputs(0, 16, 40)
    losses, dresid, dW_U = losses_and_gradients("triton", resid, W_U, targets)
    assert (losses.shape, dresid.shape, dW_U.any()) == ((0,), (0, 16), False)


def test_a_target_that_is_no_token_costs_infinity():
    resid, W_U, targets = inputs(6, 16, 40)
    targets[:4] = torch.tensor([40, -1, 2**32 + 5, 5 - 2**32])
    losses = linear_cross_entropy(resid, W_U, targets, "triton")
    assert losses.isinf().tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("n_bytes", [1, 2000, 2**20], ids=["one row", "some rows", "all rows"])
def test_chunks_of_any_size(monkeypatch, n_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", n_bytes)
    assert_as_exact_as_the_reference(*inputs(20, 16, 60))


@pytest.mark.parametrize("d_vocab", [50_257, 100_277, 2**16])
@pytest.mark.parametrize("n_rows", [1, 5000, 32_768, 10**6])
def test_chunks_are_about_equal_and_of_whole_tiles(d_vocab, n_rows):
    W_U = torch.empty(16, d_vocab, dtype=torch.bfloat16, device="meta")
    size = module._chunk(n_rows, W_U, tile=128)
    n_chunks = -(-n_rows // size)
    assert size % 128 == 0 and size * d_vocab * 2 <= module.CHUNK_BYTES
    assert n_chunks * size - n_rows < 128 * n_chunks  # no chunk is much smaller than the others
    assert n_chunks <= -(-n_rows * d_vocab * 2 // module.CHUNK_BYTES) * 1.05 + 1


def test_the_gradients_of_many_chunks_add_up_in_float32(monkeypatch):
    """40 times 1 - 1/32: in bfloat16 the sum would be another from 8 on."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    resid = torch.ones(40, 16, dtype=torch.bfloat16)
    W_U = torch.zeros(16, 32, dtype=torch.bfloat16, requires_grad=True)
    losses = linear_cross_entropy(resid, W_U, torch.zeros(40, dtype=torch.long), "triton")
    assert (torch.autograd.grad(losses.sum(), W_U)[0][:, 0] == -38.75).all()


@pytest.mark.parametrize("programs", [1, 12, 10**6])
def test_programs_that_share_the_vocabulary_agree(monkeypatch, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    assert_as_exact_as_the_reference(*inputs(20, 16, 300, torch.bfloat16))


def test_the_gradient_by_the_logits_takes_no_more_than_a_chunk(monkeypatch):
    """And it is the only thing as wide as the vocabulary, but for dW_U."""
    resid, W_U, targets = inputs(64, 32, 320, torch.bfloat16)
    monkeypatch.setattr(module, "CHUNK_BYTES", 320 * 2 * 16)
    shapes = []

    def launch(kernel, resid, W_U, d_vocab, per_row, dlogits=None, launch=module._launch):
        launch(kernel, resid, W_U, d_vocab, per_row, dlogits)
        shapes.append(None if dlogits is None else tuple(dlogits.shape))

    monkeypatch.setattr(module, "_launch", launch)
    losses_and_gradients("triton", resid, W_U, targets)
    assert shapes == [None] + [(16, 320)] * 4


@pytest.mark.parametrize("frozen", [0, 1], ids=["resid", "W_U"])
def test_what_needs_no_gradient_costs_none(monkeypatch, frozen):
    matrices = [matrix.requires_grad_() for matrix in inputs(20, 16, 50)[:2]]
    matrices[frozen].requires_grad_(False)
    monkeypatch.setattr(*((torch, "mm") if frozen == 0 else (module, "_add_product")), None)
    linear_cross_entropy(*matrices, torch.arange(20), "triton").sum().backward()
    assert matrices[1 - frozen].grad.norm() > 0


def test_strided_inputs():
    resid, W_U, targets = inputs(40, 64, 96)
    assert_as_exact_as_the_reference(resid[::2, ::2], W_U.T.contiguous().T[::2], targets[::2])


def test_second_derivatives_are_refused():
    resid, W_U, targets = inputs(4, 16, 40)
    losses = linear_cross_entropy(resid.requires_grad_(), W_U, targets, "triton")
    with pytest.raises(RuntimeError, match="no second derivatives: use kernels='reference'"):
        torch.autograd.grad(losses.sum(), resid, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_that_start_anywhere(dtype):
    resid, W_U, targets = inputs(20, 16, 48, dtype)
    odd = [torch.cat([m.new_zeros(1), m.flatten()])[1:].view(m.shape) for m in (resid, W_U)]
    assert all(m.data_ptr() % 16 for m in odd)
    assert_as_exact_as_the_reference(*odd, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_types_that_no_kernel_is_made_for_are_refused(dtype):
    resid, W_U, targets = inputs(4, 16, 40, torch.float64)
    resid, W_U = resid.detach().to(dtype), W_U.detach().to(dtype)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        linear_cross_entropy(resid, W_U, targets, "triton")


FAULTS = {
    "the sum is not rescaled": ("total *= tl.exp(largest - larger)", "pass"),
    "the largest logit is the last tile's": ("largest = larger", "largest = tl.max(logits, 1)"),
    "padding counts as logits": ('logits, float("-inf"))\n        of', "logits, 0.0)\n        of"),
    "the vocabulary is shifted": ("columns == target - column", "columns == target - column + 1"),
    "the last share is left out": ("tl.program_id(1) * share\n    for", "share\n    for"),
    "the target is not subtracted": ("gradient - weight", "gradient"),
    "the weight counts twice": ("* scale\n", "* scale * weight\n"),
    "a slice is read twice": ("resid, row, depth, n_rows", "resid, row, depth // 2, n_rows"),
    "rows are shifted": ("weight_ptr + rows", "weight_ptr + rows + 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_these_tests_find_a_planted_fault(fault, monkeypatch, tmp_path):
    right, wrong = FAULTS[fault]
    source = open(module.__file__).read()
    assert right in source
    path = tmp_path / "faulty.py"  # Triton reads a kernel's source from its file
    path.write_text(source.replace(right, wrong))
    faulty = types.ModuleType("faulty")
    exec(compile(path.read_text(), path, "exec"), faulty.__dict__)
    faulty.TILES, faulty.PROGRAMS = module.TILES, module.PROGRAMS
    monkeypatch.setattr(module, "linear_cross_entropy", faulty.linear_cross_entropy)
    with pytest.raises(AssertionError):
        assert_as_exact_as_the_reference(*inputs(40, 48, 403, torch.bfloat16))
