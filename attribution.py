"""The record of a snapshot: what ablating each head changes, and some heads together.

`ablate.py` makes records with this; the definitions are in metrics.py, the computation in sweep.py.
"""

import hashlib

import numpy as np
import torch

import loading
import machine
import metrics
from heads import CLASSES, name_of, pick_heads
from measure import N_CTX, ROWS_AT_ONCE, draw_examples, gather_losses, head_scores
from parallel import Cores
from records import stack
from safety import BadInput
from summary import heads_table
from sweep import ablation, mean_results, sweep

# of a change of losses: the names of what metrics.py measures
ATTRIBUTION = {
    "icl_score": "icl_attribution",
    "icl_band_score": "band_attribution",
    "loss": "loss_change",
}
QUANTITIES = (*ATTRIBUTION.values(), "before_and_after")
# what is kept of a chunk of examples, for each core
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 16 * 2**30}


class Ablations:
    """What is ablated, how and on which examples: the same for every snapshot. By the scores of the
    model in `path` heads are put into classes.
    """

    def __init__(self, args, ranks, path):
        self.args, self.ranks, self.cores = args, ranks, Cores(args.device)
        self.corpus = loading.corpus_of(args, path, ranks)
        self.examples = draw_examples(self.corpus, args.examples).to(args.device)
        model, _ = self.load(path)
        with open(path, "rb") as file:  # up to 52 GB
            self.weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self.table = heads_table(head_scores(model, self.examples, self.cores))
        self.sets = name_sets(self.table, args.heads)
        # the bands, which hold the paper's two positions, and each example's own
        self.scored = [n + 1 for n in self.examples.scored[0, :-1].tolist()]
        self.at = self.examples.scored
        if args.no_bands:
            keep = [self.scored.index(n) for n in (metrics.EARLY, metrics.LATE)]
            self.scored, self.at = [metrics.EARLY, metrics.LATE], self.at[:, [*keep, -1]]
        # of the phase change, which only a run has: its steps and the before-and-after vector
        self.window, self.vector = (), None

    def settings(self):
        """All that decides a snapshot's record."""
        args = self.args
        return {
            "model": self.weights,
            "corpus": self.corpus.sha256,
            "examples": args.examples,
            "patterns": "changing" if args.full else "preserved",
            "replacement": "mean" if args.mean else "zero",
            "layernorm": "frozen" if args.freeze_layernorm else "recomputed",
            "scored_positions": self.scored,
            "together": {name: list(map(name_of, some)) for name, some in self.sets.items()},
            "phase_change_steps": list(self.window),
            "before_and_after": "share",
        }

    def machine(self):
        args, ranks = self.args, self.ranks
        return machine.describe(args.device, self.cores, ranks.world, torch.float32, args.kernels)

    def load(self, path):
        model, about = loading.load_fitting(path, self.corpus, self.args.kernels)
        return model.to(self.args.device), about

    def find_vector(self, start, end):
        """The before-and-after vector between two snapshots."""
        losses, self.window = [], []
        for path in start, end:
            model, about = self.load(path)
            losses.append(self.losses(model, [[]])[0, :, -1])
            self.window.append(about["step"])
        self.vector = metrics.before_and_after_vector(*losses)

    def record(self, model, progress):
        """One snapshot's record, nats: the clean run's scores, and QUANTITIES (ablate.py tells what
        they are) as far as they are defined: for every head [layer, head], summed over the heads of
        each set and for each set ablated together [set]; `..._error` is a standard error.
        """
        n_layers, n_heads = model.config.n_layers, model.config.n_heads
        heads = list(np.ndindex(n_layers, n_heads))
        together = list(self.sets.values())
        losses = self.losses(model, [[], *([head] for head in heads), *together], progress)
        clean, changes = losses[0], losses[1:] - losses[0]
        by_head, together_changes = changes[: len(heads)], changes[len(heads) :]
        record = {"examples": len(clean), **with_errors(self.scores(clean))}
        effects = stack([self.effect(change) for change in by_head])
        record |= {name: row.reshape(n_layers, n_heads) for name, row in effects.items()}
        if together:
            sums = [sum(by_head[heads.index(head)] for head in some) for some in together]
            for what, some in ("sum", sums), ("together", together_changes):
                effects = stack([self.effect(change) for change in some])
                record |= {f"{what}_{name}": row for name, row in effects.items()}
        return record

    def scores(self, losses):
        """losses [example, scored], last those at each example's own position -> {name: (value, its
        standard error)}, nats.
        """
        by_position = losses.new_full((len(losses), N_CTX), torch.nan)
        by_position[:, [n - 1 for n in self.scored]] = losses[:, :-1]
        scores = {
            "icl_score": metrics.in_context_learning_score(by_position),
            "loss": metrics.mean_and_error(losses[:, -1]),
        }
        if not self.args.no_bands:
            scores["icl_band_score"] = metrics.band_score(by_position)
        return scores

    def effect(self, change):
        """The scores of a change of losses, ablated minus clean, under the names of QUANTITIES."""
        effect = {ATTRIBUTION[name]: value for name, value in self.scores(change).items()}
        if self.vector is not None:
            effect["before_and_after"] = metrics.before_and_after_attribution(
                change[:, -1], self.vector
            )
        return with_errors(effect)

    def losses(self, model, ablations, progress=lambda done, n: None):
        """Losses at the scored positions and, last, at each example's own: [ablation, example,
        scored], on the CPU.
        """
        config, device = model.config, self.at.device.type
        rows = [self.ranks.share(x) for x in (self.examples.inputs, self.examples.targets, self.at)]
        means = self.means(model, rows[0]) if self.args.mean else None
        at_once = ROWS_AT_ONCE[device]
        if not self.args.full:
            width = max(config.d_model, config.n_heads * config.d_head)
            # of one example: the clean run's q, k, z and residual stream, and what ablations end in
            n_bytes = 4 * 4 * config.n_layers * N_CTX * width
            n_bytes += 4 * len(ablations) * self.at.shape[1] * config.d_model
            at_once = max(1, CHUNK_BYTES[device] // n_bytes)

        @torch.no_grad()  # gradients are switched off for each thread
        def of_chunk(inputs, targets, at):
            if not self.args.full:
                frozen = self.args.freeze_layernorm
                losses = sweep(model, inputs, targets, at, ablations, means, frozen)
                return losses.transpose(0, 1)
            hooks = (ablation(heads, means) for heads in ablations)
            losses = [model.losses(inputs, targets, hook, pattern=None, at=at) for hook in hooks]
            return torch.stack(losses, dim=1)

        parts = []
        chunks = zip(*(x.split(at_once * self.cores.count) for x in rows), strict=True)
        for chunk in chunks if len(rows[0]) else ():
            parts += self.cores(of_chunk, *chunk)
            progress(sum(map(len, parts)), len(rows[0]))
        losses = gather_losses(parts, self.ranks).cpu().transpose(0, 1)
        loading.check_losses(losses)
        return losses

    def means(self, model, inputs):
        """Mean results over the examples of all processes, of which inputs is this one's share:
        [layer, head, d_head].
        """
        at_once = ROWS_AT_ONCE[inputs.device.type]
        shape = model.config.n_layers, model.config.n_heads, model.config.d_head

        def of_rows(inputs):
            return sum(mean_results(model, rows) * len(rows) for rows in inputs.split(at_once))

        total = sum(self.cores(of_rows, inputs), inputs.new_zeros(shape, dtype=torch.float32))
        self.ranks.sum(total)
        return total / len(self.examples)


def with_errors(values):
    """{name: (value, error)} -> {name: value, name_error: error}, float32."""
    errors = {f"{name}_error": np.float32(error) for name, (_, error) in values.items()}
    return {name: np.float32(value) for name, (value, _) in values.items()} | errors


def name_sets(table, wanted):
    """What is ablated together: {name: [(layer, head)]} of the heads that --heads names and of all
    others; nothing if no head matches prefixes and none is named.
    """
    kind = wanted or "prefix-matching"
    heads = pick_heads(table, kind)
    if wanted and not heads:
        classes = ", ".join(f"{row['head']} {row['class']}" for row in table)
        raise BadInput(f"--heads {wanted}: none of this model's heads is one ({classes})")
    of_kind = f"{kind} " if kind in CLASSES else ""
    names = ", ".join(map(name_of, heads))
    name = f"{of_kind}head{'s' * (len(heads) > 1)} {names}"
    sets = {name if len(heads) < 4 else f"{len(heads)} {of_kind or 'chosen '}heads": heads}
    every = ",".join(row["head"] for row in table)
    sets["all other heads"] = sorted(set(pick_heads(table, every)) - set(heads))
    return {name: some for name, some in sets.items() if some} if heads else {}
