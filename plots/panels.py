"""One panel each: what a model did through training, drawn into an axis.

Every figure that has training time on its x axis is a choice of these (`ROWS`), with a column for
each model, put together by `grid`. R1 to R9 are the rows of the paper's model analysis table.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from heads import head_named, name_of
from plots import pca, style, trajectories
from plots.context import fitted_lines
from plots.style import plt

STEEPEST = 0.4  # slope over the context with the darkest colour, in all figures: nats
BANDS = "tokens 400-511 minus 30-70"  # of metrics.band_score, which needs torch


@dataclasses.dataclass(frozen=True)
class Shown:
    """All runs of a figure: what a panel needs to know of the others."""

    runs: list
    in_plane: list  # runs that share the plane of the trajectories, shown or not

    @functools.cached_property
    def planes(self):
        groups = pca.by_examples(self.in_plane)
        return {run.folder: pca.joint_pca(group) for group in groups for run in group}

    def one_layer_like(self, run):
        """The plain one-layer model, other than this one, trained on the same corpus."""
        for other in self.runs:
            same_corpus = other.made["corpus"]["sha256"] == run.made["corpus"]["sha256"]
            if other.is_plain_one_layer and same_corpus and other is not run:
                return other
        return None


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a figure: draw(ax, run, shown) fills a panel."""

    label: str
    draw: Callable
    colours: str = ""  # what the colours of a heat map say
    diverging: bool = False  # about 0
    timed: bool = True  # is the x axis training time?


def grid(runs, names, note, in_plane=(), height=1.6):
    """-> a figure with a column for each run, the rows of those names and, beside each, its key.

    note: what the figure is in the paper. in_plane: other runs that share the trajectories' plane.
    height: of a panel, inches.
    """
    shown = Shown(runs, [*runs, *in_plane])
    width = np.clip(10 / len(runs), 1.7, 2.5)  # six have to be legible on a page
    size = (2.3 + width * len(runs), 0.9 + height * len(names))
    figure = plt.figure(figsize=size, layout="constrained")
    ratios = [width] * len(runs) + [1.2]
    cells = figure.add_gridspec(len(names), len(runs) + 1, width_ratios=ratios)
    panels = cells.subplots(squeeze=False)
    for row, axes in zip((ROWS[name] for name in names), panels, strict=True):
        draw_row(row, axes, shown)
    timed = [axes[:-1] for name, axes in zip(names, panels, strict=True) if ROWS[name].timed]
    for axes in timed:
        for ax in axes:
            ax.set_xlim(0, 1.005 * max(run.millions[-1] for run in runs))
            ax.tick_params(labelbottom=axes is timed[-1])
            if axes is timed[-1]:
                ax.set_xlabel("training tokens (millions)", fontsize=8)
    for ax, run in zip(panels[0], runs, strict=False):
        ax.set_title(style.column_title(run), fontsize=8.5)
    examples = examples_note(runs, names)
    more = " Bands and bars: one standard error."
    if {"R6", "R7"} & set(names):
        more += " Layers count from 0; layer n has the colour of models of n + 1 layers."
    if {"R3", "R4"} & set(names):
        more += " Stripes that all models share come from the examples."
    style.caption(figure, f"{note} {examples}.{more}")
    return figure


def examples_note(runs, names):
    """On how many examples the numbers in the rows of those names are."""
    note = style.examples_note(runs)
    if any(run.evaluation is not run.measurements for run in runs):
        every = style.counted(run.measurements["per_token_loss"].shape[1] for run in runs)
        whole = style.counted(run.n_whole for run in runs)
        note += f", {every} for the window, {whole} of these for every snapshot's loss"
    if "R5" in names:
        note += f", {style.counted(run.summary['examples'] for run in runs)} for black points"
    ablated = [run.ablations["examples"][0] for run in runs if run.has("ablations.npz")]
    if ablated and {"R8", "R9"} & set(names):
        note += f", {style.counted(ablated)} for ablations"
    return note


def draw_row(row, axes, shown):
    *axes, key = axes
    key.set_axis_off()
    for ax, run in zip(axes, shown.runs, strict=True):
        ax.sharey(axes[0])
        if not row.timed:
            ax.sharex(axes[0])
        row.draw(ax, run, shown)
        ax.tick_params(labelleft=ax is axes[0])
    axes[0].set_ylabel(row.label)
    if row.colours:
        explain_colours(row, axes, key)
    else:
        explain_lines(axes, key)


