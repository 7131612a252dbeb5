"""What is drawn from the records of a run: where its phase change is, and what its summary says."""

import numpy as np
import pytest

from heads import HEAD_SCORES
from loading import choose_snapshots
from records import read_records, write_records
from safety import BadInput, write_json
from summary import conclusion, summarise

CHANGE = 1 / (1 + np.exp(-(np.arange(101) - 60) / 4))  # of 101 snapshots


def touch_snapshots(folder):
    (folder / "snapshots").mkdir()
    for n in range(101):
        (folder / "snapshots" / f"step_{10 * n:07d}.pt").touch()


def make_records(icl, prefix):
    heads = np.zeros((2, 2), np.float32)
    records = []
    for n, (score, best) in enumerate(zip(icl, prefix, strict=True)):
        matching = heads.copy()
        matching[1, 0] = best
        records.append(
            {
                "step": 10 * n, "tokens": 1000 * n, "loss": 3.0, "per_token_loss": np.zeros(9),
                "icl_score": score, "icl_score_error": 0.01,
                "icl_band_score": score, "icl_band_score_error": 0.01,
                "prefix_matching": matching, "previous_token": heads + 0.3, "copying": heads + 0.5,
            }
        )  # fmt: skip
    return records


def test_a_summary_tells_where_the_phase_change_is():
    records = make_records(-0.05 - 0.4 * CHANGE, 0.03 + 0.7 * CHANGE)
    asked = []

    def measure_again(index):
        asked.append(index)
        return records[index]

    summary = summarise(records, measure_again)
    window = summary["phase_change"]
    assert 470 <= window["start_step"] <= 510 and 690 <= window["end_step"] <= 730
    assert window["start_tokens"] == 100 * window["start_step"]
    assert window["icl_half_way_snapshot"] == window["prefix_matching_half_way_snapshot"]
    assert asked == [100, window["start_step"] // 10, window["end_step"] // 10]
    assert summary["icl_before"] == pytest.approx(-0.07, abs=0.02)
    assert summary["icl_after"] == pytest.approx(-0.43, abs=0.02)
    assert summary["best_prefix_matching"] == {
        "head": "1:0",
        "score": pytest.approx(0.73, abs=1e-3),
    }
    assert summary["heads"][2]["class"] == "induction"
    assert "phase change from" in conclusion(summary)


def test_every_number_of_a_summary_is_of_its_snapshot_and_its_score():
    """The change is in the score between bands alone; what is measured again tells its index."""
    records = make_records(-0.4 * CHANGE, 0.7 * CHANGE)
    for record in records:
        record["icl_score"] = -0.4 * float(record["step"] > 100)

    def measure_again(index):
        names = ("icl_score", "icl_score_error", "icl_band_score", "icl_band_score_error")
        told = {name: index + n / 10 for n, name in enumerate(names)}
        heads = {name: np.eye(2) * index / 1000 + n / 10 for n, name in enumerate(HEAD_SCORES)}
        return {"loss": index, "per_token_loss": np.zeros(7), **told, **heads}

    summary = summarise(records, measure_again)
    change = summary["phase_change"]
    places = change["start_step"] // 10, change["end_step"] // 10, 100
    assert 47 <= places[0] <= 51 and change["icl_half_way_snapshot"] == 60
    for when, index in zip(("before", "after", "score"), places, strict=True):
        assert summary[f"icl_{when}"] == index and summary[f"icl_{when}_error"] == index + 0.1
        assert summary[f"icl_band_{when}"] == index + 0.2
        assert summary[f"icl_band_{when}_error"] == index + 0.3
        matching = summary["best_prefix_matching" + f"_{when}" * (when != "score")]
        assert matching["score"] == pytest.approx(index / 1000)
    assert summary["best_previous_token"]["score"] == pytest.approx(0.3)  # of all alike
    line = conclusion(summary)
    assert f"between bands {places[0] + 0.2:+.2f} -> {places[1] + 0.2:+.2f}" in line
    assert "at the end +100.20 +- 100.30 (token 500 minus token 50 +100.00 +- 100.10)" in line


def test_the_best_head_is_half_way_on_its_own_way():
    """Another matches half of all prefixes from the start: the best goes from 0.5 to 0.73."""
    records = make_records(-0.4 * CHANGE, 0.03 + 0.7 * CHANGE)
    for record in records:
        record["prefix_matching"][0, 1] = 0.5
    window = summarise(records, records.__getitem__)["phase_change"]
    assert window["icl_half_way_snapshot"] == 60
    assert window["prefix_matching_half_way_snapshot"] == 67  # the logistic passes 0.84 at 66.5


def test_a_summary_without_a_phase_change_says_so():
    summary = summarise(
        records := make_records(np.full(50, -0.1), np.full(50, 0.03)), records.__getitem__
    )
    assert summary["phase_change"] is None and summary["icl_before"] is None
    assert conclusion(summary).startswith("no phase change")


def test_chosen_snapshots_are_even_with_those_of_the_phase_change(tmp_path):
    write_records(tmp_path / "measurements.npz", make_records(-0.4 * CHANGE, 0.7 * CHANGE))
    touch_snapshots(tmp_path)
    paths, window = choose_snapshots(tmp_path, 5)
    assert 470 <= window[0] <= 510 and 690 <= window[1] <= 730
    assert list(paths) == sorted({0, 250, 500, 750, 1000, *window})
    assert all(path.name == f"step_{step:07d}.pt" for step, path in paths.items())
    assert len(choose_snapshots(tmp_path, 1000)[0]) == 101
    write_records(tmp_path / "measurements.npz", make_records(0 * CHANGE, 0 * CHANGE))
    paths, window = choose_snapshots(tmp_path, 3)
    assert list(paths) == [0, 500, 1000] and window == ()
    (tmp_path / "measurements.npz").unlink()
    with pytest.raises(BadInput, match="not measured yet"):
        choose_snapshots(tmp_path, 3)


def test_the_summary_tells_where_the_phase_change_is(tmp_path):
    """Not the records, once training is finished: somebody may have set it by hand."""
    records = make_records(-0.4 * CHANGE, 0.7 * CHANGE)
    touch_snapshots(tmp_path)
    write_records(tmp_path / "measurements.npz", records)
    found = choose_snapshots(tmp_path, 2)[1]
    summary = summarise(records, records.__getitem__, (30, 80))
    assert "phase change, set by hand, from 0.03M to 0.08M" in conclusion(summary)
    assert summary["icl_band_before"] == pytest.approx(records[30]["icl_band_score"])
    assert summary["icl_band_after"] == pytest.approx(records[80]["icl_band_score"])
    write_json(tmp_path / "summary.json", summary)
    assert choose_snapshots(tmp_path, 2)[1] == (300, 800)
    (tmp_path / "snapshots" / "step_0000300.pt").unlink()  # what is not there cannot be ablated
    assert choose_snapshots(tmp_path, 2)[1] == found
    write_json(tmp_path / "summary.json", summary | {"phase_change": None})
    assert choose_snapshots(tmp_path, 2)[1] == ()


def test_records_come_back_exactly(tmp_path):
    noise = np.random.default_rng(0).normal(size=(3, 2, 5))
    records = [{"step": n, "a": row, "b": np.float32(row)} for n, row in enumerate(noise)]
    write_records(tmp_path / "a.npz", records)
    for record, found in zip(records, read_records(tmp_path / "a.npz"), strict=True):
        assert all(np.array_equal(record[name], found[name]) for name in record)
        assert found["b"].dtype == np.float32
