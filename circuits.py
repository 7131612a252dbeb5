"""The mechanism, read off the weights: what each head copies, what it looks for, and which earlier
heads it is built on ("Argument 5"; "A Mathematical Framework for Transformer Circuits").

    python circuits.py runs/NAME/snapshots/X.pt   one snapshot: eigenvalues and composition
    python circuits.py runs/NAME                  all of a run: do eigenvalues and scores agree?

A head multiplies the residual stream by two matrices of rank d_head: QK = W_Q @ W_K.T says what it
looks for, OV = W_V @ W_O what it does with what it finds. Between tokens they are d_vocab x
d_vocab. Their nonzero eigenvalues are needed, and never the matrices: those of A @ B.T [d_vocab,
d_vocab] are those of B.T @ A [d_head, d_head]. Positive eigenvalues of OV: a token raises its own
logit. Positive eigenvalues of QK through previous-token heads: a token is drawn to keys that were
preceded by itself.

What the stream holds about a token when a layer reads it is taken along two sets of paths. *Direct*
is the paper's: the embedding, and for the previous token what the previous-token heads make of the
embedding. *All* adds the heads that look at their own token, which in a small model may say most of
what a token is. Every path counts by the attention that a text shows: own-token and previous-token
attention, averaged. Paths through MLPs are left out.

What LayerNorm does: its centring and gain are folded into the matrix that reads. Its divisor is
the token's own in the first layer, which is exact, and the mean over a text in later ones. Its bias
and the positions, which only reach W_Q and W_K, add to QK something that does not depend on the key
or not on the query, and to OV something that does not depend on the token attended to. They drop
out exactly, because both matrices are taken less their means over rows and over columns. That costs
nothing: softmax does not see what all keys (or all logits) share, and without the one mean a matrix
has the same eigenvalues as without both.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

import loading
import machine
import metrics
from heads import HEAD_SCORES, head_class, name_of
from measure import draw_examples, head_scores
from model import layer_norm_divisor
from parallel import Cores, Ranks
from plots.analysis import pearson, spearman
from progress import Countdown
from safety import ArgumentParser, BadInput, check_out, one_line_errors, write_json


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the weights do not tell: how the heads attend in a text, and how far the stream spreads
    there.
    """

    own_token: torch.Tensor  # [layer, head]: mean attention to the present token
    previous_token: torch.Tensor  # [layer, head]: mean attention to the one before
    spread: torch.Tensor  # [layer + 1]: mean divisor of each layer's first, and the last, LayerNorm

    def without_own_token(self):
        return dataclasses.replace(self, own_token=torch.zeros_like(self.own_token))


@torch.no_grad()
def read_text(model, text):
    """The model's `Reading` of text [batch, pos]; the start token does not count as a query."""
    own, previous, spread = [], [], []

    def hook(name, layer, value):
        if name == "pattern":
            own.append(metrics.own_token_score(value))
            previous.append(metrics.previous_token_score(value))
        if name == "resid_pre" or (name, layer) == ("resid_post", model.config.n_layers - 1):
            spread.append(layer_norm_divisor(value).mean())

    model.residual(text, hook)
    spread = torch.stack(spread)
    if not spread.isfinite().all():  # they have no eigenvalues
        raise BadInput("activations that are not numbers: the training of this model has diverged")
    return Reading(torch.stack(own), torch.stack(previous), spread)


def _normalised(layer_norm, part, divisor):
    """What LayerNorm makes of a part of the stream, without the bias."""
    return _less_mean(part, -1) / divisor * layer_norm.w


# --- between tokens: eigenvalues


def token_streams(model, reading):
    """For each layer: what it reads, after its LayerNorm, about the token where it reads and about
    the one before: (own, previous), [d_vocab, d_model] each, a row a token. All tokens count alike,
    the never seen ones too.
    """
    own = model.embed["W_E"]
    previous = torch.zeros_like(own)
    for layer, block in enumerate(model.blocks):
        divisor = reading.spread[layer] if layer else layer_norm_divisor(own)
        own_read, previous_read = (_normalised(block.ln1, x, divisor) for x in (own, previous))
        yield own_read, previous_read
        attn = block.attn
        move_own, move_previous = (
            torch.einsum("h,hdk,hke->de", shares.to(own.dtype), attn.W_V, attn.W_O)
            for shares in (reading.own_token[layer], reading.previous_token[layer])
        )
        own = own + own_read @ move_own
        previous = previous + previous_read @ move_own + own_read @ move_previous


def eigenvalues(A, B):
    """The eigenvalues that may differ from 0 of A @ B.T, for A and B [n, d_head] -> [d_head]."""
    return np.linalg.eigvals((B.T @ A).numpy(force=True))


