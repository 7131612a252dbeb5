"""A passage and token views: what they colour, list and frame is in the records."""

import json

import numpy as np
import pytest

from plots import passage, style, text, token_views
from plots.runs import load_run
from tests.test_plots import make_run

CHANGE = {"start_tokens": 1_000_000, "end_tokens": 2_000_000}
# the repeat, of the first four words, begins at 9
TEXT = np.array([b"<|endoftext|>", b"the", b" bell", *[b" the", b" bell"] * 3])
TEXT = np.append(TEXT, [b"the", b" bell", b" the", b" bell"])
RIGHT = [(9, 2), (10, 3), (11, 4)]  # the last token has no next one


def make_passages(folder, seed=0, window=(10, 20), tokens=100_000):
    """Of 40 snapshots. Losses by a generator; in the last snapshot the second head of the last
    layer attends to what came next the first time, for 2 nats.

    window: the snapshots at its ends. tokens: between two snapshots.
    """
    rng = np.random.default_rng(seed)
    n, n_pairs = len(TEXT), len(TEXT) * (len(TEXT) + 1) // 2
    arrays = {
        "step": np.arange(40),
        "tokens": np.arange(40) * tokens,
        "shown": np.array([0, window[0], sum(window) // 2, window[1], 39]),
        "compared": np.array(window),
    }
    n_layers = json.loads((folder / "run.json").read_text())["config"]["n_layers"]
    pattern = np.zeros((5, n_layers, 2, n_pairs), np.uint8)
    for query, key in RIGHT:
        pattern[-1, -1, 1, query * (query + 1) // 2 + key] = 204
    for name in ("Python", "prose"):
        loss = rng.uniform(0, 8, (40, n)).astype(np.float16)
        loss[:, 0] = np.nan
        arrays |= {
            f"{name}_text": TEXT,
            f"{name}_repeat": np.array(9),
            f"{name}_loss": loss,
            f"{name}_word": np.array(["the bell", "bell"]),
            f"{name}_word_token": np.array([4, 2]),
            f"{name}_word_expected": np.array([True, False]),
            f"{name}_pattern": pattern,
            f"{name}_attribution": (pattern // 204 * 100).astype(np.int8),
            f"{name}_attribution_scale": np.full((5, n_layers, 2), 0.02, np.float32),
        }
    np.savez(folder / "passage.npz", **arrays)


def make_tasks(folder):
    head = {"head": "1:1", "attention": 0.8, "chance": 0.1, "logit": 2.0}
    other = {"head": "0:0", "attention": 0.1, "chance": 0.1, "logit": 0.0}
    copying = {"heads": [head, other], "loss_first": 4.0, "loss_repeat": 1.5}
    sentences = [
        "<|endoftext|>",
        "EN",
        ":",
        " the",
        " be",
        "ll",
        ".",
        "\n",
        "FR",
        ":",
        " la",
        " clo",
        "che",
    ]
    translation = {"tokens": sentences, "edges": [[10, 4, 0.5, 1.0], [10, 5, 0.25, -0.5]]}
    translation["right"] = [[10, 4], [10, 5]]
    lines = ["<|endoftext|>", "red", " cat", ":", " 2", "\n", "May", " cat", ":", " 0", "\n"]
    lines += ["pink", " dog", ":", " 2", "\n"]
    patterns = {"tokens": lines, "edges": [[13, 4, 0.6, 3.0], [13, 9, 0.1, 1.0], [12, 2, 0.9, 1.0]]}
    patterns["right"] = [[13, 4]]
    record = {
        "literal_copying": {"Python": copying, "prose": copying},
        "translation": {"heads": [head, other], "view": translation},
        "pattern_matching": {
            "heads": [head | {"above_chance_error": 0.02}, other | {"above_chance_error": 0.01}],
            "view": patterns,
            "right_labels": 0.3,
            "right_labels_error": 0.02,
        },
    }
    (folder / "tasks.json").write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path):
    folder = make_run(tmp_path / "two", 2, change=CHANGE)
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | {"corpus": {"data": "python"}}))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"tokens": 3_900_000}))
    make_passages(folder)
    make_tasks(folder)
    return folder


