"""What scripts tell while they work: what is about to be trained, how far they are, where the time
went.
"""

import contextlib
import time

from measure import N_CTX
from model import count_parameters
from summary import find_phase_change, one_line

PROGRESS_SECONDS = 15  # from one line of progress to the next


class Clock:
    """Seconds spent on each activity and in all."""

    def __init__(self):
        self.started, self.spent = time.time(), {}

    @contextlib.contextmanager
    def __call__(self, activity):
        tick = time.time()
        yield
        self.spent[activity] = self.spent.get(activity, 0.0) + time.time() - tick

    def read(self):
        return {"total": time.time() - self.started, **self.spent}

    def go_on_from(self, seconds):
        """Counts what an interrupted run has spent as spent."""
        self.spent = dict(seconds)
        self.started = time.time() - self.spent.pop("total")


def time_left(spent, done, total):
    """What the rest will take at the pace so far; spent: seconds."""
    minutes, seconds = divmod(round(spent / done * (total - done)), 60)
    return f"{minutes}:{seconds:02d} left"


class Countdown:
    """Of long work: now and then a line with how much is done, and how long the rest will take."""

    def __init__(self, says, what):
        self.says, self.what = says, what
        self.started = self.shown = time.time()

    def __call__(self, done, total, more=""):
        now = time.time()
        if self.says and done < total and now - self.shown > PROGRESS_SECONDS:
            left = time_left(now - self.started, done, total)
            print(f"{round(done, 1):,} of {total:,} {self.what}  {left}{more}", flush=True)
            self.shown = now


class Progress:
    """A line every fifteen seconds, and one when the phase change has come."""

    def __init__(self, say, records, first_step, n_steps):
        self.say, self.records, self.n_steps = say, records, n_steps
        self.started, self.first_step = time.time(), first_step
        self.shown_at, self.shown_step = self.started, first_step
        self.losses = []
        self.announced = False

    def after_step(self, step, tokens, loss):
        self.losses.append(loss)
        now = time.time()
        if now - self.shown_at < PROGRESS_SECONDS and step < self.n_steps:
            return
        done, total = step - self.first_step, self.n_steps - self.first_step
        speed = tokens / step * (step - self.shown_step) / (now - self.shown_at)
        loss = sum(self.losses) / len(self.losses)
        self.say(
            f"step {step:>{len(str(self.n_steps))}}  {tokens / 1e6:.2f}M tokens  loss {loss:.3f}"
            f"  {one_line(self.records[-1])}"
            f"  {speed / 1000:,.1f}k tokens/s  {time_left(now - self.started, done, total)}"
        )
        self.shown_at, self.shown_step, self.losses = now, step, []

    def after_snapshot(self):
        # curves.phase_change leaves out the first 2 % of training, too: of that up to now
        records = [record for record in self.records if record["step"] >= self.n_steps / 50]
        change = records and find_phase_change(records)
        # four snapshots later the smoothed score no longer changes
        if change and not self.announced and change[1] < len(records) - 5:
            start, end = (records[n] for n in change)
            self.announced = True
            self.say(
                f"the phase change has come, from {start['tokens'] / 1e6:.2f}M to"
                f" {end['tokens'] / 1e6:.2f}M tokens:\n"
                f"  before  {one_line(start)}\n  after   {one_line(end)}"
            )


def header(args, model, corpus, recipe, n_steps, n_snapshots, machine):
    """What is about to be trained, on what, with what."""
    config = model.config
    layers = f"{config.n_layers} layer{'s' * (config.n_layers > 1)}"
    whole = "" if recipe.whole == 1 else f" ({recipe.whole:.0%} of them at every position)"
    kind = f"MLPs of {config.d_mlp}" if config.d_mlp else "attention-only"
    return (
        f"model    {layers}, {kind}{', smeared keys' * config.smear}, d_model {config.d_model},"
        f" {config.n_heads} heads of {config.d_head}, context {config.n_ctx}:"
        f" {count_parameters(model)[0]:,} parameters (scale {args.scale})\n"
        f"machine  {machine['device']}, {machine['dtype']}, kernels {machine['kernels']},"
        f" torch {machine['torch']}, commit {machine['commit']}\n"
        f"corpus   {corpus.name}: {sum(map(len, corpus.train)):,} tokens to train on, vocabulary of"
        f" {corpus.d_vocab:,}, sha256 {corpus.sha256[:12]}\n"
        f"training {n_steps:,} steps of {recipe.n_rows} x {config.n_ctx} tokens, seed {args.seed};"
        f" {n_snapshots} snapshots, measured on {recipe.n_examples:,} examples of"
        f" {N_CTX} tokens{whole}"
    )
