"""A corpus small enough for tests: documents that repeat their own words, as real text does."""

import random

import pytest

from corpora import open_corpus
from vocabulary import END_OF_TEXT, PYTHON_1024


def document(rng, n_lines=60):
    """Lines of nonsense code over a dozen names of the document's own."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["".join(rng.choices(letters, k=rng.randint(3, 8))) for _ in range(12)]
    pattern = "def {}({}, {}):\n    return {} + {}\n"
    return "".join(pattern.format(*rng.choices(names, k=5)) for _ in range(n_lines))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """300 documents, about 1.2 MB."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "nonsense.txt"
    path.write_text(f"\n{END_OF_TEXT}\n".join(document(rng) for _ in range(300)))
    return path


@pytest.fixture(scope="session")
def corpus(text_file, tmp_path_factory):
    return open_corpus(str(text_file), PYTHON_1024, root=tmp_path_factory.mktemp("corpus"))
