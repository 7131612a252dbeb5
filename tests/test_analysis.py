"""The numbers behind the claims, on cases that are known by hand or by construction."""

import numpy as np
import pytest

from plots import analysis

TOKENS = np.linspace(0, 8e6, 89)


def convex_curve(noise=0.0, seed=0):
    """A loss that falls ever more slowly."""
    rng = np.random.default_rng(seed)
    return 2.8 + 4 * np.exp(-TOKENS / 1e6) + rng.normal(0, noise, len(TOKENS))


def change(centre=4e6, drop=0.3, width=2e5):
    """What a phase change adds: a fall by `drop`, in the main within four widths, in tokens."""
    return -drop / (1 + np.exp(-(TOKENS - centre) / width))


def test_curvature_of_a_parabola_is_exact_on_any_spacing():
    tokens = np.sort(np.random.default_rng(0).uniform(0, 10, 40))
    second, error = analysis.curvature(tokens, 3 * tokens**2 - tokens + 1)
    assert np.isnan(second[[0, 4, -5, -1]]).all()
    assert second[5:-5] == pytest.approx(np.full(30, 6.0))
    assert error[5:-5] == pytest.approx(np.zeros(30), abs=1e-9)


def test_few_snapshots_have_no_curvature():
    assert np.isnan(analysis.curvature(TOKENS[:10], TOKENS[:10])).all()


def test_the_error_of_curvature_is_how_much_it_varies():
    found = [analysis.curvature(TOKENS, convex_curve(0.01, seed))[:, 60] for seed in range(200)]
    second, error = np.array(found).T
    assert np.sqrt((error**2).mean()) == pytest.approx(second.std(), rel=0.1)


def test_a_convex_curve_has_no_bump():
    assert not analysis.non_convex(TOKENS, convex_curve()).any()
    bent = [analysis.non_convex(TOKENS, convex_curve(0.01, seed)).any() for seed in range(40)]
    assert sum(bent) <= 4  # one in twenty is to be expected


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_bump_is_found_where_it_is_and_nowhere_else(noise):
    loss = convex_curve(noise) + change()
    bent = TOKENS[analysis.non_convex(TOKENS, loss)]
    assert len(bent) and 3e6 < bent.min() and bent.max() < 4.2e6  # where the fall sets in
    assert analysis.bump(TOKENS, loss, (3.4e6, 4.6e6)) == (True, False)
    assert analysis.bump(TOKENS, loss, (6e6, 7e6)) == (False, True)
    assert analysis.bump(TOKENS, loss, None) == (False, True)
    assert analysis.bump(TOKENS, convex_curve(), (3.4e6, 4.6e6)) == (False, False)


def test_the_start_of_training_is_no_bump():
    """Where the learning rate warms up, losses fall faster and faster."""
    tokens = np.linspace(0, 100, 1001)
    loss = np.where(tokens < 1, -(tokens**2), 2 / np.maximum(tokens, 1) - 3)
    assert not analysis.non_convex(tokens, loss).any()
    assert analysis.non_convex(tokens[:101], loss[:101]).any()


def test_speed_of_learning_on_a_power_of_tokens():
    tokens = np.r_[0, np.geomspace(1, 100, 50)]
    loss = np.r_[9, -0.7 * np.log(tokens[1:])]
    speed = analysis.speed_of_learning(tokens, loss)
    assert np.isnan(speed[0]) and speed[1:] == pytest.approx(np.full(50, -0.7))
    assert analysis.mean_rate(tokens[1:], loss[1:], 2, 50) == pytest.approx(-0.7, rel=1e-3)


def test_speed_of_learning_keeps_a_phase_change():
    speed = analysis.speed_of_learning(TOKENS, change(drop=0.3, width=5e5))
    steepest = -0.3 / (4 * 5e5) * 4e6
    assert np.nanmin(speed) == pytest.approx(steepest, rel=0.3)
    assert TOKENS[np.nanargmin(speed)] == pytest.approx(4e6, rel=0.1)


def two_speeds(before, after, turn=20.0):
    """A loss that falls by `before` nats an e-fold of tokens until `turn`, then by `after`."""
    tokens = np.arange(1.0, 201)
    early = -before * np.log(np.minimum(tokens, turn))
    return tokens, early - after * np.log(np.maximum(tokens, turn) / turn)


