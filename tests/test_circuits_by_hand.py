"""The measures, from the model to the score, on models of which we know what every head does."""

import numpy as np
import pytest
import torch

import measure
import summary
from parallel import Cores
from tests.circuits_by_hand import N_TOKENS, induction_circuit, smeared_induction_circuit

ONE_CORE = Cores(torch.device("cpu"), 1)


@pytest.fixture(scope="module")
def examples():
    """Random tokens as in evaluate.py, drawn from the circuit's 29 tokens; token 29 is the start
    token.
    """
    rng = np.random.default_rng(0)
    draws = np.stack([rng.choice(N_TOKENS - 1, 25, replace=False) for _ in range(10)])
    start = np.full((10, 1), N_TOKENS - 1)
    text = np.concatenate([start, rng.integers(N_TOKENS - 1, size=(10, 512))], axis=1)
    inputs, targets, repeated = text[:, :-1], text[:, 1:], np.hstack([start, np.tile(draws, 4)])
    inputs, targets, repeated, draws = map(torch.from_numpy, (inputs, targets, repeated, draws))
    scored = torch.arange(10)[:, None]
    return measure.Examples(inputs, targets, 10, scored, inputs, targets, repeated, draws)


def test_the_induction_circuit_scores_what_its_heads_do(examples):
    scores = measure.head_scores(induction_circuit(), examples, ONE_CORE)
    assert scores["prefix_matching"][1, 1] == pytest.approx(1, abs=1e-3)
    assert scores["copying"][1, 1] == pytest.approx(1, abs=1e-3)
    assert scores["previous_token"][0, 0] == pytest.approx(1, abs=1e-3)
    # and nothing else does any of it
    assert scores["prefix_matching"].flatten()[:3].max() < 0.05
    assert scores["previous_token"].flatten()[1:].max() < 0.05
    classes = [row["class"] for row in summary.heads_table(numpy_record(scores))]
    assert classes == ["previous token", "other", "other", "induction"]


def test_the_induction_circuit_predicts_the_repeat(examples):
    logits = induction_circuit()(examples.repeated)
    # from the second repeat on every next token is known, but the one after the last
    predicted, actual = logits[:, 26:-1].argmax(-1), examples.repeated[:, 27:]
    # the present token's own embedding is read out too; the head's contribution has to beat it
    assert (predicted == actual).float().mean() > 0.99


def test_without_the_previous_token_head_there_is_no_induction(examples):
    model = induction_circuit()
    with torch.no_grad():
        model.blocks[0].attn.W_O.zero_()
    assert measure.head_scores(model, examples, ONE_CORE)["prefix_matching"].max() < 0.05


def test_smeared_keys_make_an_induction_head_of_one_layer(examples):
    model = smeared_induction_circuit()
    scores = measure.head_scores(model, examples, ONE_CORE)
    assert scores["prefix_matching"][0, 1] == pytest.approx(1, abs=1e-3)
    assert scores["own_key_share"][0].tolist() == pytest.approx([0.2689, 0.0], abs=1e-4)
    with torch.no_grad():
        model.blocks[0].attn.alpha.fill_(
            20.0
        )  # vanilla keys: the same head now finds the token itself
    scores = measure.head_scores(model, examples, ONE_CORE)
    assert scores["prefix_matching"].max() < 0.05
    assert scores["match_itself"][0, 1] > 0.5


def test_a_head_that_lowers_what_it_attends_to_does_not_copy(examples):
    model = induction_circuit()
    with torch.no_grad():
        model.blocks[1].attn.W_O[1] *= -1
    scores = measure.head_scores(model, examples, ONE_CORE)
    assert scores["copying"][1, 1] == pytest.approx(-1, abs=1e-3)
    assert scores["prefix_matching"][1, 1] == pytest.approx(1, abs=1e-3)


def numpy_record(scores):
    return {name: value.numpy(force=True) for name, value in scores.items()}
