"""From a snapshot or a run to what each head causes, by plainer ways; and the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ablate
import measure
import metrics
import substitute
import summary
from attribution import Ablations, name_sets
from model import ModelConfig, Transformer
from records import read_records, write_records
from snapshots import save_snapshot
from sweep import ablation, mean_results, preserving_patterns
from tests.circuits_by_hand import N_TOKENS, induction_circuit
from vocabulary import PYTHON_1024

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    n_layers=2, d_model=32, n_heads=2, d_head=16, d_mlp=64, n_ctx=512, d_vocab=1024, smear=True
)
HEADS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def make(seed, config=CONFIG):
    """Untrained, but loud enough that heads differ."""
    model = Transformer(config).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.dim() > 1 else 1
    return model


def save(path, model, corpus, text_file, step=5):
    origin = {"data": str(text_file), "name": corpus.name, "sha256": corpus.sha256}
    save_snapshot(path, model, step, 100 * step, origin)
    return path


@pytest.fixture
def snapshot(corpus, text_file, workplace):
    return save(workplace / "snapshot.pt", make(0), corpus, text_file)


@pytest.fixture
def command(text_file):
    def arguments(path, *more):
        data = ["--data", str(text_file), "--vocabulary", PYTHON_1024]
        return [str(path), "--examples", "6", "--device", "cpu", *data, *more]

    return arguments


def record_of(path, command, *flags, out="out.npz"):
    assert ablate.main(command(path, "--heads", "0:1,1:1", "--out", out, *flags)) == 0
    return read_records(Path(out))[0]


# a snapshot


def losses_with(model, examples, heads):
    hook = preserving_patterns(model, examples.inputs, ablation(heads))
    with torch.no_grad():
        return model.losses(examples.inputs, examples.targets, hook).double().numpy()


def test_a_record_is_what_two_passes_and_the_definitions_say(snapshot, command, corpus):
    record = record_of(snapshot, command)
    model, examples = make(0), measure.draw_examples(corpus, 6)
    clean = losses_with(model, examples, [])
    changes = {head: losses_with(model, examples, [head]) - clean for head in HEADS}
    expected = {
        "icl_attribution": lambda x: x[:, 499] - x[:, 49],
        "band_attribution": lambda x: x[:, 399:511].mean(1) - x[:, 29:70].mean(1),
        "loss_change": lambda x: np.array([x[n, i] for n, i in enumerate(examples.scored[:, -1])]),
    }
    together = losses_with(model, examples, [(0, 1), (1, 1)]) - clean
    summed = changes[0, 1] + changes[1, 1]
    for name, of in expected.items():
        for head, change in changes.items():
            assert record[name][head] == pytest.approx(of(change).mean(), abs=1e-4)
            error = of(change).std(ddof=1) / 6**0.5  # paired: of the differences
            assert record[f"{name}_error"][head] == pytest.approx(error, abs=1e-4)
        for what, change in ("sum", summed), ("together", together):
            assert record[f"{what}_{name}"][0] == pytest.approx(of(change).mean(), abs=1e-4)
            error = of(change).std(ddof=1) / 6**0.5
            assert record[f"{what}_{name}_error"][0] == pytest.approx(error, abs=1e-4)
    assert record["icl_score"] == pytest.approx((clean[:, 499] - clean[:, 49]).mean(), abs=1e-4)
    assert "before_and_after" not in record  # that takes a run


def test_mean_results_are_those_of_all_examples(snapshot, command, corpus):
    """Five of them, which chunks of two cannot share evenly."""
    record = record_of(snapshot, command, "--mean", "--examples", "5")
    model, examples = make(0), measure.draw_examples(corpus, 5)
    means = mean_results(model, examples.inputs)
    hooks = (
        preserving_patterns(model, examples.inputs, ablation(heads, means))
        for heads in ([], [(0, 0)])
    )
    with torch.no_grad():
        clean, ablated = (model.losses(examples.inputs, examples.targets, hook) for hook in hooks)
    expected = (ablated - clean)[:, 499].mean() - (ablated - clean)[:, 49].mean()
    assert record["icl_attribution"][0, 0] == pytest.approx(expected.item(), abs=2e-5)


def test_sums_and_sets_together_are_told_apart(snapshot, command, capsys):
    record = record_of(snapshot, command)
    out = capsys.readouterr().out
    for told, name in ("sum over", "sum"), ("together,", "together"):
        (line,) = re.findall(rf"^{told} heads 0:1, 1:1 +([+-]\d\.\d+)", out, re.MULTILINE)
        assert float(line) == pytest.approx(record[f"{name}_icl_attribution"][0], abs=1e-3)


def test_the_table_shows_the_record_in_the_order_of_effect(snapshot, command, capsys):
    record = record_of(snapshot, command)
    out = capsys.readouterr().out
    rows = re.findall(r"^ +(\d):(\d) .*?([+-]\d\.\d{3}) \+- (\d\.\d{3})", out, re.MULTILINE)
    assert sorted((int(layer), int(head)) for layer, head, *_ in rows) == HEADS
    for layer, head, value, error in rows:
        place = int(layer), int(head)
        assert float(value) == pytest.approx(record["icl_attribution"][place], abs=1e-3)
        assert float(error) == pytest.approx(record["icl_attribution_error"][place], abs=1e-3)
    shown = [float(value) for _, _, value, _ in rows]
    assert shown == sorted(shown, reverse=True)
    assert json.loads(Path("out.json").read_text())["answer"] == out.splitlines()[-2]


@pytest.mark.parametrize(
    "flags", [["--mean"], ["--full"], ["--freeze-layernorm"], ["--full", "--mean"]]
)
def test_flags_change_what_they_name(snapshot, command, flags):
    usual = record_of(snapshot, command)
    changed = record_of(snapshot, command, *flags, out="changed.npz")
    assert changed["icl_score"] == pytest.approx(usual["icl_score"], abs=1e-4)  # clean is clean
    same = np.abs(changed["loss_change"] - usual["loss_change"]) < 1e-5
    # patterns after the last layer do not exist
    assert same.tolist() == [[False] * 2, [flags == ["--full"]] * 2]


def test_without_bands_the_rest_stays(snapshot, command):
    with_bands = record_of(snapshot, command)
    without = record_of(snapshot, command, "--no-bands", out="without.npz")
    assert "band_attribution" not in without
    for name in without:
        assert without[name] == pytest.approx(with_bands[name], abs=1e-5)


@pytest.mark.parametrize("processes, examples", [(2, 6), (3, 2)], ids=["even", "one idle"])
def test_processes_ablate_as_one(snapshot, command, processes, examples):
    flags = ["--mean", "--examples", str(examples)]
    one = record_of(snapshot, command, *flags)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = str(Path(ablate.__file__))
    arguments = command(snapshot, "--heads", "0:1,1:1", "--out", "all.npz", *flags)
    subprocess.run([sys.executable, *launch, script, *arguments], check=True, timeout=100)
    together = read_records(Path("all.npz"))[0]
    for name in one:
        assert together[name] == pytest.approx(one[name], abs=1e-4)


def test_all_other_heads_are_those_that_are_not_named():
    table = [{"head": f"{layer}:{head}"} for layer, head in HEADS]
    others = [(0, 0), (1, 0), (1, 1)]
    assert name_sets(table, "0:1") == {"head 0:1": [(0, 1)], "all other heads": others}
    assert list(name_sets(table, "0:0,0:1,1:0,1:1").values()) == [HEADS]


# what the answer says


def answer(attribution, together, heads=((1, 0),)):
    record = {"step": 5, "icl_score": -0.5, "examples": 9, "icl_attribution": np.array(attribution)}
    record |= {
        "together_icl_attribution": [together, 0.1],
        "icl_attribution_error": np.zeros((2, 2)),
    }
    record["together_icl_attribution_error"] = [0.01, 0.02]
    sets = {"these": list(heads), "the others": []} if heads else {}
    setup = type("Setup", (), {"sets": sets, "window": ()})
    return ablate.answer(setup, [record])


def test_the_answer_is_computed():
    assert "these carries 75% of the positive" in answer([[0.1, -0.9], [0.3, 0.0]], 0.3)
    without = answer([[0, 0], [0.3, 0]], 0.3)
    assert "score of -0.500 becomes -0.200 (+0.300 +- 0.010) without these" in without
    assert "-0.400 (+0.100 +- 0.020) without the others" in without
    assert "these carry 100%" in answer([[0.1, -0.9], [0.3, 0]], 0.3, [(0, 0), (1, 0)])
    assert "these carries 0%" in answer([[0.1, -0.9], [-0.3, 0]], -0.3)
    assert "these carries none" in answer([[-0.1, -0.9], [-0.3, 0]], -0.3)
    assert "no head matches prefixes" in answer([[0.1, 0.2], [0.0, 0.0]], 0, None)
    assert "that of 0:1, +0.200" in answer([[0.1, 0.2], [0.0, 0.0]], 0, None)


# a circuit that we know


@pytest.fixture(scope="module")
def repeated():
    rng = np.random.default_rng(0)
    rows = [np.tile(rng.choice(N_TOKENS - 1, 25, replace=False), 21)[:512] for _ in range(8)]
    rows = torch.from_numpy(np.stack(rows))
    return torch.cat([torch.full((8, 1), N_TOKENS - 1), rows[:, :-1]], dim=1), rows


def test_a_previous_token_head_matters_through_patterns_alone(repeated):
    """What it writes is read by the keys of the induction head: with patterns preserved it can go,
    with patterns recomputed induction goes with it.
    """
    model, (inputs, targets) = induction_circuit(), repeated

    def loss(hook=None):
        with torch.no_grad():
            return model.losses(inputs, targets, hook)[:, 30:].mean().item()

    def preserved(head):
        return preserving_patterns(model, inputs, ablation([head]), freeze_layernorm=True)

    assert loss(preserved((0, 0))) == pytest.approx(loss(), abs=1e-4)
    assert loss(ablation([(0, 0)])) > loss() + 0.5
    assert loss(preserved((1, 1))) > loss() + 0.5


# a run


@pytest.fixture
def run(corpus, text_file, workplace):
    """25 snapshots from one untrained model to another, with measurements that tell of a phase
    change in the middle.
    """
    (workplace / "run" / "snapshots").mkdir(parents=True)
    start, end, records = make(0).state_dict(), make(1).state_dict(), []
    model = make(0)
    for n, step in enumerate(range(0, 250, 10)):
        way = 1 / (1 + np.exp(-(n - 12) / 1.5))
        model.load_state_dict({name: torch.lerp(start[name], end[name], way) for name in start})
        path = workplace / "run" / "snapshots" / f"step_{step:07d}.pt"
        save(path, model, corpus, text_file, step)
        records.append({"step": step, "tokens": 100 * step, "icl_band_score": -0.5 * way})
    write_records(workplace / "run" / "measurements.npz", records)
    return workplace / "run"


def test_a_run_is_ablated_with_its_before_and_after_vector(run, command, corpus, capsys):
    assert ablate.main(command(run, "--heads", "1:0", "--snapshots", "3")) == 0
    out = capsys.readouterr().out
    records = read_records(run / "ablations.npz")
    measured = read_records(run / "measurements.npz")
    window = [int(measured[n]["step"]) for n in summary.find_phase_change(measured)]
    assert [int(r["step"]) for r in records] == sorted({0, 120, 240, *window})
    assert json.loads((run / "ablations.json").read_text())["answer"] in out
    since = [record for record in records if record["step"] >= window[0]]
    assert f"at {len(since)} snapshots from the phase change on" in out
    # the vector and the dot product by hand, at the last snapshot
    examples, own = measure.draw_examples(corpus, 6), []
    model = make(0)
    for step in window:
        weights = torch.load(run / "snapshots" / f"step_{step:07d}.pt", weights_only=True)
        model.load_state_dict(weights["weights"])
        own.append(losses_with(model, examples, [])[range(6), examples.scored[:, -1]])
    vector = (own[1] - own[0]) / ((own[1] - own[0]) ** 2).sum()
    model.load_state_dict(
        torch.load(run / "snapshots" / "step_0000240.pt", weights_only=True)["weights"]
    )
    for head in HEADS:
        change = losses_with(model, examples, [head]) - losses_with(model, examples, [])
        products = change[range(6), examples.scored[:, -1]] * vector
        assert records[-1]["before_and_after"][head] == pytest.approx(products.sum(), abs=1e-3)
        rest = products - products.sum() * vector * (own[1] - own[0])
        error = rest.std(ddof=1) * 6**0.5
        assert records[-1]["before_and_after_error"][head] == pytest.approx(error, abs=1e-3)
    assert "of what it did to the per-token losses" in out


def interrupted_after(n, monkeypatch):
    """Control-C comes when so many snapshots are made; -> what counts them."""
    made, record = [], Ablations.record

    def interrupted(self, *rest):
        if len(made) == n:
            raise KeyboardInterrupt
        made.append(1)
        return record(self, *rest)

    monkeypatch.setattr(Ablations, "record", interrupted)
    return made


def test_an_interrupted_sweep_goes_on(run, command, monkeypatch, capsys):
    arguments = command(run, "--heads", "1:0", "--snapshots", "4")
    assert ablate.main([*arguments, "--out", "whole.npz"]) == 0
    whole, made = read_records(Path("whole.npz")), interrupted_after(2, monkeypatch)
    assert ablate.main(arguments) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert len(read_records(run / "ablations-unfinished.npz")) == 2
    assert not (run / "ablations.npz").exists()  # figures would take it for all there is
    refused(capsys, [*arguments, "--mean"])
    made.clear()
    made += [1] * 3  # never 2 again
    assert ablate.main(arguments) == 0
    assert len(made) == 3 + len(whole) - 2  # only what was left
    resumed = read_records(run / "ablations.npz")
    assert not [*run.glob("*unfinished*")]
    for one, other in zip(whole, resumed, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_finished_sweep_is_extended_even_if_interrupted(run, command, monkeypatch):
    assert ablate.main(command(run, "--heads", "1:0", "--snapshots", "2")) == 0
    few, made = read_records(run / "ablations.npz"), interrupted_after(1, monkeypatch)
    more = command(run, "--heads", "1:0", "--snapshots", "6")
    assert ablate.main(more) == 130
    assert len(read_records(run / "ablations-unfinished.npz")) == len(few) + 1
    made += [1]
    assert ablate.main(more) == 0
    records = read_records(run / "ablations.npz")
    assert len(made) == 2 + len(records) - len(few) - 1  # none twice
    steps = [int(record["step"]) for record in records]
    assert len(set(steps)) == len(steps) > len(few) + 1


def test_records_made_otherwise_are_kept(run, command, capsys):
    arguments = command(run, "--heads", "1:0", "--snapshots", "2")
    assert ablate.main(arguments) == 0
    before = (run / "ablations.npz").read_bytes()
    error = refused(capsys, [*arguments, "--mean"])
    assert "replacement zero then, mean now" in error and "--out" in error
    assert (run / "ablations.npz").read_bytes() == before


def test_records_of_another_model_are_not_taken_for_its_own(
    run, command, corpus, text_file, capsys
):
    arguments = command(run, "--heads", "1:0", "--snapshots", "2")
    assert ablate.main(arguments) == 0
    about = json.loads((run / "ablations.json").read_text())
    del about["settings"]["model"]  # as older records have it
    (run / "ablations.json").write_text(json.dumps(about))
    assert ablate.main(arguments) == 0  # which now tells it
    save(run / "snapshots" / "step_0000240.pt", make(2), corpus, text_file, 240)
    assert "other settings (model" in refused(capsys, arguments)


def test_a_run_without_a_phase_change_has_no_before_and_after(run, command, capsys):
    records = read_records(run / "measurements.npz")
    write_records(run / "measurements.npz", [{**r, "icl_band_score": -0.1} for r in records])
    assert ablate.main(command(run, "--heads", "1:0", "--snapshots", "2")) == 0
    assert "N/A (no phase change)" in capsys.readouterr().out
    assert "before_and_after" not in read_records(run / "ablations.npz")[0]


def test_one_layer_is_enough(corpus, text_file, command, workplace, capsys):
    config = ModelConfig(1, 32, 2, 16, 0, 512, 1024)
    path = save(workplace / "one.pt", make(0, config), corpus, text_file)
    assert ablate.main(command(path)) == 0
    out = capsys.readouterr().out
    assert "no head matches prefixes" in out and "N/A (a run is needed" in out


# idealised patterns


def test_substitution_from_the_command_line(snapshot, command, capsys, monkeypatch):
    monkeypatch.setattr("substitute.FIT_EXAMPLES", 3)
    whole, seen = substitute.substitute, []

    def look(*arguments):
        seen.append([{tuple(row) for row in inputs.tolist()} for inputs, _ in arguments[3:5]])
        return whole(*arguments)

    monkeypatch.setattr("substitute.substitute", look)
    arguments = command(snapshot, "--substitute", "induction", "--heads", "0:1,1:0")
    assert ablate.main([*arguments, "--out", "out.json"]) == 0
    for measured, fitted_on in seen:
        assert len(measured) == 6 and len(fitted_on) == 3 and not measured & fitted_on
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [row["heads"] for row in rows] == [["0:1"], ["1:0"], ["0:1", "1:0"]]
    *_, one, _, both = capsys.readouterr().out.splitlines()[:-1]
    assert both.split()[:2] == ["0:1", "1:0"] and one.split()[0] == "0:1"
    assert one.split()[1] == f"{rows[0]['icl_band_clean'][0]:+.3f}"
    for row in rows:
        assert row["loss_zero"] != row["loss_mean"] != row["loss_free"] != row["loss_fitted"]


def test_that_no_head_is_of_the_class_of_a_rule_is_a_record_too(snapshot, command, capsys):
    arguments = command(snapshot, "--substitute", "induction", "--out", "out.json")
    assert ablate.main(arguments) == 0
    assert "no prefix-matching head" in capsys.readouterr().out
    assert json.loads(Path("out.json").read_text())["rows"] == []


# bad input


def refused(capsys, arguments):
    assert ablate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_input_is_one_line(snapshot, run, command, tmp_path, capsys):
    def says(*arguments):
        return refused(capsys, command(*arguments))

    assert "at least 2" in says(snapshot, "--examples", "1")
    assert "no such head: they are 0:0 to 1:1" in says(snapshot, "--heads", "1:0,2:0")
    assert "no such head" in says(snapshot, "--heads", "best")
    assert "none of this model's heads is one" in says(snapshot, "--heads", "induction")
    assert "--full" in says(snapshot, "--full", "--freeze-layernorm")
    assert "--full" in says(snapshot, "--full", "--no-bands")
    assert "--substitute" in says(snapshot, "--substitute", "previous", "--mean")
    assert "takes one snapshot" in says(run, "--substitute", "previous")
    assert "--snapshots" in says(snapshot, "--snapshots", "5")
    assert "--snapshots" in says(run, "--snapshots", "1")
    assert "end in .npz" in says(snapshot, "--out", "records.txt")
    assert "nowhere" in says(tmp_path / "nowhere.pt")
    assert "no snapshots" in says(run / "snapshots")
    (tmp_path / "there.npz").write_text("mine")
    assert "exists" in says(snapshot, "--out", "there.npz")
    assert (tmp_path / "there.npz").read_text() == "mine"
    assert "no folder" in says(snapshot, "--out", "nowhere/records.npz")
    (tmp_path / "mine.json").write_text('{"settings": null}')
    assert "exists" in says(snapshot, "--out", "mine.npz")
    assert "other settings" in says(run, "--heads", "1:0", "--out", "mine.npz")
    assert (tmp_path / "mine.json").read_text() == '{"settings": null}'
    (run / "measurements.npz").unlink()
    assert "python evaluate.py" in says(run)
    snapshot.write_bytes(snapshot.read_bytes()[:-1000])
    assert "damaged" in says(snapshot)
    snapshot.write_text("a stranger's")
    assert "damaged" in says(snapshot)
    assert "cuda" in refused(capsys, [*command(snapshot)[:3], "--device", "cuda"])


def test_a_model_that_diverged_is_one_line(corpus, text_file, command, tmp_path, capsys):
    model = make(0)
    with torch.no_grad():
        model.blocks[0].attn.W_O[0, 0, 0] = torch.nan
    path = save(tmp_path / "diverged.pt", model, corpus, text_file)
    assert "diverged" in refused(capsys, command(path))


def test_before_and_after_by_hand():
    start, end = torch.tensor([3.0, 3.0]), torch.tensor([0.0, -1.0])
    vector = metrics.before_and_after_vector(start, end)
    assert vector.tolist() == pytest.approx([-3 / 25, -4 / 25])
    dot, error = metrics.before_and_after_attribution(start - end, vector)
    assert dot == pytest.approx(-1)  # all the way back
    assert error == pytest.approx(0, abs=1e-6)  # on whatever examples
    # -0.36 and 0, of which -0.36 times (0.36, 0.64) is taken off: -0.2304 and 0.2304
    some, error = metrics.before_and_after_attribution(torch.tensor([3.0, 0.0]), vector)
    assert (some, error) == (pytest.approx(-0.36), pytest.approx(0.4608))
    four = metrics.before_and_after_vector(start.repeat(2), end.repeat(2))
    dot, error = metrics.before_and_after_attribution((start - end).repeat(2) / 2, four)
    assert dot == pytest.approx(-0.5)  # half of it, on any number of examples