@pytest.fixture
def run(folder):
    return load_run(folder)


def written(ax):
    return "".join(piece.get_text() for piece in ax.texts)


# laying out


def test_rows_break_before_words_and_at_newlines():
    spelled = ["a", " bc", "d", " ef\n", "\n", "g"]
    pieces, n_rows = text.lay_out(spelled, 5)
    assert pieces == [
        (0, 0, 0, "a"),
        (1, 0, 1, " bc"),
        (2, 0, 4, "d"),
        (3, 1, 0, " ef"),
        (4, 2, 0, ""),
        (5, 3, 0, "g"),
    ]
    assert n_rows == 4
    # one column less, and " bcd" no longer fits beside "a"
    assert [piece[1] for piece in text.lay_out(spelled, 4)[0]] == [0, 1, 1, 2, 3, 4]


def test_a_character_of_several_tokens_is_spelled_at_its_last():
    assert text.spell([b"a\xc3", b"\xa9", b"\n"]) == ["a", "é", "↵\n"]


def test_ink_is_white_on_dark_colours_only():
    assert text.is_dark("navy") and text.is_dark("#b2182b")
    assert not text.is_dark("white") and not text.is_dark("none") and not text.is_dark("yellow")


def test_letters_and_boxes_stand_in_their_columns():
    figure, ax = style.plt.subplots()
    text.draw_text(ax, ["cost", " $", "1 $2↵\n", "so"], ["white", "navy", "none", "navy"], 20, {1})
    inks = [(line.get_position()[1], line.get_color(), line.get_text()) for line in ax.texts]
    assert inks == [
        (0.54, "black", "cost  1 $2↵"),
        (0.54, "white", "     $"),
        (1.54, "white", "so"),
    ]
    assert not any(line.get_parse_math() for line in ax.texts)  # dollars are no formula
    (boxes,) = ax.collections
    spans = [path.get_extents().intervalx.tolist() for path in boxes.get_paths()]
    assert spans == [[0, 4], [4, 6], [6, 11], [0, 2]]
    assert [bool(edge[3]) for edge in boxes.get_edgecolor()] == [False, True, False, False]
    style.plt.close(figure)


# the passage


def test_tokens_have_the_colour_of_their_change(run):
    figure = passage.draw([run])
    (panel,) = [ax for ax in figure.axes if ax.get_title("left").startswith("Python")]
    assert written(panel).startswith("<|endoftext|>the bell")
    losses = run.passage["Python_loss"].astype(float)
    change = losses[20] - losses[10]
    assert f"{change[1:].mean():+.2f} nats" in panel.get_title("left")
    boxes = panel.collections[0].get_facecolor()
    assert len(boxes) == len(TEXT)
    for token in range(1, len(TEXT)):
        red, _, blue, _ = boxes[token]
        assert (red > blue) == (change[token] > 0)
    style.plt.close(figure)


def test_the_tokens_that_change_most_are_listed():
    spelled = ["", "a", "b", "a", "b", "c"]
    easier, harder = passage.most_changed(np.array([0, -1, -3, 2, -2, 1]), spelled)
    # the second "ab" changed less than the first
    assert [int(n) for n in easier] == [2, 1, 0, 5, 3]
    assert [int(n) for n in harder] == [3, 5, 0, 1, 4]


def test_curves_are_the_losses_of_the_words(run):
    figure = passage.draw([run])
    (_, panel) = [ax for ax in figure.axes if ax.get_ylabel().startswith("loss")]
    losses = run.passage["prose_loss"].astype(float)
    expected, unexpected, mean = [line.get_ydata() for line in panel.get_lines()]
    assert np.array_equal(expected, losses[:, 4]) and np.array_equal(unexpected, losses[:, 2])
    assert mean == pytest.approx(losses[:, 1:].mean(axis=1))
    (window,) = panel.patches
    assert (window.get_x(), window.get_x() + window.get_width()) == (1.0, 2.0)
    style.plt.close(figure)


