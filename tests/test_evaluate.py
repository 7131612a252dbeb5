"""From a snapshot to its record, by slower and plainer ways; and the command line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import measure
import metrics
from heads import HEAD_SCORES
from kernels.attention import attention_and_lse, head_mass
from kernels.cross_entropy import linear_cross_entropy
from model import Transformer, config_for
from parallel import Cores, Ranks
from records import read_records, write_records
from safety import BadInput, write_json
from snapshots import load_snapshot, save_snapshot
from tests.test_summary import make_records
from vocabulary import PYTHON_1024

CPU = torch.device("cpu")
HEADS = HEAD_SCORES


@pytest.fixture(scope="module")
def model():
    """Untrained, but loud enough that heads differ."""
    model = Transformer(config_for("mini", 2, 1024, attn_only=True, smear=True)).init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.dim() > 1 else 1
        for layer, block in enumerate(model.blocks):
            block.attn.alpha.copy_(torch.tensor([0.5, -1.0 - layer]))
        model.ln_final.w.copy_(torch.linspace(0.5, 2, 128))
    return model


@pytest.fixture(scope="module")
def examples(corpus):
    return measure.draw_examples(corpus, 20)


@pytest.fixture(scope="module")
def record(model, examples):
    return measure.measure(model, examples, Cores(CPU, 2), Ranks(CPU))


def test_losses_are_those_of_the_logits_row_by_row(model, examples, record):
    with torch.no_grad():
        rows = [
            F.cross_entropy(model(inputs[None])[0], targets, reduction="none")
            for inputs, targets in zip(examples.inputs, examples.targets, strict=True)
        ]
    losses = torch.stack(rows)
    assert record["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert record["loss_by_position"] == pytest.approx(losses.mean(0).numpy(), rel=1e-4)
    by_hand = [losses[n, examples.scored[n, -1]].item() for n in range(20)]
    assert record["per_token_loss"] == pytest.approx(by_hand, rel=1e-4)
    assert record["icl_score"] == pytest.approx(
        (losses[:, 499] - losses[:, 49]).mean().item(), abs=1e-4
    )


def test_the_way_of_a_gpu_gives_the_same_record(model, examples, record, monkeypatch):
    """With what Triton's kernels mean in their place."""

    class StandIn:
        attention = staticmethod(attention_and_lse)
        head_mass = staticmethod(lambda *inputs: head_mass(*inputs, "torch"))

    def losses(resid, W_U, targets, kernels):
        return linear_cross_entropy(resid, W_U, targets)

    monkeypatch.setattr("kernels.attention._triton", lambda module="attention": StandIn)
    monkeypatch.setattr("model.linear_cross_entropy", losses)
    config = dataclasses.replace(model.config, windows=(512, 20))
    for usual in model, Transformer(config).init_weights(0):
        twin = Transformer(usual.config)
        twin.load_state_dict(usual.state_dict())
        twin.kernels = "triton"
        expected, found = (
            measure.measure(m, examples, Cores(CPU), Ranks(CPU)) for m in (usual, twin)
        )
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-5), name


def test_every_example_has_a_token_of_its_own_from_all_over_it(corpus):
    places = measure.draw_examples(corpus, 70).scored[:, -1]
    assert places.min() < 50 and places.max() > 460 and len(set(places.tolist())) > 60
    assert len(set((places % 8).tolist())) == 8


def test_heads_are_tested_on_ten_sequences_of_each_kind(examples):
    assert examples.repeated.shape == (10, 101)
    assert examples.random.shape == (10, 25)
    assert examples.text.shape == examples.text_targets.shape == (10, 512)


def test_more_examples_begin_with_the_fewer(corpus, model, record):
    more = measure.measure(model, measure.draw_examples(corpus, 30), Cores(CPU, 1), Ranks(CPU))
    assert more["per_token_loss"][:20] == pytest.approx(record["per_token_loss"], abs=1e-4)
    assert np.array_equal(more["prefix_matching"], record["prefix_matching"])


def test_a_share_of_the_examples_is_measured_at_every_position(corpus, model, record):
    examples = measure.draw_examples(corpus, 20, whole=0.25)
    partly = measure.measure(model, examples, Cores(CPU, 2), Ranks(CPU))
    for name in ("icl_score", "icl_score_error", "icl_band_score", "icl_band_score_error"):
        assert partly[name] == pytest.approx(record[name], abs=1e-4)
    assert partly["per_token_loss"] == pytest.approx(record["per_token_loss"], abs=1e-4)
    whole = measure.measure(model, measure.draw_examples(corpus, 5), Cores(CPU, 1), Ranks(CPU))
    assert partly["loss"] == pytest.approx(whole["loss"], abs=1e-4)
    assert partly["loss_by_position"] == pytest.approx(whole["loss_by_position"], abs=1e-4)


