"""What size changes, and what it does not: loss by context index, and the speed of learning.

    python plots/sizes.py RUN [RUN ...] --out FILE.png

Figures F16 to F18 of the paper ("Unexplained curiosities"), for models that differ in depth or in
width. In the paper loss by context index less that at the last one is nearly the same for all
sizes, a large model's lead is there within the first tokens, and in the phase change large models
begin to learn faster than small ones.
"""

import sys
from pathlib import Path

import numpy as np

# `python plots/sizes.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from curves import SETTLED
from plots import analysis, style
from plots.runs import layers
from plots.style import plt
from safety import BadInput

# for widths, dark to light as depths are, but reds, so that they are not taken for depths
WIDTH_COLOURS = ("#67000d", "#cb181d", "#fb6a4a", "#fcae91")


def draw(runs):
    """-> a figure with four panels; runs by size, smallest first."""
    n_examples = same_examples(runs)
    runs = sorted(runs, key=lambda run: run.summary["parameters"])
    largest = runs[-1].evaluation["loss_by_position"][-1]
    colours = colours_of(runs)
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    to_last, loss, gap, speed = axes.flat
    for run in runs:
        style_of = {"color": colours[run.name], "lw": 1.5}
        losses = run.evaluation["loss_by_position"][-1]
        for ax, (positions, values) in (
            (to_last, analysis.loss_to_last(losses)),
            (loss, analysis.log_bins(losses)),
            (gap, analysis.log_bins(losses - largest)),
        ):
            ax.plot(positions, values, marker=".", ms=4, label=label_of(run, runs), **style_of)
        error = 2 * analysis.bin_errors(losses - largest)
        gap.fill_between(
            positions, values - error, values + error, color=style_of["color"], alpha=0.12
        )
        draw_speed(speed, run, style_of)
    to_last.set_title("F16  loss at the last index minus loss at each")
    loss.set_title("F17a  loss at each index")
    gap.set_title(f"F17b  loss minus that of {what_differs(runs[-1], runs)}")
    speed.set_title("F18  speed of learning")
    for ax in (to_last, loss, gap):
        ax.set(xlabel="context index (tokens)", ylabel="nats per token", xscale="log")
        ax.set_xticks([1, 10, 100], ["1", "10", "100"])
    speed.set(xlabel="training tokens (millions)", ylabel="d loss / d ln tokens (nats)")
    speed.set_xscale("log", base=2)
    speed.xaxis.set_major_formatter("{x:g}")
    for ax in (to_last, gap):
        ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    # the first three tokens, which have next to no context, would leave no room for the others
    to_last.set_ylim(bottom=1.1 * min(line.get_ydata()[3:].min() for line in to_last.lines[:-1]))
    loss.legend(loc="upper right")
    style.caption(
        figure,
        f"Paper: figures F16 to F18. F16 and F17 at the end of training on {n_examples:,} examples,"
        " in bins of equal width in ln index, F17b ± 2 standard errors; the last bin stands for the"
        " last index. F18 on"
        f" {style.counted(run.n_whole for run in runs)} examples at every snapshot, slopes of lines"
        " fitted in ln tokens; bars: phase changes.",
    )
    return figure


def same_examples(runs):
    """Their number; curves on different ones would differ by the examples."""
    counts = {run.name: run.n_whole for run in runs}
    for run in runs:
        if run.evaluation is not run.measurements:
            counts[run.name] = run.evaluation["per_token_loss"].shape[1]
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise BadInput(
            f"the runs are measured on different numbers of examples ({told}): python evaluate.py"
            " RUN --snapshots 30 --examples N for each"
        )
    return counts[runs[0].name]


def draw_speed(ax, run, style_of):
    tokens = run.measurements["tokens"]
    shown = tokens >= SETTLED * tokens[-1]
    values = analysis.speed_of_learning(tokens, run.measurements["loss"])
    ax.plot(run.millions[shown], values[shown], **style_of)
    if run.window:
        height = 1 - 0.015 * len(ax.lines)  # of the panel
        bar = {"color": style_of["color"], "lw": 3, "transform": ax.get_xaxis_transform()}
        ax.plot(run.window, (height, height), **bar)


def differ_in_width(runs):
    return len({run.made["config"]["d_model"] for run in runs}) > 1


def colours_of(runs):
    """{name: colour}: the depth's, or by rank in width."""
    if not differ_in_width(runs):
        return {run.name: style.depth_colour(run.n_layers) for run in runs}
    widths = sorted({run.made["config"]["d_model"] for run in runs})
    places = np.linspace(0, len(WIDTH_COLOURS) - 1, len(widths)).round().astype(int)
    of_width = {width: WIDTH_COLOURS[n] for width, n in zip(widths, places, strict=True)}
    return {run.name: of_width[run.made["config"]["d_model"]] for run in runs}


def label_of(run, runs):
    return f"{what_differs(run, runs)} ({run.summary['parameters'] / 1e6:.2g}M parameters)"


def what_differs(run, runs):
    if differ_in_width(runs):
        return f"width {run.made['config']['d_model']}"
    return layers(run.n_layers)


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
