"""The phase change and what is half way when, on curves that are known."""

import numpy as np
import pytest

import curves


def logistic_drop(tokens, centre, width, before=-0.1, after=-0.5):
    return before + (after - before) / (1 + np.exp(-(tokens - centre) / width))


def test_phase_change_is_found_where_the_score_drops():
    tokens = np.linspace(0, 8e6, 101)
    first, last = curves.phase_change(logistic_drop(tokens, 4e6, 2e5), tokens)
    # the logistic falls at a quarter of its fastest 2.63 widths from the centre
    assert abs(first - 43.4) <= 2 and abs(last - 56.6) <= 2


def test_phase_change_survives_noise():
    tokens = np.linspace(0, 8e6, 101)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.02, 101)
        first, last = curves.phase_change(logistic_drop(tokens, 4e6, 3e5) + noise, tokens)
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
        first, last = curves.phase_change(noisy, tokens)
        assert tokens[first] < 4e6 < tokens[last]


def test_noise_at_either_end_is_not_taken_for_the_change():
    tokens = np.linspace(0, 8e6, 101)
    change = logistic_drop(tokens, 4e6, 3e5)
    expected = curves.phase_change(change, tokens)
    for place in (3, 100):  # the first that counts, and the last
        noisy = change.copy()
        noisy[place] -= 0.1
        assert curves.phase_change(noisy, tokens) == expected


def test_a_flat_score_never_has_a_phase_change():
    tokens = np.linspace(0, 8e6, 89)
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(0, 0.025, 89)
        assert curves.phase_change(noise - 0.05 * tokens / 8e6, tokens) is None


def test_a_slow_decline_is_no_phase_change():
    tokens = np.linspace(0, 8e6, 101)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.02, 101)
        assert curves.phase_change(-0.1 * tokens / 8e6 + noise, tokens) is None


def test_a_descent_that_undoes_an_earlier_rise_is_no_phase_change():
    """Early in training later tokens are worse off for a while; that this ends teaches nothing."""
    tokens = np.linspace(0, 8e6, 101)
    hump = 0.3 * np.exp(-(((tokens - 1e6) / 3e5) ** 2))
    assert curves.phase_change(hump, tokens) is None
    change = logistic_drop(tokens, 5e6, 3e5)
    assert curves.phase_change(change + hump, tokens) == curves.phase_change(change, tokens)


def test_a_drop_in_the_first_steps_is_no_phase_change():
    tokens = np.linspace(0, 8e6, 101)
    assert curves.phase_change(-0.3 * (tokens > 1e5), tokens) is None


def test_a_drop_soon_after_the_first_steps_is_one():
    tokens = np.linspace(0, 8e6, 401)
    first, last = curves.phase_change(-0.3 * (tokens > 0.04 * 8e6), tokens)
    assert tokens[first] < 0.04 * 8e6 < tokens[last]


def test_a_phase_change_is_of_a_tenth_of_a_nat_or_more():
    tokens = np.linspace(0, 8e6, 101)
    assert curves.phase_change(logistic_drop(tokens, 4e6, 2e5, 0, -0.08), tokens) is None
    assert curves.phase_change(logistic_drop(tokens, 4e6, 2e5, 0, -0.13), tokens)


def test_phase_change_is_where_the_score_falls_a_quarter_as_fast_as_it_ever_does():
    """By slopes of the fastest: 0.22 does not count, 0.28 does; on either side."""
    slopes = np.repeat([0, 0.28, 1, 0.28, 0, 0.22, 1, 0.22, 0], 30)
    for part, edges in (slice(0, 150), (30, 120)), (slice(120, None), (60, 90)):
        scores = -0.02 * np.cumsum(np.concatenate([np.zeros(20), slopes[part]]))
        found = curves.phase_change(scores, np.arange(len(scores)))
        assert found == pytest.approx([20 + edge for edge in edges], abs=5)


def test_how_fast_a_score_falls_is_by_the_tokens_between_snapshots():
    tokens = np.cumsum(np.repeat([1.0, 10.0], [60, 60]))
    scores = -np.cumsum(np.repeat([0, 0.01, 0, 0.02, 0], [20, 20, 35, 20, 25]))
    first, last = curves.phase_change(scores, tokens)
    assert 15 <= first <= 25 and 35 <= last <= 45  # 0.01 a token, later 0.002


def test_phase_change_is_told_from_twenty_snapshots_on():
    for n, told in (21, True), (19, False):
        scores = np.interp(np.arange(n), [n / 3, n * 2 / 3], [0, -0.5])
        assert (curves.phase_change(scores, np.arange(n)) is not None) == told


def test_phase_change_is_none_without_a_descent_or_with_too_few_snapshots():
    assert curves.phase_change(np.arange(50.0), np.arange(50)) is None
    assert curves.phase_change([0.0, -1.0], [0, 1]) is None


def test_half_way_is_the_first_snapshot_past_the_middle():
    assert curves.half_way([0.0, 0.1, 0.2, 0.6, 0.9, 1.0]) == 3
    assert curves.half_way([0.0, -0.1, -0.5, -0.9, -1.0]) == 2
    assert curves.half_way([0.1] * 6) == 0


def test_half_way_takes_no_notice_of_a_single_snapshot():
    values = np.linspace(0, 1, 41)
    values[5] = 1
    assert curves.half_way(values) == 20
    values[-1] = 1.5  # alone it would put half way at 30
    assert curves.half_way(values) == 22
    assert curves.half_way_tokens(np.arange(41), values) == pytest.approx(22, abs=1)


def test_half_way_in_tokens_lies_between_snapshots():
    values, tokens = [0.0] * 6 + [1.0] * 6, 10 * np.arange(12)
    assert curves.half_way(values) == 6  # smoothed: 0.4 before, 0.6 there
    assert curves.half_way_tokens(tokens, values) == pytest.approx(55)


def test_what_starts_beyond_half_its_way_is_there_at_once():
    values = [1.0] + [0.0] * 7 + [0.5] * 8
    assert curves.half_way(values) == 0
    assert curves.half_way_tokens(np.arange(3, 19), values) == 3