def test_head_scores_have_a_place_for_every_head(record):
    for name in (
        "prefix_matching",
        "match_itself",
        "match_before",
        "copying",
        "previous_token",
        "own_key_share",
    ):
        assert record[name].shape == (2, 2)
    assert record["own_key_share"][0, 0] == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert (record["own_key_share"][1, 1] - 1 / (1 + np.exp(2.0))) == pytest.approx(0, abs=1e-6)


def test_logit_effect_is_the_change_of_the_logits(model, examples):
    """Adds a value's contribution to the residual stream by hand, behind a LayerNorm whose scale is
    held fixed.
    """
    tokens = examples.random[:2]
    seen = {}
    model.residual(tokens, lambda name, layer, value: seen.update({(name, layer): value}))
    layer, head, row, key = 1, 1, 1, 6
    effect = measure.logit_effect(model, layer, seen["v", layer], tokens)
    with torch.no_grad():
        contribution = seen["v", layer][row, head, key] @ model.blocks[layer].attn.W_O[head]
        centred = contribution - contribution.mean()
        logits = (centred * model.ln_final.w) @ model.unembed["W_U"]
        expected = (logits - logits.mean())[tokens[row]]
    assert torch.allclose(effect[row, head, key], expected, atol=1e-4)


def patterns_of(model, tokens):
    patterns = []

    def look(name, layer, value):
        if name == "pattern":
            patterns.append(value)

    with torch.no_grad():
        model.residual(tokens, look)
    return patterns


def test_previous_token_score_of_the_model_is_that_of_its_patterns(model, examples, record):
    patterns = patterns_of(model, examples.text)
    expected = torch.stack([metrics.previous_token_score(pattern) for pattern in patterns])
    assert record["previous_token"] == pytest.approx(expected.numpy(), abs=1e-5)


def test_prefix_matching_and_its_controls_are_those_of_the_patterns(model, examples, record):
    for name, offset in ("prefix_matching", 1), ("match_itself", 0), ("match_before", -1):
        for layer, pattern in enumerate(patterns_of(model, examples.repeated)):
            expected = metrics.prefix_matching_score(pattern, examples.repeated, offset)
            assert record[name][layer] == pytest.approx(expected.numpy(), abs=1e-5)


def test_copying_score_of_the_model_by_brute_force(model, examples, record):
    """From patterns and weights, with loops, as the definition says it."""
    seen = {}
    model.residual(examples.random, lambda name, layer, value: seen.update({(name, layer): value}))
    with torch.no_grad():
        for layer, head in np.ndindex(2, 2):
            own = total = 0.0
            for row in range(10):
                tokens = examples.random[row]
                results = seen["v", layer][row, head] @ model.blocks[layer].attn.W_O[head]
                for j in range(25):
                    logits = ((results[j] - results[j].mean()) * model.ln_final.w) @ model.unembed[
                        "W_U"
                    ]
                    raised = (logits - logits.mean()).clamp(min=0)
                    weight = seen["pattern", layer][row, head, :, j].sum().item()
                    own += weight * raised[tokens[j]].item()
                    total += weight * raised[tokens].sum().item()
            assert record["copying"][layer, head] == pytest.approx(
                4 * own / (own + total) - 1, abs=1e-4
            )


def test_examples_need_a_spread():
    with pytest.raises(BadInput):
        measure.draw_examples(None, 1)


# the command line


@pytest.fixture
def run(model, text_file, corpus, workplace):
    """A folder with two snapshots."""
    origin = {"data": str(text_file), "name": corpus.name, "sha256": corpus.sha256}
    (workplace / "run" / "snapshots").mkdir(parents=True)
    for step in (0, 5):
        save_snapshot(
            workplace / "run" / "snapshots" / f"step_{step:07d}.pt", model, step, 100 * step, origin
        )
    return workplace / "run"


def command(path, text_file, *more):
    data = ["--data", str(text_file), "--vocabulary", PYTHON_1024]
    return [str(path), "--examples", "4", "--device", "cpu", *data, *more]


def test_a_snapshot_is_printed_as_a_table_of_heads(run, text_file, record, capsys):
    snapshot = run / "snapshots" / "step_0000005.pt"
    assert evaluate.main(command(snapshot, text_file, "--out", "record.npz")) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines if line.strip()[:2] in ("0:", "1:")}
    assert list(table) == ["0:0", "0:1", "1:0", "1:1"]
    for layer, head in np.ndindex(2, 2):
        names = "prefix_matching", "match_itself", "match_before", "copying", "previous_token"
        for name, shown in zip(names, table[f"{layer}:{head}"][1:], strict=False):  # then the class
            precision = 1e-2 if name == "copying" else 1e-3
            assert float(shown) == pytest.approx(record[name][layer, head], abs=precision)
    assert read_records(Path("record.npz"))[0]["step"] == 5


