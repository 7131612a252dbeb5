"""The Triton kernels, run by Triton's interpreter in a process of its own for each file of
tests/interpreted (its conftest.py says why and what it adds).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


FILES = sorted(FOLDER.glob("test_*.py"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All files at once: {file: (process, file of its output)}."""
    # products of small tiles gain nothing from a second thread
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    outputs = {file: tmp_path_factory.mktemp("interpreted") / file.stem for file in FILES}
    started = {}
    for file, output in outputs.items():
        with open(output, "w") as out:
            command = [sys.executable, "-m", "pytest", file, "--color=no"]
            process = subprocess.Popen(
                command, cwd=FOLDER.parent.parent, env=environment, stdout=out, stderr=out
            )
        started[file] = process, output
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton on this machine")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_in_the_interpreter(file, runs):
    process, output = runs[file]
    assert process.wait() == 0, output.read_text()
