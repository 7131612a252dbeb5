"""One snapshot measured: losses, in-context learning, and what every attention head does.

The quantities are defined in metrics.py; here they meet a model and the examples, held-out rows and
random-token sequences that are the same for every model, snapshot and seed. The work is cut into
small jobs for whichever core is free (parallel.py).
"""

import dataclasses
import functools

import numpy as np
import torch

import metrics
from data import EVALUATION_SEED, evaluation_rows, random_sequences
from kernels.attention import head_statistics
from safety import BadInput

N_CTX = 512  # of every measurement, whatever the model's own context, as in the paper
ROWS_AT_ONCE = {"cpu": 2, "cuda": 64}  # for each core


@dataclasses.dataclass(frozen=True)
class Examples:
    """What every snapshot is measured on."""

    inputs: torch.Tensor  # [example, 512]
    targets: torch.Tensor  # [example, 512]
    n_whole: int  # so many of the examples at every position, the others at those below
    scored: torch.Tensor  # [example, n]: places of the bands and of the per-token loss, the last
    text: torch.Tensor  # [10, 512]: the first of the inputs, for the previous-token score
    text_targets: torch.Tensor  # [10, 512]
    repeated: torch.Tensor  # [10, 101]: start token, then 25 random tokens four times
    random: torch.Tensor  # [10, 25]: 25 random tokens, no start token (the paper's footnote 31)

    def __len__(self):
        return len(self.inputs)

    def to(self, device):
        tensors = {n: x.to(device) for n, x in vars(self).items() if torch.is_tensor(x)}
        return dataclasses.replace(self, **tensors)


def draw_examples(corpus, n_examples, whole=1.0):
    """The first n_examples of the fixed held-out examples, with the sequences that test heads.

    whole: the share of them whose losses are measured at every position. The rest only serves the
    in-context learning score and the per-token losses, which costs less.
    """
    if n_examples < 2:
        raise BadInput(f"{n_examples} examples: at least 2 are needed for a standard error")
    inputs, targets = evaluation_rows(corpus, N_CTX, n_examples)
    text = evaluation_rows(corpus, N_CTX, min(10, corpus.rows("val", N_CTX)))
    token_index = np.random.default_rng(EVALUATION_SEED).integers(N_CTX, size=n_examples)
    bands = [torch.arange(a - 1, b) for a, b in (metrics.EARLY_BAND, metrics.LATE_BAND)]
    scored = torch.cat(bands).expand(n_examples, -1)
    return Examples(
        inputs,
        targets,
        max(1, round(whole * n_examples)),
        torch.cat([scored, torch.from_numpy(token_index)[:, None]], dim=1),
        *text,
        repeated=random_sequences(corpus, repeats=4),
        random=random_sequences(corpus, start=False),
    )


def measure(model, examples, cores, ranks):
    """One snapshot's record: {name: float or float32 array}; every quantity is defined in
    metrics.py.
    """
    losses, scores = losses_and_scores(model, examples, cores, ranks)
    loss_by_position = losses[: examples.n_whole].mean(dim=0)
    score, score_error = metrics.in_context_learning_score(losses)
    band, band_error = metrics.band_score(losses)
    record = {
        "loss": loss_by_position.mean().item(),
        "icl_score": score,
        "icl_score_error": score_error,
        "icl_band_score": band,
        "icl_band_score_error": band_error,
        "loss_by_position": loss_by_position,
        "per_token_loss": losses.gather(1, examples.scored[:, -1:].cpu()).squeeze(1),
    }
    return {
        name: value.numpy(force=True) if torch.is_tensor(value) else value
        for name, value in (record | scores).items()
    }


def losses_and_scores(model, examples, cores, ranks):
    """-> losses [example, 512], float32 on the CPU, NaN where an example is not measured; and
    `head_scores`. The text whose attention is scored is also the first of the examples.
    """
    inputs, targets, n_whole = examples.inputs, examples.targets, examples.n_whole
    n_text = min(len(examples.text), n_whole)
    scored = examples.scored[n_whole:]
    of_heads, whole, narrow = cores.run(
        head_jobs(model, examples),
        loss_jobs(model, ranks, inputs[n_text:n_whole], targets[n_text:n_whole]),
        loss_jobs(model, ranks, inputs[n_whole:], targets[n_whole:], scored),
    )
    scores, text_losses = gather_heads(model, of_heads)
    losses = torch.full(inputs.shape, torch.nan)
    losses[:n_text] = text_losses[:n_text].cpu()
    losses[n_text:n_whole] = gather_losses(whole, ranks).view(-1, N_CTX)
    losses[n_whole:].scatter_(1, scored.cpu(), gather_losses(narrow, ranks).view(scored.shape))
    return losses, scores


def loss_jobs(model, ranks, *rows):
    """The losses of this process's share of (inputs, targets) or (inputs, targets, at)."""
    return in_pieces(functools.partial(losses_of, model), *map(ranks.share, rows))


@torch.no_grad()  # gradients are switched off for each thread
def losses_of(model, inputs, targets, at=None):
    return model.losses(inputs, targets, at=at).float().cpu()


def gather_losses(results, ranks):
    """Results for this process's rows -> those of all rows. Of few it may have got none."""
    return ranks.gather(torch.cat(results) if results else torch.empty(0))


