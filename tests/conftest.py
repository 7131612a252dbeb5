"""A corpus small enough for tests: documents that repeat their own words, as real text does."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corpora import open_corpus
from documents import END_OF_TEXT
from vocabulary import PYTHON_1024


def document(rng, n_lines=60):
    """Lines of nonsense code over a dozen names of the document's own."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["".join(rng.choices(letters, k=rng.randint(3, 8))) for _ in range(12)]
    pattern = "def {}({}, {}):\n    return {} + {}\n"
    return "".join(pattern.format(*rng.choices(names, k=5)) for _ in range(n_lines))


@pytest.fixture
def unwritten_memory_is_nan():
    """A result that was not written cannot be right because its memory held the same one before."""
    torch.use_deterministic_algorithms(True)  # makes torch.empty and the like fill with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """300 documents, about 1.2 MB."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "nonsense.txt"
    path.write_text(f"\n{END_OF_TEXT}\n".join(document(rng) for _ in range(300)))
    return path


@pytest.fixture(scope="session", autouse=True)
def smoke(request, tmp_path_factory):
    """`reproduce.py --scale smoke` as a stranger would run it: (process, its folder). It takes a
    minute, so it starts before all tests and runs beside them, on one core.
    """
    if not any("at_the_scale_smoke" in item.name for item in request.session.items):
        yield None
        return
    folder, text = tmp_path_factory.mktemp("smoke"), request.getfixturevalue("text_file")
    script = Path(__file__).parent.parent / "reproduce.py"
    flags = f"--scale smoke --data {text} --vocabulary {PYTHON_1024} --second-corpus {text}"
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        process = subprocess.Popen(
            [sys.executable, script, *flags.split()],
            cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=err,
        )  # fmt: skip
    yield process, folder
    process.send_signal(signal.SIGINT)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="session")
def corpus(text_file, corpus_folder):
    return open_corpus(str(text_file), PYTHON_1024, root=corpus_folder)


@pytest.fixture
def workplace(tmp_path, corpus, corpus_folder, monkeypatch):
    """A folder to run scripts in, where the corpus is prepared already."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    return tmp_path
