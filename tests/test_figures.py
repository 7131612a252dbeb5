"""Trajectories, model analysis table, ablations, smeared keys: what they show is in the records,
and where there is nothing they say so.
"""

import json

import numpy as np
import pytest

from plots import ablations, analysis_table, context, pca, smear, style, trajectories
from plots.runs import load_run
from tests.test_plots import make_run, panels_of

CHANGE = {"start_tokens": 1_000_000, "end_tokens": 2_000_000}


@pytest.fixture
def one(tmp_path):
    return load_run(make_run(tmp_path / "one", 1))


@pytest.fixture
def two(tmp_path):
    """With all records."""
    folder = make_run(tmp_path / "two", 2, change=CHANGE)
    add_ablations(folder, 2, change=True)
    heads = [{"head": h, "qk_match": None, "qk_match_direct": None} for h in ("0:0", "0:1")]
    heads += [{"head": h, "qk_match": 5.0, "qk_match_direct": 0.5} for h in ("1:0", "1:1")]
    snapshots = [{"step": step, "tokens": step * 100_000, "heads": heads} for step in (0, 39)]
    (folder / "circuits.json").write_text(json.dumps({"snapshots": snapshots}))
    return load_run(folder)


def add_ablations(folder, n_layers, change):
    rng = np.random.default_rng(0)
    names = ("band_attribution", "before_and_after") if change else ("band_attribution",)
    arrays = {"tokens": np.array([0, 20, 39]) * 100_000, "examples": np.full(3, 1200)}
    for name in names:
        arrays[name] = rng.normal(0, 0.1, (3, n_layers, 2))
        arrays[f"{name}_error"] = np.full((3, n_layers, 2), 0.01)
        arrays[f"{name}_error"][:, 0, 0] = 0.03
    np.savez(folder / "ablations.npz", **arrays)


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts)


# lines fitted to the loss by position


def test_a_line_in_log_position_is_recovered_everywhere():
    log_position = np.log(np.arange(1, 513))
    losses = np.stack([3 - 0.2 * log_position, 2 + 0 * log_position])
    places, height, slope = context.fitted_lines(losses)
    assert places[[0, -1]] == pytest.approx([context.FIRST, 512])
    assert height == pytest.approx(np.stack([3 - 0.2 * np.log(places), 2 + 0 * places]))
    assert slope == pytest.approx(np.stack([-0.2 + 0 * places, 0 * places]), abs=1e-12)


def test_fitted_lines_are_those_of_weighted_least_squares():
    losses = np.random.default_rng(0).normal(size=512)
    places, height, slope = context.fitted_lines(losses)
    log_position = np.log(np.arange(1, 513))
    for n in (0, 20, 63):
        away = log_position - np.log(places[n])
        weight = np.exp(-0.5 * (away / context.REACH) ** 2) / np.arange(1, 513)
        expected = np.polyfit(away, losses, 1, w=np.sqrt(weight))
        assert [slope[n], height[n]] == pytest.approx(expected)


def test_a_bend_at_position_50_is_seen_there():
    log_position = np.log(np.arange(1, 513))
    places, _, slope = context.fitted_lines(-np.minimum(log_position, np.log(50)))
    assert slope[places < 12] == pytest.approx(-1, abs=0.01)
    assert slope[places > 170] == pytest.approx(0, abs=0.01)
    half_way = places[np.abs(slope + 0.5).argmin()]
    assert half_way == pytest.approx(50, rel=0.04)


# principal components and the pivot


