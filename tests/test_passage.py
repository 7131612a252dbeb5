"""The record of a passage is what the models say of it, told by numpy alone."""

import json

import numpy as np
import pytest
import torch

import passage
import tasks
from model import Transformer, config_for
from plots.runs import head_on_passage, read_arrays
from snapshots import save_snapshot
from tests.circuits_by_hand import N_TOKENS, induction_circuit
from vocabulary import PYTHON_1024, load_vocabulary

STEPS = [0, 10, 20, 30, 40, 50]
CHANGE = {"start_step": 20, "end_step": 40, "start_tokens": 2000, "end_tokens": 4000}


@pytest.fixture(scope="module")
def models():
    """A different one for each step, with heads that do something."""
    made = [
        Transformer(config_for("mini", 2, 1024, attn_only=True)).init_weights(n) for n in range(6)
    ]
    for model in made[1:]:
        for parameter in model.parameters():
            parameter.data *= 3
    return made


@pytest.fixture(scope="module")
def run(models, text_file, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "some"
    (folder / "snapshots").mkdir(parents=True)
    origin = {"data": str(text_file), "name": corpus.name, "sha256": corpus.sha256}
    for step, model in zip(STEPS, models, strict=True):
        save_snapshot(folder / f"snapshots/step_{step:07d}.pt", model, step, 100 * step, origin)
    (folder / "summary.json").write_text(json.dumps({"phase_change": CHANGE}))
    return folder


@pytest.fixture(scope="module")
def arguments(run, text_file):
    return [str(run), "--data", str(text_file), "--vocabulary", PYTHON_1024, "--device", "cpu"]


@pytest.fixture(scope="module")
def record(run, arguments, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))  # where the corpus is prepared
        assert passage.main(arguments) == 0
    return read_arrays(run / "passage.npz")


def tokens_of(name):
    encoding = load_vocabulary(PYTHON_1024)
    first, rest, *_ = tasks.PASSAGES[name]
    pieces = [encoding.encode_ordinary(part) for part in (first, rest, first)]
    return torch.tensor([encoding.eot_token, *sum(pieces, [])])


@pytest.mark.parametrize("name", tasks.PASSAGES)
def test_losses_are_those_of_every_snapshot(record, models, name):
    tokens = tokens_of(name)
    assert record["step"].tolist() == STEPS
    assert record["tokens"].tolist() == [100 * step for step in STEPS]
    assert record[f"{name}_loss"].shape == (6, len(tokens))
    assert np.isnan(record[f"{name}_loss"][:, 0]).all()
    for recorded, model in zip(record[f"{name}_loss"], models, strict=True):
        with torch.no_grad():
            losses = model.losses(tokens[None, :-1], tokens[None, 1:])[0]
        # half precision: 11 bits
        assert recorded[1:] == pytest.approx(losses.numpy(), rel=2**-11)


@pytest.mark.parametrize("name", tasks.PASSAGES)
def test_the_text_and_the_words_to_follow(record, name):
    first, rest, helped, misled = tasks.PASSAGES[name]
    text = record[f"{name}_text"]
    assert text[0] == b"<|endoftext|>"
    assert b"".join(text[1:]).decode() == first + rest + first
    assert b"".join(text[record[f"{name}_repeat"] :]).decode() == first
    assert record[f"{name}_word"].tolist() == [*helped, *misled]
    expected = record[f"{name}_word_expected"].tolist()
    assert expected == [True] * len(helped) + [False] * len(misled)
    for word, place in zip(helped, record[f"{name}_word_token"], strict=False):
        before, through = (b"".join(text[1:stop]).decode() for stop in (place, place + 1))
        assert before.count(word) == 1 and through.count(word) == 2
    for word, place in zip(misled, record[f"{name}_word_token"][len(helped) :], strict=True):
        assert word not in b"".join(text[1:place]).decode()
        assert b"".join(text[place:]).decode().lstrip().startswith(word)