def head_scores(model, examples, cores):
    """Prefix matching, copying and previous-token score of every head, each [layer, head]; the
    share of its own key that each head keeps, if keys are smeared.
    """
    (results,) = cores.run(head_jobs(model, examples))
    return gather_heads(model, results)[0]


def head_jobs(model, examples):
    return [
        functools.partial(scores_on_repeated, model, examples.repeated),
        functools.partial(scores_on_random, model, examples.random),
        *in_pieces(functools.partial(scores_on_text, model), examples.text, examples.text_targets),
    ]


def gather_heads(model, results):
    """What `head_jobs` gave -> (scores, losses of the text [row, 512])."""
    on_repeated, on_random, *on_text = results
    previous, losses = zip(*on_text, strict=True)
    losses = torch.cat(losses)
    scores = on_repeated | on_random | {"previous_token": sum(previous) / len(losses)}
    if model.config.smear:
        scores["own_key_share"] = torch.stack([b.attn.alpha.sigmoid() for b in model.blocks])
    return scores, losses


def in_pieces(function, *rows):
    """Jobs of a few rows each: function(*some of the rows)."""
    at_once = ROWS_AT_ONCE[rows[0].device.type]
    pieces = zip(*(x.split(at_once) for x in rows), strict=True)
    return [functools.partial(function, *piece) for piece in pieces if len(piece[0])]


@torch.no_grad()
def scores_on_repeated(model, tokens):
    """{name: [layer, head]}. On a GPU the patterns never exist: the kernel sums them."""
    if model.kernels == "triton":
        queries_and_keys = list(zip(*model.activations(tokens, "q", "k"), strict=True))

        def score(offset):
            layers = enumerate(queries_and_keys)
            of_layers = [statistics(model, n, q, k, tokens, offset)[0] for n, (q, k) in layers]
            return torch.stack(of_layers)

    else:
        (patterns,) = model.activations(tokens, "pattern")
        pattern = torch.cat(patterns, dim=1)  # all layers at once: the matching keys are the same

        def score(offset):
            return metrics.prefix_matching_score(pattern, tokens, offset).view(len(patterns), -1)

    offsets = {"prefix_matching": 1, "match_itself": 0, "match_before": -1}
    return {name: score(offset) for name, offset in offsets.items()}


def copying_variants(model, examples):
    """Other readings of the copying score, each [layer, head]: with a start token before the random
    tokens, to rest on (footnote 31), which does not count itself; by destination; and both.
    """
    led = examples.repeated[:, : examples.random.shape[1] + 1]  # the same tokens
    scores = {
        "copying_start_token": scores_on_random(model, led, 1),
        "copying_by_destination": scores_on_random(model, examples.random, 0, True),
        "copying_both": scores_on_random(model, led, 1, True),
    }
    return {name: score["copying"].numpy(force=True) for name, score in scores.items()}


@torch.no_grad()
def scores_on_random(model, tokens, n_left_out=0, by_destination=False):
    """n_left_out: so many of the first tokens do not count."""
    scores, counted = [], slice(n_left_out, None)
    values, patterns = model.activations(tokens, "v", "pattern")
    for layer, (v, pattern) in enumerate(zip(values, patterns, strict=True)):
        effect = logit_effect(model, layer, v, tokens)
        both = (x[:, :, counted, counted] for x in (pattern, effect))
        scores.append(metrics.copying_score(*both, by_destination))
    return {"copying": torch.stack(scores)}


@torch.no_grad()
def scores_on_text(model, tokens, targets):
    """-> (previous-token score of every head [layer, head], summed over the rows; the rows'
    losses).
    """
    scores, last = torch.zeros(len(model.blocks), model.config.n_heads, device=tokens.device), {}

    def hook(name, layer, value):
        last[name] = value
        if name == "k" and fused:
            scores[layer] += statistics(model, layer, last["q"], value, tokens)[1] * len(tokens)
        if name == "pattern_tile":
            first_query, pattern = value
            attention = pattern.diagonal(first_query - 1, dim1=2, dim2=3).sum(dim=(0, 2))
            scores[layer] += attention / (tokens.shape[1] - 1)  # the first has none before it

    fused = model.kernels == "triton"
    losses = model.losses(tokens, targets, hook, pattern=None if fused else "tiles")
    return scores, losses.float()


def statistics(model, layer, q, k, tokens, offset=1):
    """`head_statistics` of one layer."""
    attn = model.blocks[layer].attn
    return head_statistics(q, k, None, tokens, attn.alpha, attn.windows, offset, model.kernels)


def logit_effect(model, layer, v, tokens):
    """What the value at each position would add to the logits of the sequence's own tokens if fully
    attended to: straight through W_O and the unembedding, relative to the mean over the
    vocabulary.

    v [batch, head, pos, d_head], tokens [batch, pos] -> [batch, head, pos, token]. The final
    LayerNorm enters through its centring and its gain; its scale, which is the same for all tokens,
    is left out.
    """
    W_U = model.ln_final.w[:, None] * model.unembed["W_U"]
    W_U = W_U - W_U.mean(dim=1, keepdim=True)
    W_U = W_U - W_U.mean(dim=0, keepdim=True)
    result = v.float() @ model.blocks[layer].attn.W_O  # [batch, head, pos, d_model]
    return result @ W_U[:, tokens].transpose(0, 1)[:, None]
