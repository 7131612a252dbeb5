"""The figure shows the records, and only needs them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metrics
from model import SCALES
from plots import panels, phase_change, style
from plots import runs as runs_of
from plots.context import fitted_lines
from plots.runs import load_run
from safety import BadInput

ROOT = Path(__file__).parent.parent


def make_run(folder, n_layers, smear=False, change=None, seed=3, corpus="python"):
    """Records as train.py writes them, as far as figures read them: two heads a layer, those of the
    last one match prefixes.
    """
    folder.mkdir()
    n = 40
    rng = np.random.default_rng(n_layers)
    arrays = {
        "step": np.arange(n),
        "tokens": np.arange(n) * 100_000,
        "loss": np.linspace(7, 3, n),
        "icl_band_score": rng.normal(-0.1, 0.02, n),
        "icl_band_score_error": np.full(n, 0.02),
        "prefix_matching": rng.uniform(0, 1, (n, n_layers, 2)),
        "loss_by_position": rng.normal(4, 0.5, (n, 512)).astype(np.float32),
        "per_token_loss": rng.normal(4, 2, (n, 30)).astype(np.float32),
    }
    np.savez(folder / "measurements.npz", **arrays)
    config = {"n_layers": n_layers, "d_model": 128, "d_mlp": 0, "smear": smear}
    made = {"config": config, "seed": seed, "scale": "mini"}
    made["corpus"] = {"data": corpus, "sha256": corpus}
    (folder / "run.json").write_text(json.dumps(made))
    heads = [f"{layer}:{head}" for layer in range(n_layers) for head in range(2)]
    summary = {
        "phase_change": change,
        "best_prefix_matching": {"head": "0:1", "score": 0.5},
        "examples": 1024,
        **dict.fromkeys(("icl_before", "icl_before_error", "icl_after", "icl_after_error")),
        "icl_score": -0.3,
        "icl_score_error": 0.1,
        "heads": [
            {"head": head, "prefix_matching": 0.5, "class": "prefix matching"}
            if head in heads[-2:]
            else {"head": head, "prefix_matching": 0.0, "class": "other"}
            for head in heads
        ],
    }
    if change:
        summary |= {"icl_before": 0.1, "icl_before_error": 0.2}
        summary |= {"icl_after": -0.2, "icl_after_error": 0.3}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path):
    change = {"start_tokens": 1_000_000, "end_tokens": 2_000_000}
    return [make_run(tmp_path / "one", 1), make_run(tmp_path / "two", 2, change=change)]


def panels_of(figure, n_rows, n_columns):
    """Without the keys at the right."""
    return np.array(figure.axes[: n_rows * (n_columns + 1)]).reshape(n_rows, -1)[:, :-1]


def test_every_panel_shows_its_records(runs):
    loaded = [load_run(run) for run in runs]
    figure = phase_change.draw(loaded)
    axes = panels_of(figure, 4, 2)
    one, two = (run.measurements for run in loaded)
    lines = [[line.get_ydata() for line in ax.get_lines()] for ax in axes[:, 1]]
    assert any(np.array_equal(y, two["loss"]) for y in lines[0])
    assert any(
        np.array_equal(y, one["loss"]) for y in lines[0]
    )  # the one-layer curve for comparison
    assert any(np.array_equal(y, [-0.3, 0.1, -0.2]) for y in lines[1])  # at the end, before, after
    (band, bars) = axes[1, 1].collections
    reach = np.array([bar[:, 1] for bar in bars.get_segments()])
    assert reach == pytest.approx(np.array([(-0.4, -0.2), (-0.1, 0.3), (-0.5, 0.1)]))
    edges = two["icl_band_score"] + two["icl_band_score_error"]
    assert np.isin(edges.round(6), band.get_paths()[0].vertices[:, 1].round(6)).all()
    assert any(np.array_equal(y, two["icl_band_score"]) for y in lines[1])
    for layer, head in np.ndindex(2, 2):
        assert any(np.array_equal(y, two["prefix_matching"][:, layer, head]) for y in lines[2])
    (mesh,) = axes[3, 1].collections
    places, _, slopes = fitted_lines(two["loss_by_position"])
    assert np.array_equal(np.reshape(mesh.get_array(), slopes.T.shape), slopes.T)
    assert np.array_equal(mesh.get_coordinates()[:, 0, 1], places)
    assert axes[2, 1].get_lines()[0].get_xdata()[-1] == 3.9  # millions of tokens
    style.plt.close(figure)


def test_the_window_is_shaded_where_there_is_one(runs):
    figure = phase_change.draw([load_run(run) for run in runs])
    axes = panels_of(figure, 4, 2)
    for row in range(3):
        assert not axes[row, 0].patches
        (window,) = axes[row, 1].patches
        assert (window.get_x(), window.get_x() + window.get_width()) == (1.0, 2.0)
    edges = [line.get_xdata()[0] for line in axes[3, 1].get_lines()]
    assert edges == [1.0, 2.0] and not axes[3, 0].get_lines()
    style.plt.close(figure)


def test_a_window_set_by_hand_is_called_so(runs):
    loaded = [load_run(run) for run in runs]
    loaded[1].summary["phase_change"]["by_hand"] = True
    figure = phase_change.draw(loaded)
    axes = panels_of(figure, 4, 2)
    titles = [ax.get_title().splitlines()[-1] for ax in axes[0]]
    assert titles == ["attention-only", "window set by hand"]
    style.plt.close(figure)


def test_the_script_writes_a_picture_and_imports_no_torch(runs, tmp_path):
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['phase_change.py', *{[str(run) for run in runs]}, '--out', 'f.png']\n"
        f"try: runpy.run_path({str(ROOT / 'plots' / 'phase_change.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    picture = (tmp_path / "f.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def save_as_npy(path):
    with path.open("wb") as file:
        np.save(file, np.arange(3))


@pytest.mark.parametrize("name", ["measurements.npz", "run.json", "summary.json"])
def test_missing_and_damaged_records_are_one_line(runs, tmp_path, capsys, name):
    for spoil, fault in (
        (lambda path: path.write_bytes(b"{"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_text("[3]"), "damaged"),
        (lambda path: path.write_text("[" * 99999), "damaged"),
        (lambda path: path.write_text("{}"), "damaged"),
        (lambda path: save_as_npy(path), "damaged"),
        (lambda path: np.savez(path.open("wb"), step=np.arange(3)), "damaged"),
        (lambda path: np.savez(path.open("wb"), tokens=np.arange(3), loss=np.ones(2)), "damaged"),
        (lambda path: np.savez(path.open("wb"), tokens=np.arange(3)), "damaged"),
        (Path.unlink, "missing"),
    ):
        spoil(runs[0] / name)
        assert phase_change.main([*map(str, runs), "--out", str(tmp_path / "f.png")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and fault in error
    assert not (tmp_path / "f.png").exists()


def test_an_evaluation_of_half_a_training_is_not_its_end(runs):
    with np.load(runs[0] / "measurements.npz") as arrays:
        np.savez(runs[0] / "evaluation.npz", **{name: x[:20] for name, x in arrays.items()})
    with pytest.raises(BadInput, match="run evaluate.py again"):
        load_run(runs[0]).evaluation  # noqa: B018


def test_only_pictures_are_written(runs, tmp_path, capsys):
    assert phase_change.main([str(runs[0]), "--out", str(tmp_path / "f.txt")]) == 2
    assert ".png" in capsys.readouterr().err


def test_what_figures_know_of_the_models_is_true():
    """They cannot import it."""
    (late_from, late_to), (early_from, early_to) = metrics.LATE_BAND, metrics.EARLY_BAND
    assert panels.BANDS == f"tokens {late_from}-{late_to} minus {early_from}-{early_to}"
    assert runs_of.WIDTHS == {scale: sizes["d_model"] for scale, sizes in SCALES.items()}


def test_the_ground_of_a_picture_is_white(tmp_path):
    """Though all colours near white are among those that it is reduced to."""
    figure, ax = style.plt.subplots()
    shades = np.mgrid[240:256, 240:256].reshape(2, -1).T / 255
    ax.imshow(np.concatenate([shades, np.ones((256, 1))], axis=1).reshape(16, 16, 3))
    style.save(figure, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
