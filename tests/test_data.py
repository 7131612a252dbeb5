import dataclasses

import numpy as np
import pytest
import torch

from data import (
    Corpus,
    evaluation_rows,
    random_sequences,
    read_shard,
    shard_header,
    training_batch,
)
from safety import BadInput


def counting_corpus(n_train=(1000, 500), n_val=300, d_vocab=2000):
    """Token n at place n, over several shards."""
    places = np.arange(sum(n_train) + n_val, dtype=np.uint16)
    *train, val = np.split(places, np.cumsum(n_train))
    return Corpus("counting", "gpt2", d_vocab, d_vocab - 1, "", train, [val])


# shards


def test_a_shard_comes_back(tmp_path):
    tokens = np.arange(5000, dtype=np.uint16)
    (tmp_path / "a.bin").write_bytes(shard_header(5000) + tokens.tobytes())
    assert np.array_equal(read_shard(tmp_path / "a.bin"), tokens)
    assert (tmp_path / "a.bin").read_bytes()[:12] == np.array(
        [20240520, 1, 5000], np.int32
    ).tobytes()


def test_a_headerless_shard_comes_back(tmp_path):
    tokens = np.arange(5000, dtype=np.uint16)
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    assert np.array_equal(read_shard(tmp_path / "a.bin"), tokens)


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"", "no token shard"),
        (b"\1\2\3", "no token shard"),
        (shard_header(0), "no token shard"),
        (shard_header(10)[:500], "cut short"),
        (shard_header(10) + bytes(18), "cut short"),
        (shard_header(10) + bytes(22), "too long"),
        (shard_header(2**31 - 1) + bytes(20), "cut short"),
        (np.array([20240520, 7, 10], np.int32).tobytes() + bytes(1012 + 20), "version"),
        (np.array([20240520, 1, -10], np.int32).tobytes() + bytes(1012 + 20), "too long"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, content, fault):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(BadInput, match=fault):
        read_shard(tmp_path / "a.bin")


# rows


def test_a_row_opens_with_the_start_token_and_predicts_every_token():
    inputs, targets = counting_corpus().take("train", 100, [3])
    assert targets[0].tolist() == list(range(300, 400))
    assert inputs[0].tolist() == [1999, *range(300, 399)]


def test_rows_do_not_reach_over_the_end_of_a_shard():
    corpus = counting_corpus(n_train=(250, 120))
    assert corpus.rows("train", 100) == 2 + 1
    _, targets = corpus.take("train", 100, [0, 1, 2])
    assert targets[:, 0].tolist() == [0, 100, 250]


def test_tokens_beyond_the_vocabulary_are_refused():
    corpus = dataclasses.replace(counting_corpus(), d_vocab=500)
    corpus.take("train", 100, [4])
    with pytest.raises(BadInput, match="token 599 is beyond"):
        corpus.take("train", 100, [5])
    with pytest.raises(BadInput, match="beyond"):
        random_sequences(corpus)


def test_text_shorter_than_a_context_is_refused():
    with pytest.raises(BadInput, match="shorter than one context"):
        training_batch(counting_corpus(), 1024, 4, 0, 0)
    with pytest.raises(BadInput, match="shorter than one context"):
        evaluation_rows(counting_corpus(), 512, 2)


# training batches


def first_tokens(corpus, step, seed=0, **ranks):
    return training_batch(corpus, 10, 8, seed, step, **ranks)[1][:, 0].tolist()


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order():
    corpus = counting_corpus(n_train=(800, 480))  # 128 rows of 10: 16 steps of 8
    first = [token for step in range(16) for token in first_tokens(corpus, step)]
    second = [token for step in range(16, 32) for token in first_tokens(corpus, step)]
    assert sorted(first) == sorted(second) == list(range(0, 1280, 10))
    assert first != second
    other = [token for step in range(16) for token in first_tokens(corpus, step, seed=1)]
    assert other not in (first, second)