def test_order_of_learning_inverts_only_where_it_does():
    windows = [(10, 30)] * 3
    inverting = [two_speeds(*speeds) for speeds in ((0.9, 0.1), (0.6, 0.2), (0.3, 0.3))]
    steady = [two_speeds(*speeds) for speeds in ((0.9, 0.3), (0.6, 0.2), (0.3, 0.1))]
    assert analysis.order_of_learning([1, 2, 3], inverting, windows) == pytest.approx((-1, 1))
    assert analysis.order_of_learning([1, 2, 3], steady, windows) == pytest.approx((-1, -1))


def test_log_bins_take_every_position_from_the_first_on_once():
    for first, n_bins in (4, 12), (1, 24):
        centres, weights = analysis.log_bins(np.eye(512), n_bins, first)  # [position, bin]
        assert not weights[: first - 1].any()
        assert ((weights[first - 1 :] > 0).sum(axis=1) == 1).all()
        assert weights.sum(axis=0) == pytest.approx(1)
        assert np.log(centres) == pytest.approx(np.log(np.arange(1, 513)) @ weights)
        width = np.log(513 / first) / n_bins
        assert np.diff(np.log(centres))[-6:] == pytest.approx(width, rel=0.05)


def test_slope_over_the_context_begins_beyond_the_fiftieth_token():
    position = np.arange(1, 513)
    bent = np.log(np.minimum(position, 50)) - 0.1 * np.log(np.maximum(position, 50))
    losses = np.stack([bent, 2 * bent])
    assert analysis.context_slope(losses) == pytest.approx([-0.1, -0.2], rel=1e-3)
    assert analysis.context_slope(losses, 1, 50) == pytest.approx([1, 2], rel=1e-2)


def test_loss_to_the_last_bin():
    position = np.arange(1.0, 513)
    centres, values = analysis.loss_to_last(-np.log(position))
    assert values == pytest.approx(np.log(centres / centres[-1]), abs=1e-3)


def test_share_of_a_gap_by_the_tenth_token():
    large = np.linspace(5, 3, 512)
    gap = np.where(np.arange(1, 513) < 100, 0.3, 0.4)
    assert analysis.gap_share(large + gap, large) == pytest.approx(0.75)
    assert np.isnan(analysis.gap_share(large, large + gap))
    assert np.isnan(analysis.gap_share(large + 0.119, large))
    assert analysis.gap_share(large + 0.121, large) == pytest.approx(1)


def test_errors_over_the_context_are_the_spread_over_many_draws():
    position, rng = np.arange(1, 513), np.random.default_rng(0)
    draws = 3 - 0.2 * np.log(position) + 0.1 * rng.standard_normal((2000, 512))
    errors = [analysis.context_slope_error(draw, 50, 200) for draw in draws[:50]]
    assert np.mean(errors) == pytest.approx(analysis.context_slope(draws, 50, 200).std(), rel=0.05)
    of_bins = np.mean([analysis.bin_errors(draw) for draw in draws[:50]], axis=0)
    assert of_bins == pytest.approx(analysis.log_bins(draws)[1].std(axis=0), rel=0.1)


def test_positive_share_counts_what_is_positive_alone():
    attribution = np.array([[[1.0, -5.0], [7.0, 2.0]], [[1.0, -5.0], [-1.0, -2.0]]])
    # on average 1, -5, 3 and 0: what comes and goes is noise
    assert analysis.positive_share(attribution, [(1, 0)]) == pytest.approx(3 / 4)
    assert analysis.positive_share(attribution, [(1, 0), (0, 0), (0, 1)]) == 1
    assert analysis.positive_share(attribution, []) == 0
    assert np.isnan(analysis.positive_share(-abs(attribution), [(1, 0)]))


def test_layers_are_counted_from_the_last():
    assert list(analysis.layers_from_last([(2, 0), (2, 1), (0, 1)], 3)) == [2, 0, 1]
    assert list(analysis.layers_from_last([], 2)) == [0, 0]


def test_coefficients_of_correlation():
    x = np.array([1.0, 2, 3, 4])
    assert analysis.pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert analysis.pearson(x, [1, 1, 2, 4]) == pytest.approx(5 / np.sqrt(5 * 6))
    assert analysis.spearman(x, np.exp(x)) == pytest.approx(1)
    assert analysis.spearman(x, [1, 1, 2, 4]) == pytest.approx(4.5 / np.sqrt(5 * 4.5))  # a tie
    assert list(analysis.ranks([30, 10, 30, 20])) == [3.5, 1, 3.5, 2]
    assert np.isnan(analysis.pearson(x[:2], x[:2])) and np.isnan(analysis.spearman(x, [1, 1, 1, 1]))


def test_range_by_mean():
    assert analysis.relative_range([-0.3, -0.5, -0.4]) == pytest.approx(0.5)