def positivity(A, B):
    """Of A @ B.T, for A and B [d_vocab, d_head]: (sum of eigenvalues / sum of their moduli, mean
    over tokens of the diagonal, effective rank).

    The first is from -1 to 1, near 0 for a random matrix, nan for a zero one. The second is the
    trace / d_vocab. The third is trace^2 / squared Frobenius norm: of equal positive eigenvalues
    their number, at most d_head.
    """
    values = eigenvalues(A, B)
    trace, moduli = values.sum().real, np.abs(values).sum()
    if not moduli:
        return np.nan, 0.0, np.nan
    square = ((A.T @ A) * (B.T @ B)).sum().item()
    return trace / moduli, trace / len(A), trace**2 / square


@torch.no_grad()
def token_circuits(model, reading):
    """What OV and QK do between tokens along the paths of `reading`: arrays [layer, head].

    ov_copying: sum of OV's eigenvalues / sum of their moduli, -1 to 1 (1: every token raises
    itself). ov_raise: by how many nats a token's logit rises above the mean logit if the head
    attends to that token alone, mean over the vocabulary. ov_rank: OV's effective rank. qk_prefix:
    the eigenvalue ratio of QK from a token to a key *preceded* by it. qk_match: how much higher
    the attention score is of a key preceded by the query's own token than of an average key, nats:
    the paper's trace / d_vocab, with 1/sqrt(d_head) (Model analysis: QK eigenvalue trace). nan for
    the QK numbers where nothing tells a key what preceded it: a first layer without smeared keys.
    """
    model = copy.deepcopy(model).double()
    W_U = model.ln_final.w[:, None] * model.unembed["W_U"] / reading.spread[-1]
    W_U = _less_mean(_less_mean(W_U, 0), 1)
    numbers = {n: [] for n in ("ov_copying", "ov_raise", "ov_rank", "qk_prefix", "qk_match")}
    for block, streams in zip(model.blocks, token_streams(model, reading), strict=True):
        own, previous = (_less_mean(stream, 0) for stream in streams)
        attn = block.attn
        for head in range(model.config.n_heads):
            ov = positivity(own @ attn.W_V[head], (attn.W_O[head] @ W_U).T)
            # a smeared key is told of the token before by that token's own key, too
            share = torch.sigmoid(attn.alpha[head]) if model.config.smear else 1.0
            key = (share * previous + (1 - share) * own) @ attn.W_K[head]
            query = own @ attn.W_Q[head] * model.config.d_head**-0.5
            qk = positivity(query, key)[:2] if key.any() else (np.nan, np.nan)
            for name, number in zip(numbers, (*ov, *qk), strict=True):
                numbers[name].append(number)
    shape = model.config.n_layers, model.config.n_heads
    return {name: np.array(values).reshape(shape) for name, values in numbers.items()}


def copying_score_of_rank(rank, n_tokens=25):
    """The copying score to expect of an OV that raises every token, with that effective rank.

    Of rank r among many more tokens than r, OV cannot leave the others alone: it moves them by
    noise of 1/sqrt(r) of the attended token's raise, and the mean of the noise above 0 is its
    deviation / sqrt(2 pi). In a sample of 25 tokens the score passes 0 at rank 23, and an OV of 64
    equal eigenvalues has +0.25.
    """
    ratio = 1 / (1 + (n_tokens - 1) / (2 * np.pi * rank) ** 0.5)  # own raise / raise of all
    return 4 * ratio / (1 + ratio) - 1


def _less_mean(x, dim):
    return x - x.mean(dim=dim, keepdim=True)


# --- between heads: composition


@torch.no_grad()
def composition(model):
    """How much each head reads of what each earlier head writes, above chance: {"K", "Q", "V"} of
    [layer, head, earlier layer, earlier head], nan where the other head is not earlier.

    With OV of the earlier head and QK, OV of the later one: K |OV QK.T|, Q |OV QK|, V |OV OV'|,
    each over the product of the two norms (Frobenius); 0 to 1. LayerNorm's gain and centring are
    folded into what reads. Chance is 1 / sqrt(d_model - 1): what the two matrices have in root
    mean square if the stream between them is turned at random (one direction is centred away).
    """
    config = model.config
    found = np.full((3, *(config.n_layers, config.n_heads) * 2), np.nan)
    folded = [_folded(block) for block in model.blocks]
    for later in range(config.n_layers):
        W_Q, W_K, W_V, W_O = folded[later]
        for earlier in range(later):
            _, _, *ov = folded[earlier]
            for n, reads in enumerate(((W_K, W_Q.mT), (W_Q, W_K.mT), (W_V, W_O))):
                found[n, later, :, earlier] = _relative_norm(ov, reads)
    return dict(zip("KQV", found - chance_composition(config), strict=True))


