"""The kernels' comparisons on a CPU: every one is checked against the definition, timed and told in
a line; what computes something else is not timed.
"""

import dataclasses

import pytest
import torch

import bench_kernels
from bench_kernels import COMPARISONS, Comparison, cases, line, pairs, rows
from kernels.attention import visible
from safety import BadInput

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(bench_kernels, "CHECKED", 50)
    monkeypatch.setattr(bench_kernels, "INPUT_BYTES", 0)
    monkeypatch.setattr(bench_kernels, "AVAILABLE_CORES", 1)
    monkeypatch.setattr(bench_kernels, "matmul_ceiling", lambda device, dtype: 1e12)


def small(what):
    """The op's first comparison in each mode, its timed batch as small as the checked one."""
    first = {}
    for comparison in COMPARISONS[what](CPU):
        first.setdefault(comparison.mode, comparison)
    return [
        dataclasses.replace(
            c, make=lambda device, dtype, small, make=c.make: make(device, dtype, True)
        )
        for c in first.values()
    ]


@pytest.mark.parametrize("what", COMPARISONS)
def test_each_comparison_gives_a_row_for_every_contender(what):
    comparisons = small(what)
    records = list(rows(comparisons, CPU, torch.float32, seconds=0))
    assert len(records) == sum(len(c.contenders) for c in comparisons)
    ours = [record for record in records if record["what"] == "ours"]
    assert all(record["times_ours"] == 1 and record["n"] >= 5 for record in ours)
    assert {record.get("not_timed") for record in records} <= {None, "needs a GPU"}
    assert len([record for record in records if "milliseconds" in record]) >= 2
    for record in records:
        assert record["what"] in line(record)


def doubling(wrong, name):
    return Comparison(
        title="doubling",
        mode="forward",
        flops=1,
        shape={},
        make=lambda device, dtype, small: [torch.randn(8, 8, dtype=dtype)],
        exact=lambda x: 2 * x,
        contenders={"ours": lambda x: x + x, name: lambda x: x * wrong},
    )


@pytest.mark.parametrize("wrong, by", [(2.001, "5.0e-04"), (float("nan"), "nan")])
def test_a_wrong_contender_is_not_timed(wrong, by):
    ours, theirs = rows([doubling(wrong, "theirs")], CPU, torch.float32, seconds=0)
    assert ours["relative_error"] == 0 and "milliseconds" in ours
    assert theirs["not_timed"] == f"wrong by {by}" and "milliseconds" not in theirs


def test_nothing_is_timed_if_ours_is_wrong():
    with pytest.raises(RuntimeError, match="wrong by"):
        list(rows([doubling(2.001, "ours")], CPU, torch.float32, seconds=0))


def test_cases_are_chosen_by_parts_of_their_names():
    titles = [case.title for case in cases("attention", CPU, ["window 128", "smeared"])]
    assert len(set(titles)) == 2 and all("smeared" in t or "window 128" in t for t in titles)
    assert len(cases("attention", CPU)) == len(list(COMPARISONS["attention"](CPU)))
    with pytest.raises(BadInput, match="none is named so.*'causal, T 512"):
        cases("attention", CPU, ["T 99"])


@pytest.mark.parametrize("window", [None, 1, 3, 10, 99])
def test_pairs_are_what_the_mask_lets_through(window):
    windows = None if window is None else (window,)
    assert pairs(10, window) == visible(torch.arange(10)[None], 10, windows).sum()
