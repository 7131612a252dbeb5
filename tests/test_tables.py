"""Every claim's criterion, both ways, on records made by hand; README and records say the same."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from plots import analysis, tables
from plots.checks import CLAIMS, NONE, Check, check, evaluated, verdict
from plots.runs import load_all
from tests.records_by_hand import GOOD, WORST, make_run, make_world

ROOT = Path(__file__).parent.parent
BY_NAME = {claim.name: claim for claim in CLAIMS}
# claims about what no small model can show, and about how many models there are
BEYOND = ("Q11", "Q12 (A3)", "Q16")
NAMES = [name for name in BY_NAME if name not in BEYOND]


def judge(name, folder):
    return verdict(list(BY_NAME[name].judge(load_all(folder))))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("good") / "mini")


@pytest.fixture(scope="module")
def worst(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("worst") / "mini", **WORST)


@pytest.mark.parametrize("name", NAMES)
def test_records_that_meet_a_claim_reproduce_it(good, name):
    assert judge(name, good) == "reproduced", [str(c) for c in BY_NAME[name].judge(load_all(good))]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Q13 (A4)"])
def test_records_that_do_not_meet_it_do_not(worst, name):
    found = [str(c) for c in BY_NAME[name].judge(load_all(worst))]
    assert judge(name, worst) == "not reproduced", found


def test_heads_that_do_one_or_the_other_are_no_induction_heads(tmp_path):
    """In the worst world one-layer models have some that do both."""
    assert judge("Q13 (A4)", make_world(tmp_path / "mini", copying=-0.99)) == "not reproduced"


def test_what_is_half_way_when_is_told(good):
    """By straight ways from 0 to the end of training, half of them at times of the records'."""
    told = [str(found) for found in BY_NAME["Q3"].judge(load_all(good))]
    assert "in-context learning after prefix matching (M tokens) +0.07" in told
    assert "nats of copying after it (M tokens) +0.48" in told


def test_a_model_that_never_changes_is_not_sooner_than_others(tmp_path):
    world = make_world(tmp_path / "mini")
    told = world / "2L-smear" / "summary.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"phase_change": None}))
    late = [c for c in BY_NAME["Q8"].judge(load_all(world)) if c.what.startswith("two layers")]
    assert [check.holds for check in late] == [{"2L-smear": False}]


@pytest.mark.parametrize(
    "name, lacks", [("Q9", "band_attribution"), ("Q10", "before_and_after")], ids=["Q9", "Q10"]
)
def test_ablations_from_before_there_was_a_window_are_left_out(tmp_path, name, lacks):
    """One was set by hand since; and those of two positions alone."""
    world = make_world(tmp_path / "mini")
    records = world / "2L" / "ablations.npz"
    arrays = {key: values for key, values in np.load(records).items() if key != lacks}
    np.savez(records, **arrays)
    named = [found for check in BY_NAME[name].judge(load_all(world)) for found in check.holds]
    assert "3L" in str(named) and "2L" not in [found.split()[0] for found in named]


# the last value of a knob that still counts, and one that does not
@pytest.mark.parametrize(
    "name, knob, counts, does_not",
    [
        ("Q1", "before", 0.19, 0.21),
        ("Q1", "end", -0.48, -0.5),
        ("Q1", "window", True, False),
        ("Q2", "before", -0.08, -0.1),
        ("Q3", "apart", -2, 3),
        ("Q4", "one_window", False, True),
        ("Q4", "one_prefix", 0.39, 0.4),
        ("Q4", "late_bump", 0.0, 0.3),
        ("Q4", "prefix", 0.4, 0.39),
        ("Q4", "copying", 0.01, -0.01),
        ("Q4", "bump", 0.3, 0.0),
        ("Q5", "late_bump", 0.0, 0.3),
        ("Q5", "window", True, False),
        ("Q6", "slope_before", -0.049, -0.051),
        ("Q6", "slope_before", 0.049, 0.051),
        ("Q6", "slope_after", -0.051, -0.049),
        ("Q6", "one_slope", -0.049, -0.051),
        ("Q7", "turn", 46, 44),
        ("Q7", "turn_after", 46, 44),
        ("Q7", "one_turn", 44, 46),
        ("Q7", "second_turn", 44, 46),
        ("Q8", "smear_end", -0.33, -0.31),
        ("Q8", "smear_end", -0.49, -0.51),
        ("Q8", "smear_half", 44, 45),
        ("Q9", "other_attribution", 0.0, 0.02),
        ("Q9", "attribution", 0.3, -0.3),
        ("Q9", "left", -0.09, -0.11),
        ("Q9", "left", 0.09, 0.11),
        ("Q10", "along", -0.21, -0.19),
        ("Q12 (A1)", "layer", -1, -2),
        ("Q12 (A2)", "mlp_layer", -2, -1),
        ("Q13 (A4)", "copying", 0.0, -0.99),
        ("Q13 (A5)", "eigenvalues", 1.0, -1.0),
        ("Q13 (A6)", "eigenvalues", 1.0, -1.0),
        ("Q14 (score)", "spread", 0.12, 0.13),
        ("Q14 (F16)", "context_spread", 0.08, 0.1),
        ("Q14 (F17)", "early_share", 0.51, 0.49),
        ("Q14 (note 27)", "steeper", 1e-5, -1e-5),
        ("Q15", "order", (-0.1, 0.05), (0.1, 0.05)),
        ("Q15", "order", (-0.1, 0.05), (-0.1, -0.05)),
        ("Q17", "warmup", 3.3e6, 3.5e6),
        ("Q17", "decay_later", (1201, 0.01), (1200, 0.01)),
        ("Q18", "previous", 0.89, 0.88),
        ("Q18", "copies", 0.56, 0.54),
        ("Q18", "longer", 0.06, 0.04),
    ],
)
def test_every_criterion_is_where_the_claim_says(tmp_path, name, knob, counts, does_not):
    assert judge(name, make_world(tmp_path / "counts", **{knob: counts})) == "reproduced"
    assert judge(name, make_world(tmp_path / "not", **{knob: does_not})) != "reproduced"


