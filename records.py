"""The folder of a run: what is in it, the order it is written in, and how an interrupted run is
taken up again.

    run.json          what made it: sizes, recipe, seed, corpus; machine, versions, commit
    train.jsonl       one line a step: step, tokens, loss (nats), gradient norm
    snapshots/        step_<step>.pt: weights that describe themselves (snapshots.py)
    measurements.npz  one record a snapshot, stacked over snapshots (evaluate.py)
    state.pt          weights and optimizer, only for resuming
    summary.json      what the run shows

state.pt comes last of what a snapshot writes, if it is written. Whenever the process dies,
everything up to the step in state.pt is on disk, and what is later is cut off on resuming: the same
batches then give the same losses to the last bit.
"""

import json
import os
import time
import zipfile

import numpy as np

from safety import BadInput, write_whole
from snapshots import load_tensors, save_snapshot, save_tensors

# writing state.pt takes at most one part in so many of a run's time: of a large model it takes
# seconds, and losing a little of the work now and then costs less
STATE_SHARE = 20


class RunFolder:
    """Opens `folder` for a new run, or, with resume, the run in it that was made by the same
    `identity`.

    identity: {"config", "recipe", "seed", "corpus"}, all that decides the losses. about: what else
    run.json should tell. ranks: this process among several (parallel.py); only the first writes.
    """

    def __init__(self, folder, identity, about, resume, ranks):
        self.folder, self.writes = folder, ranks.is_first
        self.identity = json.loads(json.dumps(identity))
        self.records, self.next_state = [], 0.0
        self.state = self._find_state() if resume else None
        if not resume and folder.exists() and any(folder.iterdir()):
            raise BadInput(f"{folder} exists: --resume goes on with it, --out DIR writes elsewhere")
        ranks.wait()  # until all have looked: what the first writes would look like a run to them
        if self.writes:
            self.snapshots.mkdir(parents=True, exist_ok=True)
            if self.state is None:
                write_json(folder / "run.json", identity | about)
            self.log = open(folder / "train.jsonl", "w" if self.state is None else "a")

    @property
    def snapshots(self):
        return self.folder / "snapshots"

    def _find_state(self):
        """state.pt of the run in the folder, the run's later traces cut off; None if it had no
        snapshot yet.
        """
        if not (self.folder / "run.json").exists():
            raise BadInput(
                f"{self.folder} holds no run to go on with; leave out --resume to begin one"
            )
        before = read_json(self.folder / "run.json")
        for name, now in self.identity.items():
            if before.get(name) != now:
                raise BadInput(
                    f"{self.folder} was begun with another {name}"
                    f" ({difference(before.get(name), now)}); repeat the flags that began it, or"
                    " begin a new run with --out DIR"
                )
        if not (self.folder / "state.pt").exists():
            return None
        state = load_tensors(self.folder / "state.pt")
        records = read_records(self.folder / "measurements.npz")
        self.records = [record for record in records if record["step"] <= state["step"]]
        if self.writes:
            lines = (
                (self.folder / "train.jsonl").read_text().splitlines(keepends=True)[: state["step"]]
            )
            write_whole(self.folder / "train.jsonl", lambda path: path.write_text("".join(lines)))
        return state

    def restore(self, model, optimizer, clock):
        """Puts the state of an interrupted run into them; returns the number of steps done."""
        if self.state is None:
            return 0
        try:
            model.load_state_dict(self.state["weights"])
            optimizer.load_state_dict(self.state["optimizer"])
            clock.go_on_from(self.state["seconds"])
            return self.state["step"]
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{self.folder / 'state.pt'}: does not fit this model ({reason})"
            ) from None
        finally:
            self.state = None

    def has_record_of(self, step):
        return bool(self.records) and self.records[-1]["step"] == step

    def write_step(self, **line):
        if self.writes:
            self.log.write(json.dumps(line) + "\n")

    def write_snapshot(self, model, record):
        self.records.append(record)
        if self.writes:
            step, tokens = record["step"], record["tokens"]
            save_snapshot(self.snapshot_path(step), model, step, tokens, self.identity["corpus"])
            write_records(self.folder / "measurements.npz", self.records)

    def snapshot_path(self, step):
        return self.snapshots / f"step_{step:07d}.pt"

    def write_state(self, step, model, optimizer, clock, now=True):
        """now: or else only if the last one is long enough ago."""
        began = time.time()
        if self.writes and (now or began >= self.next_state):
            self.log.flush()
            os.fsync(self.log.fileno())
            state = {
                "step": step,
                "weights": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "seconds": clock.read(),
            }
            write_whole(self.folder / "state.pt", lambda path: save_tensors(state, path))
            took = time.time() - began
            self.next_state = began + STATE_SHARE * took

    def write_summary(self, summary):
        if self.writes:
            write_json(self.folder / "summary.json", summary)


def difference(before, now):
    """What has changed between two settings, in words."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before} then, {now} now"
    return ", ".join(
        f"{key} {before.get(key)} then, {now[key]} now"
        for key in now
        if before.get(key) != now[key]
    )


def write_json(path, content, indent=1):
    text = json.dumps(content, indent=indent) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path}: damaged ({error})") from None


def stack(records):
    """Records of snapshots -> {name: array [snapshot, ...]}."""
    # what the last has: a run may have been begun by an older version, whose records held more
    return {name: np.stack([record[name] for record in records]) for name in records[-1]}


def write_records(path, records):
    """All records of a run in one .npz, which numpy alone can read."""
    write_arrays(path, stack(records))


def write_arrays(path, arrays):
    """{name: array} as a compressed .npz."""

    def save(temporary):
        with open(temporary, "wb") as file:  # np.savez adds a suffix to a name, not to a file
            np.savez_compressed(file, **arrays)

    write_whole(path, save)


def read_records(path):
    """What `write_records` wrote, one record a snapshot."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return [
            {name: array[n] for name, array in arrays.items()} for n in range(len(arrays["step"]))
        ]
    except (ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: damaged, or not the records of a run ({error})") from None