def test_other_readings_of_copying_are_printed_too(run, text_file, model, examples, capsys):
    flags = "--copying-variants", "--out", "record.npz"
    assert evaluate.main(command(run / "snapshots" / "step_0000005.pt", text_file, *flags)) == 0
    *_, titles, _, _, row, _, _ = capsys.readouterr().out.splitlines()
    assert titles == "  head  copying  start token  by destination  both"
    record, seen, expected = read_records(Path("record.npz"))[0], {}, []
    names = "copying", "copying_start_token", "copying_by_destination", "copying_both"
    for name, (by_destination, start) in zip(names, np.ndindex(2, 2), strict=True):
        tokens = examples.repeated[:, 1 - start : 26]
        with torch.no_grad():
            model.residual(tokens, lambda name, layer, value: seen.update({name: value}))
        effect = measure.logit_effect(model, 1, seen["v"], tokens)[:, :, start:, start:]
        pattern = seen["pattern"][:, :, start:, start:]
        expected.append(metrics.copying_score(pattern, effect, by_destination).numpy(force=True))
        assert record[name][1] == pytest.approx(expected[-1], abs=1e-5)
    shown = [float(number) for number in row.split()[1:]]
    assert shown == pytest.approx([of_heads[0] for of_heads in expected], abs=0.01)
    assert "takes one snapshot" in refused(capsys, command(run, text_file, "--copying-variants"))


def test_a_phase_change_is_set_by_hand(run, text_file, capsys):
    told = run / "summary.json"
    first, *_ = sorted((run / "snapshots").glob("*.pt"))
    model, about = load_snapshot(first)
    model.unembed["W_U"].data *= 2  # differs from the last
    save_snapshot(run / "snapshots" / "step_0000002.pt", model, 2, 200, about["corpus"])
    by_hand = command(run, text_file, "--window", "0.00015", "0.0004")  # at 0.0002 and 0.0005
    assert "its training is not finished" in refused(capsys, by_hand)
    write_json(told, {"tokens": 500, "phase_change": None})
    assert "not measured yet" in refused(capsys, by_hand)
    records = make_records(np.array([0, -0.1, -0.2]), np.array([0, 0.1, 0.2]))
    for record, step in zip(records, (0, 2, 5), strict=True):
        record.update(step=step, tokens=100 * step)
    write_records(run / "measurements.npz", records)
    assert evaluate.main(by_hand) == 0
    summary = json.loads(told.read_text())
    assert "set by hand" in capsys.readouterr().out
    change = summary["phase_change"]
    assert change["by_hand"] and (change["start_step"], change["end_step"]) == (2, 5)
    assert summary["tokens"] == 500 and summary["examples"] == 4
    for step, when in (2, "before"), (5, "after"):  # measured anew, not from the records
        path = run / "snapshots" / f"step_{step:07d}.pt"
        assert evaluate.main(command(path, text_file, "--out", f"{when}.npz")) == 0
        (record,) = read_records(Path(f"{when}.npz"))
        assert summary[f"icl_{when}"] == pytest.approx(float(record["icl_score"]), abs=1e-6)
    assert summary["icl_before"] != summary["icl_after"]
    capsys.readouterr()
    more = [*command(run, text_file), "--examples", "5"]
    assert evaluate.main(more) == 0  # which finds none
    assert "set by hand" in capsys.readouterr().out
    again = json.loads(told.read_text())
    assert again["examples"] == 5 and again["phase_change"]["by_hand"]
    assert again["phase_change"]["end_step"] == 5
    before = told.read_bytes()
    starts = "0.0005", "0", "-1", "nan", "0.0002", "0.0002"
    ends = "0.0002", "0.0005", "0.0005", "0.0005", "0.00021", "2"
    for wrong in zip(starts, ends, strict=True):
        assert "two snapshots" in refused(capsys, command(run, text_file, "--window", *wrong))
    snapshot = run / "snapshots" / "step_0000005.pt"
    needs = "needs the folder of a run"
    assert needs in refused(capsys, command(snapshot, text_file, "--window", "0", "1"))
    assert needs in refused(capsys, [*by_hand, "--out", "a.npz"])
    assert told.read_bytes() == before


def test_a_run_is_measured_snapshot_by_snapshot(run, text_file, capsys):
    (run / "measurements.npz").write_bytes(b"training's own")
    (run / "summary.json").write_text(json.dumps({"tokens": 500, "examples": 1, "loss": 0.0}))
    assert evaluate.main(command(run, text_file)) == 0
    assert (run / "measurements.npz").read_bytes() == b"training's own"
    records = read_records(run / "evaluation.npz")
    assert [record["step"] for record in records] == [0, 5]
    assert len(records[0]["per_token_loss"]) == 4
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == 500 and summary["examples"] == 4
    assert summary["loss"] == pytest.approx(records[1]["loss"])


