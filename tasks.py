"""Induction heads that do more than repeat: the paper's Argument 4 on three kinds of text.

    python tasks.py runs/NAME/snapshots/X.pt

- Literal copying: a passage whose first sentences come again.
- Translation: one sentence in three languages.
- Pattern matching: lines "(month) (animal): 0", "(month) (fruit): 1", "(colour) (animal): 2",
  "(colour) (fruit): 3" in any order.

Each task knows, for some of its tokens, the earlier tokens that an induction head should attend to:
what came after the same token, after its translation, after a line of the same kind. A head that
sees the earlier copy, sentence or lines but not what is the same would spread its attention over
them: that is the chance level. In the paper single heads of a 13B model do all three. Small models
need not: the last two ask for words that a small model may hardly know, and are here to be asked of
a larger one.
"""

import codecs
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

import machine
from heads import head_named, name_of
from loading import add_corpus_flags, check_losses, corpus_of, load_fitting
from measure import logit_effect
from model import layer_norm_divisor
from parallel import Ranks
from safety import ArgumentParser, check_out, one_line_errors, write_json
from vocabulary import load_vocabulary


@dataclasses.dataclass(frozen=True)
class Task:
    """A text and where in it an induction head should look."""

    tokens: torch.Tensor  # [pos]
    right: torch.Tensor  # bool [query, key]: empty rows are not asked
    candidates: torch.Tensor  # bool [query, key]: what a head would take that saw no difference


