"""Per-token losses of all models in the plane of their first two principal components, and by how
much their paths turn there. Numbers alone: plots/trajectories.py draws them.
"""

import dataclasses

import numpy as np

from curves import nearest
from safety import BadInput


@dataclasses.dataclass(frozen=True)
class Plane:
    """The first two principal components of per-token losses."""

    centre: np.ndarray  # [token]
    axes: np.ndarray  # [token, 2], orthonormal
    explained: np.ndarray  # [2]: shares of the variance

    def project(self, losses):
        """losses [snapshot, token] -> points [snapshot, 2], nats."""
        return (losses[:, : len(self.centre)] - self.centre) @ self.axes


def losses_through_training(run):
    """(millions of training tokens [snapshot], per-token losses [snapshot, token]), without the
    untrained model.
    """
    trained = run.evaluation["tokens"] > 0
    if trained.sum() < 2:
        raise BadInput(f"{run.folder}: a path needs two snapshots of the trained model, or more")
    losses = run.evaluation["per_token_loss"][trained].astype(np.float64)
    return run.evaluation["tokens"][trained] / 1e6, losses


def principal_plane(losses):
    """The plane of losses [snapshot, token], centred and not scaled.

    From the Gram matrix [snapshot, snapshot], which is small for any number of tokens. The signs of
    the axes are such that the first snapshot lies to the left and above: training moves right.
    Snapshots on one line have no second axis: it is 0.
    """
    centre = losses.mean(axis=0)
    offsets = losses - centre
    variances, vectors = np.linalg.eigh(offsets @ offsets.T)  # ascending
    of_both, first_two = variances[:-3:-1].clip(min=0), vectors[:, :-3:-1]
    lengths = np.where(of_both > 1e-12 * of_both[0], of_both**0.5, np.inf)
    axes = offsets.T @ first_two / lengths
    axes *= np.where(offsets[0] @ axes * (-1, 1) < 0, -1, 1)
    return Plane(centre, axes, of_both / variances.sum())


def joint_pca(runs):
    """The `Plane` of all snapshots of those of the runs that are plain (of all, if none is).

    The examples of a run are the first of a list that never changes: of runs measured on different
    numbers of them the common ones count.
    """
    some = [run for run in runs if is_plain(run)] or runs
    losses = [losses_through_training(run)[1] for run in some]
    n_tokens = min(part.shape[1] for part in losses)
    return principal_plane(np.concatenate([part[:, :n_tokens] for part in losses]))


def is_plain(run):
    return not run.made["config"]["smear"] and run.series != "width"


def pivot_angles(points, tokens, window):
    """By how much a path turns: the angles, 0 to 180 degrees, of its mean velocities in the window
    and after it with that until it begins. nan if one of the two is zero.

    points [snapshot, dimension] at `tokens` [snapshot]; window: (start, end), in the same unit. A
    mean velocity is the way from one snapshot to another by the tokens between, so only the
    snapshots next to 0, start, end and the last count. A straight path has 0 and the paper's
    "orthogonal pivot" 90.
    """
    start, end = (nearest(tokens, edge) for edge in window)
    before, within = points[start] - points[0], points[end] - points[start]
    return angle(before, within), angle(before, points[-1] - points[end])


def angle(one, other):
    length = np.linalg.norm(one) * np.linalg.norm(other)
    cosine = np.clip(one @ other / length, -1, 1) if length else np.nan
    return float(np.degrees(np.arccos(cosine)))


@dataclasses.dataclass(frozen=True)
class Pivot:
    """How one run's path in the plane turns, degrees."""

    window: tuple  # millions of tokens
    own_window: bool  # a run without one is judged in the median window of the others
    within: float  # in the window
    after: float


def pivots(runs):
    """{name: Pivot}, in the joint plane of the runs on the same examples; empty if none of the runs
    has a phase change.
    """
    windows = [run.window for run in runs if run.window and is_plain(run)]
    windows = windows or [run.window for run in runs if run.window]
    if not windows:
        return {}
    usual, found = tuple(np.median(windows, axis=0).tolist()), {}
    for group in by_examples(runs):
        plane = joint_pca(group)
        for run in group:
            millions, losses = losses_through_training(run)
            window = run.window or usual
            angles = pivot_angles(plane.project(losses), millions, window)
            found[run.name] = Pivot(window, run.window is not None, *angles)
    return found


def by_examples(runs):
    """The runs, in lists of those that are measured on the same examples."""
    groups = {}
    for run in runs:
        groups.setdefault(run.made["corpus"]["sha256"], []).append(run)
    return list(groups.values())
