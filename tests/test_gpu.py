"""On a GPU: every launch configuration that ships for it, against float64 on the same device. What
the interpreter cannot see shows here: tensor-core rounding, races, the compiler's mistakes.

A compiler may err in one configuration and not in the next, so none is left out.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import ablate
import measure
import metrics
from data import evaluation_rows
from kernels.attention import (
    attention_and_lse,
    attention_pattern,
    attention_reference,
    frozen_attention,
    head_statistics,
    index_attention,
)
from model import Transformer, config_for
from parallel import Cores, Ranks
from records import read_records
from snapshots import save_snapshot
from sweep import sweep
from tests.test_attention import (
    assert_as_exact_as_the_reference,
    inputs,
    output_and_gradients,
)
from vocabulary import PYTHON_1024

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
D_HEADS = [16, 32, 64, 128]
WINDOWS = (1, 5, 63, 66, 130, 300, 2000)
ALPHA = (-10.0, -1.0, 0.5, 10.0, 0.0, -2.0, 2.0)


def on_gpu(n_ctx, d_head, dtype, seed=0):
    """q, k, v [2, 7, pos, d_head] as projections make them: strided."""
    tensors = inputs(n_ctx, d_head, 7, 2, seed, dtype)
    rows = torch.stack([t.detach().transpose(1, 2) for t in tensors], dim=2).cuda()
    return [t.transpose(1, 2).requires_grad_() for t in rows.unbind(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_head", D_HEADS)
@pytest.mark.parametrize("windows", [None, WINDOWS], ids=["full", "local"])
@pytest.mark.parametrize("smear", [False, True], ids=["not smeared", "smeared"])
@pytest.mark.parametrize("n_ctx", [512, 1000])
def test_attention_and_every_gradient(n_ctx, d_head, dtype, windows, smear):
    from kernels import attention_triton

    tensors = on_gpu(n_ctx, d_head, dtype)
    if smear:
        tensors.append(torch.tensor(ALPHA, device="cuda", requires_grad=True))

    def kernel(q, k, v, alpha=None):
        return attention_triton.attention(q, k, v, alpha, windows)[0]

    def reference(q, k, v, alpha=None):
        return attention_reference(q, k, v, alpha, windows)

    doubles = [t.detach().double().requires_grad_() for t in tensors]
    actual = output_and_gradients(kernel, tensors)
    again = output_and_gradients(kernel, tensors)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    # dq is what is left of dz . value - dz . z, which cancel where a query sees few keys: the
    # definition subtracts equal numbers, a GPU two sums that were added up in different orders
    assert_as_exact_as_the_reference(
        actual,
        output_and_gradients(reference, tensors),
        output_and_gradients(reference, doubles),
        dq_roundings=4,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_head", D_HEADS)
@pytest.mark.parametrize("windows", [None, WINDOWS], ids=["full", "local"])
@pytest.mark.parametrize("n_values", [1, 2, 7])
def test_frozen_attention_and_head_statistics(d_head, dtype, windows, n_values):
    q, k, v = (t.detach() for t in on_gpu(1000, d_head, dtype))
    alpha = torch.tensor(ALPHA, device="cuda")
    _, lse = attention_and_lse(q, k, v, alpha, windows, "triton")
    exact = attention_pattern(q.double(), k.double(), alpha.double(), windows)
    rounded = attention_pattern(q, k, alpha, windows)
    eps = torch.finfo(dtype).eps

    generator = torch.Generator("cuda").manual_seed(1)
    values = torch.randn(n_values, *v.shape, generator=generator, device="cuda").to(dtype)
    z = exact @ values.double()
    budget = 2 * ((rounded @ values).double() - z).abs().max() + 2 * eps * z.abs().max()
    frozen = frozen_attention(q, k, lse, values, alpha, windows, "triton")
    assert (frozen.double() - z).abs().max() <= budget

    tokens = torch.randint(50, (2, 1000), generator=generator, device="cuda")
    scores = head_statistics(q, k, lse, tokens, alpha, windows, kernels="triton")
    for actual, expected in zip(
        scores,
        (metrics.prefix_matching_score(exact, tokens), metrics.previous_token_score(exact)),
        strict=True,
    ):
        assert torch.allclose(actual.double(), expected, rtol=2 * eps, atol=1e-5)


def test_index_patterns_copy_rows_exactly():
    values = torch.randn(3, 2, 4, 1000, 64, device="cuda").bfloat16()
    index = torch.randint(-1, 1000, (2, 4, 1000), device="cuda")
    z = index_attention(index, values, "triton")
    assert torch.equal(z, index_attention(index, values, "reference"))


def test_head_statistics_of_8192_tokens_take_no_pattern():
    q, k, v = (t.detach() for t in on_gpu(8192, 64, torch.bfloat16))
    _, lse = attention_and_lse(q, k, v, kernels="triton")
    tokens = torch.randint(50, (2, 8192), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_statistics(q, k, lse, tokens, kernels="triton")
    assert torch.cuda.max_memory_allocated() - before < q.numel() * q.element_size()


@pytest.mark.parametrize("smear", [False, True])
def test_a_snapshot_measures_the_same(corpus, smear):
    gpu = torch.device("cuda")
    examples = measure.draw_examples(corpus, 20, whole=0.75).to(gpu)
    records = []
    for kernels in ("torch", "triton"):
        model = Transformer(
            config_for("mini", 2, 1024, attn_only=True, smear=smear), kernels
        ).init_weights(0)
        records.append(measure.measure(model.to(gpu), examples, Cores(gpu), Ranks(gpu)))
    assert records[0].keys() == records[1].keys()
    for name, value in records[0].items():
        assert records[1][name] == pytest.approx(value, abs=2e-3), name


@torch.no_grad()
@pytest.mark.parametrize("smear", [False, True])
def test_the_sweep_is_that_of_the_cpu(corpus, smear):
    inputs, targets = evaluation_rows(corpus, 512, 4)
    at = torch.tensor([49, 499, 299]).expand(4, -1)
    heads = [[], [(0, 0)], [(1, 1)], [(0, 1), (2, 0)]]
    losses = []
    for device, kernels in ("cpu", "torch"), ("cuda", "triton"):
        model = Transformer(config_for("mini", 3, 1024, smear=smear), kernels).init_weights(0)
        rows = (x.to(device) for x in (inputs, targets, at))
        losses.append(sweep(model.to(device), *rows, heads).cpu())
    torch.testing.assert_close(*losses, atol=1e-3, rtol=0)


@pytest.mark.parametrize("flags", ["", "--full", "--mean --freeze-layernorm"])
def test_ablate_says_what_it_says_on_the_cpu(corpus, text_file, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    about = {"data": "python", "name": corpus.name, "sha256": corpus.sha256}
    model = Transformer(config_for("mini", 2, 1024, attn_only=True)).init_weights(0)
    save_snapshot("x.pt", model, step=0, tokens=0, corpus=about)
    command = f"x.pt --data {text_file} --vocabulary {PYTHON_1024} --examples 8 --heads 0:0,1:1"
    records = []
    for device in "cpu", "cuda":
        assert ablate.main(f"{command} --device {device} --out {device}.npz {flags}".split()) == 0
        records += read_records(f"{device}.npz")
    for name, value in records[0].items():
        assert records[1][name] == pytest.approx(value, abs=2e-3), name


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
def test_no_kernel_reaches_beyond_its_memory():
    subprocess.run(
        ["compute-sanitizer", "--error-exitcode=1", sys.executable, "-m", "pytest", __file__]
        + ["-k", "local and 64 and (bfloat16 or float32) and (1000 or frozen) or index"],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # a cache hides what lies beyond
        check=True,
    )
