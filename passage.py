"""A text through training: what every token costs, and what every head does there.

    python passage.py runs/NAME

All snapshots of a run read the passages of tasks.py, each with its first sentences once more at
its end. The record, RUN/passage.npz, has the loss of every token, which shows what the phase change
does to single words (Argument 1: "per-token losses"), and, of a few snapshots, where each head
attends and what that adds to the prediction of the next token (Argument 4: token views).
plots/passage.py, plots/token_views.py and the viewer of plots/report.py show it.

    step, tokens                 [snapshot]
    shown                        [shown] which snapshots the last three are of
    compared                     [2] start and end of the phase change, else first and last snapshot
    NAME_text                    [token] bytes; the start token first
    NAME_repeat                  where the first sentences begin again
    NAME_loss                    [snapshot, token] float16: nats; nan at the start token
    NAME_word, NAME_word_token   [word] what to follow: a word and the place of one of its tokens
    NAME_word_expected           [word] does induction expect that token, or another one there?
    NAME_pattern                 [shown, layer, head, pair] uint8: attention, 0 to 1 in 255 steps
    NAME_attribution             [shown, layer, head, pair] int8: logit attribution in steps of
    NAME_attribution_scale       [shown, layer, head] nats

Pairs are those of a query and a key that is not later: row by row the lower triangle.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import machine
from loading import add_corpus_flags, corpus_of, load_fitting, snapshots_of, step_of
from parallel import Ranks
from records import stack
from safety import ArgumentParser, BadInput, one_line_errors, read_json, write_arrays
from tasks import PASSAGES, Text, literal_copying, logit_attribution, token_losses, word_places
from vocabulary import load_vocabulary

# of a recorded attribution, nats: finer ones would record what untrained heads do at random
SMALLEST_STEP = 0.02


def pick_snapshots(steps, change):
    """-> (shown, compared), places in `steps`. Shown are the first snapshot, start, middle and end
    of the phase change, and the last; without a change, five evenly spaced (fewer of a run of
    fewer). Compared: start and end, or first and last.

    change: as in summary.json, or None.
    """
    last = len(steps) - 1
    if change is None:
        return np.unique(np.linspace(0, last, 5).round().astype(int)), np.array([0, last])
    if not {change["start_step"], change["end_step"]} <= set(steps):
        raise BadInput("the snapshots of the phase change are missing: train again, or restore")
    start, end = steps.index(change["start_step"]), steps.index(change["end_step"])
    return np.unique([0, start, (start + end) // 2, end, last]), np.array([start, end])


def describe_text(text, tokens, encoding, helped, misled):
    """What the record tells of a passage itself. Followed are the last token of each helped word's
    second occurrence, and the first token of each misled one's first.
    """
    places = [occurrences[1] for occurrences in word_places(text, helped, -1).values()]
    places += [occurrences[0] for occurrences in word_places(text, misled, 0).values()]
    return {
        "text": np.array(encoding.decode_tokens_bytes(tokens.tolist())),
        "repeat": np.array(len(tokens) - len(text.parts[0])),
        "word": np.array([*helped, *misled]),
        "word_token": np.array(places),
        "word_expected": np.array([True] * len(helped) + [False] * len(misled)),
    }


def describe_heads(model, tokens):
    """Pattern and logit attribution of all heads on one text, as the record keeps them."""
    seen = logit_attribution(model, tokens.to(model.positions.device))
    query, key = torch.tril_indices(len(tokens), len(tokens))
    pattern, attribution = (x.float().cpu()[..., query, key] for x in seen)
    scale = (attribution.abs().amax(dim=-1) / 127).clamp(min=SMALLEST_STEP)
    return {
        "pattern": (255 * pattern).round().to(torch.uint8).numpy(),
        "attribution": (attribution / scale[..., None]).round().to(torch.int8).numpy(),
        "attribution_scale": scale.numpy(),
    }


def read_run(paths, change, corpus, device):
    """The record of the run with these snapshots: {name: array} (module docstring)."""
    encoding = load_vocabulary(corpus.vocabulary)
    record, tokens = {}, {}
    for name, (first, rest, helped, misled) in PASSAGES.items():
        text = Text(encoding, first, rest)
        tokens[name] = literal_copying(text).tokens
        about = describe_text(text, tokens[name], encoding, helped, misled)
        record |= {f"{name}_{what}": value for what, value in about.items()}
    shown, compared = pick_snapshots([step_of(path) for path in paths], change)
    losses, heads = [], []
    for n, path in enumerate(paths):
        model, about = load_fitting(path, corpus)
        model = model.to(device)
        losses.append({"step": about["step"], "tokens": about["tokens"]})
        for name, text in tokens.items():
            losses[n][f"{name}_loss"] = token_losses(model, text).half().numpy()
        if n in shown:
            found = {name: describe_heads(model, text) for name, text in tokens.items()}
            heads.append({f"{name}_{what}": x for name in found for what, x in found[name].items()})
    return {"shown": shown, "compared": compared, **record, **stack(losses), **stack(heads)}


def print_passage(name, record, most=4):
    """How much each loss changed between the compared snapshots: the mean, the most and the least
    helped tokens, the words that are followed.
    """
    text, loss = record[f"{name}_text"], record[f"{name}_loss"]
    before, after = loss[record["compared"]].astype(float)
    change = after - before
    print(
        f"{name}: mean loss {before[1:].mean():.2f} -> {after[1:].mean():.2f} nats; most changed:"
    )
    order = 1 + change[1:].argsort()
    for place in [*order[:most], *order[-most:]]:
        context = b"".join(text[max(1, place - 8) : place]).decode(errors="replace")
        token = text[place].decode(errors="replace")
        print(f"  {before[place]:>5.1f} -> {after[place]:>4.1f}  {context[-24:]!r:>28} {token!r}")
    words = (record[f"{name}_{what}"] for what in ("word", "word_token", "word_expected"))
    for word, place, expected in zip(*words, strict=True):
        which = "last token of the second" if expected else "first token of the first"
        print(f"  {before[place]:>5.1f} -> {after[place]:>4.1f}  {which} {str(word)!r}")


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run")
    add_corpus_flags(add)
    args = parser.parse_args(argv)
    device, out = machine.pick_device(args.device), args.path / "passage.npz"
    paths = snapshots_of(args.path)
    corpus = corpus_of(args, paths[0], Ranks(device))
    change = read_json(args.path / "summary.json")["phase_change"]
    record = read_run(paths, change, corpus, device)
    start, end = record["tokens"][record["compared"]] / 1e6
    what = "the phase change" if change else "training, no phase change"
    print(f"{args.path}: {len(paths)} snapshots; {what}, {start:.2f}M to {end:.2f}M tokens")
    for name in PASSAGES:
        print_passage(name, record)
    write_arrays(out, record)
    print(f"-> {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
