"""The list of commands: each could be given by hand, what is done is not done again, and what takes
long can be interrupted.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reproduce
from model import SCALES as SIZES
from plots import claims, claims_of_models  # noqa: F401  they fill CLAIMS
from plots.checks import CLAIMS
from reproduce import SCALES, Schedule, Step, drawings, measurements, models
from safety import ArgumentParser
from train import RECIPES, model_config, parse_args

ROOT = Path(__file__).parent.parent


def listed(scale, second_corpus="books.txt.xz"):
    """All steps of a scale."""
    args = argparse.Namespace(
        scale=scale, data="python", vocabulary=None, second_corpus=second_corpus
    )
    chosen = models(SCALES[scale])
    steps = measurements(args, SCALES[scale], chosen), drawings(args, SCALES[scale], chosen)
    return [step for some in steps for step in some]


# the list


class UnderstoodError(Exception):
    pass


@pytest.fixture
def only_parse(monkeypatch):
    """Scripts stop when they have understood their command line."""

    def parse(self, argv):
        argparse.ArgumentParser.parse_args(self, argv)
        raise UnderstoodError

    monkeypatch.setattr(ArgumentParser, "parse_args", parse, raising=False)


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_has_flags_that_exist(only_parse, scale):
    for step in listed(scale):
        script, *arguments = shlex.split(step.command)
        main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
        with pytest.raises(UnderstoodError):
            main(arguments)
        assert main([*arguments, "--no-such-flag"]) == 2, step.command


def test_the_models_are_those_of_the_paper():
    names = [model.name for model in models(SCALES["mini"])]
    series = {f"{n}L" for n in range(1, 7)} | {f"{n}L-mlp" for n in range(1, 7)}
    smeared, seeds = {"1L-smear", "2L-smear"}, {"1L-1", "1L-2", "2L-1", "2L-2"}
    others = {"1L-smear-1", "1L-smear-2", "1L-books", "2L-books", "1L-smear-books"}
    assert set(names) == series | smeared | seeds | others | {"2L-d64", "2L-d192"}
    assert len(names) == len(set(names))


def test_no_model_has_fewer_heads_than_the_circuit_takes():
    for scale in SCALES.values():
        for model in models(scale):
            args = parse_args(["--scale", scale.name, *shlex.split(model.flags)])
            config = model_config(args, scale.d_vocab)
            assert config.n_heads >= 2 and config.d_head == 64, model.name


@pytest.mark.parametrize("scale", SCALES)
def test_what_the_list_knows_of_the_scales_is_true(scale):
    ours = SCALES[scale]
    sizes, recipe = SIZES[ours.name], RECIPES[ours.name]
    assert ours.d_model == sizes["d_model"]
    assert ours.tokens_per_step == recipe.n_rows * sizes["n_ctx"]
    assert scale == "smoke" or ours.tokens == recipe.n_tokens


def test_no_two_commands_write_the_same():
    outputs = [path for step in listed("mini") for path in step.outputs]
    assert len(outputs) == len(set(outputs))


def test_figures_show_the_records_of_the_results():
    shown = [step for step in listed("mini") if "/figures/" in step.command]
    assert {step.outputs[0].stem for step in shown} == set(reproduce.FIGURES)
    for step in shown:
        assert step.reads and all(path.parent == Path("results/mini") for path in step.reads)


def test_the_figures_that_claims_point_to_are_in_the_list():
    assert len(CLAIMS) > 10
    for claim in CLAIMS:
        if claim.figure:
            script = reproduce.FIGURES[claim.figure][0]
            assert claim.command.startswith(f"plots/{script} ")


def test_the_readme_shows_no_figure_that_is_not_in_the_list():
    named = re.findall(r"results/mini/figures/([\w-]+)\.png", (ROOT / "README.md").read_text())
    assert set(named) <= set(reproduce.FIGURES)


def test_without_a_second_corpus_its_models_are_left_out():
    chosen = [model for model in models(SCALES["mini"]) if not model.books]
    args = argparse.Namespace(scale="mini", data="python", vocabulary=None, second_corpus=None)
    commands = [step.command for step in measurements(args, SCALES["mini"], chosen)]
    assert not any("books" in c or "vocabulary" in c or "None" in c for c in commands)


# carrying it out, with scripts that do next to nothing

SCRIPTS = {
    "quick.py": "open(sys.argv[1], 'a').write('x')",
    "train.py": "open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]))",
    "fails.py": "sys.exit(3)",
    # a training that takes a while, until it is let go
    "slow.py": """
open('pid', 'w').write(str(os.getpid()))
while not os.path.exists('go'):
    time.sleep(0.01)
open(sys.argv[1], 'a').write('x')
""",
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scripts").mkdir()
    for name, text in SCRIPTS.items():
        Path("scripts", name).write_text(f"import os, sys, time\n{text}\n")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path / "scripts")
    return tmp_path


def start(*commands, **options):
    """reproduce.py with these commands for its list; the output of each is its first argument."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import reproduce
from reproduce import Step
reproduce.ROOT = Path("scripts").absolute()
commands = {commands!r}
steps = [Step(c, (Path(c.split()[1]),), seconds=1) for c in commands]
reproduce.measurements, reproduce.drawings = lambda *_: steps, lambda *_: []
sys.exit(reproduce.main(["--scale", "smoke"]))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], **pipes, **options)


def wait_for_the_slow_one(process):
    deadline = time.time() + 60
    while not (Path("pid").exists() and Path("pid").read_text()):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)


def hear():
    """A process that was started in the background may have been told not to listen."""
    for ending in signal.SIGINT, signal.SIGHUP:
        signal.signal(ending, signal.SIG_DFL)


