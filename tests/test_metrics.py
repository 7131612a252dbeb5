"""Hand-computable cases, the anchors of the paper's evaluators, and a brute-force twin of every
measure.
"""

import math

import numpy as np
import pytest
import torch

import metrics
from plots import analysis


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


# the phase change


def logistic_drop(tokens, centre, width, before=-0.1, after=-0.5):
    return before + (after - before) / (1 + np.exp(-(tokens - centre) / width))


def test_phase_change_is_found_where_the_score_drops():
    tokens = np.linspace(0, 8e6, 101)
    first, last = metrics.phase_change(logistic_drop(tokens, 4e6, 2e5), tokens)
    # the logistic falls at a quarter of its fastest 2.63 widths from the centre
    assert abs(first - 43.4) <= 2 and abs(last - 56.6) <= 2


def test_phase_change_survives_noise():
    tokens = np.linspace(0, 8e6, 101)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.02, 101)
        first, last = metrics.phase_change(logistic_drop(tokens, 4e6, 3e5) + noise, tokens)
        assert 35 <= first <= 49 and 51 <= last <= 65


@pytest.mark.parametrize("millions", [1, 2, 3])
def test_phase_change_is_found_in_the_noise_of_72_examples(millions):
    """Where eight tenths of 0.3 nats take so many of 8 million tokens; the noise of `mini`'s runs
    is 0.010 to 0.015 nats a snapshot.
    """
    tokens = np.linspace(0, 8e6, 89)
    drop = logistic_drop(tokens, 4e6, millions * 1e6 / 4.39, before=0, after=-0.3)
    for seed in range(100):
        noisy = drop + np.random.default_rng(seed).normal(0, 0.015, 89)
        first, last = metrics.phase_change(noisy, tokens)
        assert tokens[first] < 4e6 < tokens[last]


def test_noise_at_either_end_is_not_taken_for_the_change():
    tokens = np.linspace(0, 8e6, 101)
    change = logistic_drop(tokens, 4e6, 3e5)
    expected = metrics.phase_change(change, tokens)
    for place in (3, 100):  # the first that counts, and the last
        noisy = change.copy()
        noisy[place] -= 0.1
        assert metrics.phase_change(noisy, tokens) == expected


def test_a_flat_score_never_has_a_phase_change():
    tokens = np.linspace(0, 8e6, 89)
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(0, 0.025, 89)
        assert metrics.phase_change(noise - 0.05 * tokens / 8e6, tokens) is None


def test_a_slow_decline_is_no_phase_change():
    tokens = np.linspace(0, 8e6, 101)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.02, 101)
        assert metrics.phase_change(-0.1 * tokens / 8e6 + noise, tokens) is None


def test_a_descent_that_undoes_an_earlier_rise_is_no_phase_change():
    """Early in training later tokens are worse off for a while; that this ends teaches nothing."""
    tokens = np.linspace(0, 8e6, 101)
    hump = 0.3 * np.exp(-(((tokens - 1e6) / 3e5) ** 2))
    assert metrics.phase_change(hump, tokens) is None
    change = logistic_drop(tokens, 5e6, 3e5)
    assert metrics.phase_change(change + hump, tokens) == metrics.phase_change(change, tokens)


def test_a_drop_in_the_first_steps_is_no_phase_change():
    tokens = np.linspace(0, 8e6, 101)
    assert metrics.phase_change(-0.3 * (tokens > 1e5), tokens) is None


def test_a_drop_soon_after_the_first_steps_is_one():
    tokens = np.linspace(0, 8e6, 401)
    first, last = metrics.phase_change(-0.3 * (tokens > 0.04 * 8e6), tokens)
    assert tokens[first] < 0.04 * 8e6 < tokens[last]


def test_a_phase_change_is_of_a_tenth_of_a_nat_or_more():
    tokens = np.linspace(0, 8e6, 101)
    assert metrics.phase_change(logistic_drop(tokens, 4e6, 2e5, 0, -0.08), tokens) is None
    assert metrics.phase_change(logistic_drop(tokens, 4e6, 2e5, 0, -0.13), tokens)


def test_phase_change_is_where_the_score_falls_a_quarter_as_fast_as_it_ever_does():
    """By slopes of the fastest: 0.22 does not count, 0.28 does; on either side."""
    slopes = np.repeat([0, 0.28, 1, 0.28, 0, 0.22, 1, 0.22, 0], 30)
    for part, edges in (slice(0, 150), (30, 120)), (slice(120, None), (60, 90)):
        scores = -0.02 * np.cumsum(np.concatenate([np.zeros(20), slopes[part]]))
        found = metrics.phase_change(scores, np.arange(len(scores)))
        assert found == pytest.approx([20 + edge for edge in edges], abs=5)


def test_how_fast_a_score_falls_is_by_the_tokens_between_snapshots():
    tokens = np.cumsum(np.repeat([1.0, 10.0], [60, 60]))
    scores = -np.cumsum(np.repeat([0, 0.01, 0, 0.02, 0], [20, 20, 35, 20, 25]))
    first, last = metrics.phase_change(scores, tokens)
    assert 15 <= first <= 25 and 35 <= last <= 45  # 0.01 a token, later 0.002


def test_phase_change_is_told_from_twenty_snapshots_on():
    for n, told in (21, True), (19, False):
        scores = np.interp(np.arange(n), [n / 3, n * 2 / 3], [0, -0.5])
        assert (metrics.phase_change(scores, np.arange(n)) is not None) == told


def test_phase_change_is_none_without_a_descent_or_with_too_few_snapshots():
    assert metrics.phase_change(np.arange(50.0), np.arange(50)) is None
    assert metrics.phase_change([0.0, -1.0], [0, 1]) is None


def test_half_way_is_the_first_snapshot_past_the_middle():
    assert metrics.half_way([0.0, 0.1, 0.2, 0.6, 0.9, 1.0]) == 3
    assert metrics.half_way([0.0, -0.1, -0.5, -0.9, -1.0]) == 2
    assert metrics.half_way([0.1] * 6) == 0


def test_half_way_takes_no_notice_of_a_single_snapshot():
    values = np.linspace(0, 1, 41)
    values[5] = 1
    assert metrics.half_way(values) == 20
    values[-1] = 1.5  # alone it would put half way at 30
    assert metrics.half_way(values) == 22
    assert analysis.half_way(np.arange(41), values) == pytest.approx(22, abs=1)
