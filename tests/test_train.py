"""The training script from the outside: its files, its promises about interruption, and what it
refuses.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import machine
import records
import train
from corpora import open_corpus
from data import training_batch
from model import Transformer, config_for
from parallel import Cores, Ranks
from progress import Clock, Progress
from records import RunFolder, read_records, write_records
from safety import BadInput
from snapshots import load_snapshot
from train import RECIPES, snapshot_steps
from vocabulary import PYTHON_1024

ROOT = Path(__file__).parent.parent
TINY = {"n_rows": 4, "n_snapshots": 10, "n_examples": 4, "n_final_examples": 8}
STEP = 4 * 512  # tokens


@pytest.fixture(autouse=True)
def cheap_evaluations(monkeypatch):
    monkeypatch.setitem(RECIPES, "mini", dataclasses.replace(RECIPES["mini"], **TINY))


@pytest.fixture(scope="module")
def two_steps(text_file, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "mini", dataclasses.replace(RECIPES["mini"], **TINY))
        patch.chdir(folder)
        assert train.main(flags(text_file, steps=2)) == 0
    return folder / "run"


@pytest.fixture
def trained(workplace, two_steps):
    """The folder `run`, trained for two steps, in a folder to run in."""
    shutil.copytree(two_steps, workplace / "run")
    return workplace


def flags(text_file, *more, steps=20, out="run"):
    data = ["--data", str(text_file), "--vocabulary", PYTHON_1024, "--tokens", str(steps * STEP)]
    return ["--device", "cpu", "--layers", "1", "--attn-only", *data, "--out", out, *more]


def start(workplace, arguments, *launcher, **options):
    """train.py in a process of its own, with the same cheap evaluations."""
    script = workplace / "tiny_train.py"
    script.write_text(
        "import dataclasses, sys, train\n"
        f"train.RECIPES['mini'] = dataclasses.replace(train.RECIPES['mini'], **{TINY})\n"
        "sys.exit(train.main())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(script), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=workplace, env=environment, **pipes, **options)


def losses(folder):
    return [
        json.loads(line)["loss"] for line in Path(folder, "train.jsonl").read_text().splitlines()
    ]


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.02)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# the schedule


@pytest.mark.parametrize(
    "n_steps, n_snapshots", [(3906, 100), (10_000, 200), (500, 100), (30, 10), (1, 100), (30, 3)]
)
def test_snapshots_start_at_zero_and_end_at_the_end(n_steps, n_snapshots):
    steps = snapshot_steps(n_steps, n_snapshots)
    assert steps[0] == 0 and steps[-1] == n_steps
    assert steps == sorted(set(steps))
    assert len(steps) <= n_snapshots + 1


def test_snapshots_are_log_spaced_early_and_even_later():
    steps = np.array(snapshot_steps(10_000, 200))
    assert 190 <= len(steps) <= 201
    even = np.diff(steps[steps >= 200])
    assert even.max() - even.min() <= 1 and even.max() < 60
    early = steps[steps < 200]
    assert early[:2].tolist() == [0, 1]
    assert (np.diff(early)[1:] >= np.diff(early)[:-1] - 1).all()


# a run


def test_a_run_leaves_its_records(workplace, text_file, capsys):
    assert train.main(flags(text_file, steps=30)) == 0
    run = workplace / "run"
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["tokens"] for line in lines] == [n * STEP for n in range(1, 31)]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3  # it learns

    records = read_records(run / "measurements.npz")
    steps = snapshot_steps(30, 10)
    assert [record["step"] for record in records] == steps
    assert records[0]["loss_by_position"].shape == (512,)
    assert records[0]["per_token_loss"].shape == (4,)
    assert records[0]["prefix_matching"].shape == (1, 2)
    assert records[-1]["loss"] == pytest.approx(records[-1]["loss_by_position"].mean(), rel=1e-5)
    for step in steps:
        model, about = load_snapshot(run / "snapshots" / f"step_{step:07d}.pt")
        assert about["step"] == step and about["tokens"] == step * STEP

    summary = json.loads((run / "summary.json").read_text())
    promised = {
        "phase_change", "icl_before", "icl_after", "icl_score", "loss", "parameters",
        "best_prefix_matching", "best_previous_token", "tokens", "seconds", "tokens_per_second",
        "corpus_sha256",
    }  # fmt: skip
    assert promised <= summary.keys()
    assert summary["phase_change"] is None
    assert summary["tokens"] == 30 * STEP
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    made = json.loads((run / "run.json").read_text())
    assert made["corpus"]["sha256"] == summary["corpus_sha256"]
    assert made["machine"]["kernels"] == "torch"
    assert made["machine"]["dtype"] == ("bfloat16" if machine.has_amx() else "float32")
    out = capsys.readouterr().out
    assert "1 layer" in out and str(run.name) in out.splitlines()[-1]


def test_a_small_text_is_measured_at_the_end_on_all_that_it_holds_out(workplace, text_file):
    held_out = open_corpus(str(text_file), PYTHON_1024).rows("val", 512)
    assert train.main(flags(text_file, "--set", f"n_final_examples={held_out + 1}", steps=2)) == 0
    assert json.loads(Path("run/summary.json").read_text())["examples"] == held_out


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_commit_is_dirty_if_code_was_changed_but_not_if_results_were(tmp_path):
    assert machine.commit_of(tmp_path) is None
    code, result = tmp_path / "code.py", tmp_path / "results" / "record.json"
    result.parent.mkdir()
    for path in code, result:
        path.write_text("before")
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init"], ["add", "."], [*author, "commit", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    clean = machine.commit_of(tmp_path)
    result.write_text("after")
    assert machine.commit_of(tmp_path) == clean
    code.write_text("after")
    assert machine.commit_of(tmp_path) == f"{clean}-dirty"


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(workplace, text_file):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train.main(flags(text_file, "--seed", str(seed), steps=5, out=out)) == 0
    assert losses("a") == losses("b") != losses("c")


def test_kernels_agree_on_the_curve(workplace, text_file):
    exactly = ("--dtype", "float32")
    train.main(flags(text_file, *exactly, steps=10, out="fast"))
    train.main(flags(text_file, *exactly, "--kernels", "reference", steps=10, out="reference"))
    assert losses("fast") == pytest.approx(losses("reference"), abs=1e-4)


@pytest.mark.skipif(not machine.has_amx(), reason="needs a CPU with AMX")
def test_products_in_bfloat16_give_the_same_curve(workplace, text_file):
    for dtype in ("float32", "bfloat16"):
        assert train.main(flags(text_file, "--dtype", dtype, steps=50, out=dtype)) == 0
    exact, rounded = np.array(losses("float32")), np.array(losses("bfloat16"))
    assert 0 < abs(rounded - exact).max() < 0.02 < exact[0] - exact[-1]
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("tokens_at_once", [2**15, 3 * 512, 100])
def test_gradient_is_the_same_on_one_core_and_on_three(corpus, monkeypatch, tokens_at_once):
    """Rows shared unevenly among threads, all at once or not: only the order of additions
    changes.
    """
    monkeypatch.setattr(train, "TOKENS_AT_ONCE", tokens_at_once)
    cpu = torch.device("cpu")
    model = Transformer(config_for("mini", 1, 1024, attn_only=True)).init_weights(0)
    batch = training_batch(corpus, 512, 4, seed=0, step=0)
    one, three = (
        train.loss_and_gradient(
            model, list(model.parameters()), *batch, 4 * 512, Cores(cpu, n), Ranks(cpu)
        )
        for n in (1, 3)
    )
    assert torch.allclose(one, three, rtol=1e-4, atol=1e-7)
    loss = model.losses(*batch).mean()
    loss.backward()
    assert one[0].item() == pytest.approx(loss.item(), rel=1e-6)
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(one[1:], whole, rtol=1e-4, atol=1e-7)


def test_every_process_takes_the_gpu_of_its_number(monkeypatch):
    taken, groups = [], []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda kind, **_: groups.append(kind)
    )
    for rank, local_rank in (0, 0), (3, 1):  # two machines with two GPUs each
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert Ranks(torch.device("cuda")).rank == rank
    assert (taken, groups) == ([0, 1], ["nccl", "nccl"])
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match="--nproc-per-node 2"):
        Ranks(torch.device("cuda"))
    Ranks(torch.device("cpu"))
    assert (taken, groups[2:]) == ([0, 1], ["gloo"])


def test_two_processes_train_as_one(workplace, text_file):
    process = start(
        workplace,
        flags(text_file, "--dtype", "float32", out="two"),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    )
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "2 processes" in out
    train.main(flags(text_file, "--dtype", "float32", out="one"))
    assert losses("two") == pytest.approx(losses("one"), abs=2e-5)
    one, two = (read_records(workplace / name / "measurements.npz") for name in ("one", "two"))
    assert len(one) == len(two)
    assert two[-1]["per_token_loss"] == pytest.approx(one[-1]["per_token_loss"], abs=1e-3)


def test_the_state_takes_at_most_a_twentieth_of_a_run(tmp_path, monkeypatch):
    seconds, written = [1000.0], []

    def slow_save(state, path):
        written.append(state["step"])
        path.write_bytes(b"")
        seconds[0] += 2

    monkeypatch.setattr(records, "save_tensors", slow_save)
    monkeypatch.setattr(records.time, "time", lambda: seconds[0])
    run = RunFolder(tmp_path / "run", {}, {}, False, Ranks(torch.device("cpu")))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(100):  # of a second each
        run.write_state(step, model, optimizer, Clock(), now=step == 50)
        seconds[0] += 1
    assert written == [0, 38, 50, 88]


def test_no_process_writes_into_the_folder_before_all_have_looked_at_it(tmp_path):
    """Else a slower process would take what the first one just wrote for somebody else's run."""
    waited = []

    def slower_process_arrives():
        waited.append((tmp_path / "run").exists())
        RunFolder(tmp_path / "run", {}, {}, False, SimpleNamespace(is_first=False, wait=list))

    first = SimpleNamespace(is_first=True, wait=slower_process_arrives)
    RunFolder(tmp_path / "run", {}, {}, False, first)
    assert waited == [False] and (tmp_path / "run").exists()