def chance_composition(config):
    return (config.d_model - 1) ** -0.5


def _folded(block):
    """W_Q, W_K, W_V, W_O in float64: the LayerNorm's gain and centring folded into what reads, and
    what is written along the direction that every LayerNorm removes left out.
    """
    attn, gain = block.attn, block.ln1.w[:, None]
    reads = (_less_mean(gain * W, 1) for W in (attn.W_Q, attn.W_K, attn.W_V))
    return [W.double() for W in (*reads, _less_mean(attn.W_O, 2))]


def _relative_norm(first, second):
    """|A B| / (|A| |B|) in Frobenius norms, for A = first[0] @ first[1] of each earlier and B =
    second[0] @ second[1] of each later head, all [d_model, d_model] -> [later, earlier].

    From d_head x d_head matrices alone: |X Y Z|^2 = tr(X.T X . Y . Z Z.T . Y.T).
    """
    left, right = first[0].mT @ first[0], second[1] @ second[1].mT  # [head, d_head, d_head]
    middle = first[1] @ second[0][:, None]  # [later, earlier, d_head, d_head]
    square = ((left @ middle @ right[:, None]) * middle).sum(dim=(-2, -1))
    norms = [(a.mT @ a * (b @ b.mT)).sum(dim=(-2, -1)).sqrt() for a, b in (first, second)]
    return (square.sqrt() / norms[0] / norms[1][:, None]).numpy(force=True)


# --- the command line


def measure_circuits(model, examples, cores):
    """One snapshot's numbers, each [layer, head]: the scores of measure.py, the attention to the
    own token, and `token_circuits` along all paths and (with `_direct`) along the paper's.
    """
    reading = read_text(model, examples.text)
    scores = head_scores(model, examples, cores)
    direct = token_circuits(model, reading.without_own_token())
    return {
        **{name: scores[name].numpy(force=True) for name in HEAD_SCORES},
        "own_token": reading.own_token.numpy(force=True),
        **token_circuits(model, reading),
        **{f"{name}_direct": values for name, values in direct.items()},
    }


def heads_table(numbers):
    """One row for each head: its name `layer:head`, its class and its numbers, None for nan."""
    rows = []
    for layer, head in np.ndindex(numbers["copying"].shape):
        row = {name: _rounded(values[layer, head]) for name, values in numbers.items()}
        kind = head_class(**{name: row[name] for name in HEAD_SCORES})
        rows.append({"head": name_of((layer, head)), "class": kind, **row})
    return rows


def _rounded(value):
    return None if np.isnan(value) else round(float(value), 4)


def composition_table(found):
    """Rows {"kind", "earlier", "later", "above_chance"}, one for each pair, strongest first."""
    rows = []
    for kind, values in found.items():
        for later, head, earlier, other in np.argwhere(~np.isnan(values)):
            ends = {"earlier": name_of((earlier, other)), "later": name_of((later, head))}
            row = {"kind": kind, **ends}
            rows.append({**row, "above_chance": _rounded(values[later, head, earlier, other])})
    return sorted(rows, key=lambda row: -row["above_chance"])


# the paper's figures A5 and A6: does what a head does agree with what its weights say?
COMPARED = (
    ("copying", "ov_copying_direct"),
    ("copying", "ov_copying"),
    ("prefix_matching", "qk_match_direct"),
    ("prefix_matching", "qk_match"),
    ("prefix_matching", "qk_prefix"),
)


def correlations(snapshots):
    """Pearson's and Spearman's coefficient of each pair in COMPARED over all heads of all
    `snapshots`: rows {"score", "weights", "n", "pearson", "spearman"}. None where fewer than three
    heads have both numbers, or all have the same.
    """
    rows = []
    for names in COMPARED:
        x, y = (np.concatenate([s[name].flatten() for s in snapshots]) for name in names)
        x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        row = dict(zip(("score", "weights"), names, strict=True)) | {"n": len(x)}
        row |= {"pearson": _rounded(pearson(x, y)), "spearman": _rounded(spearman(x, y))}
        rows.append(row)
    return rows


def print_heads(rows):
    print(
        "                         copying                           prefix matching"
        "              attention to\n"
        "                         score  OV: direct   all  nats  rank"
        "  score  QK: direct   all  nats   own  before"
    )
    for row in rows:
        print(
            f"{row['head']:>6}  {row['class']:<15}  {row['copying']:+.2f}"
            f"  {_shown(row['ov_copying_direct'], 10)} {_shown(row['ov_copying'])}"
            f" {_shown(row['ov_raise'])}  {row['ov_rank'] or 0:>4.0f}"
            f"  {row['prefix_matching']:>5.3f}"
            f"  {_shown(row['qk_prefix_direct'], 10)} {_shown(row['qk_prefix'])}"
            f" {_shown(row['qk_match'])}  {row['own_token']:.2f}  {row['previous_token']:>6.2f}"
        )
    print(
        "  OV, QK: sum of eigenvalues / sum of moduli, on the direct path and on all; nats: rise of"
        " the\n  attended token's logit, and of the score of a key that the query's token precedes"
    )


