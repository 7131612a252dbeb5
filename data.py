"""Tokens on disk and what is drawn from them: training batches, the evaluation set, random-token
sequences.

A shard is the .bin format of llm.c and modded-nanogpt: 256 int32 (magic 20240520, version 1, number
of tokens, zeros), then the tokens as uint16. It is mapped, not read. Every draw is a pure function
of its arguments; nothing here keeps a state.

A row is `n_ctx` consecutive tokens of a shard. The model reads <start> t_1 ... t_{n-1} and predicts
t_1 ... t_n, so that position i (counted from 1, as in the paper) is the token predicted from i - 1
tokens of context and the start token.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch

from safety import BadInput

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
EVALUATION_SEED = 512  # never moved by --seed
COUNTED_TOKENS = 20_000_000  # the first, for the frequencies behind `random_sequences`


def shard_header(n_tokens):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


def read_shard(path):
    """The tokens of a .bin file as a read-only uint16 map: with the header above, or headerless
    (nanoGPT).

    Raises BadInput if the file is no shard, cut short or longer than its header says. Whether the
    tokens fit a vocabulary is checked where they are drawn.
    """
    path = Path(path)
    size = path.stat().st_size
    header = np.fromfile(path, dtype=np.int32, count=256)
    offset = 0
    if len(header) and header[0] == MAGIC:
        if len(header) < 256 or header[1] != VERSION:
            raise BadInput(f"{path}: its header is cut short or of another version than {VERSION}")
        offset, announced = HEADER_BYTES, HEADER_BYTES + 2 * int(header[2])
        if announced != size:
            fault = "cut short" if size < announced else "too long"
            raise BadInput(
                f"{path}: {fault}: {size:,} bytes, its header says {announced:,}; fetch it again"
            )
    if size % 2 or size == offset:
        raise BadInput(f"{path}: {size:,} bytes are no token shard (uint16 tokens, at least one)")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=offset)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out shards with the vocabulary that they are written in."""

    name: str
    vocabulary: str  # what load_vocabulary takes
    d_vocab: int
    start_token: int  # <|endoftext|>: at position 0 of every row, and between documents
    sha256: str  # of all tokens, training before held-out; of FineWeb's first shard of either
    train: list
    val: list

    def rows(self, split, n_ctx):
        """How many rows there are; BadInput if none."""
        n_rows = sum(len(shard) // n_ctx for shard in getattr(self, split))
        if n_rows == 0:
            raise BadInput(
                f"corpus {self.name}: its {split} text is shorter than one context of {n_ctx}"
            )
        return n_rows

    def take(self, split, n_ctx, indices):
        """The rows of those numbers: inputs and targets, int64 [row, n_ctx] each (module
        docstring).
        """
        rows = np.empty((len(indices), n_ctx), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            for shard in getattr(self, split):
                if index < len(shard) // n_ctx:
                    break
                index -= len(shard) // n_ctx
            row[:] = shard[index * n_ctx : (index + 1) * n_ctx]
        if rows.max() >= self.d_vocab:
            self.refuse(rows.max())
        targets = torch.from_numpy(rows)
        start = torch.full((len(rows), 1), self.start_token)
        return torch.cat([start, targets[:, :-1]], dim=1), targets

    def refuse(self, token):
        raise BadInput(
            f"corpus {self.name}: token {token} is beyond its vocabulary of {self.d_vocab};"
            " pass the --vocabulary that its shards were written with"
        )


def training_batch(corpus, n_ctx, n_rows, seed, step, rank=0, world=1):
    """Inputs and targets [n_rows / world, n_ctx] of one step for one rank: a pure function of its
    arguments.

    Rows come in random order without replacement, an epoch later in another order. Models that
    share corpus, seed, n_ctx and n_rows see the same rows in the same order, whatever else differs.
    """
    available = corpus.rows("train", n_ctx)
    share = n_rows // world
    first = step * n_rows + rank * share
    places = (divmod(n, available) for n in range(first, first + share))
    return corpus.take(
        "train", n_ctx, [_order(available, seed, epoch)[place] for epoch, place in places]
    )


@functools.lru_cache(maxsize=2)  # two: a batch may reach over the end of an epoch
def _order(n_rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def evaluation_rows(corpus, n_ctx, n_examples):
    """Inputs and targets [n_examples, n_ctx]: held-out rows, the same for every model and seed;
    fewer are the first of more.
    """
    available = corpus.rows("val", n_ctx)
    if n_examples > available:
        raise BadInput(
            f"{n_examples} examples asked for, but corpus {corpus.name} holds out only {available}"
        )
    order = np.random.default_rng(EVALUATION_SEED).permutation(available)
    return corpus.take("val", n_ctx, order[:n_examples])


def random_sequences(corpus, n_examples=10, length=25, repeats=1, start=True):
    """Random tokens, `length` of them drawn without replacement, then repeated: [n_examples, start
    + length * repeats].

    Very common and very rare tokens are left out, as in the paper (Model Analysis: evaluators),
    which does not say how many: here the 4 % at either end of the frequency ranking, those seen
    fewer than 100 times, and <|endoftext|>.
    """
    pool = _ordinary_tokens(corpus)
    if len(pool) < length:
        raise BadInput(
            f"corpus {corpus.name}: too little text: only {len(pool)} tokens are common enough to"
            " test heads with"
        )
    rng = np.random.default_rng(EVALUATION_SEED)
    draws = np.stack(
        [np.tile(rng.choice(pool, length, replace=False), repeats) for _ in range(n_examples)]
    )
    tokens = torch.from_numpy(draws)
    if not start:
        return tokens
    return torch.cat([torch.full((n_examples, 1), corpus.start_token), tokens], dim=1)


def _ordinary_tokens(corpus):
    counts, left = np.zeros(2**16, dtype=np.int64), COUNTED_TOKENS
    for shard in corpus.train:
        counts += np.bincount(shard[:left], minlength=2**16)
        left -= len(shard[:left])
    if counts[corpus.d_vocab :].any():
        corpus.refuse(counts.nonzero()[0].max())
    counts[corpus.start_token] = 0
    seen = np.flatnonzero(counts)
    ranked = seen[np.argsort(-counts[seen], kind="stable")]
    ordinary = ranked[len(ranked) // 25 : len(ranked) - len(ranked) // 25]
    often = ordinary[counts[ordinary] >= 100]
    return often if len(often) >= 100 else ordinary  # a small text has few tokens that often