@pytest.mark.skipif(not records.fcntl, reason="needs locks")
def test_only_one_process_trains_in_a_folder(workplace, text_file, capsys):
    process = start(workplace, flags(text_file, steps=2000))
    try:
        wait_for(lambda: Path("run/state.pt").exists(), process)
        assert train.main(flags(text_file, "--resume", steps=2000)) == 2
        assert "another process is training in this folder" in one_line(capsys)
    finally:
        process.kill()
        process.communicate()
    torch.save({}, "run/state.pt")  # the lock is gone, so that it gets as far as this
    assert train.main(flags(text_file, "--resume", steps=2000)) == 2
    assert "state.pt: damaged" in one_line(capsys)


def test_a_full_gpu_is_told_in_one_line(workplace, text_file, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 ...")

    monkeypatch.setattr(train, "loss_and_gradient", full)
    assert train.main(flags(text_file, steps=2)) == 2
    assert "run/snapshots/step_0000000.pt" in {
        str(p.relative_to(workplace)) for p in workplace.rglob("*.pt")
    }
    assert "memory" in one_line(capsys)


# interruption


@pytest.mark.parametrize("n_snapshots", [1, 4, 7])
def test_a_killed_run_goes_on_to_the_last_bit(workplace, text_file, n_snapshots):
    train.main(flags(text_file, steps=30, out="whole"))
    process = start(workplace, flags(text_file, steps=30, out="killed"))
    snapshots = workplace / "killed" / "snapshots"
    wait_for(lambda: len(list(snapshots.glob("*.pt"))) >= n_snapshots, process)
    process.kill()
    process.communicate()
    # as if it had died while writing
    with open(workplace / "killed" / "train.jsonl", "a") as log:
        log.write('{"step": 999, "tok')
    (workplace / "killed" / "state.pt.partial").write_bytes(b"half")
    assert train.main(flags(text_file, "--resume", steps=30, out="killed")) == 0
    assert losses("killed") == losses("whole")
    whole, killed = (
        read_records(workplace / name / "measurements.npz") for name in ("whole", "killed")
    )
    assert len(whole) == len(killed)
    for a, b in zip(whole, killed, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_control_c_ends_cleanly_between_snapshots_too(workplace, text_file):
    train.main(flags(text_file, steps=60, out="whole"))
    process = start(workplace, flags(text_file, steps=60, out="stopped"))
    snapshots = workplace / "stopped" / "snapshots"
    wait_for(lambda: len(list(snapshots.glob("*.pt"))) >= 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in out.splitlines()[-1]
    assert "Traceback" not in err
    # as if an older version had begun it, whose records held more
    path = workplace / "stopped" / "measurements.npz"
    write_records(path, [{**record, "no_longer": 0.0} for record in read_records(path)])
    assert train.main(flags(text_file, "--resume", steps=60, out="stopped")) == 0
    assert losses("stopped") == losses("whole")
    assert "no_longer" not in read_records(path)[0]


def test_resuming_a_finished_run_changes_nothing(workplace, text_file):
    train.main(flags(text_file))
    before = losses("run")
    window = f"run --device cpu --examples 4 --window 0.02 {20 * STEP / 1e6}".split()
    text = ["--data", str(text_file), "--vocabulary", PYTHON_1024]
    assert evaluate.main([*window, *text]) == 0  # a phase change set by hand
    change = json.loads(Path("run/summary.json").read_text())["phase_change"]
    assert train.main(flags(text_file, "--resume")) == 0
    assert losses("run") == before
    assert json.loads(Path("run/summary.json").read_text())["phase_change"] == change


def test_a_loss_that_is_not_a_number_stops_with_the_last_good_snapshot(
    workplace, text_file, capsys
):
    assert train.main(flags(text_file, "--lr", "1e12", steps=200)) == 2
    error = one_line(capsys)
    assert "--lr" in error and "last good snapshot" in error
    snapshots = sorted((workplace / "run" / "snapshots").glob("*.pt"))
    assert str(snapshots[-1].name) in error
    for path in snapshots:
        model, _ = load_snapshot(path)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_full_disk_is_one_line_and_leaves_whole_files(workplace, text_file):
    def no_file_above_half_a_megabyte():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    process = start(workplace, flags(text_file), preexec_fn=no_file_above_half_a_megabyte)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert error.count("\n") == 1 and "File too large" in error
    run = workplace / "run"
    assert json.loads((run / "run.json").read_text())["seed"] == 0
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.pt"))


# the model that flags ask for


@pytest.mark.parametrize(("taken", "fits"), [(0, False), (1, False), (2, True)])
def test_a_run_whose_snapshots_do_not_fit_on_the_disk_is_not_begun(
    tmp_path, monkeypatch, taken, fits
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=14_000))
    run = tmp_path / "runs" / "new"
    (run / "snapshots").mkdir(parents=True)
    for step in range(taken):
        (run / "snapshots" / f"step_{step}.pt").touch()
    with contextlib.nullcontext() if fits else pytest.raises(BadInput, match="--snapshots"):
        train.check_space(run, n_snapshots=10, n_bytes=1000)
    with pytest.raises(BadInput, match="10 snapshots"):
        train.check_space(Path("runs/none"), n_snapshots=10, n_bytes=1000)


@pytest.mark.parametrize(
    "flags, d_model, heads, d_head",
    [
        ("", 128, 2, 64),
        ("--d-model 192", 192, 3, 64),
        ("--d-model 64", 64, 1, 64),
        ("--heads 4", 128, 4, 32),
        ("--d-head 32", 128, 4, 32),
        ("--heads 4 --d-head 64", 128, 4, 64),  # heads need not fill the width
        ("--d-model 64 --heads 2 --d-head 64", 64, 2, 64),
    ],
)
def test_heads_fill_the_width_unless_both_are_given(flags, d_model, heads, d_head):
    config = train.model_config(train.parse_args(["--scale", "mini", *flags.split()]), 1024)
    assert (config.d_model, config.n_heads, config.d_head) == (d_model, heads, d_head)


def test_flags_change_the_recipe_in_what_they_name():
    given = {"--tokens": 5_000_000, "--lr": 1e-3, "--snapshots": 40, "--examples": 30}
    args = train.parse_args(["--scale", "mini", *(str(x) for pair in given.items() for x in pair)])
    changed = {"n_tokens": 5_000_000, "learning_rate": 1e-3, "n_snapshots": 40, "n_examples": 30}
    expected = dataclasses.replace(train.RECIPES["mini"], **changed, n_final_examples=30)
    assert train.training_recipe(args, n_ctx=512, world=1) == expected
    args.settings = {"n_final_examples": 50}
    expected = dataclasses.replace(expected, n_final_examples=50)
    assert train.training_recipe(args, n_ctx=512, world=1) == expected


def test_settings_change_what_they_name_in_model_and_recipe():
    settings = ["--set", "init_gain_later=1", "vector_factor=2.5", "n_rows=16"]
    plain, args = (train.parse_args(["--scale", "mini", *more]) for more in ([], settings))
    config, recipe = train.model_config(args, 1024), train.training_recipe(args, 512, 1)
    assert config == dataclasses.replace(train.model_config(plain, 1024), init_gain_later=1.0)
    assert recipe == dataclasses.replace(RECIPES["mini"], vector_factor=2.5, n_rows=16)
    assert train.default_name(args) != train.default_name(plain)
    other = train.parse_args(["--model", "full-13M", "--set", "position_scale=2"])
    assert train.model_config(other, 1024).position_scale == 2
    assert train.model_config(other, 1024).windows  # all else is the model's own


# what it refuses


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["--colour", "red"], "unrecognized"),
        (["--layers", "0"], "n_layers is 0"),
        (["--layers", "-2"], "n_layers is -2"),
        (["--layers", "two"], "invalid int"),
        (["--heads", "3"], "cannot be divided"),
        (["--heads", "0"], "cannot be divided"),
        (["--d-head", "0"], "d_head is 0"),
        (["--heads", "0", "--d-head", "64"], "n_heads is 0"),
        (["--d-model", "0"], "d_model is 0"),
        (["--scale", "huge"], "invalid choice"),
        (["--model", "full-1T"], "invalid choice"),
        (["--model", "full-13M", "--smear"], "whole model"),
        (["--model", "full-13M", "--layers", "2"], "whole model"),
        (["--model", "full-13M", "--heads", "0"], "whole model"),
        (["--tokens", "100"], "one step alone"),
        (["--tokens", "-5"], "a positive number"),
        (["--lr", "0"], "learning_rate is 0.0: a positive number"),
        (["--lr", "nan"], "a positive number"),
        (["--set", "init_gian_later=1"], "with one of position_scale"),
        (["--set", "init_gain_later"], "'' is not a number"),
        (["--set", "n_rows=8.5"], "'8.5' is not a whole number"),
        (["--set", "init_value=-1"], "init_value is -1.0"),
        (["--set", "whole=2"], "1 at most"),
        (["--set", "warmup_tokens=0"], "warmup_tokens is 0"),
        (["--set", "n_final_examples=1"], "at least 2"),
        (["--seed", "-1"], "--seed -1: a whole number from 0"),
        (["--seed", str(2**63)], "a whole number from 0"),
        (["--snapshots", "2"], "at least 3"),
        (["--examples", "1"], "at least 2"),
        (["--examples", "1000000"], "holds out only"),
        (["--device", "cuda"], "no GPU"),
        (["--kernels", "triton"], "run on a GPU"),
        (["--data", "nowhere.txt"], "no such file"),
        (["--vocabulary", "nowhere.tiktoken"], "No such file"),
        (["--resume"], "no run to go on with"),
        (["--out", "/dev/null/run"], "Not a directory"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(workplace, text_file, capsys, arguments, fault):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    base = [
        "--data",
        str(text_file),
        "--vocabulary",
        PYTHON_1024,
        "--tokens",
        str(2 * STEP),
        "--out",
        "run",
    ]
    if "cuda" not in arguments:
        base += ["--device", "cpu"]
    assert train.main([*base, *arguments]) == 2
    assert fault in one_line(capsys)
    assert not (workplace / "run").exists()


def test_an_existing_run_is_not_overwritten(workplace, text_file, capsys):
    (workplace / "run").mkdir()
    (workplace / "run" / "precious").write_text("kept")
    assert train.main(flags(text_file)) == 2
    assert "--resume" in one_line(capsys)
    assert [p.name for p in (workplace / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "change, fault",
    [
        (["--layers", "2"], "config"),
        (["--d-model", "64"], "config"),
        (["--seed", "1"], "seed"),
        (["--lr", "1e-4"], "recipe"),
        (["--vocabulary", "other.tiktoken"], "corpus"),
        (["--kernels", "reference"], "--kernels (torch then, reference now)"),
        pytest.param(
            ["--dtype", "float32"],
            "--dtype",
            marks=pytest.mark.skipif(not machine.has_amx(), reason="needs a CPU with AMX"),
        ),
    ],
)
def test_resuming_with_other_flags_is_refused(trained, text_file, capsys, change, fault):
    before = {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()}
    vocabulary = Path(PYTHON_1024).read_bytes().splitlines(keepends=True)
    vocabulary[1000:1002] = [
        v.replace(b" 1000", b" 1001") if b" 1000" in v else v.replace(b" 1001", b" 1000")
        for v in vocabulary[1000:1002]
    ]
    Path("other.tiktoken").write_bytes(b"".join(vocabulary))
    capsys.readouterr()
    assert train.main(flags(text_file, "--resume", *change, steps=2)) == 2
    assert f"another {fault}" in one_line(capsys)
    assert before == {
        path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()
    }


def put(value, *place):
    """Spoils a state: its entry at that place is the value, or is missing."""

    def spoil(state):
        for name in place[:-1]:
            state = state[name]
        if value is None:
            del state[place[-1]]
        else:
            state[place[-1]] = value

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        put(torch.zeros(7), "weights", "ln_final.w"),
        put(7, "weights", "ln_final.w"),
        put([7], "weights"),
        put(torch.zeros(7), "optimizer", "state", 0, "exp_avg"),
        put(torch.zeros(7).to_sparse(), "optimizer", "state", 0, "exp_avg_sq"),
        put(None, "optimizer", "state", 3, "exp_avg_sq"),
        put({}, "optimizer", "state"),
        put(None, "optimizer"),
        put(3, "step"),
        put(-1, "step"),
        put(torch.tensor([1, 2]), "step"),
        put(2.0, "step"),
        put(None, "seconds", "total"),
        put(float("nan"), "seconds", "training"),
        put(3, "seconds"),
        put(10**400, "seconds", "total"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_lost(trained, text_file, capsys, spoil):
    state = torch.load("run/state.pt", weights_only=True)
    spoil(state)
    torch.save(state, "run/state.pt")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train.main(flags(text_file, "--resume", steps=2)) == 2
    assert "state.pt: damaged, or does not fit" in one_line(capsys)
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert before == after


def test_a_run_that_does_not_tell_its_dtype_goes_on(trained, text_file):
    made = json.loads(Path("run/run.json").read_text())
    del made["machine"]["dtype"]
    Path("run/run.json").write_text(json.dumps(made))
    assert train.main(flags(text_file, "--dtype", "float32", "--resume", steps=2)) == 0


def test_moments_that_share_their_memory_are_taken_apart(trained, text_file):
    state = torch.load("run/state.pt", weights_only=True)
    config = config_for("mini", 1, 1024, attn_only=True)
    model = Transformer(config)
    optimizer = train.make_optimizer(model, RECIPES["mini"])
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = torch.ones(1).expand(moments["exp_avg"].shape)
    state["optimizer"]["param_groups"][0]["weight_decay"] = 1e9
    assert records.read_state(state, model, optimizer, Clock(), n_steps=2) == 2
    assert all(s["exp_avg"].is_contiguous() for s in optimizer.state.values())
    assert optimizer.param_groups[0]["weight_decay"] == RECIPES["mini"].weight_decay


def test_a_run_without_its_state_is_not_overwritten(trained, text_file, capsys):
    Path("run/state.pt").unlink()
    before = losses("run")
    capsys.readouterr()
    assert train.main(flags(text_file, "--resume", steps=2)) == 2
    assert "state.pt is missing" in one_line(capsys)
    assert losses("run") == before


def test_a_log_shorter_than_its_state_is_refused(trained, text_file, capsys):
    Path("run/train.jsonl").write_text("")
    capsys.readouterr()
    assert train.main(flags(text_file, "--resume", steps=2)) == 2
    assert "train.jsonl: damaged" in one_line(capsys)


@pytest.mark.parametrize("name", ["state.pt", "measurements.npz", "run.json"])
def test_a_damaged_run_is_refused(trained, text_file, capsys, name):
    an_array = io.BytesIO()
    np.save(an_array, np.zeros(3))
    for content in Path("run", name).read_bytes()[:100], b"", b"[]", an_array.getvalue():
        Path("run", name).write_bytes(content)
        capsys.readouterr()
        assert train.main(flags(text_file, "--resume", steps=2)) == 2
        assert "damaged" in one_line(capsys)


def test_embeddings_and_vectors_learn_at_their_own_rate_and_only_matrices_decay():
    """One step of AdamW by hand: at first it moves every weight that has a gradient by the learning
    rate, and takes learning rate times decay off it.
    """
    config = dataclasses.replace(config_for("mini", 1, 50, attn_only=True), n_ctx=8)
    recipe = dataclasses.replace(
        RECIPES["mini"],
        learning_rate=1e-2, warmup_tokens=100, weight_decay=0.5, weight_decay_later=(1, 0.25),
        vector_factor=40,
    )  # fmt: skip
    model = Transformer(config).init_weights(0)
    parameters = list(model.parameters())
    optimizer = train.make_optimizer(model, recipe)
    for step, rate, decay in (0, 5e-3, 0.5), (1, 1e-2, 0.25):  # the first in warm-up
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradient = torch.ones(sum(p.numel() for p in parameters))
        train.update(optimizer, parameters, gradient, recipe, step, tokens=50 * (step + 1))
        for name, p in model.named_parameters():
            of_it = rate * (40 if name == "embed.W_E" or p.dim() == 1 else 1)
            expected = before[name] * (1 - of_it * decay * (p.dim() > 1)) - of_it
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5, msg=name)
    resumed = train.make_optimizer(model, recipe)  # after that step
    train.update(resumed, parameters, torch.ones_like(gradient), recipe, step=2, tokens=200)
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.25, 0.25, 0]


@pytest.mark.parametrize("norm", [0.25, 4.0])
def test_a_long_gradient_is_cut_to_length_one_and_a_short_one_is_not(norm):
    """By the moments after one step: shares of the gradient and of its square."""
    recipe = dataclasses.replace(RECIPES["mini"], betas=(0.75, 0.5))
    model = Transformer(config_for("mini", 1, 50, attn_only=True)).init_weights(0)
    parameters = list(model.parameters())
    optimizer = train.make_optimizer(model, recipe)
    gradient = torch.randn(sum(p.numel() for p in parameters))
    gradient *= norm / gradient.norm()
    cut = gradient * min(1, 1 / norm)
    told = train.update(optimizer, parameters, gradient.clone(), recipe, step=0, tokens=100)
    assert told == pytest.approx(norm, rel=1e-4)
    for name, share in ("exp_avg", 0.25 * cut), ("exp_avg_sq", 0.5 * cut**2):
        moments = torch.cat([optimizer.state[p][name].flatten() for p in parameters])
        torch.testing.assert_close(moments, share, rtol=1e-4, atol=0)


def test_training_is_one_step_after_the_other(workplace, corpus, text_file):
    """From the weights of its seed, over the batches of its seed, the learning rate growing with
    the tokens that have been trained on.
    """
    weights = "float32", "--seed", "3", "--set", "warmup_tokens=100000"
    assert train.main(flags(text_file, "--dtype", *weights, steps=3)) == 0
    recipe = dataclasses.replace(RECIPES["mini"], warmup_tokens=100_000)
    model = Transformer(config_for("mini", 1, 1024, attn_only=True)).init_weights(3)
    optimizer, cpu = train.make_optimizer(model, recipe), torch.device("cpu")
    for step, loss in enumerate(losses("run")):
        inputs, targets = training_batch(corpus, 512, recipe.n_rows, seed=3, step=step)
        with torch.no_grad():
            expected = model.losses(inputs, targets).mean().item()
        assert loss == pytest.approx(expected, rel=1e-5)
        train.train_step(model, optimizer, corpus, recipe, 3, step, Cores(cpu), Ranks(cpu))
        rate = recipe.learning_rate * (step + 1) * STEP / 100_000
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_dip_of_the_first_steps_is_not_announced_as_the_phase_change():
    """As in a run of the miniature: in-context learning between bands is at -0.13 after 30 of 1,953
    steps, back at -0.06 soon, and comes for good much later.
    """
    steps = snapshot_steps(1953, 90)
    scores = np.interp(
        steps, [0, 10, 30, 90, 700, 1200, 1953], [0, 0, -0.13, -0.06, -0.06, -0.4, -0.4]
    )
    head = {"prefix_matching": np.zeros((1, 1)), "previous_token": np.zeros((1, 1))}
    said, seen = [], []
    progress = Progress(said.append, seen, 0, 1953)
    for step, score in zip(steps, scores, strict=True):
        seen.append({"step": step, "tokens": step * 4096, "icl_band_score": score, **head})
        progress.after_snapshot()
    (announced,) = said
    assert announced.startswith("the phase change has come, from 2.")
