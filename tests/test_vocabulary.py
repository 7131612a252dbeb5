import base64
import collections

import pytest

import vocabulary
from safety import BadInput
from vocabulary import PYTHON_1024, load_vocabulary, train_bpe


def slow_bpe(word_counts, n_ranks):
    """Count all pairs, merge the most frequent (of equals the smallest), start over."""
    words = {tuple(word): count for word, count in word_counts.items()}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < n_ranks:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        merged = collections.Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append(new)
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] += count
        words = merged
    return {token: rank for rank, token in enumerate(tokens)}


def test_bpe_by_hand():
    ranks = train_bpe({b"aaab": 5, b"ab": 3}, 258)
    # pairs: aa 10, ab 8; merging aa leaves (aa)a 5, ab 5 + 3
    assert ranks[b"aa"] == 256 and ranks[b"ab"] == 257


def test_bpe_agrees_with_counting_everything_every_time(text_file):
    counts = collections.Counter(word.encode() for word in text_file.read_text()[:20_000].split())
    assert train_bpe(counts, 400) == slow_bpe(counts, 400)


def test_bpe_stops_when_nothing_is_left_to_merge():
    assert len(train_bpe({b"ab": 1}, 1000)) == 257


def test_the_committed_vocabulary_encodes_and_decodes_any_text():
    encoding = load_vocabulary(PYTHON_1024)
    assert encoding.n_vocab == 1024 and encoding.eot_token == 1023
    text = "def f(self):\n        return 'naïve ✓ 𝛼'\r\n\t\0"
    tokens = encoding.encode_ordinary(text)
    assert encoding.decode(tokens) == text
    assert max(tokens) < 1023


def test_code_takes_fewer_tokens_than_bytes():
    source = open(vocabulary.__file__).read()
    assert len(source.encode()) / len(load_vocabulary(PYTHON_1024).encode_ordinary(source)) > 2


def test_the_command_writes_what_tiktoken_reads(text_file, tmp_path):
    out = tmp_path / "v.tiktoken"
    assert vocabulary.main(["--data", str(text_file), "--size", "300", "--out", str(out)]) == 0
    assert load_vocabulary(str(out)).n_vocab == 300
    # a new file of the same name is not mistaken for the old one, though tiktoken caches by name
    assert vocabulary.main(["--data", str(text_file), "--size", "310", "--out", str(out)]) == 0
    assert load_vocabulary(str(out)).n_vocab == 310


def lines_of(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


ALL_BYTES = {bytes([b]): b for b in range(256)}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"hello\n", b"\0\1\2", lines_of({b"a": 0, b"b": 1}),
        lines_of(ALL_BYTES | {b"ab": 300}), lines_of(ALL_BYTES | {b"ab": 255}),
    ],
    ids=["empty", "text", "binary", "bytes missing", "a gap", "a rank twice"],
)  # fmt: skip
def test_what_is_no_vocabulary_is_refused(tmp_path, content):
    path = tmp_path / "v.tiktoken"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not a tiktoken vocabulary"):
        load_vocabulary(str(path))


def test_a_vocabulary_that_does_not_fit_16_bits_is_refused(tmp_path):
    path = tmp_path / "v.tiktoken"
    extra = {bytes([a, b, c]): 256 + n for n, (a, b, c) in enumerate(three_bytes(2**16))}
    path.write_bytes(lines_of(ALL_BYTES | extra))
    with pytest.raises(BadInput, match="16 bits"):
        load_vocabulary(str(path))


def three_bytes(n):
    return [(i >> 16, i >> 8 & 255, i & 255) for i in range(n)]


def test_gpt2_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(vocabulary.tiktoken, "get_encoding", offline)
    with pytest.raises(BadInput, match="--vocabulary"):
        load_vocabulary("gpt2")


@pytest.mark.parametrize("size", ["256", "70000", "many"])
def test_impossible_sizes_are_one_line_and_exit_code_2(size, tmp_path, capsys):
    assert vocabulary.main(["--size", size, "--out", str(tmp_path / "v")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
