"""The phase change: loss, in-context learning score, prefix matching of every head and the value of
context, over training.

    python plots/phase_change.py RUN [RUN ...] --out FILE.png

One column a run, as the paper's figures F3 to F6: in the shaded window in-context learning and
induction heads appear together, the loss curve has its bump, and the loss begins to fall with
context beyond the first fifty tokens.
"""

import sys
from pathlib import Path

import numpy as np

# `python plots/phase_change.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import style
from plots.style import plt


def draw(runs):
    """-> a figure with four rows and a column for each run."""
    n_columns = len(runs)
    figure, axes = plt.subplots(
        4, n_columns, figsize=(1.4 + 3.1 * n_columns, 8.5), layout="constrained",
        sharex="col", sharey="row", squeeze=False,
    )  # fmt: skip
    one_layer = next((run for run in runs if run.is_plain_one_layer), None)
    strongest = np.percentile(
        np.abs(np.concatenate([run.measurements["loss_derivative"] for run in runs])), 98
    )
    losses = np.concatenate([run.measurements["loss"] for run in runs])
    for run, (loss, score, heads, derivative) in zip(runs, axes.T, strict=True):
        loss.set_title(f"{run.title}\nseed {run.seed}")
        draw_loss(loss, run, one_layer)
        draw_score(score, run)
        draw_heads(heads, run)
        mesh = draw_derivative(derivative, run, strongest)
        for ax in (loss, score, heads):
            style.shade_phase_change(ax, run)
        derivative.set_xlabel("training tokens (millions)")
    axes[0, 0].set_ylim(losses.min() - 0.1, np.percentile(losses, 85))
    axes[2, 0].set_ylim(0, 1)
    low, high = axes[1, 0].get_ylim()
    axes[1, 0].set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    axes[1, 0].legend(loc="upper left")
    row_labels = (
        "held-out loss\n(nats per token)",
        "in-context learning\nscore (nats)",
        "prefix matching\nof each head",
        "context: token position",
    )
    for ax, label in zip(axes[:, 0], row_labels, strict=True):
        ax.set_ylabel(label)
    bar = figure.colorbar(mesh, ax=axes[3], aspect=12, pad=0.01)
    bar.set_label("d loss / d ln position\n(blue: context helps)")
    return figure


def draw_loss(ax, run, one_layer):
    if one_layer and one_layer is not run:
        ax.plot(
            one_layer.millions,
            one_layer.measurements["loss"],
            color=style.QUIET,
            lw=1,
            label=one_layer.title,
        )
        ax.legend(loc="upper right")
    ax.plot(run.millions, run.measurements["loss"], color=style.depth_colour(run.n_layers))


def draw_score(ax, run):
    """The difference between two bands of positions with its standard error, over training; as
    points the paper's two positions, which take more examples: where those were measured.
    """
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    score, error = (run.measurements[f"icl_band_score{suffix}"] for suffix in ("", "_error"))
    ax.fill_between(
        run.millions,
        score - error,
        score + error,
        color=style.depth_colour(run.n_layers),
        alpha=0.2,
        lw=0,
    )
    ax.plot(
        run.millions,
        score,
        color=style.depth_colour(run.n_layers),
        label="tokens 400-511 minus 30-70",
    )
    shown = run.summary
    points = [(run.millions[-1], shown["icl_score"], shown["icl_score_error"])]
    for edge, when in zip(run.window or (), ("before", "after"), strict=False):
        points.append((edge, shown[f"icl_{when}"], shown[f"icl_{when}_error"]))
    millions, scores, errors = zip(*points, strict=True)
    label = f"token 500 minus token 50, {shown['examples']:,} examples"
    ax.errorbar(
        millions, scores, errors, fmt="o", ms=4, lw=1, color="black", clip_on=False, label=label
    )


def draw_heads(ax, run):
    scores = run.measurements["prefix_matching"]
    for layer, head in np.ndindex(scores.shape[1:]):
        label = f"layer {layer}" if head == 0 else None
        ax.plot(
            run.millions,
            scores[:, layer, head],
            color=style.depth_colour(layer + 1),
            lw=1.2,
            label=label,
        )
    best = run.summary["best_prefix_matching"]
    end = (run.millions[-1], best["score"])
    ax.annotate(best["head"], end, xytext=(3, 0), textcoords="offset points", va="center")
    ax.legend(loc="upper left")


def draw_derivative(ax, run, strongest):
    positions = run.measurements["derivative_position"][0]
    values = run.measurements["loss_derivative"].T
    mesh = ax.pcolormesh(
        run.millions,
        positions,
        values,
        cmap="RdBu_r",
        vmin=-strongest,
        vmax=strongest,
        shading="nearest",
    )
    ax.set_yscale("log")
    ax.set_yticks([5, 50, 500], ["5", "50", "500"])
    ax.minorticks_off()
    for edge in run.window or ():
        ax.axvline(edge, color=style.WINDOW_COLOUR, lw=1.5)
    return mesh


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