COMMANDS = [f"{s}.py runs/smoke/2L/{s}.json" for s in ("quick", "slow", "train")]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_list_goes_on_where_it_was_interrupted(workplace, ending):
    run = Path("runs/smoke/2L")
    run.mkdir(parents=True)
    process = start(*COMMANDS, preexec_fn=hear)
    wait_for_the_slow_one(process)
    process.send_signal(ending)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == ""
    assert out.splitlines()[-1] == "stopped; the same command goes on from here"
    with pytest.raises(ProcessLookupError):  # the command has ended with it
        os.kill(int(Path("pid").read_text()), 0)
    assert (run / "quick.json").exists() and not (run / "train.json").exists()

    Path("go").touch()
    again = start(*COMMANDS)
    out, error = again.communicate(timeout=60)
    assert again.returncode == 0 and error == ""
    assert re.findall("^python (.*)", out, re.MULTILINE) == COMMANDS[1:]
    assert "2 of 3 commands left" in out and "all 3 commands are done" in out
    assert (run / "quick.json").read_text() == "x"
    assert set(json.loads(Path("runs/smoke/times.json").read_text())) == set(COMMANDS)
    assert Path("results/smoke/2L/slow.json").read_text() == "x"


def test_what_another_command_made_is_not_taken_for_done(workplace):
    run = Path("runs/smoke/2L")
    run.mkdir(parents=True)
    (run / "train.json").write_text("of an older run, which does not tell its command")
    for command, code in (COMMANDS[0], 0), (COMMANDS[0], 0), (f"{COMMANDS[0]} --data b.txt", 2):
        process = start(command, f"{COMMANDS[2]} --data b.txt")
        _, error = process.communicate(timeout=60)
        assert process.returncode == code
    assert error.count("\n") == 1 and f"made by another command, python {COMMANDS[0]}:" in error
    assert (run / "quick.json").read_text() == "x"


def test_under_nohup_a_hangup_ends_nothing(workplace):
    Path("runs/smoke/2L").mkdir(parents=True)
    process = start(*COMMANDS, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_the_slow_one(process)
    process.send_signal(signal.SIGHUP)
    Path("go").touch()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == "" and "all 3 commands are done" in out


def test_a_failing_command_ends_the_list(workplace):
    Path("runs/smoke/2L").mkdir(parents=True)
    process = start("fails.py runs/smoke/2L/a.json", COMMANDS[0])
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert error == "reproduce.py: error: exit code 3: python fails.py runs/smoke/2L/a.json\n"
    assert not Path("runs/smoke/2L/quick.json").exists()


def test_a_training_that_was_begun_is_resumed(workplace):
    run = workplace / "run"
    step = Step("train.py run/log --layers 1", (run / "run.json", run / "summary.json"), 1)
    run.mkdir()
    step.carry_out()
    (run / "run.json").touch()
    step.carry_out()
    assert (run / "log").read_text() == "--layers 1--layers 1 --resume"


def test_a_step_is_done_when_its_outputs_are_there_and_new(tmp_path):
    out, records = tmp_path / "out.json", tmp_path / "records"
    step = Step("x.py", (out,), 1, reads=(records,))
    assert not step.done()
    out.write_text("{}")
    assert step.done()
    records.mkdir()
    (records / "new.npz").touch()
    os.utime(out, (0, 0))
    assert not step.done()


def test_the_time_left_follows_what_the_same_script_took(tmp_path):
    a, b, c, d = (Step(f"{name} {n}", (), n + 1) for n, name in enumerate("aabc"))
    schedule = Schedule([a, b, c, d], tmp_path / "times.json")
    assert schedule.seconds([a, b]) == 1 + 2  # nothing is known
    schedule.times = {a.command: 3}
    assert schedule.seconds([b, c, d]) == 3 * (2 + 3 + 4)
    schedule.times = {a.command: 3, c.command: 3}
    assert schedule.seconds([b, d]) == 3 * 2 + (3 + 3) / (1 + 3) * 4
    assert reproduce.duration(3 * 3600 + 62.4) == "3:01:02"


# all of it


def test_the_whole_paper_on_next_to_nothing_at_the_scale_smoke(smoke):
    process, folder = smoke
    _, status, used = os.wait4(process.pid, 0)
    output = (folder / "stdout").read_text()
    assert os.waitstatus_to_exitcode(status) == 0, (folder / "stderr").read_text()
    assert used.ru_utime + used.ru_stime < 90  # CPU seconds

    names = {"run", "summary", "ablations", "circuits", "tasks", "substitute-induction"}
    results = folder / "results" / "smoke"
    assert {path.stem for path in (results / "2L").glob("*.json")} == names
    records = {path.stem for path in (results / "2L").glob("*.npz")}
    assert records == {"measurements", "evaluation", "ablations", "passage"}
    assert (results / "1L-books" / "evaluation.npz").exists()
    for record in results.glob("*/*.npz"):
        run = folder / "runs" / "smoke" / record.parent.name
        assert record.read_bytes() == (run / record.name).read_bytes()
    drawn = {path.stem for path in (results / "figures").glob("*.png")}
    steps = [step for step in listed("smoke") if "/figures/" in step.command]
    assert drawn == {step.outputs[0].stem for step in steps} != set()
    assert (results / "report.html").exists() and "| claim |" in output

    again = subprocess.run(process.args, cwd=folder, capture_output=True, text=True)
    assert again.returncode == 0
    assert re.findall("^python (.*)", again.stdout, re.MULTILINE) == [
        "plots/tables.py results/smoke"
    ]
    assert "commands are done" in again.stdout


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["--second-corpus", "nowhere.txt"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere.txt" in error
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_said(workplace):
    process = start()
    out, _ = process.communicate(timeout=60)
    assert "(--second-corpus PATH): 1L-books\n" in out
