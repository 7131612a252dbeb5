"""Idealised patterns: by hand, by loops, and on a model whose heads are ideal."""

import numpy as np
import pytest
import torch

import substitute
from data import evaluation_rows
from model import Transformer, config_for
from parallel import Cores, Ranks
from substitute import idealised_pattern, recovered, substitution
from sweep import ablation, mean_results
from tests.circuits_by_hand import N_TOKENS, induction_circuit

CPU = torch.device("cpu")
TOKENS = torch.tensor([[9, 1, 2, 1, 3, 1, 2, 1]])


def attended(name, query, **scores):
    """{key: weight} of the keys that a query looks at."""
    row = idealised_pattern(name, TOKENS, **scores)[0, query]
    return {key: w.item() for key, w in enumerate(row) if w > 0}


def test_a_previous_token_pattern_is_the_diagonal_below():
    assert attended("previous", 0) == {0: 1.0}
    for query in range(1, 8):
        assert attended("previous", query) == {query - 1: 1.0}


def test_an_induction_pattern_is_what_followed_earlier_copies():
    assert attended("induction", 1) == {0: 1.0}  # first of its kind: the first token
    assert attended("induction", 3) == {2: 1.0}
    assert attended("induction", 5) == pytest.approx({2: 0.5, 4: 0.5})  # after 1: 2, 3
    assert attended("induction", 7) == pytest.approx({2: 1 / 3, 4: 1 / 3, 6: 1 / 3})


def test_two_matching_tokens_come_first():
    assert attended("induction2", 5) == pytest.approx({2: 0.5, 4: 0.5})  # 3 1 was not there before
    assert attended("induction2", 7) == {4: 1.0}  # 2 1 was, and 3 followed


def test_scores_divide_attention_between_the_first_token_and_matches():
    def shares(keys, scores):
        weights = np.exp(scores)
        return pytest.approx(dict(zip(keys, weights / weights.sum(), strict=True)))

    assert attended("induction", 5, match=1.0) == shares((0, 2, 4), [0, 1, 1])
    assert attended("induction2", 7, match=1.0, longer=2.0) == shares((0, 2, 4, 6), [0, 1, 3, 1])


def test_patterns_by_loops():
    tokens = torch.randint(6, (3, 40), generator=torch.Generator().manual_seed(0))
    pattern = idealised_pattern("induction2", tokens)
    for row, t in enumerate(tokens.tolist()):
        for query in range(40):
            copies = [k for k in range(2, query + 1) if t[k - 1] == t[query]]
            longer = [k for k in copies if k > 2 and t[k - 2] == t[query - 1]]
            keys = longer or copies or [0]
            expected = torch.zeros(40)
            expected[keys] = 1 / len(keys)
            assert torch.allclose(pattern[row, query], expected, atol=1e-6)


def test_recovered_by_hand():
    clean, ablated = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert recovered(clean, ablated, clean)[0] == pytest.approx(1)
    assert recovered(clean, ablated, ablated) == (0, 0)
    share, error = recovered(clean, ablated, torch.tensor([1.5, 4.5]))
    assert share == pytest.approx(0.5)  # 1.5 of 2 and 1.5 of 4
    assert error == pytest.approx(1 / 6)  # half of their costs would be 1 and 2: each 0.5 off, of 3
    assert recovered(clean, clean + 0.005, clean) is None  # too cheap to divide by
    assert recovered(clean, clean - 0.5, clean) is None  # costs nothing


def test_in_context_learning_is_that_of_the_substituted_run(corpus):
    """By hand: the model with that pattern in it, row by row."""
    model = Transformer(config_for("mini", 2, corpus.d_vocab, attn_only=True)).init_weights(0)
    with torch.no_grad():
        model.unembed["W_U"] *= 10  # so that heads matter
    rows = evaluation_rows(corpus, 512, 6)
    measured, others = zip(*(x.split(4) for x in rows), strict=True)
    means = torch.zeros(2, 2, 64)
    row = substitute.substitute(
        model, "induction", [(1, 1)], measured, others, means, Cores(CPU, 2), Ranks(CPU)
    )
    by_hand = []
    for inputs, targets in zip(*measured, strict=True):
        hook = substitution([(1, 1)], idealised_pattern("induction", inputs[None]))
        with torch.no_grad():
            losses = model.losses(inputs[None], targets[None], hook)[0]
        by_hand.append((losses[399:511].mean() - losses[29:70].mean()).item())
    score, error = row["icl_band_free"]
    assert score == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert error == pytest.approx(np.std(by_hand, ddof=1) / 2, rel=1e-3)
    assert row["icl_band_clean"][0] != pytest.approx(score, abs=1e-5)


