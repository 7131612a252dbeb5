"""Hand-computable cases, the anchors of the paper's evaluators, and a brute-force twin of every
measure.
"""

import math

import numpy as np
import pytest
import torch

import metrics


def repeated_tokens(n_examples=3, length=25, repeats=4, seed=0):
    rng = np.random.default_rng(seed)
    draws = [np.tile(rng.choice(500, length, replace=False), repeats) for _ in range(n_examples)]
    return torch.tensor(np.insert(np.stack(draws), 0, 999, axis=1))


def random_pattern(*shape, seed=0):
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(~torch.ones(shape[-2:]).tril().bool(), -math.inf).softmax(-1)


def attending_to(index, n_ctx=101):
    """A pattern [1, 1, query, key] with all of query q's attention on index(q)."""
    pattern = torch.zeros(1, 1, n_ctx, n_ctx)
    for query in range(n_ctx):
        pattern[0, 0, query, index(query)] = 1
    return pattern


# in-context learning score and its relatives


def test_in_context_learning_score_is_loss_500_minus_loss_50_counted_from_one():
    losses = torch.zeros(4, 512)
    losses[:, 499] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # the 500th
    losses[:, 49] = 5.0  # the 50th
    score, error = metrics.in_context_learning_score(losses)
    assert score == pytest.approx(2.5 - 5.0)
    assert error == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)


def test_a_loss_that_falls_with_context_scores_negative():
    losses = 5 - torch.arange(512.0).expand(3, 512) / 512
    assert metrics.in_context_learning_score(losses)[0] < 0
    assert metrics.band_score(losses)[0] < 0


def test_band_score_averages_both_bands_with_their_ends():
    losses = torch.full((2, 512), 100.0)
    losses[:, 399:511] = 1.0  # 400 to 511
    losses[:, 29:70] = 3.0  # 30 to 70
    assert metrics.band_score(losses)[0] == pytest.approx(-2.0)


# prefix matching


def test_prefix_matching_keys_by_brute_force():
    tokens = torch.randint(1, 5, (2, 30), generator=torch.Generator().manual_seed(1))
    for offset in (-1, 0, 1):
        keys = metrics.prefix_matching_keys(tokens, offset)
        for b in range(2):
            for q in range(30):
                expected = {
                    j + offset
                    for j in range(1, q)
                    if tokens[b, j] == tokens[b, q] and j + offset <= q
                }
                assert set(keys[b, q].nonzero().flatten().tolist()) == expected
        same_for_all = torch.equal(keys.any(-1), metrics.prefix_matching_keys(tokens).any(-1))
        assert same_for_all, offset


def test_prefix_matching_score_by_brute_force():
    tokens, pattern = repeated_tokens(), random_pattern(3, 2, 101, 101)
    score = metrics.prefix_matching_score(pattern, tokens)
    for head in range(2):
        rows = []
        for b in range(3):
            for q in range(26, 101):  # repeats two to four
                matches = [j for j in range(1, q) if tokens[b, j] == tokens[b, q]]
                rows.append(sum(pattern[b, head, q, j + 1].item() for j in matches))
        assert len(rows) == 3 * 75
        assert score[head].item() == pytest.approx(np.mean(rows), rel=1e-9)


def test_prefix_matching_is_one_for_a_perfect_induction_pattern():
    tokens = repeated_tokens(1)
    keys = metrics.prefix_matching_keys(tokens).float()[:, None]
    spread_over_all_matches = keys / keys.sum(-1, keepdim=True).clamp(min=1)
    assert metrics.prefix_matching_score(spread_over_all_matches, tokens).item() == pytest.approx(1)
    on_the_latest = attending_to(lambda q: max(0, q - 24))
    assert metrics.prefix_matching_score(on_the_latest, tokens).item() == pytest.approx(1)