def test_an_epoch_may_end_inside_a_batch():
    corpus = counting_corpus(
        n_train=(100, 50)
    )  # 15 rows: the second batch of 8 has the last 7 and the first of the next epoch
    shown = first_tokens(corpus, 0) + first_tokens(corpus, 1)
    assert sorted(shown[:15]) == list(range(0, 150, 10))


def test_a_batch_is_a_function_of_seed_and_step():
    corpus = counting_corpus()
    assert first_tokens(corpus, 5) == first_tokens(corpus, 5)
    assert first_tokens(corpus, 5) != first_tokens(corpus, 6)
    assert first_tokens(corpus, 5) != first_tokens(corpus, 5, seed=1)


def test_ranks_share_the_batch_of_one_process():
    corpus = counting_corpus()
    shares = [first_tokens(corpus, 3, rank=rank, world=4) for rank in range(4)]
    assert sum(shares, []) == first_tokens(corpus, 3)


# evaluation


def test_evaluation_rows_are_held_out_fixed_and_nested():
    corpus = counting_corpus()
    inputs, targets = evaluation_rows(corpus, 10, 20)
    assert targets.min() >= 1500  # the held-out shard begins there
    assert len(set(targets[:, 0].tolist())) == 20
    assert targets[:, 0].max() >= 1700  # drawn from all of it, not its first rows
    assert torch.equal(evaluation_rows(corpus, 10, 7)[0], inputs[:7])
    with pytest.raises(BadInput, match="holds out only 30"):
        evaluation_rows(corpus, 10, 31)


def test_random_sequences_are_distinct_ordinary_tokens_repeated():
    rng = np.random.default_rng(0)
    # token n is seen about 40 n times, up to 200; the start token 201 most often of all
    tokens = np.repeat(np.arange(201), np.arange(201) * 40)
    tokens = np.concatenate([tokens, np.full(20_000, 201)])
    rng.shuffle(tokens)
    corpus = Corpus("ranked", "gpt2", 202, 201, "", [tokens.astype(np.uint16)], [])
    sequences = random_sequences(corpus, repeats=4)
    assert sequences.shape == (10, 101)
    assert (sequences[:, 0] == 201).all()
    once = sequences[:, 1:26]
    assert torch.equal(sequences[:, 1:], once.repeat(1, 4))
    assert all(len(set(row.tolist())) == 25 for row in once)
    # of the 200 seen tokens the 8 most and the 8 least frequent are out
    assert once.min() >= 9 and once.max() <= 192
    assert len(set(map(tuple, once.tolist()))) == 10
    plain = random_sequences(corpus, start=False)
    assert torch.equal(plain, once)


def test_tokens_seen_fewer_than_100_times_are_not_drawn():
    tokens = np.concatenate([np.repeat(np.arange(150), 150), np.repeat(np.arange(150, 300), 50)])
    corpus = Corpus("two kinds", "gpt2", 301, 300, "", [tokens.astype(np.uint16)], [])
    assert random_sequences(corpus, start=False).max() < 150
    tokens = np.concatenate([tokens, np.repeat(np.arange(150, 300), 49)])  # 99 times
    corpus = dataclasses.replace(corpus, train=[tokens.astype(np.uint16)])
    assert random_sequences(corpus, start=False).max() < 150


def test_of_a_small_text_all_ordinary_tokens_are_drawn():
    """Where fewer than 100 kinds are seen often."""
    tokens = np.concatenate([np.repeat(np.arange(90), 150), np.repeat(np.arange(90, 300), 50)])
    corpus = Corpus("small", "gpt2", 301, 300, "", [tokens.astype(np.uint16)], [])
    assert random_sequences(corpus, start=False).max() >= 90


def test_too_few_kinds_of_tokens_to_test_heads_with_are_refused():
    corpus = Corpus("poor", "gpt2", 101, 100, "", [np.arange(20, dtype=np.uint16)], [])
    with pytest.raises(BadInput, match="too little text"):
        random_sequences(corpus)