def _shown(number, width=5):
    return f"{'N/A':>{width}}" if number is None else f"{number:>+{width}.2f}"


def print_composition(rows, chance, most=9):
    if not rows:
        print("composition: N/A: a single layer has no earlier heads")
        return
    print(f"composition above chance ({chance:.3f}), strongest of {len(rows)} first:")
    for row in rows[:most]:
        print(f"  {row['kind']}  {row['earlier']} -> {row['later']}  {row['above_chance']:+.3f}")


def print_correlations(over, rows):
    print(f"{over}:  Pearson  Spearman")
    for row in rows:
        print(
            f"  {row['score']:<15} ~ {row['weights']:<17}  n={row['n']:<5}"
            f"  {_shown(row['pearson'])}  {_shown(row['spearman'], 8)}"
        )


def conclusion(heads, compositions):
    """How the best prefix-matching head is built."""
    best = max(heads, key=lambda row: row["prefix_matching"])
    sentence = (
        f"{best['head']} matches prefixes best ({best['prefix_matching']:.2f}). A token that it"
        f" attends to rises by {best['ov_raise']:.2f} nats, {best['ov_raise_direct']:.2f} of them"
        " by the direct path"
    )
    if best["qk_match"] is not None:
        sentence += (
            "; a key that the query's token precedes scores"
            f" {best['qk_match']:.2f} nats above the average, {best['qk_match_direct']:.2f} direct"
        )
    if (best["ov_copying"] or 0) > 0.9:
        expected = copying_score_of_rank(best["ov_rank"])
        sentence += (
            f". Of effective rank {best['ov_rank']:.0f}, its OV can be expected to have a copying"
            f" score of {expected:+.2f}; it is {best['copying']:+.2f}"
        )
    # of each kind the strongest, which comes last here
    of_best = {row["kind"]: row for row in compositions[::-1] if row["later"] == best["head"]}
    if of_best:
        partners = (
            f"{k} with {of_best[k]['earlier']} {of_best[k]['above_chance']:+.3f}" for k in "KQV"
        )
        sentence += f". Composition above chance: {', '.join(partners)}"
    return sentence


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run, or one snapshot")
    loading.add_corpus_flags(add)
    loading.add_snapshots_flag(add, "all")
    out_help = "JSON file for the record (default: circuits.json of a run, none of a snapshot)"
    add("--out", type=Path, help=out_help)
    args = parser.parse_args(argv)
    loading.check_snapshots(args)
    is_run = args.path.is_dir()
    out = args.out or (args.path / "circuits.json" if is_run else None)
    check_out(out, ".json")
    device, paths = machine.pick_device(args.device), loading.paths_of(args)
    corpus = loading.corpus_of(args, paths[0], Ranks(device))
    examples, cores = draw_examples(corpus, 2).to(device), Cores(device)

    record = {"corpus": corpus.name, "snapshots": []}
    snapshots, countdown = [], Countdown(True, "snapshots")
    for path in paths:
        model, about = loading.load_fitting(path, corpus)
        snapshots.append(measure_circuits(model.to(device), examples, cores))
        heads = heads_table(snapshots[-1])
        record["snapshots"].append(
            {"step": about["step"], "tokens": about["tokens"], "heads": heads}
        )
        countdown(len(snapshots), len(paths))

    chance = chance_composition(model.config)
    record["composition_by_chance"] = chance
    record["composition"] = composition_table(composition(model))
    record["conclusion"] = conclusion(heads, record["composition"])
    print(f"{path}: after {about['step']:,} steps, {about['tokens'] / 1e6:.2f}M tokens")
    print_heads(heads)
    print_composition(record["composition"], chance)
    if model.config.d_mlp:
        print("this model has MLPs: what passes through them is left out of all of the above")
    if is_run:
        record["correlations"] = correlations(snapshots)
        record["correlations_at_the_end"] = correlations(snapshots[-1:])
        over = f"all heads of {len(paths)} snapshots, which are not independent"
        print_correlations(over, record["correlations"])
        print_correlations("heads of the last snapshot", record["correlations_at_the_end"])
    print(record["conclusion"])
    if out:
        write_json(out, record)
        print(f"-> {out}")


if __name__ == "__main__":
    sys.exit(main())
