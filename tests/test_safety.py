"""What all scripts promise: bad input is told in one line, and files are written whole."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safety import BadInput, check_out, one_line_errors, write_whole


def test_an_out_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "read.json").touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "read.json")
    refused = {
        "out.npz": "end in .json",
        "nowhere/out.json": "no folder",
        "folder.json": "is a folder",
        "summary.json": "train.py's own",
        "read.json": "is what is read",
        "link.json": "is what is read",
    }
    for name, reason in refused.items():
        with pytest.raises(BadInput, match=reason):
            check_out(tmp_path / name, ".json", "python", tmp_path / "read.json")
    check_out(None, ".json")
    check_out(tmp_path / "out.json", ".json", tmp_path / "read.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="no leave to write"):
        check_out(tmp_path / "out.json", ".json")


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_who_has_seen_enough_is_no_error(flush):
    """As head is."""
    program = (
        f"import sys\nfrom safety import one_line_errors\n"
        f"@one_line_errors\ndef main(argv):\n    print('a line\\n' * 100_000, flush={flush})\n"
        "sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"a line\n"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, b"")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError(), 2, "memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "9 bytes"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 9 bytes\n"), 2, "9 bytes"),
        (RuntimeError("a bug"), None, None),
    ],
)
def test_what_is_no_bug_is_told_in_one_line(error, code, told, capsys):
    @one_line_errors
    def main(argv):
        raise error

    if code is None:
        with pytest.raises(type(error)):
            main()
    else:
        assert main() == code
        shown = capsys.readouterr()
        assert told in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_full_disk_is_said_of_the_file_that_was_to_be_written(tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.json").write_text("before")
    with pytest.raises(OSError, match="No space left on device.*a.json'$"):
        write_whole(tmp_path / "a.json", write)
    with pytest.raises(FileNotFoundError, match="b.json'$"):
        write_whole(tmp_path / "none" / "b.json", lambda path: path.write_text("x"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "before")]