def test_a_summary_of_as_many_examples_is_kept(run, text_file, capsys):
    assert evaluate.main(command(run, text_file)) == 0
    assert not (run / "summary.json").exists()  # training is not finished
    (run / "summary.json").write_text('{"examples": 4}')
    assert evaluate.main(command(run, text_file)) == 0
    assert (run / "summary.json").read_text() == '{"examples": 4}'


def test_some_snapshots_are_measured_beside_what_training_measured(run, text_file, capsys):
    assert evaluate.main(command(run, text_file)) == 0
    (run / "evaluation.npz").rename(run / "measurements.npz")
    (run / "summary.json").write_text(told := '{"phase_change": null}')
    before = (run / "measurements.npz").read_bytes()
    (run / "snapshots" / "step_best.pt").write_text("not train.py's")
    extra = run / "snapshots" / "step_0000003.pt"
    extra.write_bytes((run / "snapshots" / "step_0000005.pt").read_bytes())
    assert evaluate.main(command(run, text_file, "--snapshots", "2")) == 0
    assert [int(r["step"]) for r in read_records(run / "evaluation.npz")] == [0, 5]
    assert "evaluation.npz" in capsys.readouterr().out.splitlines()[-1]
    out = ["--out", str(run / "other.npz")]
    assert evaluate.main(command(run, text_file, "--snapshots", "2", *out)) == 0
    assert (run / "other.npz").exists()
    assert (run / "measurements.npz").read_bytes() == before
    assert (run / "summary.json").read_text() == told


def test_another_corpus_than_the_one_trained_on_is_named(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(
        "quick brown foxes jump over 37 lazy dogs; why not?\n" * 2000
    )
    snapshot = run / "snapshots" / "step_0000005.pt"
    assert evaluate.main(command(snapshot, tmp_path / "other.txt")) == 0
    assert "not the corpus it was trained on" in capsys.readouterr().out


def refused(capsys, arguments):
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_path_inside_a_snapshot_is_not_followed(run, capsys):
    error = refused(capsys, [str(run / "snapshots" / "step_0000005.pt"), "--device", "cpu"])
    assert "pass --data" in error


def test_bad_input_is_one_line(run, text_file, tmp_path, capsys):
    snapshot = run / "snapshots" / "step_0000005.pt"
    assert "at least 2" in refused(capsys, command(snapshot, text_file, "--examples", "1"))
    assert "holds out only" in refused(capsys, command(snapshot, text_file, "--examples", "100000"))
    assert "no snapshots" in refused(capsys, command(tmp_path, text_file))
    assert "not measured" in refused(capsys, command(run, text_file, "--snapshots", "2"))
    assert "folder of a run" in refused(capsys, command(snapshot, text_file, "--snapshots", "2"))
    assert "at least 2" in refused(capsys, command(run, text_file, "--snapshots", "1"))
    assert "nowhere.pt" in refused(capsys, command("nowhere.pt", text_file))
    assert "end in .npz" in refused(capsys, command(snapshot, text_file, "--out", str(snapshot)))
    out = "--out", str(run / "measurements.npz")
    assert "train.py's own" in refused(capsys, command(run, text_file, *out))
    assert "invalid int" in refused(capsys, command(snapshot, text_file, "--examples", "all"))
    assert "run on a GPU" in refused(capsys, command(snapshot, text_file, "--kernels", "triton"))
    model, about = load_snapshot(snapshot)
    with torch.no_grad():
        model.unembed["W_U"].fill_(3e38)
    save_snapshot(snapshot, model, 5, 500, about["corpus"])
    error = refused(capsys, command(run, text_file))
    assert "losses that are not numbers" in error and snapshot.name in error
    assert not (run / "evaluation.npz").exists()
    snapshot.write_bytes(snapshot.read_bytes()[:-1000])
    assert "damaged" in refused(capsys, command(snapshot, text_file))


def test_a_vocabulary_of_another_size_is_refused(run, text_file, tmp_path, capsys):
    model = Transformer(config_for("mini", 1, 500, attn_only=True)).init_weights(0)
    origin = {"data": "python", "name": "x", "sha256": "y"}
    save_snapshot(tmp_path / "small.pt", model, 0, 0, origin)
    assert "a vocabulary of 500" in refused(capsys, command(tmp_path / "small.pt", text_file))
    assert load_snapshot(tmp_path / "small.pt")[1]["corpus"] == origin