@pytest.mark.parametrize("name, least", [("Q13 (A5)", 0.5), ("Q13 (A6)", 0.25)])
def test_how_large_a_coefficient_has_to_be(good, monkeypatch, name, least):
    """In each of the two; 0.25 is two standard errors of 65 heads."""
    heads = np.zeros((2, 65))
    monkeypatch.setattr(tables.claims_of_models, "of_heads", lambda *_: heads)
    for low, wanted in (least + 1e-6, "reproduced"), (least - 1e-6, "partly"):
        monkeypatch.setattr(analysis, "pearson", lambda *_, low=low: low)
        monkeypatch.setattr(analysis, "spearman", lambda *_: 0.9)
        assert judge(name, good) == wanted


@pytest.mark.parametrize("after, wanted", [(-0.21, "reproduced"), (-0.19, "partly")])
def test_in_context_learning_at_least_doubles(tmp_path, after, wanted):
    world = make_world(tmp_path / "mini", before=-0.1, after=after, end=after)
    assert judge("Q1", world) == wanted


@pytest.mark.parametrize(
    "others, wanted",
    [
        ([0.03, 0, 0], "reproduced"),  # 91 % of the positive attribution are the one head's
        ([0.04, 0, 0], "partly"),  # 88 %
        ([0.01, 0.01, 0], "partly"),  # 94 %, but most others have a part
    ],
)
def test_how_much_of_the_attribution_other_heads_may_have(tmp_path, others, wanted):
    world = make_world(tmp_path / "mini")
    path = world / "2L" / "ablations.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["band_attribution"][1:, [0, 0, 1], [0, 1, 1]] = others
    np.savez(path, **arrays)
    assert judge("Q9", world) == wanted


@pytest.mark.filterwarnings("error")
def test_a_change_that_training_cuts_off_is_not_asked_what_came_after(tmp_path):
    world = make_world(tmp_path / "mini")
    for name in ("2L", "2L-d64"):
        path = world / name / "summary.json"
        summary = json.loads(path.read_text())
        summary["phase_change"]["end_tokens"] = int(
            load_all(world)[name].measurements["tokens"][-1]
        )
        path.write_text(json.dumps(summary))
    found = [str(c) for c in BY_NAME["Q15"].judge(load_all(world))]
    assert "after, width: no records" in found and "before, width: no records" in found
    for name, what in ("Q1", "speed afterwards"), ("Q2", "share"), ("Q7", "degrees after"):
        judged = {c.what: c.holds for c in BY_NAME[name].judge(load_all(world))}
        assert "3L" in judged[what] and "2L" not in judged[what] and all(judged[what].values())
    assert "2L" in judged["degrees within"]


@pytest.mark.parametrize("name", BY_NAME)
def test_without_runs_there_are_no_records(name):
    assert verdict(list(BY_NAME[name].judge({}))) == "no records"


@pytest.mark.parametrize(
    "name, missing",
    [
        ("Q6", "evaluation.npz"),
        ("Q7", "evaluation.npz"),
        ("Q9", "ablations.npz"),
        ("Q10", "ablations.npz"),
        ("Q13 (A5)", "circuits.json"),
        ("Q14 (F16)", "evaluation.npz"),
        ("Q18", "substitute-previous.json"),
    ],
)
def test_what_is_not_recorded_is_not_judged(tmp_path, name, missing):
    world = make_world(tmp_path / "mini")
    for path in world.glob(f"*/{missing}"):
        path.unlink()
    assert judge(name, world) == ("partly" if name == "Q18" else "no records")