def test_every_share_is_of_its_own_losses(corpus, monkeypatch):
    """By hand, of two heads in different layers, row by row; the scores are fitted on others."""
    model = Transformer(config_for("mini", 2, corpus.d_vocab, attn_only=True)).init_weights(0)
    with torch.no_grad():
        model.unembed["W_U"] *= 10
    rows = evaluation_rows(corpus, 512, 8)
    measured, others = zip(*(x.split(5) for x in rows), strict=True)
    heads, scores, means = [(0, 0), (1, 1)], {"match": 2.0, "longer": 3.0}, torch.ones(2, 2, 64)
    fitted_on = []

    def fit(name, losses):
        fitted_on.append(losses(**scores))
        return scores

    def losses(inputs, targets, hook):
        with torch.no_grad():
            return model.losses(inputs[None], targets[None], hook(inputs[None])).mean().item()

    def by_rule(**scores):
        return lambda x: substitution(heads, idealised_pattern("induction2", x, **scores))

    monkeypatch.setattr(substitute, "fit", fit)
    monkeypatch.setattr(
        substitute, "SMALLEST", -10.0
    )  # of an untrained model ablations cost little
    row = substitute.substitute(
        model, "induction2", heads, measured, others, means, Cores(CPU, 1), Ranks(CPU)
    )
    hooks = {"clean": lambda x: None, "free": by_rule(), "fitted": by_rule(**scores)}
    hooks |= {"zero": lambda x: ablation(heads), "mean": lambda x: ablation(heads, means)}
    loss = {
        what: torch.tensor([losses(*some, hook) for some in zip(*measured, strict=True)])
        for what, hook in hooks.items()
    }
    for what, expected in loss.items():
        assert row[f"loss_{what}"] == pytest.approx(expected.mean().item(), abs=1e-5)
    for by in "zero", "mean":
        for how in "free", "fitted":
            share = recovered(loss["clean"], loss[by], loss[how])
            assert row[f"recovered_{by}_{how}"] == pytest.approx(share, rel=1e-3)
    other = [losses(*some, hooks["fitted"]) for some in zip(*others, strict=True)]
    assert fitted_on[0].mean(dim=1).tolist() == pytest.approx(other, abs=1e-5)


def test_fitting_finds_the_best_of_the_grid():
    def losses(match, longer):
        return torch.tensor([abs(match - 2) + (longer - 3) ** 2, 1.0])

    assert substitute.fit("induction2", losses) == {"match": 2.0, "longer": 3.0}
    assert substitute.fit("induction", losses) == {"match": 2.0, "longer": 0.0}


@pytest.fixture(scope="module")
def repeated():
    """30 rows of 24 random tokens and their repeats, for the circuit of 30 tokens."""
    rng = np.random.default_rng(0)
    rows = [np.tile(rng.choice(N_TOKENS - 1, 24, replace=False), 4) for _ in range(30)]
    rows = torch.from_numpy(np.stack(rows))
    return torch.cat([torch.full((30, 1), N_TOKENS - 1), rows[:, :-1]], dim=1), rows


@pytest.mark.parametrize("name, head", [("previous", (0, 0)), ("induction", (1, 1))])
def test_everything_is_recovered_where_heads_are_ideal(name, head, repeated):
    model = induction_circuit()
    measured, others = zip(*(x.tensor_split([20]) for x in repeated), strict=True)
    with torch.no_grad():
        means = mean_results(model, measured[0])
    row = substitute.substitute(
        model, name, [head], measured, others, means, Cores(CPU, 1), Ranks(CPU)
    )
    assert row["loss_zero"] > row["loss_clean"] + 0.5
    assert row["recovered_zero_free"][0] == pytest.approx(1, abs=0.01)
    assert row["recovered_mean_free"][0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_process_without_examples_has_no_losses(cores, repeated):
    ranks = Ranks(CPU)
    ranks.world, ranks.rank, ranks.gather = 31, 30, lambda tensor: tensor  # of 30 examples
    losses = substitute.example_losses(
        induction_circuit(), repeated, lambda inputs: None, Cores(CPU, cores), ranks
    )
    assert losses.shape == (0,)
