"""What is read off curves over training: when the phase change is, and what is half way when.

Values are one a snapshot, arrays or lists; tokens are those trained on. numpy alone: evaluation and
figures read the same curves.
"""

import numpy as np

SETTLED = 0.02  # of training: what comes before is the model's start, not its way
SMALLEST_CHANGE = 0.1  # nats


def smooth(values, width=5):
    """Running mean over `width` snapshots, an odd number; near the ends over the fewer that lie
    symmetrically around: [snapshot].
    """
    values, last = np.asarray(values, dtype=float), len(values) - 1
    reaches = [min(width // 2, n, last - n) for n in range(len(values))]
    return np.array([values[n - r : n + r + 1].mean() for n, r in enumerate(reaches)])


def nearest(tokens, when):
    """Index of the snapshot nearest to that many tokens."""
    return int(np.abs(np.asarray(tokens) - when).argmin())


def phase_change(scores, tokens):
    """The stretch of training in which in-context learning appears: (first, last) snapshot index,
    or None.

    scores: in-context learning score of each snapshot; tokens: trained on by then. The score is
    smoothed over a tenth of the snapshots, at most nine, and the first 2 % of training left out.
    The change is the stretch around its steepest descent to new lows (a fall that only undoes a
    rise teaches nothing) where it falls at least a quarter as fast. None if it ends less than
    SMALLEST_CHANGE below all that was before, or if there are fewer than 20 snapshots to tell by.
    (The paper selects its interval "based on the derivative of the in-context learning score" and
    says no more.)
    """
    tokens = np.asarray(tokens, dtype=float)
    width = min(9, len(scores) // 10 | 1)  # odd
    skipped = int((tokens < SETTLED * tokens[-1]).sum())
    scores, tokens = smooth(scores[skipped:], width), tokens[skipped:]
    if len(scores) < 20:
        return None
    slope = np.gradient(scores, tokens)
    lower_than_ever = scores <= np.minimum.accumulate(scores)
    edge = width // 2  # at either end scores are smoothed over fewer snapshots, and so noisier
    lower_than_ever[:edge] = lower_than_ever[len(scores) - edge :] = False
    if not lower_than_ever.any():
        return None
    first = last = int(np.where(lower_than_ever, slope, np.inf).argmin())
    fast = slope < slope[first] / 4
    while first > 0 and fast[first - 1]:
        first -= 1
    while last < len(fast) - 1 and fast[last + 1]:
        last += 1
    gained = scores[: first + 1].min() - scores[last]
    return (skipped + first, skipped + last) if gained >= SMALLEST_CHANGE else None


def way_made(values):
    """Shares of their way that `values`, smoothed, have made, [snapshot]: from the mean of the
    first five to that of the last five (of few snapshots, from a quarter to a quarter). All 1 if
    these are the same.
    """
    values = np.asarray(values, dtype=float)
    few = max(1, min(5, len(values) // 4))
    start, end = values[:few].mean(), values[-few:].mean()
    return (smooth(values) - start) / (end - start) if start != end else np.ones(len(values))


def half_way(values):
    """Index of the first snapshot by which `values` have made half their way."""
    return int(np.argmax(way_made(values) >= 0.5))


def half_way_tokens(tokens, values):
    """Tokens by which `values` have made half their way, in proportion between snapshots."""
    way, after = way_made(values), half_way(values)
    around = slice(max(after - 1, 0), after + 1)
    return float(np.interp(0.5, way[around], tokens[around]))