def explain_colours(row, axes, key):
    """One scale of colours for all panels of a row; symmetric if it diverges."""
    meshes = [mesh for ax in axes for mesh in ax.collections]
    values = np.concatenate([np.asarray(mesh.get_array()).ravel() for mesh in meshes])
    limits = (-STEEPEST, STEEPEST) if row.diverging else np.percentile(values, (1, 75))
    for mesh in meshes:
        mesh.set_clim(*limits)
    bar = key.figure.colorbar(meshes[0], cax=key.inset_axes([0, 0, 0.1, 1]), extend="both")
    bar.set_label(row.colours)


def explain_lines(axes, key):
    """One legend for all panels of a row."""
    lines = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    labels = sorted(lines)  # in the same order in all figures
    key.legend([lines[label] for label in labels], labels, loc="center left", borderaxespad=0)


def draw_trajectory(ax, run, shown):
    plane = shown.planes[run.folder]
    trajectories.draw_path(ax, run, plane)
    ax.set_xlabel(f"PC 1 (nats; {plane.explained[0]:.0%})")


def draw_loss(ax, run, shown):
    """The curve at every snapshot, for its bump; below a beginning that all models share."""
    one_layer = shown.one_layer_like(run)
    if one_layer:
        label = one_layer.title.replace(", ", ",\n")
        draw_curve(ax, one_layer, color=style.QUIET, lw=1, label=label)
    draw_curve(ax, run, color=style.depth_colour(run.n_layers))
    losses = np.concatenate([other.measurements["loss"] for other in shown.runs])
    ax.set_ylim(losses.min() - 0.1, np.percentile(losses, 82))
    style.shade_phase_change(ax, run)


def draw_curve(ax, run, **line):
    ax.plot(run.millions, run.measurements["loss"], **line)


def draw_loss_by_position(ax, run, shown):
    places, loss, _ = fitted_lines(run.evaluation["loss_by_position"])
    draw_map(ax, run, places, loss, cmap="viridis")


def draw_derivative(ax, run, shown):
    places, _, slope = fitted_lines(run.evaluation["loss_by_position"])
    draw_map(ax, run, places, slope, cmap="RdBu_r")


def draw_map(ax, run, places, values, cmap):
    """values [snapshot, place], interpolated between snapshots as a line would be."""
    millions = run.evaluation["tokens"] / 1e6
    ax.pcolormesh(millions, places, values.T, cmap=cmap, shading="gouraud", rasterized=True)
    ax.set_yscale("log")
    ax.set_yticks([10, 50, 500], ["10", "50", "500"])
    ax.minorticks_off()
    for edge in run.window or ():
        ax.axvline(edge, color=style.WINDOW_COLOUR, lw=1.5)


def draw_score(ax, run, shown):
    """The difference between two bands of positions with its standard error, over training; as
    points the paper's two positions, which take more examples: where those were measured.
    """
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    draw_band_score(ax, run, style.depth_colour(run.n_layers))
    points = [(run.millions[-1], run.summary["icl_score"], run.summary["icl_score_error"])]
    for edge, when in zip(run.window or (), ("before", "after"), strict=False):
        points.append((edge, run.summary[f"icl_{when}"], run.summary[f"icl_{when}_error"]))
    ax.errorbar(
        *zip(*points, strict=True), fmt="o", ms=4, lw=1, color="black", clip_on=False,
        label="token 500\nminus 50",
    )  # fmt: skip
    style.shade_phase_change(ax, run)


def draw_band_score(ax, run, colour):
    millions = run.evaluation["tokens"] / 1e6
    score, error = (run.evaluation[f"icl_band_score{suffix}"] for suffix in ("", "_error"))
    ax.fill_between(millions, score - error, score + error, color=colour, alpha=0.2, lw=0)
    ax.plot(millions, score, color=colour, label=BANDS.replace(" minus", "\nminus"))


def draw_heads(ax, run, shown):
    scores = run.measurements["prefix_matching"]
    for layer, head in np.ndindex(scores.shape[1:]):
        colour, label = style.depth_colour(layer + 1), f"layer {layer}"
        ax.plot(run.millions, scores[:, layer, head], color=colour, lw=1.2, label=label)
    name = run.summary["best_prefix_matching"]["head"]
    beneath = scores[-15:, *head_named(name)].max()  # its curve, where the name stands
    ax.annotate(
        name, (run.millions[-1], beneath), xytext=(0, 2), ha="right", va="bottom",
        textcoords="offset points",
    )  # fmt: skip
    ax.set_ylim(0, 1)
    style.shade_phase_change(ax, run)


