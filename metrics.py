"""Every number of the paper as a pure function of tensors: no model, no files, no randomness.

Positions are counted from 1, as in the paper: position i is the token predicted from the start
token and i - 1 tokens of context. Losses are in nats. Patterns are [batch, head, query, key], rows
summing to 1.
"""

import math

import torch

EARLY, LATE = 50, 500
EARLY_BAND, LATE_BAND = (30, 70), (400, 511)


def in_context_learning_score(losses):
    """Loss at the 500th token minus loss at the 50th ("Key concepts"): negative, and the more so
    the better the model uses its context.

    losses [example, pos] -> (score, its standard error over the examples), nats.
    """
    return mean_and_error(losses[:, LATE - 1] - losses[:, EARLY - 1])


def band_score(losses):
    """The in-context learning score with each of its two positions widened to a band, both ends
    included.

    The same quantity with a quarter of the noise, for finding the phase change in few examples:
    losses [example, pos] -> (score, error), nats.
    """
    early, late = (losses[:, a - 1 : b].mean(dim=1) for a, b in (EARLY_BAND, LATE_BAND))
    return mean_and_error(late - early)


def mean_and_error(values):
    """values [example] -> (mean, its standard error). Of paired differences, the error of their
    mean.
    """
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def before_and_after_vector(start, end):
    """What the phase change does to each token: per-token losses [example] at its start and its
    end -> the vector from one to the other [example], of such a length that its dot product with
    their difference is 1 (Argument 3).
    """
    change = end - start
    return change / change.square().sum()


def before_and_after_attribution(change, vector):
    """How far an ablation's change of the per-token losses goes along the before-and-after vector:
    both [example] -> (dot product, its standard error over the examples).

    In shares of what the phase change did, the same for any number of examples: the paper's dot
    product with a unit vector, by the length of the change. -1: without the head all of it is
    undone; positive: there is more of it. Both are sums over examples, and the error is of their
    ratio.
    """
    products = change * vector
    share = products.sum()
    own = vector.square() / vector.square().sum()  # the products of the phase change itself
    return share.item(), ((products - share * own).std() * len(own) ** 0.5).item()


def prefix_matching_keys(tokens, offset=1):
    """The keys that count as prefix matching: bool [batch, query, key].

    Key k counts for query q if the token at k - offset is q's own token, seen before q. offset 1 is
    the definition (attend to what came next the last times); 0 is a duplicate-token head and -1 the
    literal reading of the article's text, both kept as controls. Position 0, the start token, is
    nobody's copy.
    """
    n_ctx = tokens.shape[1]
    key = torch.arange(n_ctx, device=tokens.device)
    query, copy = key[:, None], key - offset
    earlier_copy = (copy >= 1) & (copy < query)
    same_token = tokens[:, :, None] == tokens[:, copy.clamp(0, n_ctx - 1)][:, None, :]
    return same_token & earlier_copy


def prefix_matching_score(pattern, tokens, offset=1):
    """How much of its attention a head spends on the tokens that followed earlier copies of the
    present token.

    pattern [batch, head, query, key] over start-token-led repeated random `tokens` [batch, pos] ->
    [head], 0 to 1. Summed over all earlier copies, averaged over the queries that have one (paper:
    evaluators; a mean over the entries themselves could not exceed one half). An ideal induction
    head has 1, uniform attention 0.0307 on the paper's 4 x 25 tokens.
    """
    keys = prefix_matching_keys(tokens, offset)
    mass = (pattern * keys[:, None]).sum(dim=(0, 2, 3))
    return mass / keys.any(dim=-1).sum()  # the same queries for every offset


def previous_token_score(pattern):
    """Mean attention from a token to the one before it: [batch, head, query, key] -> [head], 0 to
    1.
    """
    return pattern.diagonal(-1, dim1=2, dim2=3).mean(dim=(0, 2))


def own_token_score(pattern):
    """Mean attention from a token, but not the first, to itself: [batch, head, query, key] ->
    [head], 0 to 1.
    """
    return pattern.diagonal(dim1=2, dim2=3)[..., 1:].mean(dim=(0, 2))