class Text:
    """A start token and the tokens of each part of a text, found by what they spell."""

    def __init__(self, encoding, *parts):
        self.bytes = "".join(parts).encode()
        self.parts = [encoding.encode_ordinary(part) for part in parts]
        self.ids = [encoding.eot_token, *sum(self.parts, [])]
        pieces = [b"", *encoding.decode_tokens_bytes(self.ids[1:])]
        self.ends = np.cumsum([len(piece) for piece in pieces])

    def places(self, start, stop):
        """Where the tokens stand that spell the bytes from start to stop."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        return list(range(first, last + 1))

    def find(self, word, start=0):
        """Where the tokens of `word` stand the first time after byte `start`, and the byte after
        it; None if it does not come again.
        """
        begin = self.bytes.find(word.encode(), start)
        if begin < 0:
            return None
        stop = begin + len(word.encode())
        return self.places(begin, stop), stop

    def find_all(self, word):
        """The places of every occurrence."""
        found, stop = [], 0
        while hit := self.find(word, stop):
            places, stop = hit
            found.append(places)
        return found

    def nothing(self):
        """Of every query, no key."""
        return torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)


# --- literal copying

# Each passage: what comes again at its end; the rest; words whose last piece induction predicts
# from their second occurrence on; words of which it expects another at their first.
PASSAGES = {
    "prose": (
        "The Vennicks mended clocks in Mill Lane. Mrs Vennick took them apart, Mr Vennick oiled the"
        " wheels, and a small bell over the door told them when somebody came in. They didn't hold"
        " with clocks that were late.\n",
        "On market days Mrs Vennick put a table in the lane and sold what nobody had come back for."
        " A small bell rang there too, so that the Vennicks could hear it from the house. They"
        " didn't think that anybody would steal a clock, for it would strike on the way home. Then"
        " Mrs Orlop came from the coast with a clock that ran backwards. Mrs Orlop wanted it"
        " mended, but not too well: her husband had died in June, and it was nearly May. The"
        " Vennicks looked at it for a week, and the small bell over the door kept quiet.\n",
        ("Vennicks", "Mrs Vennick", "small bell", "Mrs Orlop"),
        ("Orlop", "think"),
    ),
    "Python": (
        "class VennickClock:\n"
        '    """A clock of Mill Lane."""\n\n'
        "    def __init__(self, wheels, small_bell=None):\n"
        "        self.wheels = wheels\n"
        "        self.small_bell = small_bell\n"
        "        self.is_late = False\n\n",
        "    def strike(self, vennick_hour):\n"
        "        if self.small_bell is not None:\n"
        "            self.small_bell.ring(vennick_hour)\n"
        "        for wheel in self.wheels:\n"
        "            wheel.turn(vennick_hour)\n"
        "        self.is_late = self.orlop > vennick_hour\n"
        "        return self.orlop\n\n\n"
        "def mend(vennick_clocks):\n"
        "    return [VennickClock(clock.wheels, clock.small_bell) for clock in vennick_clocks]\n\n",
        ("VennickClock", "small_bell", "vennick_hour", "self.orlop"),
        ("orlop",),
    ),
}


def word_places(text, words, piece):
    """Where that piece of each word stands, occurrence by occurrence: {word: [place]}."""
    return {word: [places[piece] for places in text.find_all(word)] for word in words}


def literal_copying(text):
    """Text of two parts -> Task: behind them the first part comes again, and there the token that
    came next in the first copy is right; all of that copy are candidates.
    """
    first, rest = text.parts
    tokens = torch.tensor(text.ids + first)
    right, candidates = torch.zeros(2, len(tokens), len(tokens), dtype=torch.bool)
    shift = len(first) + len(rest)
    for query in range(1 + shift, len(tokens) - 1):
        right[query, query - shift + 1] = True
        candidates[query, 1 : 1 + len(first)] = True
    return Task(tokens, right, candidates)


# --- translation

SENTENCE = {
    "EN": "The old clock on the wall was the first thing that we saw",
    "FR": "La vieille horloge sur le mur était la première chose que nous vîmes",
    "DE": "Die alte Uhr an der Wand war das erste Ding, das wir sahen",
}


def translation(encoding):
    """One sentence in English, French and German, whose words stand in the same order -> Task: from
    the last piece of each French and German word but the last, the English word after its
    translation is right; all English words are candidates.
    """
    text = Text(encoding, "".join(f"{name}: {line}.\n" for name, line in SENTENCE.items()))
    right, candidates = text.nothing(), text.nothing()
    languages, stop = [], 0
    for line in SENTENCE.values():
        languages.append([])
        for word in line.split():
            places, stop = text.find(word.rstrip(","), stop)
            languages[-1].append(places)
    english, *others = languages
    for other in others:
        for word, translation_of_next in zip(other[:-1], english[1:], strict=True):
            right[word[-1], translation_of_next] = True
            candidates[word[-1], sum(english, [])] = True
    return Task(torch.tensor(text.ids), right, candidates)


# --- pattern matching

FIRST_WORDS = (
    "January February March April May June July August September October November December".split(),
    "red blue green yellow black white brown pink grey purple".split(),
)
SECOND_WORDS = (
    "cat dog horse lion bear mouse sheep wolf frog snake".split(),
    "apple banana cherry lemon grape melon peach plum mango orange".split(),
)
N_LINES, N_PROBLEMS, SEED = 30, 20, 4


def pattern_matching(encoding, seed):
    """Thirty lines whose label tells the kinds of their two words -> (Task, labels' tokens [4]):
    where a label is to be predicted, the labels of earlier lines of the same kind are right; the
    labels of all earlier lines are candidates. Words recur, so that a head may find some of the
    right lines literally.
    """
    rng = np.random.default_rng([SEED, seed])
    labels = rng.integers(4, size=N_LINES)
    words = [
        (rng.choice(FIRST_WORDS[kind // 2]), rng.choice(SECOND_WORDS[kind % 2])) for kind in labels
    ]
    lines = [f"{a} {b}: {kind}\n" for (a, b), kind in zip(words, labels, strict=True)]
    text = Text(encoding, "".join(lines))
    digits = [text.places(end - 2, end - 1)[0] for end in np.cumsum([len(line) for line in lines])]
    right, candidates = text.nothing(), text.nothing()
    for n, digit in enumerate(digits):
        same = [d for d, kind in zip(digits[:n], labels[:n], strict=True) if kind == labels[n]]
        if same:  # the token before the label, a colon if label and space are one token
            right[digit - 1, same] = True
            candidates[digit - 1, digits[:n]] = True
    token_of = {kind: text.ids[digit] for kind, digit in zip(labels, digits, strict=True)}
    return Task(torch.tensor(text.ids), right, candidates), [token_of[kind] for kind in range(4)]


# --- what heads do there


@torch.no_grad()
def logit_attribution(model, tokens):
    """What each head attends to, and what it adds to the prediction of the next token straight
    through the unembedding, key by key: (pattern, attribution), [layer, head, pos, key].

    tokens [pos]. attribution[..., t, j] = A[t, j] (v_j W_O W_U)[token t + 1], less the mean over
    the vocabulary, over the last LayerNorm's divisor at t: nats (Argument 4: logit attribution).
    Nothing comes after the last token: its row is 0. Summed over keys and heads, with the
    embedding's share and the bias, the attribution of an attention-only model is its logit.
    """
    values, patterns, streams = model.activations(tokens[None], "v", "pattern", "resid_post")
    pattern = torch.cat(patterns)
    effects = [logit_effect(model, layer, v, tokens[None]) for layer, v in enumerate(values)]
    effect = torch.cat(effects).mT  # [layer, head, token, key]
    attribution = torch.zeros_like(pattern)
    attribution[:, :, :-1] = pattern[:, :, :-1] * effect[:, :, 1:]
    return pattern, attribution / layer_norm_divisor(streams[-1][0])


def head_scores_on(task, pattern, attribution):
    """Means over the queries that are asked, each [layer, head]: attention to the right keys; what
    it would be by chance, were the attention to all candidates spread over them evenly; the nats
    that the right keys add to the logit of the token that comes.
    """
    asked = task.right.any(dim=1)
    right, candidates = task.right[asked], task.candidates[asked]
    pattern, attribution = pattern[:, :, asked], attribution[:, :, asked]
    share = right.sum(dim=1) / candidates.sum(dim=1)
    return {
        "attention": (pattern * right).sum(dim=3).mean(dim=2),
        "chance": ((pattern * candidates).sum(dim=3) * share).mean(dim=2),
        "logit": (attribution * right).sum(dim=3).mean(dim=2),
    }


def head_rows(scores):
    """Rows {"head", "attention", "chance", "logit"}, the most attention first."""
    rows = [
        {"head": name_of(head)}
        | {name: round(values[head].item(), 4) for name, values in scores.items()}
        for head in np.ndindex(scores["attention"].shape)
    ]
    return sorted(rows, key=lambda row: -row["attention"])


def token_view(task, pattern, attribution, head, encoding, least=0.05):
    """What a figure of one head's attention on the text needs: the tokens; for every query the keys
    that it attends to by at least that much: [query, key, attention, nats]; the right keys: [query,
    key]. A character of several tokens is spelled at the last of them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pattern, attribution = pattern[head], attribution[head]
    edges = [
        [*at, round(pattern[tuple(at)].item(), 3), round(attribution[tuple(at)].item(), 3)]
        for at in (pattern >= least).nonzero().tolist()
    ]
    return {
        "tokens": [
            decoder.decode(token) for token in encoding.decode_tokens_bytes(task.tokens.tolist())
        ],
        "edges": edges,
        "right": task.right.nonzero().tolist(),
    }


def measure_task(model, task):
    """Pattern, attribution and `head_scores_on` of one text, on the CPU."""
    seen = logit_attribution(model, task.tokens.to(model.positions.device))
    pattern, attribution = (x.float().cpu() for x in seen)
    return pattern, attribution, head_scores_on(task, pattern, attribution)


def record_of(task, pattern, attribution, scores, encoding):
    """The rows of all heads and the view of the best."""
    rows = head_rows(scores)
    best = head_named(rows[0]["head"])
    return {"heads": rows, "view": token_view(task, pattern, attribution, best, encoding)}


def measure_literal_copying(model, name, encoding):
    """Heads on one passage; the mean loss of its first part, both times; of each named word the
    loss at every occurrence before the repeat: of its last piece, or of its first if induction
    expects another word there.
    """
    first, rest, helped, misled = PASSAGES[name]
    text = Text(encoding, first, rest)
    task = literal_copying(text)
    losses = token_losses(model, task.tokens)
    n_first = len(text.parts[0])

    def losses_of(words, piece):
        found = word_places(text, words, piece)
        return {
            word: [round(losses[place].item(), 2) for place in places]
            for word, places in found.items()
        }

    return {
        **record_of(task, *measure_task(model, task), encoding),
        # not of the first token, which follows different ones
        "loss_first": losses[2 : 1 + n_first].mean().item(),
        "loss_repeat": losses[1 - n_first :].mean().item(),
        "last_piece": losses_of(helped, -1),
        "first_piece": losses_of(misled, 0),
    }


@torch.no_grad()
def measure_pattern_matching(model, encoding):
    """Heads on N_PROBLEMS problems, with the standard error of attention less chance, and how often
    the right label has the largest logit of the four; errors over the problems. The view is of
    the first problem.
    """
    tasks, measured, hits = [], [], []
    for seed in range(N_PROBLEMS):
        task, labels = pattern_matching(encoding, seed)
        tasks.append(task)
        measured.append(measure_task(model, task))
        asked = task.right.any(dim=1).nonzero()[:, 0]
        logits = model(task.tokens[None].to(model.positions.device))[0].float().cpu()
        chosen = torch.tensor(labels)[logits[asked][:, labels].argmax(dim=1)]
        hits.append((chosen == task.tokens[asked + 1]).float().mean())
    scores = [scores for _, _, scores in measured]
    means = {name: torch.stack([s[name] for s in scores]).mean(dim=0) for name in scores[0]}
    above_chance = torch.stack([s["attention"] - s["chance"] for s in scores])
    means["above_chance_error"] = above_chance.std(dim=0) / N_PROBLEMS**0.5
    hits = torch.stack(hits)
    return {
        **record_of(tasks[0], *measured[0][:2], means, encoding),
        "right_labels": hits.mean().item(),
        "right_labels_error": (hits.std() / N_PROBLEMS**0.5).item(),
    }


@torch.no_grad()
def token_losses(model, tokens):
    """Loss of token i at [i], nats; nan at [0], which nothing predicts."""
    tokens = tokens[None].to(model.positions.device)
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])[0].float().cpu()
    check_losses(losses)
    return torch.cat([torch.full((1,), torch.nan), losses])


