"""Two promises that every script keeps: bad input is told in one line, and a file is written whole
or not at all.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

OF_TRAINING = ("run.json", "measurements.npz", "summary.json")  # in the folder of a run


class BadInput(Exception):
    """A flag, file or setting that cannot be used. The message says what is wrong and what to do
    about it.
    """


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with the module docstring as the help text and errors in one line."""

    def __init__(self, docstring):
        super().__init__(
            description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def check_out(path, suffix, *inputs):
    """Refuses an --out before the work whose result it is to hold: one of another suffix, that
    cannot be written, or over a file that is read: one of `inputs`, or training's records.
    """
    if path is None:
        return
    if path.suffix != suffix:
        raise BadInput(f"--out {path}: the name has to end in {suffix}")
    if not path.parent.is_dir():
        raise BadInput(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise BadInput(f"--out {path} is a folder: name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"--out {path}: no leave to write in {path.parent}: write elsewhere")
    if path.name in OF_TRAINING:
        raise BadInput(f"--out {path}: {path.name} is train.py's own: give it another name")
    if path.exists() and any(Path(read).exists() and path.samefile(read) for read in inputs):
        raise BadInput(f"--out {path} is what is read: give it another name")


def one_line_errors(main, script=None):
    """Decorates a script's `main(argv) -> exit code`. `BadInput`, failures of the file system
    (missing, not writable, full) and a full GPU print one line and return 2; anything else is a
    bug and keeps its traceback.
    """
    script = script or Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv) or 0
        except (BadInput, OSError) as error:
            what = str(error)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; plots do without torch
                raise
            what = (
                "the GPU's memory is full: take a smaller model or a larger GPU"
                f" ({str(error).splitlines()[0]})"
            )
        print(f"{script}: error: {what}", file=sys.stderr)
        return 2

    return wrapped


def write_whole(path, write):
    """Calls `write(temporary path)` and moves the result to `path`: a reader, or a crash, sees the
    old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