def copying_score(pattern, logit_effect, by_destination=False):
    """Does a head raise the logit of the token it attends to, more than of the other tokens of the
    sample?

    pattern [batch, head, query, key]; logit_effect [batch, head, key, token]: what the value at a
    key adds to the logit of each token of the sample, minus the mean over the whole vocabulary,
    with tokens in the order of the keys (so that [j, j] is a key's own token). -> [head], from -1
    (raises only others) to 1 (only the attended token).

    Only raises count. With a the raise of attended tokens and T the raise of all tokens of the
    sample, both weighted by attention, the paper's ratio "0 to 0.5" is a / (a + T), scaled to [-1,
    1]. A head that raises all 25 tokens alike has -0.85; the score is positive if more than a third
    of the raise goes to the attended token.

    by_destination: what counts is the raise by all values together that a query takes in, not by
    each on its own. That penalises diffuse attention: a head that copies perfectly, and attends to
    n tokens alike, shares the raise out among them (n > 3: negative). Never compare the two.
    """
    if by_destination:
        raised = (pattern @ logit_effect).relu()  # [batch, head, query, token]
        own = (pattern * raised).sum(dim=(0, 2, 3))
        total = (pattern.sum(dim=3, keepdim=True) * raised).sum(dim=(0, 2, 3))
    else:
        raised = logit_effect.relu()
        attention = pattern.sum(dim=2)  # [batch, head, key]
        own = (attention * raised.diagonal(dim1=2, dim2=3)).sum(dim=(0, 2))
        total = (attention * raised.sum(dim=3)).sum(dim=(0, 2))
    ratio = torch.where(total > 0, own / (own + total), 0.0)  # nothing raised: nothing copied
    return 4 * ratio - 1


def phase_change(scores, tokens, smallest=0.1):
    """The stretch of training in which in-context learning appears: (first, last) snapshot index,
    or None.

    scores: in-context learning score of each snapshot; tokens: trained on by then. The score is
    smoothed over a tenth of the snapshots, at most nine, and the first 2 % of training left out.
    The change is the stretch around its steepest descent to new lows (a fall that only undoes a
    rise teaches nothing) where it falls at least a quarter as fast. None if it ends less than
    `smallest` nats below all that was before, or if there are fewer than 20 snapshots to tell by.
    (The paper selects its interval "based on the derivative of the in-context learning score" and
    says no more.)
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    tokens = torch.as_tensor(tokens, dtype=torch.float64)
    width = min(9, len(scores) // 10 | 1)  # odd
    skipped = int((tokens < 0.02 * tokens[-1]).sum())
    scores, tokens = _smooth(scores[skipped:], width), tokens[skipped:]
    if len(scores) < 20:
        return None
    (slope,) = torch.gradient(scores, spacing=(tokens,))
    lower_than_ever = scores <= scores.cummin(dim=0).values
    edge = width // 2  # at either end scores are smoothed over fewer snapshots, and so noisier
    lower_than_ever[:edge] = lower_than_ever[len(scores) - edge :] = False
    if not lower_than_ever.any():
        return None
    first = last = int(torch.where(lower_than_ever, slope, math.inf).argmin())
    fast = slope < slope[first] / 4
    while first > 0 and fast[first - 1]:
        first -= 1
    while last < len(fast) - 1 and fast[last + 1]:
        last += 1
    gained = scores[: first + 1].min() - scores[last]
    return (skipped + first, skipped + last) if gained >= smallest else None


def half_way(values):
    """Index of the first snapshot at which `values`, smoothed over five snapshots, has made half
    its way from the mean of its first five to that of its last five (of few snapshots, from a
    quarter to a quarter); 0 if these are the same.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    few = max(1, min(5, len(values) // 4))
    start, end = values[:few].mean(), values[-few:].mean()
    progress = (_smooth(values) - start) / (end - start)
    return int((progress.nan_to_num(1) >= 0.5).nonzero()[0])


def _smooth(values, width=5):
    """Running mean; near the ends over the fewer values that lie symmetrically around."""
    half = width // 2
    reach = [min(half, n, len(values) - 1 - n) for n in range(len(values))]
    return torch.stack([values[n - r : n + r + 1].mean() for n, r in enumerate(reach)])
