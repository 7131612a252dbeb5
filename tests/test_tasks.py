"""The texts ask what they say they ask; the measures by hand and on a circuit; the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tasks
from model import Transformer, config_for
from snapshots import load_snapshot, save_snapshot
from tests.circuits_by_hand import N_TOKENS, induction_circuit
from vocabulary import PYTHON_1024, load_vocabulary


@pytest.fixture(scope="module")
def encoding():
    return load_vocabulary(PYTHON_1024)


def spelled(task, places, encoding):
    return encoding.decode(task.tokens[places].tolist()).strip()


def right_keys(task, query):
    return task.right[query].nonzero()[:, 0]


def asked(task):
    return task.right.any(dim=1).nonzero()[:, 0].tolist()


# the texts


def test_words_are_found_where_they_are_spelled(encoding):
    text = tasks.Text(encoding, "Où est Vennick ?\n\n", "    Vennick, là-bas. Vennicks!")
    assert encoding.decode(text.ids[1:]).encode() == text.bytes
    found = text.find_all("Vennick")
    assert len(found) == 3 and len(found[0]) > 1
    for places in found:
        assert encoding.decode([text.ids[n] for n in places]).strip() == "Vennick"
    assert text.find("nobody") is None


@pytest.mark.parametrize("name", tasks.PASSAGES)
def test_in_the_repeat_the_next_token_of_the_first_copy_is_right(name, encoding):
    first, rest, helped, misled = tasks.PASSAGES[name]
    text = tasks.Text(encoding, first, rest)
    task = tasks.literal_copying(text)
    assert encoding.decode(task.tokens[1:].tolist()) == first + rest + first
    queries = asked(task)
    assert len(queries) == len(text.parts[0]) - 1
    for query in queries:
        (key,) = right_keys(task, query).tolist()
        # what is right is what comes, behind what stands here
        assert task.tokens[key] == task.tokens[query + 1]
        assert task.tokens[key - 1] == task.tokens[query]
        assert key <= len(text.parts[0])
        assert task.candidates[query].sum() == len(text.parts[0])
    # the features that the paper's passage has: names of several pieces that recur
    for word in helped:
        assert len(text.find_all(word)) >= 2
        assert len(text.find_all(word)[0]) >= 2
    assert all(text.find(word) for word in misled)


def test_translation_asks_for_the_english_word_after_the_translation(encoding):
    task = tasks.translation(encoding)
    queries = asked(task)
    assert len(queries) == 2 * 12
    expected = "old clock on the wall was the first thing that we saw".split() * 2
    for query, word in zip(queries, expected, strict=True):
        assert spelled(task, right_keys(task, query), encoding) == word
        candidates = spelled(task, task.candidates[query].nonzero()[:, 0], encoding)
        assert candidates == tasks.SENTENCE["EN"]
    first = spelled(task, range(queries[0] - 2, queries[0] + 1), encoding)
    assert first.endswith("La") and task.candidates[queries[0]].nonzero().max() < queries[0]


def test_pattern_matching_asks_for_labels_of_the_same_kind(encoding):
    lists = (*tasks.FIRST_WORDS, *tasks.SECOND_WORDS)
    kinds = {word: n for n, words in enumerate(lists) for word in words}
    for seed in range(5):
        task, labels = tasks.pattern_matching(encoding, seed)
        lines = encoding.decode(task.tokens[1:].tolist()).splitlines()
        assert len(lines) == tasks.N_LINES
        for line in lines:
            words, label = line.split(": ")
            a, b = words.split()
            assert int(label) == 2 * kinds[a] + kinds[b] - 2
        order = [int(line[-1]) for line in lines]
        assert len(asked(task)) == len(lines) - len(set(order))
        places = [n for n, token in enumerate(task.tokens.tolist()) if token in labels]
        for query in asked(task):
            label = task.tokens[query + 1]
            assert spelled(task, [query], encoding).endswith(":")
            keys = right_keys(task, query)
            assert (task.tokens[keys] == label).all() and keys.max() < query
            candidates = task.candidates[query].nonzero()[:, 0].tolist()
            assert set(candidates) == {n for n in places if n < query}
            same_before = order[: len(candidates)].count(int(spelled(task, [query + 1], encoding)))
            assert len(keys) == same_before


def test_problems_differ(encoding):
    first, second = (tasks.pattern_matching(encoding, seed)[0].tokens for seed in (0, 1))
    assert not torch.equal(first[:50], second[:50])
    assert torch.equal(first, tasks.pattern_matching(encoding, 0)[0].tokens)


# the measures


def test_scores_of_ideal_heads():
    size = 6
    right, candidates = torch.zeros(2, size, size, dtype=torch.bool)
    right[4, 1], right[5, [1, 3]] = True, True
    candidates[4, :4], candidates[5, :4] = True, True
    task = tasks.Task(torch.arange(size), right, candidates)
    knowing, blind, elsewhere = torch.zeros(3, size, size)
    knowing[4, 1], knowing[5, 1], knowing[5, 3] = 1.0, 0.25, 0.75
    blind[4:, :4] = 0.25
    elsewhere[:, 0] = 0.5
    elsewhere[4:, 5] = 0.5
    pattern = torch.stack([knowing, blind, elsewhere])[None]
    attribution = 4 * pattern
    scores = tasks.head_scores_on(task, pattern, attribution)
    assert scores["attention"].tolist() == [[1.0, 0.375, 0.0]]
    # a quarter and a half of the candidates are right
    assert scores["chance"].tolist() == [[0.375, 0.375, 0.1875]]
    assert scores["logit"].tolist() == [[4.0, 1.5, 0.0]]
    rows = tasks.head_rows(scores)
    assert [row["head"] for row in rows] == ["0:0", "0:1", "0:2"]


def test_the_attribution_of_all_heads_and_the_embedding_is_the_logit():
    model = Transformer(config_for("mini", 2, 200, attn_only=True)).init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases too
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.randint(200, (20,), generator=generator)
    seen = {}
    logits = model(tokens[None], lambda name, layer, value: seen.update({name: value}))[0]
    logits = logits - logits.mean(dim=1, keepdim=True)
    _, attribution = tasks.logit_attribution(model, tokens)
    with torch.no_grad():
        embedding = model.embed["W_E"][tokens]
        stream = seen["resid_post"][0]
        divisor = (stream.var(dim=1, correction=0) + 1e-5).sqrt()[:, None]
        centred = embedding - embedding.mean(dim=1, keepdim=True)
        rest = (centred / divisor * model.ln_final.w + model.ln_final.b) @ model.unembed["W_U"]
        rest = rest - rest.mean(dim=1, keepdim=True)
    for t in range(19):
        by_path = attribution[:, :, t].sum() + rest[t, tokens[t + 1]]
        assert by_path.item() == pytest.approx(logits[t, tokens[t + 1]].item(), abs=1e-4)
    assert (attribution[:, :, -1] == 0).all()
    assert attribution[1, 0, 5, 6:].abs().max() == 0  # nothing comes from later keys


def test_the_induction_circuit_copies_literally():
    rng = np.random.default_rng(0)
    first, rest = rng.permutation(N_TOKENS - 1)[:24].reshape(2, 12).tolist()
    task = tasks.literal_copying(
        SimpleNamespace(parts=[first, rest], ids=[N_TOKENS - 1, *first, *rest])
    )
    model = induction_circuit()
    _, _, scores = tasks.measure_task(model, task)
    best, *others = tasks.head_rows(scores)
    assert best["head"] == "1:1" and best["attention"] == pytest.approx(1, abs=1e-3)
    assert best["chance"] == pytest.approx(1 / 12, abs=1e-3)
    assert best["logit"] > 0.9 and abs(sum(row["logit"] for row in others)) < 1e-3
    assert all(row["attention"] < 0.1 for row in others)
    losses = tasks.token_losses(model, task.tokens)
    assert losses[-11:].mean() < losses[2:13].mean() - 0.9
    logits = model(task.tokens[None, :-1])[0].log_softmax(-1)
    assert losses[20].item() == pytest.approx(-logits[19, task.tokens[20]].item(), abs=1e-5)


@pytest.mark.parametrize("name", tasks.PASSAGES)
def test_losses_of_a_passage_token_by_token(name, encoding):
    model = Transformer(config_for("mini", 1, 1024, attn_only=True)).init_weights(0)
    found = tasks.measure_literal_copying(model, name, encoding)
    first, rest, helped, misled = tasks.PASSAGES[name]
    pieces = [encoding.encode_ordinary(part) for part in (first, rest, first)]
    tokens = torch.tensor([encoding.eot_token, *sum(pieces, [])])
    with torch.no_grad():
        log_p = model(tokens[None])[0].log_softmax(-1)
    loss = [None, *(-log_p[n, tokens[n + 1]].item() for n in range(len(tokens) - 1))]
    n = len(pieces[0])
    assert found["loss_first"] == pytest.approx(np.mean(loss[2 : n + 1]), abs=1e-5)
    assert found["loss_repeat"] == pytest.approx(np.mean(loss[len(tokens) - n + 1 :]), abs=1e-5)
    so_far = [encoding.decode(tokens[1:end].tolist()) for end in range(1, len(tokens) - n + 1)]
    for word in helped:
        # the tokens with which one more occurrence is complete
        ends = [
            i for i in range(1, len(so_far)) if so_far[i].count(word) > so_far[i - 1].count(word)
        ]
        assert found["last_piece"][word] == pytest.approx([loss[i] for i in ends], abs=0.006)
    for word in misled:
        (complete, *_) = [i for i in range(len(so_far)) if word in so_far[i]]
        begins = [i for i in range(complete) if so_far[complete][len(so_far[i]) :].strip() == word]
        assert found["first_piece"][word][0] == pytest.approx(loss[min(begins) + 1], abs=0.006)


def test_the_view_holds_what_is_attended_to(encoding):
    right, candidates = torch.zeros(2, 2, 2).bool()
    right[1, 0] = True
    task = tasks.Task(torch.tensor(encoding.encode_ordinary("a b")), right, candidates)
    pattern = torch.tensor([[1.0, 0.0], [0.04, 0.96]])[None, None]
    view = tasks.token_view(task, pattern, 2 * pattern, (0, 0), encoding)
    edges = [[0, 0, 1.0, 2.0], [1, 1, 0.96, 1.92]]
    assert view == {"tokens": ["a", " b"], "edges": edges, "right": [[1, 0]]}
    task = tasks.translation(encoding)
    nowhere = torch.zeros(1, 1, len(task.tokens), len(task.tokens))
    spelled = tasks.token_view(task, nowhere, nowhere, (0, 0), encoding)["tokens"]
    assert "était la première" in "".join(spelled) and "" in spelled


def test_right_labels_are_counted(encoding):
    """A model whose logits depend on the present token alone says the same label each time."""
    model = Transformer(config_for("mini", 1, 1024, attn_only=True)).init_weights(0)
    with torch.no_grad():
        model.blocks[0].attn.W_O.zero_()
    found = tasks.measure_pattern_matching(model, encoding)
    counts, shares = [], []
    for seed in range(tasks.N_PROBLEMS):
        task, labels = tasks.pattern_matching(encoding, seed)
        with torch.no_grad():
            says = model(task.tokens[None])[0]
        queries = asked(task)
        always = labels[int(says[queries[0], labels].argmax())]
        counts.append(len(queries))
        shares.append(np.mean([task.tokens[q + 1].item() == always for q in queries]))
    assert found["right_labels"] == pytest.approx(np.mean(shares), abs=1e-6)
    error = np.std(shares, ddof=1) / len(shares) ** 0.5
    assert found["right_labels_error"] == pytest.approx(error, abs=1e-6)
    assert 0.1 < found["right_labels"] < 0.4
    row = found["heads"][0]
    head = int(row["head"][-1])
    above = []
    for seed in range(tasks.N_PROBLEMS):
        scores = tasks.measure_task(model, tasks.pattern_matching(encoding, seed)[0])[2]
        above.append((scores["attention"] - scores["chance"])[0, head].item())
    assert row["attention"] - row["chance"] == pytest.approx(np.mean(above), abs=2e-4)
    error = np.std(above, ddof=1) / len(above) ** 0.5
    assert row["above_chance_error"] == pytest.approx(error, abs=1e-4)


# the command line


@pytest.fixture
def snapshot(text_file, corpus, workplace):
    model = Transformer(config_for("mini", 2, 1024, attn_only=True, smear=True)).init_weights(0)
    origin = {"data": str(text_file), "name": corpus.name, "sha256": corpus.sha256}
    save_snapshot(workplace / "model.pt", model, 3, 300, origin)
    return workplace / "model.pt"


def test_a_snapshot_is_asked_all_tasks(snapshot, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "N_PROBLEMS", 3)
    data = ["--data", str(text_file), "--vocabulary", PYTHON_1024, "--device", "cpu"]
    assert tasks.main([str(snapshot), *data, "--out", "record.json"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["step"] == 3
    output = capsys.readouterr().out
    assert "13B" in output and "literal copying, Python" in output
    for found in (record["translation"], record["pattern_matching"]):
        assert len(found["heads"]) == 4
    prose = record["literal_copying"]["prose"]
    assert f"{prose['loss_first']:.2f} nats" in output
    assert len(prose["last_piece"]["Mrs Vennick"]) == 2
    assert "".join(prose["view"]["tokens"][1:]).startswith("The Vennicks mended clocks")


def test_bad_input_is_one_line(snapshot, text_file, tmp_path, capsys):
    assert tasks.main([str(tmp_path / "nowhere.pt")]) == 2
    assert tasks.main([str(tmp_path)]) == 2
    assert tasks.main([str(snapshot)]) == 2
    model, about = load_snapshot(snapshot)
    with torch.no_grad():
        model.unembed["W_U"].fill_(3e38)
    save_snapshot(snapshot, model, 3, 300, about["corpus"])
    data = ["--data", str(text_file), "--vocabulary", PYTHON_1024, "--device", "cpu"]
    assert tasks.main([str(snapshot), *data, "--out", "record.json"]) == 2
    assert not Path("record.json").exists()
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 4 and "nowhere.pt" in error[0] and "pass --data" in error[2]
    assert "losses that are not numbers" in error[3]


def test_the_head_that_is_told_is_furthest_above_chance(capsys):
    """Not the one that attends most to labels of whatever kind."""
    row = {"logit": 0.0, "above_chance_error": 0.01}
    heads = [
        {"head": "1:3", "attention": 0.50, "chance": 0.45, **row},
        {"head": "0:1", "attention": 0.30, "chance": 0.10, **row},
        {"head": "0:0", "attention": 0.20, "chance": 0.25, **row},
    ]
    found = {"right_labels": 0.5, "right_labels_error": 0.1, "heads": heads}
    tasks.print_pattern_matching(found)
    assert "furthest above chance is 0:1, by 0.200 +- 0.010" in capsys.readouterr().out
