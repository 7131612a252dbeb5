"""Idealised patterns: how much of a head is one rule that fits in a line ("Comments &
replications", Scherlis).

The pattern of a head is replaced by

    previous     attend to the previous token
    induction    attend to the tokens that came next after earlier copies of the present token; if
                 there are none, to the first token
    induction2   the same, and first of all where the token before matches too

and everything after it is computed anew. Recovered is the share of the ablation's cost that this
does not have:

    recovered = (loss ablated - loss substituted) / (loss ablated - loss clean)

Beside it stands what is left of in-context learning, between bands (metrics.band_score).

The two induction patterns are taken literally ("free": no parameter), and with attention fitted,
on other examples than those they are measured on: the first token has score 0, a match `match`, and
`longer` more if the token before matches too.
"""

import itertools
import math

import torch

from heads import name_of
from measure import ROWS_AT_ONCE, gather_losses
from metrics import band_score, prefix_matching_keys
from sweep import ablation, heads_in

PATTERNS = ("previous", "induction", "induction2")
# whose pattern is replaced unless --heads tells
CLASS = {
    "previous": "previous-token",
    "induction": "prefix-matching",
    "induction2": "prefix-matching",
}
LITERAL = 200.0  # as a score: whatever has less keeps no weight at all in float32
MATCH = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
LONGER = (0.0, 1.0, 2.0, 3.0, 4.0)
FIT_EXAMPLES = 100
SMALLEST = 0.01  # nats: what an ablation has to cost for a share of it to mean something


def idealised_pattern(name, tokens, match=LITERAL, longer=LITERAL):
    """[batch, query, key] for tokens [batch, pos]."""
    n_ctx = tokens.shape[1]
    scores = torch.full((len(tokens), n_ctx, n_ctx), -math.inf, device=tokens.device)
    scores[:, :, 0] = 0
    if name == "previous":
        scores.diagonal(-1, 1, 2).fill_(LITERAL)
    else:
        follows_a_copy = prefix_matching_keys(tokens)
        scores[follows_a_copy] = match
    if name == "induction2":
        # the keys before followed a copy of the token before
        two = follows_a_copy[:, 1:, 1:] & follows_a_copy[:, :-1, :-1]
        scores[:, 1:, 1:][two] += longer
    return scores.softmax(dim=-1)


def substitution(heads, pattern):
    """A hook that gives these heads, [(layer, head)], this pattern."""

    def hook(name, layer, value):
        if name == "pattern" and heads_in(heads, layer):
            value = value.clone()
            value[:, heads_in(heads, layer)] = pattern[:, None]
            return value

    return hook


def recovered(clean, ablated, substituted):
    """Losses [example] -> (share of the ablation's cost that the substitute does not have, its
    standard error), or None if the ablation costs less than SMALLEST.
    """
    cost = (ablated - clean).mean()
    if cost < SMALLEST:
        return None
    share = (ablated - substituted).mean() / cost
    spread = ablated - substituted - share * (ablated - clean)
    return share.item(), (spread.std() / len(spread) ** 0.5 / cost).item()


def example_losses(model, examples, hook_for, cores, ranks):
    """Losses [example, pos] with the hook that their inputs need."""

    @torch.no_grad()
    def of_rows(inputs, targets):
        at_once = ROWS_AT_ONCE[inputs.device.type]
        rows = zip(inputs.split(at_once), targets.split(at_once), strict=True)
        return torch.cat([model.losses(*some, hook_for(some[0])) for some in rows])

    return gather_losses(cores(of_rows, *map(ranks.share, examples)), ranks).cpu()


def fit(name, losses):
    """The (match, longer) with the least mean of losses(match, longer), one looked for after the
    other.
    """
    scores = {"match": 0.0, "longer": 0.0}
    grids = [("match", MATCH)]
    if name == "induction2":
        grids += [("longer", LONGER), ("match", MATCH)]
    for which, grid in grids:
        means = {value: losses(**scores | {which: value}).mean().item() for value in grid}
        scores[which] = min(means, key=means.get)
    return scores


def substitute(model, name, heads, measured, others, means, cores, ranks):
    """What idealising the heads' patterns together recovers: a row of losses, shares and scores.

    measured, others: inputs and targets [example, pos], to measure and to fit on; means: of all
    heads' results, [layer, head, d_head].
    """

    def losses(examples, hook_for=lambda inputs: None):
        return example_losses(model, examples, hook_for, cores, ranks)

    def idealised(examples, **scores):
        def hook_for(inputs):
            return substitution(heads, idealised_pattern(name, inputs, **scores))

        return losses(examples, hook_for)

    row = {"heads": [name_of(head) for head in heads]}
    substituted = {"free": idealised(measured)}
    if name != "previous":
        scores = fit(name, lambda **scores: idealised(others, **scores))
        substituted["fitted"] = idealised(measured, **scores)
        row |= scores
    clean = losses(measured)
    ablated = {
        by: losses(measured, lambda inputs, means=means: ablation(heads, means))
        for by, means in (("zero", None), ("mean", means))
    }
    by_name = {"clean": clean, **ablated, **substituted}
    row |= {f"loss_{what}": values.mean().item() for what, values in by_name.items()}
    row |= {f"icl_band_{what}": band_score(values) for what, values in by_name.items()}
    mean = {what: values.mean(dim=1) for what, values in by_name.items()}  # of every example
    for by, how in itertools.product(ablated, substituted):
        row[f"recovered_{by}_{how}"] = recovered(mean["clean"], mean[by], mean[how])
    return row


def print_rows(rows):
    """Blank: this pattern has nothing to fit. N/A: the ablation costs too little to divide by."""
    losses, hows = ("clean", "zero", "mean", "free", "fitted"), ("free", "fitted")
    shares = [f"{by}_{how}" for by in ("zero", "mean") for how in hows]
    print(f"{'':>12}{'loss':^50}{'recovered':^64}")
    print(f"{'heads':>12}" + "".join(f"{name:>10}" for name in losses), end="")
    print("".join(f"{name.replace('_', ', '):>16}" for name in shares))

    def shown(share):
        return "N/A" if share is None else f"{share[0]:.0%} +- {share[1]:.0%}"

    for row in rows:
        values = [f"{row[f'loss_{n}']:.3f}" if f"loss_{n}" in row else "" for n in losses]
        texts = [shown(row[f"recovered_{n}"]) if f"recovered_{n}" in row else "" for n in shares]
        print(f"{' '.join(row['heads']):>12}" + "".join(f"{text:>10}" for text in values), end="")
        print("".join(f"{text:>16}" for text in texts))
    print(f"in-context learning between bands:\n{'heads':>12}", end="")
    print("".join(f"{name:>16}" for name in losses))
    for row in rows:
        scores = [row.get(f"icl_band_{n}") for n in losses]
        texts = ["" if score is None else "{:+.3f} +- {:.3f}".format(*score) for score in scores]
        print(f"{' '.join(row['heads']):>12}" + "".join(f"{text:>16}" for text in texts))