def draw_traces(ax, run, shown):
    """Of every head beyond the first layer, on the direct path from the embedding."""
    if not run.has("circuits.json"):
        return style.not_available(ax, "no circuits.json")
    snapshots = run.circuits["snapshots"]
    millions = [snapshot["tokens"] / 1e6 for snapshot in snapshots]
    names = [row["head"] for row in snapshots[0]["heads"] if row["qk_match_direct"] is not None]
    if not names:
        return style.not_available(ax, "no earlier layer\ntells a key what\npreceded it")
    for name in names:
        rows = [row for snap in snapshots for row in snap["heads"] if row["head"] == name]
        values, (layer, _) = [row["qk_match_direct"] for row in rows], head_named(name)
        line = {"marker": ".", "ms": 3, "lw": 1.2, "label": f"layer {layer}"}
        ax.plot(millions, values, color=style.depth_colour(layer + 1), **line)
    style.shade_phase_change(ax, run)


def draw_icl_attribution(ax, run, shown):
    if run.has("ablations.npz"):
        label = "±0.15, the\npaper's axis"
        ax.axhspan(-0.15, 0.15, color="0.94", lw=0, zorder=0, label=label)
    draw_attribution(ax, run, "band_attribution")


def draw_before_and_after(ax, run, shown):
    draw_attribution(ax, run, "before_and_after")


def draw_attribution(ax, run, name):
    """What ablating each head changes, with its standard error, and, where several heads are of a
    class, the sum over them. The two that change most are named, if it is more than three errors.
    """
    if not run.has("ablations.npz"):
        return style.not_available(ax, "no ablations.npz")
    if name not in run.ablations:
        return style.not_available(ax, "not recorded" if run.window else "no phase change")
    millions = run.ablations["tokens"] / 1e6
    effects, errors = run.ablations[name], run.ablations[f"{name}_error"]
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    kinds = run.head_classes() | dict.fromkeys(run.heads_that_match(), "matches prefixes")
    for kind, colour in style.HEAD_COLOURS.items():
        heads = [head for head in kinds if kinds[head] == kind]
        for head in heads:
            effect, error = (values[:, *head] for values in (effects, errors))
            ax.fill_between(
                millions, effect - error, effect + error, color=colour, alpha=0.15, lw=0
            )
            ax.plot(millions, effect, color=colour, lw=1.4, label=kind)
        if len(heads) > 1:
            total = sum(effects[:, *head] for head in heads)
            ax.plot(millions, total, ":", color=colour, lw=1.4, label=f"{kind},\nsum")
    clear = [head for head in kinds if abs(effects[-1, *head]) > 3 * errors[-1, *head]]
    largest = sorted(clear, key=lambda head: -abs(effects[-1, *head]))[:2]
    upper_first = sorted(largest, key=lambda head: -effects[-1, *head])
    for head, va in zip(upper_first, ("bottom", "top"), strict=False):
        ax.annotate(
            name_of(head), (millions[-1], effects[-1, *head]), xytext=(4, 0),
            textcoords="offset points", va=va, annotation_clip=False, fontsize=8,
            color=style.HEAD_COLOURS[kinds[head]],
        )  # fmt: skip
    style.shade_phase_change(ax, run)


ROWS = {
    "R1": Row("PC 2 (nats)", draw_trajectory, timed=False),
    "R2": Row("held-out loss\n(nats per token)", draw_loss),
    "R3": Row("context:\ntoken position", draw_loss_by_position, "loss (nats)"),
    "R4": Row(
        "context:\ntoken position",
        draw_derivative,
        "slope (nats an e-fold)\nblue: context helps",
        diverging=True,
    ),
    "R5": Row("in-context\nlearning (nats)", draw_score),
    "R6": Row("prefix matching\nof each head", draw_heads),
    "R7": Row("QK trace by\nvocabulary (nats)", draw_traces),
    "R8": Row("ablation: share of\nthe change (-1: undone)", draw_before_and_after),
    "R9": Row("ablation: ICL score\nbetween bands (nats)", draw_icl_attribution),
}