def test_prefix_matching_of_uniform_attention_is_chance():
    uniform = torch.ones(101, 101).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True))[None, None]
    score = metrics.prefix_matching_score(uniform, repeated_tokens(1)).item()
    by_hand = np.mean([((q - 1) // 25) / (q + 1) for q in range(26, 101)])
    assert score == pytest.approx(by_hand, rel=1e-5)
    assert score == pytest.approx(0.0307, abs=5e-5)


@pytest.mark.parametrize(
    "index",
    [
        lambda q: q,
        lambda q: max(0, q - 1),
        lambda q: 0,
        lambda q: max(0, q - 25),
        lambda q: max(0, q - 26),
    ],
    ids=["self", "previous", "start", "duplicate", "before the match"],
)
def test_prefix_matching_is_zero_for_heads_that_look_elsewhere(index):
    assert metrics.prefix_matching_score(attending_to(index), repeated_tokens(1)).item() == 0


def test_the_control_offsets_find_the_duplicate_and_the_token_before_the_match():
    tokens = repeated_tokens(1)
    duplicate, before = (
        attending_to(lambda q: max(0, q - 25)),
        attending_to(lambda q: max(0, q - 26)),
    )
    assert metrics.prefix_matching_score(duplicate, tokens, offset=0).item() == 1
    assert metrics.prefix_matching_score(before, tokens, offset=-1).item() == 1


def test_the_last_token_of_a_repeat_matches_the_first_of_the_next():
    # query 50 ends the second repeat: its only match is key 26, which opens that same repeat
    tokens = repeated_tokens(1)
    assert metrics.prefix_matching_keys(tokens)[0, 50].nonzero().flatten().tolist() == [26]


# previous token


def test_previous_token_score_by_brute_force():
    pattern = random_pattern(4, 3, 20, 20)
    score = metrics.previous_token_score(pattern)
    for head in range(3):
        entries = [pattern[b, head, i, i - 1].item() for b in range(4) for i in range(1, 20)]
        assert score[head].item() == pytest.approx(np.mean(entries), rel=1e-9)


def test_previous_token_score_of_ideal_heads():
    assert metrics.previous_token_score(attending_to(lambda q: max(0, q - 1))).item() == 1
    assert metrics.previous_token_score(attending_to(lambda q: q)).item() == 0


# copying


def test_copying_score_by_brute_force():
    pattern = random_pattern(2, 3, 7, 7)
    effect = torch.randn(
        2, 3, 7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    score = metrics.copying_score(pattern, effect)
    for head in range(3):
        own = total = 0.0
        for b in range(2):
            for i in range(7):
                for j in range(7):
                    a = pattern[b, head, i, j].item()
                    own += a * max(0, effect[b, head, j, j].item())
                    total += a * sum(max(0, effect[b, head, j, t].item()) for t in range(7))
        assert score[head].item() == pytest.approx(4 * own / (own + total) - 1, rel=1e-9)


@pytest.mark.parametrize(
    "effect, expected",
    [
        (torch.eye(25), 1.0),  # raises only the attended token
        (1 - torch.eye(25), -1.0),  # raises only the others
        (-torch.eye(25), -1.0),  # raises nothing
        (torch.ones(25, 25), 4 * (1 / 26) - 1),  # raises all alike: -0.85
        (
            torch.eye(25) + torch.ones(25, 25) / 12.0 * (1 - torch.eye(25)),
            0.0,
        ),  # a third of the raise
    ],
)
def test_copying_score_of_ideal_heads(effect, expected):
    pattern = random_pattern(1, 1, 25, 25).float()
    assert metrics.copying_score(pattern, effect[None, None]).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_attention_weighs_copying():
    effect = torch.zeros(1, 1, 2, 2)
    effect[0, 0, 0] = torch.tensor([1.0, 0.0])  # key 0 copies
    effect[0, 0, 1] = torch.tensor([1.0, 0.0])  # key 1 raises the other token
    only_key_0 = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    both = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, None]
    assert metrics.copying_score(only_key_0, effect).item() == pytest.approx(1)
    assert metrics.copying_score(both, effect).item() == pytest.approx(4 * (1 / 3) - 1)


def test_copying_by_destination_penalises_diffuse_attention():
    effect = torch.tensor([[2.0, -1.0], [-1.0, 1.0]])[None, None]
    pattern = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[None, None]
    # raised at the queries: (2, 0) and (0.5, 0); of it 2 and 0.25 on what is attended to
    expected = pytest.approx(4 * 2.25 / (2.25 + 2.5) - 1)
    assert metrics.copying_score(pattern, effect, by_destination=True).item() == expected
    # with the other half of all attention left out, as that on a start token is
    assert metrics.copying_score(pattern / 2, effect, by_destination=True).item() == expected
    assert metrics.copying_score(pattern, effect).item() == 1
    uniform = torch.full((1, 1, 25, 25), 1 / 25)
    score = metrics.copying_score(uniform, torch.eye(25)[None, None], by_destination=True).item()
    assert score == pytest.approx(4 / 26 - 1)  # as that of a head that raises all alike
