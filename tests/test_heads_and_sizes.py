"""The figures of heads and of sizes show their records."""

import json

import numpy as np
import pytest
from PIL import Image

from plots import analysis, eigenvalues, head_positions, head_scatter, sizes, style
from plots.runs import load_run
from tests.records_by_hand import GOOD, make_run, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "mini")


@pytest.fixture
def load(world):
    yield lambda *names: [load_run(world / name) for name in names]
    style.plt.close("all")


def offsets(ax):
    return np.asarray(np.concatenate([points.get_offsets() for points in ax.collections]))


def test_heads_stand_in_the_order_of_depth(load):
    figure = head_positions.draw(load("1L", "3L", "2L-smear", "6L-mlp"))
    shown = [ax for ax in figure.axes if ax.axison]
    assert len(shown) == 4 and shown[1].get_title() == "3 layers, attention-only"
    points = [line for line in shown[1].lines if line.get_marker() == "o"]
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in points] == [
        *((x, 0.0) for x in range(4)),
        (4, 0.6),
        (5, 0.0),
    ]
    colours = [style.depth_colour(1 + index // 2) for index in range(6)]
    assert [p.get_color() for p in points] == colours
    assert [text.get_text() for text in shown[1].texts] == ["2:0"]
    assert not shown[0].texts  # below the threshold


def test_seeds_are_told_only_where_there_are_several(load, tmp_path):
    make_run(tmp_path / "2L-1", GOOD, 2)
    made = json.loads((tmp_path / "2L-1" / "run.json").read_text())
    (tmp_path / "2L-1" / "run.json").write_text(json.dumps(made | {"seed": 1}))
    figure = head_positions.draw([*load("2L", "3L"), load_run(tmp_path / "2L-1")])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0].endswith("seed 0") and titles[2].endswith("seed 1")
    assert titles[1] == "3 layers, attention-only"


def test_every_head_has_its_two_scores_and_the_width_sweep_its_panel(load):
    runs = load("1L", "2L-mlp", "2L-d64")
    figure = head_scatter.draw(runs)
    left, right = figure.axes
    expected = [
        [(row["prefix_matching"], row["copying"]) for run in some for row in run.summary["heads"]]
        for some in (runs[:2], runs[2:])
    ]
    assert offsets(left) == pytest.approx(np.array(expected[0]))
    assert offsets(right) == pytest.approx(np.array(expected[1]))
    assert len(head_scatter.draw(runs[:2]).axes) == 1


def test_eigenvalues_stand_against_scores_with_their_coefficients(load):
    runs = load("1L", "2L", "3L")
    ov, qk = eigenvalues.draw(runs).axes
    rows = [row for run in runs for row in run.circuits["snapshots"][-1]["heads"]]
    expected = np.array([(row["ov_copying_direct"], row["copying"]) for row in rows])
    assert offsets(ov) == pytest.approx(expected)
    later = [row for row in rows if not row["head"].startswith("0:")]
    expected = np.array([(row["qk_match_direct"], row["prefix_matching"]) for row in later])
    assert offsets(qk) == pytest.approx(expected)
    assert "n = 6 heads\nPearson +1.00\nSpearman +1.00" in [text.get_text() for text in qk.texts]
    assert (ov.get_title(), qk.get_title()) == ("A5", "A6")


def test_without_heads_to_compare_there_is_no_coefficient(load):
    qk = eigenvalues.draw(load("1L")).axes[1]
    assert qk.texts[0].get_text() == "n = 0 heads\nPearson N/A\nSpearman N/A"


def test_curves_by_index_are_those_of_the_last_snapshot(load):
    runs = load("3L", "2L", "4L")  # sorted by the figure
    to_last, loss, gap, speed = sizes.draw(runs).axes
    by_size = [runs[1], runs[0], runs[2]]
    losses = [run.evaluation["loss_by_position"][-1] for run in by_size]
    for n, run in enumerate(by_size):
        for ax, (x, y) in (
            (to_last, analysis.loss_to_last(losses[n])),
            (loss, analysis.log_bins(losses[n])),
            (gap, analysis.log_bins(losses[n] - losses[-1])),
        ):
            assert ax.lines[n].get_xdata() == pytest.approx(x)
            assert ax.lines[n].get_ydata() == pytest.approx(y)
            assert ax.lines[n].get_color() == style.depth_colour(run.n_layers)
        tokens, values = run.measurements["tokens"], run.measurements["loss"]
        shown = tokens >= 0.02 * tokens[-1]
        curve, bar = speed.lines[2 * n : 2 * n + 2]
        assert curve.get_xdata() == pytest.approx(tokens[shown] / 1e6)
        assert curve.get_ydata() == pytest.approx(analysis.speed_of_learning(tokens, values)[shown])
        assert tuple(bar.get_xdata()) == (3.4, 4.6) and bar.get_color() == curve.get_color()


def test_widths_have_colours_of_their_own(load):
    _, loss, gap, _ = sizes.draw(load("2L", "2L-d64", "2L-d192")).axes
    labels = [text.get_text().split(" (")[0] for text in loss.get_legend().get_texts()]
    assert labels == ["width 64", "width 128", "width 192"]
    colours = [line.get_color() for line in loss.lines]
    assert len(set(colours)) == 3 and not set(colours) & set(style.DEPTH_COLOURS)
    assert gap.get_title().endswith("width 192")


def test_curves_on_different_examples_are_not_compared(load, world, tmp_path, capsys):
    make_run(tmp_path / "3L", GOOD, 3)
    path = tmp_path / "3L" / "evaluation.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"per_token_loss": np.zeros((4, 7))})
    runs = [str(world / "2L"), str(tmp_path / "3L")]
    assert sizes.main([*runs, "--out", str(tmp_path / "f.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2L 20, 3L 7" in error


@pytest.mark.parametrize("figure", [head_positions, head_scatter, eigenvalues, sizes])
def test_every_script_writes_its_picture(figure, world, tmp_path):
    out = tmp_path / "f.png"
    assert figure.main([str(world / "2L"), str(world / "3L"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert (pixels < 200).any(axis=2).sum() > 10_000  # of an empty picture there are none