def embed(points, n_tokens=60, seed=1):
    """Points of a plane somewhere in the space of losses, with the plane's axes."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(n_tokens, 2)))
    return points @ axes.T + rng.normal(size=n_tokens), axes


def test_the_plane_of_a_flat_path_is_recovered():
    points = np.random.default_rng(0).normal(size=(30, 2)) * (5, 2)
    losses, axes = embed(points)
    plane = pca.principal_plane(losses)
    assert plane.explained.sum() == pytest.approx(1)
    assert plane.axes.T @ plane.axes == pytest.approx(np.eye(2), abs=1e-9)
    assert plane.axes @ plane.axes.T == pytest.approx(axes @ axes.T, abs=1e-9)
    shown = plane.project(losses)
    distances = [np.linalg.norm(x[:, None] - x, axis=-1) for x in (shown, points)]
    assert distances[0] == pytest.approx(distances[1])
    assert shown.var(axis=0) / points.var(axis=0).sum() == pytest.approx(plane.explained)
    assert np.abs(np.corrcoef(shown.T)[0, 1]) < 1e-9 and shown[0, 0] < 0 < shown[0, 1]


def test_the_plane_is_that_of_a_singular_value_decomposition():
    losses = np.random.default_rng(2).normal(size=(40, 25)) * np.linspace(3, 1, 25)
    plane = pca.principal_plane(losses)
    _, values, vectors = np.linalg.svd(losses - losses.mean(axis=0))
    assert np.abs(np.sum(plane.axes * vectors[:2].T, axis=0)) == pytest.approx(1)
    assert plane.explained == pytest.approx(values[:2] ** 2 / (values**2).sum())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_snapshots", [2, 30])
def test_a_straight_path_has_no_second_axis(n_snapshots):
    points = np.linspace((0, 0), (3, 4), n_snapshots)
    losses, _ = embed(points)
    plane = pca.principal_plane(losses)
    assert plane.explained == pytest.approx([1, 0]) and not plane.axes[:, 1].any()
    assert plane.project(losses)[:, 0] == pytest.approx(np.linspace(-2.5, 2.5, n_snapshots))


@pytest.mark.parametrize("direction, angle", [((2, 0), 0), ((0, 5), 90), ((-1, 0), 180)])
def test_the_pivot_angle_of_a_path_of_two_straight_lines(direction, angle):
    until = np.linspace((0, 0), (10, 0), 11)
    points = np.concatenate([until, until[-1] + np.outer(np.arange(1, 6), direction), [(3, 3)]])
    losses, _ = embed(points)
    back = float(np.degrees(np.arctan2(3, 3 - points[15][0])))  # to the last point, (3, 3)
    for path in points, losses:
        within, after = pca.pivot_angles(path, np.arange(17), (10, 15))
        assert within == pytest.approx(angle, abs=1e-4)
        if direction[1] == 0:  # the window ends on the first line
            assert after == pytest.approx(back, abs=1e-4)


def test_a_path_that_stands_still_has_no_pivot_angle():
    assert np.isnan(pca.pivot_angles(np.ones((9, 3)), np.arange(9), (3, 6))).all()


def path_run(folder, points, n_layers=2, change=CHANGE, n_tokens=60, **more):
    """A run whose per-token losses go through points of the same plane for every run; the untrained
    model is far off it.
    """
    make_run(folder, n_layers, change=change, **more)
    with np.load(folder / "measurements.npz") as file:
        arrays = dict(file)
    losses, _ = embed(points)
    losses[0] += 1000 * np.random.default_rng(9).normal(size=losses.shape[1])
    np.savez(folder / "measurements.npz", **arrays | {"per_token_loss": losses[:, :n_tokens]})
    return load_run(folder)


def turning():
    """Right until the change at snapshot 10, then up."""
    along = np.arange(40.0)
    return np.stack([np.minimum(along, 10), np.maximum(along - 10, 0)], axis=1)


def straight():
    return np.stack([np.linspace(0, 30, 40), np.zeros(40)], axis=1)


def test_pivots_of_runs_with_and_without_a_window(tmp_path):
    runs = [
        path_run(tmp_path / "1L", straight(), n_layers=1, change=None),
        path_run(tmp_path / "2L", turning()),
    ]
    found = pca.pivots(runs)
    assert found["2L"].own_window and not found["1L"].own_window
    assert found["1L"].window == found["2L"].window == (1.0, 2.0)
    for angle in "within", "after":
        assert getattr(found["2L"], angle) == pytest.approx(90, abs=1e-3)
        assert getattr(found["1L"], angle) == pytest.approx(0, abs=1e-3)
    assert pca.pivots(runs[:1]) == {}


def test_a_run_without_a_window_is_judged_in_the_median_of_the_others(tmp_path):
    spans = [(10, 20), (12, 22), (20, 30)]
    runs = [path_run(tmp_path / "1L", straight(), n_layers=1, change=None)]
    for n, span in enumerate(spans):
        change = dict(zip(CHANGE, (edge * 100_000 for edge in span), strict=True))
        runs.append(path_run(tmp_path / f"2L-{n}", turning(), change=change))
    found = pca.pivots(runs)
    windows = [(1.2, 2.2)] + [(start / 10, end / 10) for start, end in spans]
    assert [found[run.name].window for run in runs] == [pytest.approx(w) for w in windows]
    risen = np.degrees(np.arctan2(10, 9))  # from (1, 0) to (10, 10) before its window
    assert found["2L-2"].within == pytest.approx(90 - risen)


def test_the_untrained_and_the_smeared_do_not_shape_the_plane(tmp_path):
    plain = path_run(tmp_path / "2L", turning())
    smeared = path_run(tmp_path / "2L-smear", 100 * turning()[::-1], smear=True)
    alone, joint = pca.joint_pca([plain]), pca.joint_pca([plain, smeared])
    assert np.array_equal(alone.axes, joint.axes)
    assert joint.explained.sum() == pytest.approx(1)
    assert pca.joint_pca([smeared]).explained.sum() == pytest.approx(1)


def test_runs_measured_on_fewer_examples_share_the_common_ones(tmp_path):
    runs = [path_run(tmp_path / "a", turning()), path_run(tmp_path / "b", turning(), n_tokens=40)]
    plane = pca.joint_pca(runs)
    paths = [plane.project(pca.losses_through_training(run)[1]) for run in runs]
    assert len(plane.centre) == 40 and np.array_equal(*paths)


def test_a_second_corpus_has_a_plane_of_its_own(tmp_path):
    first = path_run(tmp_path / "2L", turning())
    second = path_run(tmp_path / "2L-books", 9 * straight(), corpus="books")
    figure = trajectories.draw([first, second])
    paths = [ax.get_lines()[-3].get_xydata() for ax in figure.axes]
    for path, run in zip(paths, (first, second), strict=True):
        own = pca.joint_pca([run])
        assert np.array_equal(path, own.project(pca.losses_through_training(run)[1]))
    assert "second corpus" in figure.axes[1].get_title()
    style.plt.close(figure)


def test_other_runs_share_the_plane_of_paths(tmp_path):
    one, two = path_run(tmp_path / "2L", turning()), path_run(tmp_path / "3L", 5 * straight())
    figure = trajectories.draw([one], plane=[one.folder, two.folder])
    (ax,) = figure.axes
    path = ax.get_lines()[-3].get_xydata()
    plane = pca.joint_pca([one, two])
    assert np.array_equal(path, plane.project(pca.losses_through_training(one)[1]))
    style.plt.close(figure)


def test_the_window_is_outlined_on_the_path(tmp_path):
    run = path_run(tmp_path / "2L", turning())
    figure = trajectories.draw([run])
    outline, path, *_ = figure.axes[0].get_lines()
    assert outline.get_color() == style.WINDOW_COLOUR
    assert np.array_equal(outline.get_xydata(), path.get_xydata()[9:20])  # 1.0M to 2.0M tokens
    assert "turns by 90" in figure.axes[0].get_title()
    style.plt.close(figure)


# the model analysis table


def test_every_row_of_the_table_shows_its_records(one, two):
    figure = analysis_table.draw([one, two])
    axes = panels_of(figure, 9, 2)
    (mesh,) = axes[2, 1].collections
    _, height, _ = context.fitted_lines(two.measurements["loss_by_position"])
    assert np.array_equal(np.reshape(mesh.get_array(), height.T.shape), height.T)
    traces = [list(line.get_ydata()) for line in axes[6, 1].get_lines()]
    assert traces == [[0.5, 0.5]] * 2  # on the direct path; none of the first layer
    for row, name in (7, "before_and_after"), (8, "band_attribution"):
        lines = [line.get_ydata() for line in axes[row, 1].get_lines()]
        for place in np.ndindex(2, 2):
            assert any(np.array_equal(y, two.ablations[name][:, *place]) for y in lines)
    style.plt.close(figure)


def test_one_layer_is_compared_with_on_its_own_corpus(tmp_path, one, two):
    books = load_run(make_run(tmp_path / "2L-books", 2, corpus="books"))
    figure = analysis_table.draw([one, two, books], rows="R2")
    axes = panels_of(figure, 1, 3)
    grey = [
        [x.get_ydata() for x in ax.get_lines() if x.get_color() == style.QUIET] for ax in axes[0]
    ]
    assert [len(lines) for lines in grey] == [0, 1, 0]
    assert np.array_equal(grey[1][0], one.measurements["loss"])
    style.plt.close(figure)


def test_empty_panels_say_why(one, two):
    add_ablations(one.folder, 1, change=False)
    rows = [{"head": "0:0", "qk_match": None, "qk_match_direct": None}]
    snapshots = [{"step": 0, "tokens": 0, "heads": rows}]
    (one.folder / "circuits.json").write_text(json.dumps({"snapshots": snapshots}))
    (two.folder / "ablations.npz").unlink()
    figure = analysis_table.draw([one, two], rows="R7,R8,R9")
    axes = panels_of(figure, 3, 2)
    assert "N/A" in texts(axes[0, 0]) and "earlier layer" in texts(axes[0, 0])
    assert "N/A" in texts(axes[1, 0]) and "no phase change" in texts(axes[1, 0])
    assert "N/A" not in texts(axes[2, 0])
    assert "ablations.npz" in texts(axes[1, 1]) and "ablations.npz" in texts(axes[2, 1])
    style.plt.close(figure)


def test_the_colours_of_a_row_mean_the_same_in_all_panels(one, two):
    figure = analysis_table.draw([one, two], rows="R3,R4")
    axes = panels_of(figure, 2, 2)
    limits = [[ax.collections[0].get_clim() for ax in row] for row in axes]
    assert limits[0][0] == limits[0][1] and limits[1][0] == limits[1][1]
    low, high = limits[1][0]
    assert low == -high < 0
    style.plt.close(figure)


def test_other_runs_take_part_in_the_plane_unseen(tmp_path):
    drawn = path_run(tmp_path / "2L", turning())
    other = path_run(tmp_path / "3L", 5 * turning()[:, ::-1], n_layers=3)
    figure = analysis_table.draw([drawn], rows="R1", plane=[other.folder])
    path = panels_of(figure, 1, 1)[0, 0].get_lines()[1].get_xydata()
    plane = pca.joint_pca([drawn, other])
    assert np.array_equal(path, plane.project(pca.losses_through_training(drawn)[1]))
    style.plt.close(figure)


def test_a_path_of_one_snapshot_is_one_line(one, tmp_path, capsys):
    short = {name: values[:2] for name, values in one.measurements.items()}  # one is untrained
    np.savez(one.folder / "measurements.npz", **short)
    out = tmp_path / "f.png"
    assert trajectories.main([str(one.folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "two snapshots" in error and not out.exists()


def test_an_unknown_row_is_one_line(one, tmp_path, capsys):
    out = tmp_path / "f.png"
    assert analysis_table.main([str(one.folder), "--rows", "R2,R10", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "R10" in error and not out.exists()


# ablations and smeared keys


def test_ablated_heads_have_the_colour_of_their_class_and_its_sum(two):
    figure = ablations.draw([two])
    axes = panels_of(figure, 3, 1)
    attribution = two.ablations["band_attribution"]
    for layer, kind in (0, "other"), (1, "matches prefixes"):
        colour = style.HEAD_COLOURS[kind]
        shown = [line.get_ydata() for line in axes[1, 0].get_lines() if line.get_color() == colour]
        assert [list(y) for y in shown] == [
            *attribution[:, layer].T.tolist(),
            attribution[:, layer].sum(axis=1).tolist(),
        ]
    assert texts(axes[1, 0]) == "1:0 0:1"  # change most at the end, but for 0:0, which is unclear
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes[1, 0].collections]
    assert np.isin((attribution[:, 1, 0] + 0.01).round(6), np.round(bands, 6)).all()
    assert "1,200 for ablations" in figure.get_supxlabel()
    style.plt.close(figure)


def test_smeared_models_are_below_plain_ones_and_windows_are_their_median(tmp_path, one):
    changes = [
        {"start_tokens": start * 100_000, "end_tokens": (start + 10) * 100_000}
        for start in (4, 6, 20)
    ]
    seeds = [
        load_run(make_run(tmp_path / f"s{n}", 1, smear=True, change=change, seed=n))
        for n, change in enumerate(changes)
    ]
    figure = smear.draw([one, *seeds])
    plain, plain_two, smeared, _ = figure.axes
    assert len(smeared.get_lines()) == 1 + 3 and len(plain.get_lines()) == 1 + 1
    (window,) = smeared.patches
    assert (window.get_x(), window.get_width()) == pytest.approx((0.6, 1.0))
    assert "N/A" in texts(plain_two)
    style.plt.close(figure)


def test_seeds_are_compared_on_the_same_examples(tmp_path):
    folders = [make_run(tmp_path / f"s{n}", 1, seed=n) for n in range(2)]
    first, second = map(load_run, folders)
    score = first.measurements["icl_band_score"]
    for folder in folders:
        np.savez(folder / "evaluation.npz", **first.measurements | {"icl_band_score": score - 1})
        figure = smear.draw([load_run(some) for some in folders])
        shown = [line.get_ydata() for line in figure.axes[0].get_lines()[1:]]
        more = folder is folders[1]  # by then all have been measured on more
        assert np.array_equal(shown[0], score - 1 if more else score)
        assert np.array_equal(
            shown[1], score - 1 if more else second.measurements["icl_band_score"]
        )
        style.plt.close(figure)


@pytest.mark.parametrize("script", [ablations, analysis_table, smear, trajectories])
def test_one_run_without_a_window_is_enough(script, one, tmp_path):
    out = tmp_path / "f.png"
    assert script.main([str(one.folder), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
