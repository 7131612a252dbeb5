"""Scripts from end to end with `--device cuda` where there is no GPU: nothing is left on the wrong
device, and what they say is what they say on the CPU.
"""

import contextlib
import re

import numpy as np
import pytest
import torch

import ablate
import circuits
import evaluate
import passage
import progress
import tasks
import train
from records import read_records
from tests.pretended_gpu import pretended_gpu
from vocabulary import PYTHON_1024

DEVICES = {"cpu": contextlib.nullcontext, "cuda": pretended_gpu}
TRAIN = (
    "--scale mini --layers 2 --d-model 64 --heads 2 --d-head 16 --smear --lr 0.05 --dtype float32"
    " --tokens 12288 --snapshots 4 --examples 4 --out DEVICE"
)
SNAPSHOT = "cpu/snapshots/step_0000003.pt"
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def test_it_refuses_what_a_gpu_refuses():
    with pretended_gpu():
        here, there = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
        assert (here.device.type, there.device.type) == ("cpu", "cuda")
        assert here.to("cuda").device == (there + there[0] @ there[1]).device == there.device
        assert torch.nn.Linear(3, 2).to("cuda")(there).tolist() and there.cpu().numpy().all()
        with pytest.raises(RuntimeError, match="some tensors are on the GPU"):
            here + there
        with pytest.raises(RuntimeError, match="some tensors are on the GPU"):
            here[torch.zeros(2, dtype=torch.long, device="cuda")]
        with pytest.raises(TypeError, match="cannot become an array"):
            there.numpy()
        there[:] = here  # copies
        there.cpu().zero_()
        assert there.sum() == 6


def on_both(main, flags, text_file):
    """Runs a script with the same flags on one device after the other, whose name DEVICE stands
    for.
    """
    for device, there in DEVICES.items():
        arguments = f"{flags} --device {device}".replace("DEVICE", device).split()
        with there():
            assert main([*arguments, "--data", str(text_file), "--vocabulary", PYTHON_1024]) == 0
        yield device


@pytest.fixture(scope="module")
def runs(text_file, corpus_folder, tmp_path_factory):
    """A folder with a run that was trained on the CPU, `cpu`, and its twin, `cuda`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus").symlink_to(corpus_folder)
    with contextlib.chdir(folder):
        list(on_both(train.main, TRAIN, text_file))
    return folder


def test_training(runs):
    on_cpu, on_gpu = (read_records(runs / device / "measurements.npz") for device in DEVICES)
    assert [record["step"] for record in on_cpu] == [0, 2, 3]
    for record, twin in zip(on_cpu, on_gpu, strict=True):
        assert record.keys() == twin.keys()
        for name, value in record.items():
            assert twin[name] == pytest.approx(value, abs=1e-3), name


@pytest.mark.parametrize(
    "main, flags",
    [
        (evaluate.main, f"{SNAPSHOT} --examples 4 --copying-variants"),
        (evaluate.main, "cpu --examples 4 --out evaluation-DEVICE.npz"),
        (evaluate.main, "DEVICE --examples 4 --window 0.008 0.01228"),  # which the last two show
        (ablate.main, f"{SNAPSHOT} --examples 4 --heads 0:0,1:1"),
        (ablate.main, f"{SNAPSHOT} --examples 4 --heads 0:0,1:1 --full --mean"),
        (ablate.main, f"{SNAPSHOT} --examples 4 --freeze-layernorm --mean"),
        (ablate.main, f"{SNAPSHOT} --examples 4 --heads 1:1 --substitute induction2"),
        (circuits.main, SNAPSHOT),
        (circuits.main, "cpu"),
        (tasks.main, SNAPSHOT),
        (ablate.main, "DEVICE --examples 4 --snapshots 3"),
        (passage.main, "DEVICE"),
    ],
    ids=lambda what: what.__module__ if callable(what) else what,
)
def test_the_same_is_said(runs, text_file, monkeypatch, capsys, main, flags):
    monkeypatch.chdir(runs)
    monkeypatch.setattr("substitute.FIT_EXAMPLES", 3)
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 3600)  # on a busy machine one may be slow
    said = []
    for _ in on_both(main, flags, text_file):
        said.append(re.sub("cpu|cuda", "DEVICE", capsys.readouterr().out))
    assert NUMBER.sub("", said[0]) == NUMBER.sub("", said[1])
    on_cpu, on_gpu = (np.array(NUMBER.findall(text), dtype=float) for text in said)
    assert len(on_cpu) > 5 and on_gpu == pytest.approx(on_cpu, abs=0.011)