def test_several_runs_and_one_without_a_phase_change(run, tmp_path):
    other = make_run(tmp_path / "one", 1)
    make_passages(other, seed=1)
    figure = passage.draw([run, load_run(other)])
    said = " ".join(written(ax) for ax in figure.axes)
    assert "What the phase change does" in said and "there is no phase change" in said
    assert len([ax for ax in figure.axes if ax.get_ylabel().startswith("loss")]) == 4
    style.plt.close(figure)


# token views


def test_copying_frames_the_token_that_comes_and_its_copies(run):
    view = token_views.Copied(run)
    assert list(zip(view.queries, view.keys, strict=True)) == RIGHT
    # " bell" came behind " the" three times, behind "the" once
    assert view.example() == (11, [4, 6, 8])
    figure = token_views.draw([run], "copying")
    titles = [ax.get_title("left") for ax in figure.axes]
    assert any("0.800 (chance 0.100)" in title for title in titles)
    assert any("+2.00" in title for title in titles)
    style.plt.close(figure)


def test_words_and_lines_are_found_in_the_tokens(run):
    grid = token_views.words_of(run.tasks["translation"]["view"]["tokens"])
    assert grid.labels == ["(start)", "EN:", "the", "bell.", "FR:", "la", "cloche"]
    assert grid.row_of == {0: 0, 1: 1, 3: 2, 5: 3, 8: 4, 10: 5, 12: 6}
    grid = token_views.lines_of(run.tasks["pattern_matching"]["view"]["tokens"])
    assert grid.labels == ["red cat: 2", "May cat: 0", "pink dog: 2"]
    assert grid.row_of == {3: 0, 8: 1, 13: 2} and grid.column_of == {4: 0, 9: 1, 14: 2}


def test_matrices_sum_over_the_tokens_of_a_word(run):
    figure = token_views.draw([run], "translation")
    attention, nats, heads = figure.axes[:3]
    shown = attention.get_images()[0].get_array()
    assert shown[5, 3] == pytest.approx(0.75) and shown.sum() == pytest.approx(0.75)
    assert nats.get_images()[0].get_array()[5, 3] == pytest.approx(0.5)
    (frame,) = attention.patches
    assert (frame.get_x(), frame.get_y()) == (2.5, 4.5)
    assert heads.get_lines()[0].get_xdata().tolist() == [0.8, 0.1]
    style.plt.close(figure)


def test_lines_are_compared_label_by_label(run):
    figure = token_views.draw([run], "patterns")
    attention, _, heads = figure.axes[:3]
    shown = attention.get_images()[0].get_array()
    assert shown.tolist() == [[0, 0, 0], [0, 0, 0], [0.6, 0.1, 0]]
    (frame,) = attention.patches
    assert (frame.get_x(), frame.get_y()) == (-0.5, 1.5)
    assert "30 ± 2 %" in heads.get_title()
    style.plt.close(figure)


def test_scripts(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "f.png"
    for view in token_views.VIEWS:
        assert token_views.main([str(folder), "--view", view, "--out", str(out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    assert passage.main([str(folder), "--out", str(out)]) == 0
    capsys.readouterr()
    shown = []
    monkeypatch.setattr(style, "save", lambda figure, path: shown.append(figure.get_supxlabel()))
    assert passage.main([str(folder), "--out", "f.png"]) == 0
    assert shown[0].startswith("F8b, F8c, F9 of the paper")
    assert f"python plots/passage.py {folder} --out f.png" in shown[0].replace("\n", " ")
    (folder / "passage.npz").unlink()
    (folder / "tasks.json").unlink()
    assert passage.main([str(folder), "--out", str(out)]) == 2
    assert token_views.main([str(folder), "--view", "patterns", "--out", str(out)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].endswith("passage.npz is missing: python passage.py RUN writes it")
    assert "tasks.json is missing: python tasks.py SNAPSHOT --out RUN/tasks.json" in errors[1]
