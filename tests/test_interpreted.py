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


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton on this machine")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_kernels_in_the_interpreter(file):
    # products of small tiles gain nothing from a second thread
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "--color=no"],
        cwd=FOLDER.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
