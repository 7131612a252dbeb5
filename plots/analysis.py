"""The numbers behind the claims, from arrays of records alone: bumps, orders, slopes, shares.

Every function is pure and numpy is all it needs. Losses are in nats; tokens are those trained on;
positions are counted from 1, as in metrics.py. plots/claims.py says what follows from the numbers.
"""

import itertools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from curves import SETTLED, nearest, smooth

# --- over training


REACH = 5  # snapshots on either side that tell how a loss curve bends


def curvature(tokens, loss):
    """d2 loss / d tokens2 and its standard error, [snapshot] each: of the parabola that fits the
    snapshot and REACH on either side best; nan where there are fewer.
    """
    width = 2 * REACH + 1
    found = np.full((2, len(loss)), np.nan)
    if len(loss) < width:
        return found
    x, y = (sliding_window_view(values, width) for values in (tokens, loss))
    span = np.ptp(x, axis=1)
    x = (x - x[:, [REACH]]) / span[:, None]
    powers = np.stack([x**2, x, np.ones_like(x)], axis=-1)  # [fit, snapshot, power]
    solve = np.linalg.pinv(powers)
    fits = solve @ y[..., None]
    variance = ((y - (powers @ fits)[..., 0]) ** 2).sum(axis=1) / (width - 3)
    error = np.sqrt(variance * (solve[:, 0] ** 2).sum(axis=1))
    found[:, REACH:-REACH] = np.stack([fits[:, 0, 0], error]) * 2 / span**2
    return found


def non_convex(tokens, loss):
    """Where a loss curve bends downward: bool [snapshot].

    The second derivative of the smoothed curve (`curvature`) is below 0 by more than four of its
    standard errors: on a convex curve of 88 snapshots with noise that happens anywhere at all in
    one run of twenty. The first 2 % of training do not count, as in the search for the phase
    change.
    """
    second, error = curvature(tokens, loss)
    return (second + 4 * error < 0) & (tokens >= SETTLED * tokens[-1])


def bump(tokens, loss, window):
    """Is the loss curve non-convex (within the window, outside it)? Two bools.

    window: (start, end) in tokens, or None. REACH snapshots on either side belong to it: so far the
    parabola at a snapshot sees.
    """
    bent = non_convex(tokens, loss)
    if window is None:
        return False, bool(bent.any())
    first, last = (nearest(tokens, edge) for edge in window)
    inside = np.zeros_like(bent)
    inside[max(first - REACH, 0) : last + REACH + 1] = True
    return bool((bent & inside).any()), bool((bent & ~inside).any())


def speed_of_learning(tokens, loss, reach=0.12):
    """d loss / d ln(tokens), nats: [snapshot], nan at 0 tokens. The slope of the straight line in
    ln(tokens) through the snapshots around, weighted by a normal curve of deviation `reach`: of a
    phase change, which takes half an e-fold, little is smoothed away.
    """
    started = tokens > 0
    x, y = np.log(tokens[started]), loss[started, None]
    away = x[:, None] - x
    weight = np.exp(-0.5 * (away / reach) ** 2)
    away -= (weight * away).sum(axis=0) / weight.sum(axis=0)
    speed = np.full(len(loss), np.nan)
    speed[started] = (weight * away * y).sum(axis=0) / (weight * away**2).sum(axis=0)
    return speed


def mean_rate(tokens, loss, start, end):
    """Mean d loss / d ln(tokens) between two times, tokens: nats."""
    at = np.interp([start, end], tokens, smooth(loss))
    return (at[1] - at[0]) / np.log(end / start)


def order_of_learning(sizes, curves, windows):
    """Spearman's coefficient of size and speed (-d loss / d ln(tokens)): (before, after) all
    models' windows. Negative: small models learn faster; positive: large ones do.

    curves: (tokens, loss) of each model. Before is from a tenth of the first start of a window on,
    after until the end of training.
    """
    first, last = min(start for start, _ in windows), max(end for _, end in windows)
    spans = (first / 10, first), (last, min(tokens[-1] for tokens, _ in curves))
    speeds = [[-mean_rate(*curve, *span) for curve in curves] for span in spans]
    return tuple(spearman(sizes, speed) for speed in speeds)