@pytest.mark.parametrize(("n_examples", "enough"), [(10_000, True), (3000, True), (2990, False)])
def test_a_curve_over_the_context_needs_300_examples(tmp_path, n_examples, enough):
    make_run(tmp_path / "2L", GOOD, 2)
    (tmp_path / "2L" / "evaluation.npz").unlink()
    (run,) = load_all(tmp_path).values()
    run.made["recipe"] |= {"n_examples": n_examples, "whole": 0.1}
    assert evaluated([run]) == [run] * enough


def test_a_claim_of_which_a_part_is_not_recorded_is_reproduced_partly(tmp_path):
    world = make_world(tmp_path / "mini")
    assert judge("Q8", world) == "reproduced"
    (world / "2L-smear" / "summary.json").unlink()
    assert judge("Q8", world) == "partly"


def test_a_model_without_a_window_speaks_for_itself_alone(tmp_path):
    world = make_world(tmp_path / "mini")
    summary = json.loads((world / "3L" / "summary.json").read_text())
    (world / "3L" / "summary.json").write_text(json.dumps(summary | {"phase_change": None}))
    within, one_layer, second, after, *more = BY_NAME["Q7"].judge(load_all(world))
    for deeper in within, after:
        assert [name for name, holds in deeper.holds.items() if not holds] == ["3L"]
    for controls in one_layer, second, *more:
        assert all(controls.holds.values()) and controls.holds


def test_a_head_in_the_first_half_of_a_deep_model(tmp_path):
    for layer, wanted in (11, "reproduced"), (12, "not reproduced"):
        make_run(tmp_path / str(layer) / "24L", GOOD | {"layer": layer}, 24)
        assert judge("Q12 (A3)", tmp_path / str(layer)) == wanted


def test_what_only_large_models_show_is_not_asked_of_small_ones(good):
    assert judge("Q12 (A3)", good) == "not testable at this scale"
    assert judge("Q11", good) == "no records"


@pytest.mark.parametrize(
    "parameters, attention, wanted",
    [
        (4e5, 0.9, "not testable at this scale"),
        (13e9, 0.66, "reproduced"),
        (13e9, 0.64, "not reproduced"),
    ],
)
def test_pattern_matching_is_asked_of_large_models(tmp_path, parameters, attention, wanted):
    run = tmp_path / "mini" / "2L"
    make_run(run, GOOD, 2)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"parameters": parameters}))
    best = {"head": "1:0", "attention": attention, "chance": 0.25}
    (run / "tasks.json").write_text(json.dumps({"pattern_matching": {"heads": [best]}}))
    assert judge("Q11", run.parent) == wanted


def test_the_evidence_is_counted(good):
    runs = load_all(good)
    models, examples, ablations, snapshots = BY_NAME["Q16"].judge(runs)
    assert (models.values[""], examples.values[""], snapshots.values[""]) == (13, 88, 89)
    assert ablations.values[""] == 4 * 2 * (2 + 3 + 4 + 2 + 5 + 6 + 2 + 2 + 2 + 2)
    some = runs["2L"]
    some.measurements.update(per_token_loss=np.zeros((200, 10_000)), tokens=np.arange(200))
    some.ablations["examples"] = np.array([10_000, 9_999])
    assert not list(BY_NAME["Q16"].judge({"one": some}))[1].holds[""]
    some.ablations["examples"] = np.array([10_000])
    seeds = {str(n): some for n in range(34)}
    models, examples, _, snapshots = BY_NAME["Q16"].judge(seeds)
    assert models.values[""] == 1 and examples.holds[""] and snapshots.holds[""]
    sizes = {
        name: dataclasses.replace(run, made={**run.made, "config": {"n_layers": name}})
        for name, run in seeds.items()
    }
    assert next(BY_NAME["Q16"].judge(sizes)).holds[""]


def test_the_verdict_counts_what_holds():
    def of(*holds):
        return verdict([Check("", dict.fromkeys("abcd", 1.0), dict(enumerate(holds)), "")])

    assert of(True, True) == "reproduced"
    assert of(True, False) == "partly"
    assert of(True, False, False) == "not reproduced"
    assert of() == "no records"  # a value that is only told
    large = Check("", {"a": 1.0}, {}, "", of_large=True)
    assert verdict([large]) == "not testable at this scale"
    assert verdict([]) == verdict([check("", {}, bool)]) == "no records"
    assert verdict([check("", {"a": 1}, bool), check("", {}, bool)]) == "partly"


