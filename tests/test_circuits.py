"""Factored forms against dense matrices and the model's own forward pass, circuits set by hand, and
the command line.
"""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import circuits
import metrics
from circuits import Reading
from kernels.attention import smear_keys
from measure import logit_effect
from model import ModelConfig, Transformer, config_for, layer_norm_divisor
from parallel import Cores
from records import write_records
from snapshots import save_snapshot
from tests.circuits_by_hand import (
    HERE,
    N_TOKENS,
    attend_to_the_previous_token,
    induction_circuit,
    match,
    move,
    smeared_induction_circuit,
)
from vocabulary import PYTHON_1024

N_VOCAB, D_MODEL, D_HEAD = 50, 16, 4


def random_model(n_layers=3, smear=False, seed=0):
    """Everything random: gains, biases and shares too."""
    config = ModelConfig(n_layers, D_MODEL, 2, D_HEAD, 0, 8, N_VOCAB, smear=smear)
    model = Transformer(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.positions = model.positions.double()
    model.dtype = torch.float64
    return model


def random_reading(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = model.config.n_layers, model.config.n_heads
    own, previous = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    return Reading(own, previous, 1 + torch.rand(shape[0] + 1, generator=generator).double())


def dense_positivity(matrix):
    """Of a dense matrix between tokens, both its means taken away."""
    centred = matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()
    values = np.linalg.eigvals(centred.numpy())
    trace = centred.trace().item()
    ratio = (values.sum() / np.abs(values).sum()).real
    return ratio, trace / len(matrix), trace**2 / centred.square().sum().item()


# between tokens


def test_streams_are_the_sum_over_all_paths():
    """Path by path: which head of each layer takes part, and whether it moves the token along or
    from the token before.
    """
    model = random_model()
    reading = random_reading(model)
    centring = torch.eye(D_MODEL).double() - 1 / D_MODEL
    with torch.no_grad():
        W_E = model.embed["W_E"]
        blocks = [(b.attn.W_V @ b.attn.W_O, centring * b.ln1.w) for b in model.blocks]
        for layer, streams in enumerate(circuits.token_streams(model, reading)):
            expected = [torch.zeros(N_VOCAB, D_MODEL).double() for _ in range(2)]
            # each earlier layer: nothing, or one of its heads on the own or the previous token
            hops = [None, *itertools.product(range(2), (0, 1))]
            for path in itertools.product(hops, repeat=layer):
                vector, back = W_E, 0
                for n, hop in enumerate(path):
                    if hop is None:
                        continue
                    head, step = hop
                    shares = reading.previous_token if step else reading.own_token
                    divisor = reading.spread[n] if n else layer_norm_divisor(W_E)
                    OV, fold = blocks[n]
                    vector = shares[n, head] * (vector / divisor) @ fold @ OV[head]
                    back += step
                if back < 2:
                    expected[back] = expected[back] + vector
            divisor = reading.spread[layer] if layer else layer_norm_divisor(W_E)
            for stream, path_sum in zip(streams, expected, strict=True):
                assert torch.allclose(stream, path_sum / divisor @ blocks[layer][1], atol=1e-9)


@pytest.mark.parametrize("smear", [False, True])
def test_token_circuits_equal_those_of_dense_matrices(smear):
    model = random_model(smear=smear)
    reading = random_reading(model)
    found = circuits.token_circuits(model, reading)
    centring = torch.eye(D_MODEL).double() - 1 / D_MODEL
    with torch.no_grad():
        W_U = (model.ln_final.w[:, None] * centring).T @ model.unembed["W_U"]
        for layer, (own, previous) in enumerate(circuits.token_streams(model, reading)):
            attn = model.blocks[layer].attn
            for head in range(2):
                OV, QK = attn.W_V[head] @ attn.W_O[head], attn.W_Q[head] @ attn.W_K[head].T
                ratio, mean, rank = dense_positivity(own @ OV @ centring @ W_U / reading.spread[-1])
                assert found["ov_copying"][layer, head] == pytest.approx(ratio, abs=1e-9)
                assert found["ov_raise"][layer, head] == pytest.approx(mean, rel=1e-9)
                assert found["ov_rank"][layer, head] == pytest.approx(rank, rel=1e-9)
                if smear:
                    share = torch.sigmoid(attn.alpha[head])
                    key = share * previous + (1 - share) * own
                elif layer:
                    key = previous
                else:
                    assert np.isnan(found["qk_match"][layer, head])
                    continue
                ratio, mean, _ = dense_positivity(own @ QK @ key.T / D_HEAD**0.5)
                assert found["qk_prefix"][layer, head] == pytest.approx(ratio, abs=1e-9)
                assert found["qk_match"][layer, head] == pytest.approx(mean, rel=1e-9)


def test_biases_and_positions_drop_out():
    """OV and QK of a first layer, from what the model itself computes for every pair of tokens."""
    model = random_model(n_layers=1, smear=True)
    found = circuits.token_circuits(model, reading := random_reading(model))
    seen = {}

    def hook(name, layer, value):
        seen[name] = value

    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(N_VOCAB), torch.arange(N_VOCAB))
        present, before = pairs.T
        between = torch.full_like(present, 7)
        model.residual(torch.stack([between, before, between, present], dim=1), hook)
        keys = smear_keys(seen["k"], model.blocks[0].attn.alpha)
        for head in range(2):
            scores = (seen["q"][:, head, 3] * keys[:, head, 2]).sum(-1) / D_HEAD**0.5
            ratio, mean, _ = dense_positivity(scores.view(N_VOCAB, N_VOCAB))
            assert found["qk_prefix"][0, head] == pytest.approx(ratio, abs=1e-9)
            assert found["qk_match"][0, head] == pytest.approx(mean, rel=1e-9)

        model.residual(torch.arange(N_VOCAB)[:, None], hook)
        for head in range(2):
            v = seen["v"][:, head].transpose(0, 1)[:, None].float()
            effect = logit_effect(model.float(), 0, v.expand(-1, 2, -1, -1), torch.arange(50)[None])
            ratio, mean, _ = dense_positivity(effect[0, head].double() / reading.spread[-1])
            assert found["ov_copying"][0, head] == pytest.approx(ratio, abs=1e-4)
            assert found["ov_raise"][0, head] == pytest.approx(mean, rel=1e-4)


def test_read_text_averages_patterns_and_divisors():
    model = random_model(2)
    text = torch.randint(N_VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
    seen = {}
    model.residual(text, lambda name, layer, value: seen.update({(name, layer): value}))
    reading = circuits.read_text(model, text)
    for layer, head in np.ndindex(2, 2):
        pattern = seen["pattern", layer][:, head]
        own = [pattern[b, i, i].item() for b in range(3) for i in range(1, 8)]
        previous = [pattern[b, i, i - 1].item() for b in range(3) for i in range(1, 8)]
        assert reading.own_token[layer, head].item() == pytest.approx(np.mean(own))
        assert reading.previous_token[layer, head].item() == pytest.approx(np.mean(previous))
    streams = [seen["resid_pre", 0], seen["resid_pre", 1], seen["resid_post", 1]]
    for found, stream in zip(reading.spread, streams, strict=True):
        by_hand = [np.sqrt(row.numpy(force=True).var() + 1e-5) for row in stream.flatten(0, 1)]
        assert found.item() == pytest.approx(np.mean(by_hand))


# circuits set by hand


def repeated_tokens():
    rng = np.random.default_rng(0)
    draws = [np.tile(rng.choice(N_TOKENS - 1, 25, replace=False), 2) for _ in range(10)]
    return torch.from_numpy(np.insert(np.stack(draws), 0, N_TOKENS - 1, axis=1))


def test_the_induction_circuit_is_read_off_its_weights():
    model = induction_circuit()
    found = circuits.token_circuits(model, circuits.read_text(model, repeated_tokens()))
    assert found["qk_prefix"][1, 1] == pytest.approx(1, abs=1e-4)
    assert found["ov_copying"][1, 1] == pytest.approx(1, abs=1e-4)
    # thirty tokens, less their mean
    assert found["ov_rank"][1, 1] == pytest.approx(29, abs=1e-3)
    above_chance = circuits.composition(model)
    # 30 equal directions out of d_model: |OV QK.T| / |OV| |QK| = 1 / sqrt(30)
    assert above_chance["K"][1, 1, 0, 0] == pytest.approx(30**-0.5 - 255**-0.5, abs=0.005)
    for kind in "QV":
        assert above_chance[kind][1, 1, 0, 0] == pytest.approx(-(255**-0.5), abs=0.005)
    assert circuits.composition_table(above_chance)[0] == {
        "kind": "K", "earlier": "0:0", "later": "1:1", "above_chance": pytest.approx(0.12, abs=0.01)
    }  # fmt: skip


def test_qk_match_is_the_rise_of_the_attention_score_in_a_forward_pass():
    model, tokens, seen = induction_circuit(), repeated_tokens(), {}
    reading = circuits.read_text(model, tokens)
    model.residual(tokens, lambda name, layer, value: seen.update({(name, layer): value}))
    scores = seen["q", 1][:, 1] @ seen["k", 1][:, 1].mT / 32**0.5  # [batch, query, key]
    # keys from the third position on have a previous token other than the start token
    same = tokens[:, :, None] == tokens.roll(1, dims=1)[:, None, :]
    same, scores = same[:, :, 2:], scores[:, :, 2:]
    rise = scores[same].mean() - scores.mean()
    expected = circuits.token_circuits(model, reading)["qk_match"][1, 1]
    # 2 keys in 49 match here, 1 token in 30 there
    assert rise.item() == pytest.approx(expected * (1 - 2 / 49) / (1 - 1 / 30), rel=0.02)


def test_a_head_that_lowers_what_it_attends_to_has_negative_eigenvalues():
    model = induction_circuit()
    with torch.no_grad():
        model.blocks[1].attn.W_O[1] *= -1
    found = circuits.token_circuits(model, circuits.read_text(model, repeated_tokens()))
    assert found["ov_copying"][1, 1] == pytest.approx(-1, abs=1e-4)
    assert found["ov_raise"][1, 1] < 0 < found["qk_match"][1, 1]


def test_a_smeared_layer_needs_no_previous_token_head():
    model = smeared_induction_circuit()
    found = circuits.token_circuits(model, circuits.read_text(model, repeated_tokens()))
    assert found["qk_prefix"][0, 1] == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        model.blocks[0].attn.alpha[1] = 20.0  # its own key alone: not preceded by the query's token
    vanilla = circuits.token_circuits(model, circuits.read_text(model, repeated_tokens()))
    assert abs(vanilla["qk_match"][0, 1]) < 1e-4 * found["qk_match"][0, 1]


def test_a_token_may_be_known_by_what_an_own_token_head_says():
    """The same circuit, but the second layer reads tokens where head 0:1, which looks at its own
    position, has written them: nothing is left on the direct path.
    """
    elsewhere = slice(150, 150 + N_TOKENS)
    model = induction_circuit()
    no_rotation = torch.zeros_like(model.positions)
    attend_to_the_previous_token(model.blocks[0].attn, 1, no_rotation)
    move(model.blocks[0].attn, 1, HERE, elsewhere)
    with torch.no_grad():
        for W in (model.blocks[1].attn.W_Q, model.blocks[1].attn.W_V):
            W[1, HERE] = 0
    match(model.blocks[1].attn, 1, query=elsewhere, key=slice(94, 94 + N_TOKENS))
    move(model.blocks[1].attn, 1, elsewhere, HERE)
    tokens = repeated_tokens()
    examples = SimpleNamespace(
        text=tokens, text_targets=tokens, repeated=tokens, random=tokens[:, 1:26]
    )
    found = circuits.measure_circuits(model, examples, Cores(torch.device("cpu"), 1))
    assert found["own_token"][0, 1] > 0.99
    assert found["qk_prefix"][1, 1] == pytest.approx(1, abs=1e-4)
    assert found["ov_copying"][1, 1] == pytest.approx(1, abs=1e-4)
    for name in ("qk_match", "ov_raise"):
        assert abs(found[f"{name}_direct"][1, 1]) < 1e-4 * found[name][1, 1]


def test_the_copying_score_of_a_map_of_few_dimensions():
    """Random projectors among 2,000 tokens, scored on samples of 25 as evaluate.py does."""
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    for rank in (8, 23, 64):
        basis = torch.linalg.qr(torch.randn(2000, rank, generator=generator))[0]
        samples = np.stack([rng.choice(2000, 25, replace=False) for _ in range(200)])
        effect = basis[samples] @ basis[samples].mT
        pattern = torch.full((200, 1, 25, 25), 1 / 25)
        score = metrics.copying_score(pattern, effect[:, None]).item()
        assert circuits.copying_score_of_rank(rank) == pytest.approx(score, abs=0.03)
        values = circuits.positivity(basis.double(), basis.double())
        assert values == pytest.approx((1, rank / 2000, rank), rel=1e-5)


# between heads


def test_composition_equals_that_of_dense_matrices():
    model = random_model()
    found = circuits.composition(model)
    centring = torch.eye(D_MODEL).double() - 1 / D_MODEL

    def relative_norm(A, B):
        return (A @ B).norm() / A.norm() / B.norm()

    with torch.no_grad():
        for place in np.ndindex(3, 2, 3, 2):
            later, h, earlier, g = place
            if earlier >= later:
                assert all(np.isnan(found[kind][place]) for kind in "KQV")
                continue
            early, late = model.blocks[earlier], model.blocks[later]
            reads_early, reads_late = centring * early.ln1.w, centring * late.ln1.w
            OV = reads_early @ early.attn.W_V[g] @ early.attn.W_O[g] @ centring
            late_OV = reads_late @ late.attn.W_V[h] @ late.attn.W_O[h] @ centring
            QK = reads_late @ late.attn.W_Q[h] @ late.attn.W_K[h].T @ reads_late.T
            dense = {
                "K": relative_norm(OV, QK.T),
                "Q": relative_norm(OV, QK),
                "V": relative_norm(OV, late_OV),
            }
            for kind, value in dense.items():
                above_chance = value.item() - 15**-0.5
                assert found[kind][place] == pytest.approx(above_chance, abs=1e-9)


def test_composition_of_random_weights_is_chance():
    model = Transformer(config_for("mini", 3, 100, attn_only=True)).init_weights(0)
    for values in circuits.composition(model).values():
        assert abs(np.nanmean(values)) < 0.003  # of 0.089; trained heads reach 0.07 above it


# evaluators and eigenvalues


def test_correlations_leave_out_heads_without_eigenvalues():
    rng = np.random.default_rng(0)
    snapshots = [
        {name: rng.normal(size=(2, 3)) for pair in circuits.COMPARED for name in pair}
        for _ in range(4)
    ]
    for numbers in snapshots:
        numbers["ov_copying"] = numbers["copying"] ** 3
        numbers["qk_match"][0] = np.nan
    rows = {(row["score"], row["weights"]): row for row in circuits.correlations(snapshots)}
    copying = rows["copying", "ov_copying"]
    assert copying["n"] == 24 and copying["spearman"] == 1 > copying["pearson"]
    matching = rows["prefix_matching", "qk_match"]
    x, y = (
        np.concatenate([numbers[name][1] for numbers in snapshots])
        for name in ("prefix_matching", "qk_match")
    )
    assert matching["n"] == 12
    assert matching["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)
    rank = [[sorted(values).index(value) for value in values] for values in (x, y)]
    assert matching["spearman"] == pytest.approx(np.corrcoef(*rank)[0, 1], abs=1e-4)


def test_two_heads_do_not_correlate():
    numbers = {name: np.ones((1, 2)) for pair in circuits.COMPARED for name in pair}
    assert all(row["pearson"] is None for row in circuits.correlations([numbers]))


# the command line


@pytest.fixture
def run(text_file, corpus, workplace):
    """A folder with two snapshots of two layers, and one.pt of one layer."""
    origin = {"data": str(text_file), "name": corpus.name, "sha256": corpus.sha256}
    (workplace / "run" / "snapshots").mkdir(parents=True)
    for step in (0, 5):
        model = Transformer(config_for("mini", 2, 1024, attn_only=True)).init_weights(step)
        path = workplace / "run" / "snapshots" / f"step_{step:07d}.pt"
        save_snapshot(path, model, step, 100 * step, origin)
    model = Transformer(config_for("mini", 1, 1024, attn_only=True)).init_weights(0)
    save_snapshot(workplace / "one.pt", model, 0, 0, origin)
    return workplace / "run"


@pytest.fixture
def command(text_file):
    def build(path, *more):
        data = ["--data", str(text_file), "--vocabulary", PYTHON_1024, "--device", "cpu"]
        return [str(path), *data, *more]

    return build


def test_a_run_is_read_snapshot_by_snapshot(run, command, capsys):
    assert circuits.main(command(run)) == 0
    record = json.loads((run / "circuits.json").read_text())
    assert [snapshot["step"] for snapshot in record["snapshots"]] == [0, 5]
    heads = record["snapshots"][1]["heads"]
    assert [row["head"] for row in heads] == ["0:0", "0:1", "1:0", "1:1"]
    assert heads[0]["qk_match"] is None and heads[2]["qk_match"] is not None
    assert len(record["composition"]) == 12
    assert {row["n"] for row in record["correlations"]} == {4, 8}
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines if line.strip()[:2] in ("0:", "1:")}
    assert "N/A" in table["0:0"] and "N/A" not in table["1:0"]
    assert record["conclusion"] in lines and "matches prefixes best" in record["conclusion"]


def test_some_snapshots_of_a_run_are_read(run, command, tmp_path, capsys):
    extra = run / "snapshots" / "step_0000003.pt"
    extra.write_bytes((run / "snapshots" / "step_0000005.pt").read_bytes())
    measured = [{"step": step, "tokens": step, "icl_band_score": 0.0} for step in (0, 3, 5)]
    write_records(run / "measurements.npz", measured)
    assert circuits.main(command(run, "--snapshots", "2", "--out", "record.json")) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [snapshot["step"] for snapshot in record["snapshots"]] == [0, 5]
    assert not (run / "circuits.json").exists()


def test_a_single_layer_has_no_composition(run, command, tmp_path, capsys):
    assert circuits.main(command(tmp_path / "one.pt")) == 0
    output = capsys.readouterr().out
    assert "composition: N/A" in output and "Pearson" not in output
    assert not list(tmp_path.glob("*.json"))  # a snapshot's are written where --out says


def test_bad_input_is_one_line(run, command, tmp_path, capsys):
    def refused(arguments):
        assert circuits.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "foreign.pt").write_bytes(b"not a snapshot")
    assert "damaged" in refused(command("foreign.pt"))
    assert "nowhere.pt" in refused(command("nowhere.pt"))
    assert "no snapshots" in refused(command(tmp_path))
    assert "folder of a run" in refused(command("one.pt", "--snapshots", "2"))
    assert "pass --data" in refused([str(run)])
    origin = {"data": "python", "name": "x", "sha256": "y"}
    model = Transformer(config_for("mini", 1, 500, attn_only=True)).init_weights(0)
    save_snapshot(tmp_path / "small.pt", model, 0, 0, origin)
    assert "a vocabulary of 500" in refused(command("small.pt"))
    with torch.no_grad():
        model = Transformer(config_for("mini", 1, 1024, attn_only=True)).init_weights(0)
        model.blocks[0].attn.W_V[0, 0, 0] = torch.nan
    save_snapshot(tmp_path / "diverged.pt", model, 0, 0, origin)
    assert "not numbers" in refused(command("diverged.pt"))
    with torch.no_grad():
        model.blocks[0].attn.W_V.fill_(1)
        model.blocks[0].attn.W_O.fill_(3e38)
    save_snapshot(tmp_path / "diverged.pt", model, 0, 0, origin)
    assert "activations that are not numbers" in refused(command("diverged.pt"))