# --- the command line


def print_best(rows, most=3):
    print("    head  attention to the right keys  by chance  their nats for the token that comes")
    for row in rows[:most]:
        print(
            f"  {row['head']:>6}  {row['attention']:>27.3f}  {row['chance']:>9.3f}"
            f"  {row['logit']:>+35.2f}"
        )


def print_literal_copying(name, found):
    print(
        f"literal copying, {name}: loss {found['loss_first']:.2f} nats a token in the first"
        f" sentences, {found['loss_repeat']:.2f} in their repeat"
    )
    print_best(found["heads"])
    for word, losses in found["last_piece"].items():
        shown = ", ".join(f"{loss:.1f}" for loss in losses)
        print(f"    last piece of {word!r}, occurrence by occurrence: {shown} nats")
    for word, losses in found["first_piece"].items():
        print(f"    first piece of {word!r}, where another word stood before: {losses[0]:.1f} nats")


def print_pattern_matching(found):
    print(
        f"pattern matching, {N_PROBLEMS} problems: the right label of four is the likeliest in"
        f" {found['right_labels']:.0%} +- {found['right_labels_error']:.0%} (by chance 25 %);"
        " attention to labels of the same kind"
    )
    print_best(found["heads"])
    best = max(found["heads"], key=lambda row: row["attention"] - row["chance"])
    print(
        f"    furthest above chance is {best['head']},"
        f" by {best['attention'] - best['chance']:.3f} +- {best['above_chance_error']:.3f}"
    )


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("path", type=Path, help="a snapshot")
    add_corpus_flags(add)
    add("--out", type=Path, help="JSON file for the record (default: none)")
    args = parser.parse_args(argv)
    check_out(args.out, ".json")
    device = machine.pick_device(args.device)
    corpus = corpus_of(args, args.path, Ranks(device))
    model, about = load_fitting(args.path, corpus)
    model, encoding = model.to(device), load_vocabulary(corpus.vocabulary)
    torch.set_num_threads(1)  # two need three times as long for texts this short

    print(f"{args.path}: after {about['step']:,} steps, {about['tokens'] / 1e6:.2f}M tokens")
    copying = {name: measure_literal_copying(model, name, encoding) for name in PASSAGES}
    for name, found in copying.items():
        print_literal_copying(name, found)
    task = translation(encoding)
    translated = record_of(task, *measure_task(model, task), encoding)
    print("translation, English to French and German: attention to the next word in English")
    print_best(translated["heads"])
    matching = measure_pattern_matching(model, encoding)
    print_pattern_matching(matching)
    print(
        "In the paper these are single heads of a 13B model (pattern matching: about 65 % of the"
        " attention). A small model need not show the last two."
    )
    if args.out:
        record = {
            "step": about["step"],
            "tokens": about["tokens"],
            "corpus": corpus.name,
            "literal_copying": copying,
            "translation": translated,
            "pattern_matching": matching,
        }
        write_json(args.out, record, indent=None)  # thousands of edges
        print(f"-> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
