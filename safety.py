"""Two promises that every script keeps: bad input is told in one line, and a file is written whole
or not at all.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np

OF_TRAINING = ("run.json", "measurements.npz", "summary.json")  # in the folder of a run

NO_MEMORY = ("allocate memory", "not enough memory")  # how torch says it of a CPU's


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
    (missing, not writable, full) and full memory print one line and return 2, control-C returns
    130, a closed pipe 141; anything else is a bug and keeps its traceback.
    """
    script = script or Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            code = main(argv) or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # whoever read what is printed has seen enough: head, a pager
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor flush it at exit
            return 141
        except (BadInput, OSError) as error:
            what = str(error)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except (MemoryError, RuntimeError) as error:
            reason = brief(error)
            if type(error).__name__ == "OutOfMemoryError":  # torch's; plots do without torch
                what = f"the GPU's memory is full: take a smaller model or a larger GPU ({reason})"
            elif isinstance(error, MemoryError) or any(told in str(error) for told in NO_MEMORY):
                what = f"memory is full: take fewer examples or a smaller model ({reason})"
            else:
                raise
        print(f"{script}: error: {what}", file=sys.stderr)
        return 2

    return wrapped


def brief(error):
    """What an error says, of whatever length, in a line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


class Named(dict):
    """What a file of records holds by name; what it lacks is BadInput."""

    def __init__(self, path, content):
        super().__init__(content)
        self.path = path

    def __missing__(self, name):
        raise BadInput(f"{self.path}: damaged records: there is no {name!r} in them")


def read_json(path):
    """The JSON object in a file, every object in it `Named`."""
    try:
        content = json.loads(path.read_text(), object_hook=lambda found: Named(path, found))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: damaged ({error})") from None
    if not isinstance(content, Named):
        raise BadInput(f"{path}: damaged records: a {type(content).__name__}, not named values")
    return content


def read_arrays(path):
    """{name: array} of an .npz file, `Named`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Named(path, file)
    except OSError:
        raise
    except Exception as error:  # a damaged file, or one of another kind, can fail in any way
        raise BadInput(f"{path}: damaged records ({brief(error)})") from None


def read_snapshots(path):
    """`read_arrays` of one record a snapshot: all arrays are [snapshot, ...]."""
    arrays = read_arrays(path)
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise BadInput(f"{path}: damaged records: not as many of everything as of snapshots")
    return arrays


def write_arrays(path, arrays):
    """{name: array} as a compressed .npz."""

    def save(temporary):
        with open(temporary, "wb") as file:  # np.savez adds a suffix to a name, not to a file
            np.savez_compressed(file, **arrays)

    write_whole(path, save)


def write_json(path, content, indent=1):
    text = json.dumps(content, indent=indent) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def write_whole(path, write):
    """Calls `write(temporary path)` and moves the result to `path`: a reader, or a crash, sees the
    old file or the new one. What the file system refuses is said of `path`.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, temporary, str(temporary)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
