"""Byte-pair vocabularies in tiktoken's own file format: loading them, and training a small one.

A model of two CPU-minutes cannot afford 50,257 tokens: the unembedding would be most of its
arithmetic. So the default corpus has a vocabulary of 1,024, trained on that corpus's training
documents (never on the held-out ones) by

    python vocabulary.py --size 1024 --out vocabularies/python-1024.tiktoken

Every vocabulary gets one special token more, `<|endoftext|>`, its last. It separates documents and
starts every row.
"""

import base64
import collections
import hashlib
import heapq
import itertools
import sys
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from documents import END_OF_TEXT, documents_of
from safety import ArgumentParser, BadInput, check_out, one_line_errors, write_whole

PYTHON_1024 = str(Path(__file__).parent / "vocabularies" / "python-1024.tiktoken")


def load_vocabulary(name):
    """ "gpt2" or the path of a .tiktoken file -> tiktoken.Encoding, whose `eot_token` is also the
    start token of every row.
    """
    if name == "gpt2":
        return _load_gpt2()
    path = Path(name)
    # the hash makes tiktoken pass over a copy in its cache that an older file of the same name has
    # left
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        ranks = load_tiktoken_bpe(str(path), expected_hash=digest)
    except ValueError:
        ranks = {}
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(
        bytes([b]) in ranks for b in range(256)
    ):
        raise BadInput(
            f"{path}: not a tiktoken vocabulary (lines of base64 token and rank, all bytes)"
        )
    if len(ranks) > 2**16 - 1:
        raise BadInput(f"{path}: {len(ranks) + 1} tokens do not fit the shards' 16 bits")
    return tiktoken.Encoding(
        path.stem,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def _load_gpt2():
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network, a proxy or a half-written cache makes of it
        raise BadInput(
            f"tiktoken cannot fetch the GPT-2 vocabulary ({type(error).__name__}): go online once;"
            " or pass --vocabulary FILE.tiktoken, your own from `python vocabulary.py --data TEXT"
            " --size 4096 --out FILE.tiktoken` or vocabularies/python-1024.tiktoken"
        ) from None


def train_bpe(word_counts, n_ranks):
    """Byte-pair encoding: merge the most frequent neighbours, `n_ranks - 256` times.

    word_counts: {bytes: how often}. Returns {token bytes: rank}; of equally frequent pairs the
    smaller wins, so that the same counts give the same vocabulary everywhere.
    """
    words = [list(word) for word in word_counts]  # each word as the ranks of its tokens
    counts = list(word_counts.values())
    tokens = [bytes([b]) for b in range(256)]
    pair_counts, words_with = collections.Counter(), collections.defaultdict(set)
    for n, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[n]
            words_with[pair].add(n)
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)
    while len(tokens) < n_ranks and queue:
        count, pair = heapq.heappop(queue)
        if -count != pair_counts[pair]:  # the entry is stale: put the true count in its place
            if pair_counts[pair] > 0:
                heapq.heappush(queue, (-pair_counts[pair], pair))
            continue
        merged = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for n in words_with.pop(pair):
            for old in itertools.pairwise(words[n]):
                pair_counts[old] -= counts[n]
            words[n] = _merge(words[n], pair, merged)
            for new in itertools.pairwise(words[n]):
                pair_counts[new] += counts[n]
                words_with[new].add(n)
                if merged in new:
                    changed.add(new)
        for new in changed:
            heapq.heappush(queue, (-pair_counts[new], new))
    return {token: rank for rank, token in enumerate(tokens)}


def _merge(word, pair, merged):
    out, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


@one_line_errors
def main(argv=None):
    import regex  # tiktoken's own dependency: the module `re` does not know \p{L}

    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--data", default="python", help="python, or a text file or folder (default: python)"
    )
    parser.add_argument(
        "--size", type=int, default=1024, help="tokens, <|endoftext|> included (default: 1024)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the file to write, ending in .tiktoken"
    )
    args = parser.parse_args(argv)
    if not 257 <= args.size <= 2**16:
        raise BadInput(
            f"--size {args.size}: must be 257 to 65536 (the 256 bytes, <|endoftext|>, and merges)"
        )
    check_out(args.out, ".tiktoken", args.data)
    words = collections.Counter()
    split = regex.compile(GPT2_PATTERN)
    for held_out, text in documents_of(args.data):
        if not held_out:
            words.update(split.findall(text))
    ranks = train_bpe({word.encode(): count for word, count in words.items()}, args.size - 1)
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    write_whole(args.out, lambda path: path.write_bytes(lines))
    print(f"{len(ranks)} tokens and {END_OF_TEXT} -> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