def test_how_a_check_is_told():
    values = {"1L": 0.1, "2L": 0.3, "3L": NONE}
    assert (
        str(check("share", values, lambda x: x < 0.2))
        == "share +0.10 to +0.30 (1 of 3, not 2L, 3L)"
    )
    assert str(check("share", {"1L": 0.25}, lambda x: x > 1, ".0%")) == "share 25% (1L: fails)"
    assert str(check("shares", {"1L": 0.25, "2L": 0.25}, form=".0%")) == "shares 25%"
    assert str(check("score", {"1L": NONE})) == "score none"
    assert str(check("bump", {"1L": True, "2L": True}, bool, "")) == "bump (2 of 2)"
    assert str(check("score", {})) == "score: no records"


def test_the_tables_have_a_row_for_every_claim_and_run(good):
    found = tables.tables(good)
    header, _, *rows = found["claims"].splitlines()
    assert header == "|  | claim | paper | ours | verdict | figure | command |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {claim.name}" for claim in CLAIMS]
    header, _, *rows = found["runs"].splitlines()
    assert all(row.count(" | ") == header.count(" | ") for row in rows)
    names = [row.split(" | ")[0] for row in rows]
    assert names[0] == "| one layer, seed 0" and names[-1] == "| two layers, width 192, seed 0"
    assert "| two layers, smeared keys, seed 0" in names
    assert rows[1].startswith(
        "| two layers, seed 0 | 3.40 to 4.60 | 0.50 to 0.50 | -0.05 to -0.39 | 46, 45 of 89 |"
        " -0.40 ± 0.10 | -0.40 ± 0.02 | 0.50 (1:0)"
    )


def test_the_tables_are_put_between_their_comments(good, tmp_path, capsys):
    page, other = tmp_path / "README.md", tmp_path / "other.md"
    other.write_text("<!-- runs -->\n<!-- end of runs -->\n")
    places = (
        "<!-- claims -->\n<!-- end of claims -->\n",
        "<!-- runs -->\nold\n<!-- end of runs -->\n",
    )
    empty = "top\n{}middle\n{}end\n".format(*places)
    page.write_text(empty)
    assert tables.main([str(good), "--write", str(page), str(other)]) == 0
    assert tables.between_comments(other.read_text(), "runs")[2] == tables.tables(good)["runs"]
    once = page.read_text()
    assert tables.main([str(good), "--write", str(page)]) == 0
    assert page.read_text() == once
    assert "\nold\n" not in once
    for name, table in tables.tables(good).items():
        assert tables.between_comments(once, name)[2] == table
    assert re.sub(r"(?m)^\|.*\n", "", once) == empty.replace("old\n", "")


@pytest.mark.parametrize("text", ["nothing", "<!-- claims -->\nand no end"])
def test_a_page_without_a_place_is_told_in_one_line(good, tmp_path, capsys, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    assert tables.main([str(good), "--write", str(page)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "<!-- claims -->" in error
    assert page.read_text() == text
    assert tables.main([str(tmp_path)]) == 2


@pytest.mark.parametrize("content", [None, b"<!-- claims -->\n\xff<!-- end of claims -->"])
def test_a_page_that_cannot_be_read_leaves_all_as_they_are(good, tmp_path, capsys, content):
    page, bad = tmp_path / "README.md", tmp_path / "bad.md"
    page.write_text("<!-- claims -->\n<!-- end of claims -->")
    if content:
        bad.write_bytes(content)
    assert tables.main([str(good), "--write", str(page), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.md" in error
    assert page.read_text() == "<!-- claims -->\n<!-- end of claims -->"


def test_the_tables_are_printed(good, capsys):
    assert tables.main([str(good)]) == 0
    assert capsys.readouterr().out == "\n\n".join(tables.tables(good).values()) + "\n"


def test_the_pages_and_the_records_say_the_same(monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = Path("results/mini")
    if not list(folder.glob("*/summary.json")):
        pytest.skip("no records of runs in results/mini")
    found = tables.tables(folder)
    for name, page in ("claims", "README.md"), ("runs", "results/README.md"):
        assert tables.between_comments(Path(page).read_text(), name)[2] == found[name]


def test_only_a_picture_that_is_drawn_is_linked(tmp_path):
    world = make_world(tmp_path / "mini")
    picture = world / "figures" / "ablations.png"
    picture.parent.mkdir()
    picture.touch()
    rows = {row[""]: row for row in tables.claims_table(world)}
    assert rows["Q10"]["figure"] == f"[ablations]({picture})"
    assert rows["Q1"]["figure"] == "" and "phase_change.py" in rows["Q1"]["command"]