@pytest.mark.parametrize("name", tasks.PASSAGES)
def test_heads_are_recorded_within_half_a_step(record, models, name):
    assert record["shown"].tolist() == [0, 2, 3, 4, 5]
    for n, place in enumerate(record["shown"]):
        with torch.no_grad():
            pattern, attribution = tasks.logit_attribution(models[place], tokens_of(name))
        for layer, head in np.ndindex(2, 2):
            seen, added = head_on_passage(record, name, n, layer, head)
            assert np.abs(seen - pattern[layer, head].numpy()).max() <= 0.5 / 255 + 1e-6
            step = record[f"{name}_attribution_scale"][n, layer, head]
            assert np.abs(added - attribution[layer, head].numpy()).max() <= step / 2 + 1e-6
            largest = attribution[layer, head].abs().max().item() / 127
            assert step == pytest.approx(max(largest, passage.SMALLEST_STEP))
            assert (np.triu(seen, 1) == 0).all() and (np.triu(added, 1) == 0).all()


def test_the_induction_circuit_is_seen_to_copy():
    first = np.random.default_rng(0).permutation(N_TOKENS - 1)[:12]
    tokens = torch.tensor([N_TOKENS - 1, *first, *first])
    heads = passage.describe_heads(induction_circuit(), tokens)
    record = {f"circuit_{name}": value[None] for name, value in heads.items()}
    pattern, attribution = head_on_passage(record, "circuit", 0, 1, 1)
    for query in range(13, 24):
        # after a token's second time, what came after its first
        assert pattern[query, query - 11] == 1
        assert attribution[query, query - 11] > 0.9
    assert pattern.sum(axis=1) == pytest.approx(np.ones(25), abs=25 / 255)
    assert np.abs(head_on_passage(record, "circuit", 0, 1, 0)[1]).max() == 0


def test_which_snapshots_are_shown():
    steps = list(range(0, 100, 10))
    shown, compared = passage.pick_snapshots(steps, CHANGE)
    assert shown.tolist() == [0, 2, 3, 4, 9] and compared.tolist() == [2, 4]
    shown, compared = passage.pick_snapshots(steps, None)
    assert shown.tolist() == [0, 2, 4, 7, 9] and compared.tolist() == [0, 9]
    shown, compared = passage.pick_snapshots(steps[:3], None)
    assert shown.tolist() == [0, 1, 2] and compared.tolist() == [0, 2]
    assert passage.pick_snapshots(steps[2:5], CHANGE)[0].tolist() == [0, 1, 2]


def test_what_is_printed(record, arguments, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    summary = run / "summary.json"
    summary.write_text(json.dumps({"phase_change": None}))
    assert passage.main(arguments) == 0
    summary.write_text(json.dumps({"phase_change": CHANGE}))
    output = capsys.readouterr().out
    assert "no phase change, 0.00M to 0.01M tokens" in output
    loss = record["prose_loss"].astype(float)
    assert f"prose: mean loss {loss[0, 1:].mean():.2f} -> {loss[-1, 1:].mean():.2f}" in output
    best, worst = np.nanargmin(loss[-1] - loss[0]), np.nanargmax(loss[-1] - loss[0])
    lines = output.splitlines()
    for place in (best, worst):
        shown = f"{loss[0, place]:>5.1f} -> {loss[-1, place]:>4.1f}"
        assert any(shown in line for line in lines)
    assert sum("last token of the second" in line for line in lines) == 8


def test_bad_input_is_one_line(run, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert passage.main([str(tmp_path)]) == 2
    assert "no snapshots" in capsys.readouterr().err
    summary = run / "summary.json"
    summary.write_text(json.dumps({"phase_change": CHANGE | {"end_step": 41}}))
    assert passage.main(arguments) == 2
    summary.write_text("{")
    assert passage.main(arguments) == 2
    summary.write_text(json.dumps({"phase_change": CHANGE}))
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "phase change are missing" in errors[0] and "damaged" in errors[1]
