"""Every number of the paper as a pure function of tensors: no model, no files, no randomness.

Positions are counted from 1, as in the paper: position i is the token predicted from the start
token and i - 1 tokens of context. Losses are in nats. Patterns are [batch, head, query, key], rows
summing to 1.
"""

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
