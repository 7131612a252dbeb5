"""The folder of a run: what is in it, the order it is written in, and how an interrupted run is
taken up again.

    run.json          what made it: sizes, recipe, seed, corpus; machine, versions, commit
    train.jsonl       one line a step: step, tokens, loss (nats), gradient norm; locked in training
    snapshots/        step_<step>.pt: weights that describe themselves (snapshots.py)
    measurements.npz  one record a snapshot, stacked over snapshots (measure.py)
    state.pt          weights and optimizer, only for resuming
    summary.json      what the run shows

state.pt comes last of what a snapshot writes, if it is written. Whenever the process dies,
everything up to the step in state.pt is on disk, and what is later is cut off on resuming: the same
batches then give the same losses to the last bit.
"""

import json
import math
import os
import time

import numpy as np
import torch

from safety import BadInput, Named, read_json, read_snapshots, write_arrays, write_json, write_whole
from snapshots import load_tensors, save_snapshot, save_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# writing state.pt takes at most one part in so many of a run's time: of a large model it takes
# seconds, and losing a little of the work now and then costs less
STATE_SHARE = 20


class RunFolder:
    """Opens `folder` for a new run, or, with resume, the run in it that was made by the same
    `identity`.

    identity: {"config", "recipe", "seed", "corpus"}, all that decides the losses but for rounding.
    about: what else run.json should tell; of its "machine", dtype and kernels decide the rounding
    and have to be the same, too. ranks: this process among several (parallel.py); only the first
    writes.
    """

    def __init__(self, folder, identity, about, resume, ranks):
        self.folder, self.writes = folder, ranks.is_first
        self.identity = json.loads(json.dumps(identity))
        self.machine = about.get("machine", {})
        self.records, self.next_state = [], 0.0
        self.state = self._find_state() if resume else None
        if not resume and folder.exists() and any(folder.iterdir()):
            raise BadInput(f"{folder} exists: --resume goes on with it, --out DIR writes elsewhere")
        ranks.wait()  # until all have looked: what the first writes would look like a run to them
        if self.writes:
            self.snapshots.mkdir(parents=True, exist_ok=True)
            if not resume:
                self._open_log()
            if self.state is None:
                self.log.truncate(0)
                write_json(folder / "run.json", identity | about)

    def _open_log(self):
        """Opens it and locks it: two processes that write into one folder would spoil the run. The
        lock goes with the process, however that ends.
        """
        self.log = open(self.folder / "train.jsonl", "a")
        try:
            if fcntl:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{self.folder}: another process is training in this folder; wait for it, or write"
                " elsewhere with --out DIR"
            ) from None
        except OSError:
            pass  # a file system without locks

    @property
    def snapshots(self):
        return self.folder / "snapshots"

    def _find_state(self):
        """state.pt of the run in the folder; None if it had no snapshot yet."""
        if not (self.folder / "run.json").exists():
            raise BadInput(
                f"{self.folder} holds no run to go on with; leave out --resume to begin one"
            )
        if self.writes:
            self._open_log()  # before reading what another process may still be changing
        before = read_json(self.folder / "run.json")
        pairs = {name: (before.get(name), now) for name, now in self.identity.items()}
        machine = before.get("machine")
        for name in ("dtype", "kernels"):
            if isinstance(machine, dict) and name in machine and name in self.machine:
                pairs[f"--{name}"] = machine[name], self.machine[name]
        for name, (then, now) in pairs.items():
            if then != now:
                raise BadInput(
                    f"{self.folder} was begun with another {name} ({difference(then, now)});"
                    " repeat the flags that began it, or begin a new run with --out DIR"
                )
        if not (self.folder / "state.pt").exists():
            measured = self.folder / "measurements.npz"
            if measured.exists() and any(r["step"] > 0 for r in read_records(measured)):
                raise BadInput(
                    f"{self.folder}: state.pt is missing: this run cannot go on, and to start over"
                    " would overwrite its records; start anew with another --out DIR"
                )
            return None
        return load_tensors(self.folder / "state.pt")

    def restore(self, model, optimizer, clock, n_steps):
        """Puts the state of an interrupted run into them, and cuts its later traces off; returns
        the number of steps done.
        """
        if self.state is None:
            return 0
        state, self.state = self.state, None
        try:
            step = read_state(state, model, optimizer, clock, n_steps)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise BadInput(
                f"{self.folder / 'state.pt'}: damaged, or does not fit this model ({error})"
            ) from None
        records = read_records(self.folder / "measurements.npz")
        self.records = [record for record in records if record["step"] <= step]
        if self.writes:
            lines = (self.folder / "train.jsonl").read_bytes().splitlines(keepends=True)
            if len(lines) < step:
                raise BadInput(
                    f"{self.folder / 'train.jsonl'}: damaged: {len(lines)} lines, where state.pt"
                    f" has made {step} steps; begin a new run with --out DIR"
                )
            self.log.truncate(sum(map(len, lines[:step])))
        return step

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

    def read_summary(self):
        """That of a run which is finished and taken up once more, else {}."""
        path = self.folder / "summary.json"
        return read_json(path) if path.exists() else {}

    def write_summary(self, summary):
        if self.writes:
            write_json(self.folder / "summary.json", summary)


def read_state(state, model, optimizer, clock, n_steps):
    """Puts what `write_state` wrote into them; returns the number of steps done.

    The file may come from a stranger, or be damaged. Of the optimizer it gives two moments a
    parameter and nothing else: PyTorch takes any shape, and the fused AdamW then writes beyond it.
    """
    step, seconds = state["step"], state["seconds"]
    if type(step) is not int or not 0 <= step <= n_steps:
        raise ValueError("its step is none of this run")
    needed = {"total", "training"} if step else {"total"}
    if not needed <= seconds.keys() or not all(map(is_number, seconds.values())):
        raise ValueError("its seconds are none")
    if state["weights"].keys() != model.state_dict().keys():
        raise ValueError("its weights are another model's")
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(fitting(state["weights"][name], weight))
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    for n, parameter in enumerate(ordered if step else ()):
        moments = state["optimizer"]["state"][n]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
            **{
                name: torch.empty_like(parameter).copy_(fitting(moments[name], parameter))
                for name in ("exp_avg", "exp_avg_sq")
            },
        }
    clock.go_on_from(seconds)
    return step


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def fitting(found, like):
    """found, if it is a tensor like the other."""
    if not torch.is_tensor(found):
        raise ValueError("a tensor is missing")
    if (found.shape, found.dtype, found.layout) != (like.shape, like.dtype, like.layout):
        raise ValueError(f"a tensor is {list(found.shape)} where {list(like.shape)} is needed")
    return found


def difference(before, now):
    """What has changed between two settings, in words."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before} then, {now} now"
    return ", ".join(
        f"{key} {before.get(key)} then, {now[key]} now"
        for key in now
        if before.get(key) != now[key]
    )


def stack(records):
    """Records of snapshots -> {name: array [snapshot, ...]}."""
    # what the last has: a run may have been begun by an older version, whose records held more
    return {name: np.stack([record[name] for record in records]) for name in records[-1]}


def write_records(path, records):
    """All records of a run in one .npz, which numpy alone can read."""
    write_arrays(path, stack(records))


def read_records(path):
    """What `write_records` wrote, one record a snapshot."""
    arrays = read_snapshots(path)
    n_records = len(next(iter(arrays.values())))
    return [
        Named(path, {name: array[n] for name, array in arrays.items()}) for n in range(n_records)
    ]