# --- over the context


def log_bins(loss_by_position, n_bins=24, first=1):
    """Means over bins of equal width in ln(position), from position `first` on:
    (position of the bins' centres [bin], means [..., bin]). Fewer than n_bins where they would be
    narrower than a position.
    """
    n_ctx = loss_by_position.shape[-1]
    edges = np.unique(np.geomspace(first, n_ctx + 1, n_bins + 1).round().astype(int))
    bins = [slice(start - 1, stop - 1) for start, stop in itertools.pairwise(edges)]
    log_position = np.log(np.arange(1, n_ctx + 1))
    centres = np.exp([log_position[piece].mean() for piece in bins])
    return centres, np.stack([loss_by_position[..., piece].mean(axis=-1) for piece in bins], -1)


def context_slope(loss_by_position, first=51, last=None):
    """d loss / d ln(position) between two positions, both included, nats: the straight line through
    twelve bins of equal width in ln(position), so that late positions do not outweigh early ones.
    """
    centres, binned = log_bins(loss_by_position[..., :last], 12, first)
    x = np.log(centres) - np.log(centres).mean()
    return binned @ x / (x @ x)


def context_slope_error(loss_by_position, first, last):
    """Standard error of `context_slope`."""
    weights = context_slope(np.eye(len(loss_by_position)), first, last)  # of each position
    return noise(loss_by_position, first, last) * np.sqrt((weights**2).sum())


def bin_errors(loss_by_position):
    """Standard errors of the means of `log_bins`."""
    weights = log_bins(np.eye(len(loss_by_position)))[1]  # [position, bin]
    return noise(loss_by_position) * np.sqrt((weights**2).sum(axis=0))


def noise(loss_by_position, first=51, last=None):
    """Standard deviation of single positions from a straight line in ln(position), nats."""
    y = loss_by_position[first - 1 : last]
    x = np.log(np.arange(first, first + len(y)))
    off = y - np.polyval(np.polyfit(x, y, 1), x)
    return np.sqrt((off**2).sum() / (len(x) - 2))


def loss_to_last(loss_by_position):
    """Loss of the last bin minus loss of each (paper: "Loss(-1) - Loss(i)"): (positions, nats)."""
    centres, binned = log_bins(loss_by_position)
    return centres, binned[..., -1:] - binned


def gap_share(small, large):
    """Share of the gap between two models' losses by position, averaged over the last quarter of
    the context, that is there by the 10th position (the mean of 8 to 12); nan if the large model is
    better by less than 0.12 nats: of no gap there is no share. (Between models of `mini`, a mean
    over five positions and 300 examples is off by 0.03.)
    """
    gap = small - large
    last = gap[-len(gap) // 4 :].mean()
    return gap[7:12].mean() / last if last >= 0.12 else np.nan


# --- over heads


def positive_share(attribution, heads):
    """Share of the positive attribution [snapshot, layer, head] that the heads [(layer, head)]
    carry, of the mean over snapshots; nan if nothing is positive.

    The mean comes first: of heads that do nothing, half of the noise is positive, and summed
    snapshot by snapshot it would pass for attribution.
    """
    positive = np.clip(np.mean(attribution, axis=0), 0, None)
    return sum(positive[head] for head in heads) / positive.sum() if positive.any() else np.nan


def layers_from_last(heads, n_layers):
    """How many of the heads [(layer, head)] are in the last layer, the one before it and so on."""
    places = [n_layers - 1 - layer for layer, _ in heads]
    return np.bincount(places, minlength=n_layers)


# --- over anything


def pearson(x, y):
    """Nan for fewer than three pairs, or where one of the two does not vary."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x, y):
    """Pearson's coefficient of the ranks; equal values share the mean of theirs."""
    return pearson(ranks(x), ranks(y))


def ranks(values):
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def relative_range(values):
    """(largest - smallest) / |mean|: how far from constant the values are."""
    return float(np.ptp(values) / abs(np.mean(values)))
