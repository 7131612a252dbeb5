"""The texts that a corpus is made of, one document after the other.

- `python` (the default): the Python source of the standard library and of the packages that
  requirements.txt brings. Code repeats its own names all the time, so that induction pays early and
  small models show the phase change.
- a text file or folder (.txt, .gz, .xz; UTF-8), documents split on a line `<|endoftext|>`.

A document is either for training or held out for measuring, never cut between the two.
"""

import gzip
import hashlib
import importlib.metadata
import itertools
import lzma
import re
import sys
import sysconfig
import zlib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from safety import BadInput

END_OF_TEXT = "<|endoftext|>"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def documents_of(data):
    """The documents of `python`, or of a text file or folder, in a fixed order: yields (held out?,
    text).
    """
    return python_documents() if data == "python" else text_documents(Path(data))


def origin_of(data):
    """Strings that change when the documents may have: of other files, or of other versions of the
    packages.
    """
    if data == "python":
        return [sys.version, *(f"{d.name} {d.version}" for d in _distributions())]
    files = [(file, file.stat()) for file in text_files(Path(data))]
    return [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in files]


# --- the Python source that every installation carries


# tests, vendored copies and tables of data; matched against the path inside the library
LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|idle_test|_?vendor(ed)?|_vendored|pydoc_data|lib2to3)/"
    r"|(^|/)(test_[^/]*|[^/]*_tests?|conftest)\.py$"
)
# how generated files introduce themselves
GENERATED = re.compile(
    r"automatically generated|auto-?generated|do not edit|@generated|generated (by|from) '"
    r"|(file|module|code|table)s? (is|was|are|were) generated|^# *generated (by|from)",
    re.IGNORECASE | re.MULTILINE,
)
PYTHON_HELD_OUT = 6  # one document in six, which gives the 10,000 evaluation examples of the paper


def python_documents():
    """The standard library and the packages of requirements.txt with all that they require, and
    nothing else that happens to be installed. Order and held-out documents are fixed by a hash
    of the file's name, so that they survive a change of versions.

    Left out: tests, vendored copies, generated tables, and any file of whose three-line passages
    more than half occur in earlier files.
    """
    seen = set()
    for name, path in sorted(_python_files().items(), key=lambda item: _hash(item[0])):
        if LEFT_OUT.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # an old encoding in the library's corners; an incomplete installation
        # a table is mostly digits and punctuation: ordinary code is four fifths letters
        dense = "".join(text.split()).encode()
        letters = len(dense) - len(
            dense.translate(None, b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
        )
        if len(text) < 500 or letters < 0.6 * len(dense) or GENERATED.search(text, 0, 400):
            continue
        lines = [line for line in map(str.strip, text.splitlines()) if len(line) > 3]
        passages = {zlib.crc32("\n".join(lines[i : i + 3]).encode()) for i in range(len(lines) - 2)}
        if not passages or len(passages & seen) > len(passages) / 2:
            continue
        seen |= passages
        yield _hash(name) % PYTHON_HELD_OUT == 0, text


def _python_files():
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if "site-packages/" not in name and "dist-packages/" not in name:
            files["python/" + name] = path
    for distribution in _distributions():
        for file in distribution.files or []:
            if file.suffix == ".py":
                files[file.as_posix()] = Path(distribution.locate_file(file))
    return files


def _distributions():
    """The installed distributions that requirements.txt asks for, and those that they ask for in
    turn.
    """
    wanted = [line for line in REQUIREMENTS.read_text().splitlines() if line.strip()]
    found = {}
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted += found[name].requires or []
    return [found[name] for name in sorted(found)]


# --- the user's own text

TEXT_HELD_OUT = 20  # one document in twenty


def text_files(path):
    """A text file itself, or all .txt, .gz and .xz files under a folder."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".gz", ".xz"))


def text_documents(path):
    """Documents of the text files there; a line <|endoftext|> ends a document."""
    files = text_files(path)
    if not files:
        raise BadInput(f"--data {path}: no .txt, .gz, .xz or .bin file in this folder")
    for file in files:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
        try:
            with opener(file, "rt", encoding="utf-8") as lines:
                for at_separator, group in itertools.groupby(
                    lines, key=lambda line: line.rstrip("\n") == END_OF_TEXT
                ):
                    text = "".join(group)
                    if "\0" in text:
                        raise BadInput(f"--data {file}: binary, not text")
                    if not at_separator and text.strip():
                        yield _hash(text) % TEXT_HELD_OUT == 0, text
        except UnicodeDecodeError:
            raise BadInput(f"--data {file}: not UTF-8 text") from None
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise BadInput(f"--data {file}: damaged or cut short ({error})") from None


def _hash(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest())
