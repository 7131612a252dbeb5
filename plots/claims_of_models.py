"""The paper's claims about heads, sizes and the experiment itself, judged as those in
plots/claims.py are.
"""

import functools
import operator

import numpy as np

from heads import name_of
from plots import analysis
from plots.checks import (
    NONE,
    WITHIN_NOISE,
    Check,
    by_name,
    check,
    claim,
    deep,
    evaluated,
    families,
    having,
    is_over,
    loss_curve,
    scores,
    size,
    small,
)

# --- Argument 4: heads of a large model


@claim(
    name="Q11",
    words="Induction heads of a large model do fuzzy matching",
    counts="in a model of 10 billion parameters or more, a head with 65 % of its attention on"
    " labels of the same kind",
    paper="65 % for one head of a 13B model; copying 0.89, 0.20, 0.69 and prefix matching 0.75,"
    " 0.85, 0.94 for three",
    figure="token-views-patterns",
    command="plots/token_views.py --view patterns {runs}/2L",
)
def fuzzy_matching(runs):
    models = having(small(runs), "tasks.json")
    best = by_name(models, lambda run: run.tasks["pattern_matching"]["heads"][0])
    attention = {name: head["attention"] for name, head in best.items()}
    large = {run.name: attention[run.name] >= 0.65 for run in models if size(run) >= 1e10}
    copying = {}
    for run in models:
        matching = [*map(name_of, run.heads_that_match())]
        rows = [row for row in run.summary["heads"] if row["head"] in matching]
        copying |= {f"{run.name} {row['head']}": row["copying"] for row in rows}
    yield Check("best head's attention", attention, large, ".0%", of_large=True)
    yield check("by chance", {name: head["chance"] for name, head in best.items()}, form=".0%")
    yield check("copying of the heads that match prefixes", copying)


# --- where the heads are, and what their weights say


def share_in_layer(run, layer):
    """Of the heads that match prefixes; layer -1 is the last."""
    places = analysis.layers_from_last(run.heads_that_match(), run.n_layers)
    return places[-1 - layer] / places.sum() if places.any() else NONE


@claim(
    name="Q12 (A1)",
    words="Attention-only: the heads that match prefixes are in the last layer",
    counts="more than half of them in every model of three layers or more (of two it is the only"
    " layer that can have them)",
    paper="in the last layer",
    figure="head-positions",
    command="plots/head_positions.py {runs}/[1-6]L",
)
def heads_in_the_last_layer(runs):
    models = [run for run in small(runs, "attention-only") if run.n_layers > 2]
    found = by_name(models, lambda run: share_in_layer(run, -1))
    yield check("share", found, lambda share: share > 0.5, ".0%")


@claim(
    name="Q12 (A2)",
    words="With MLPs: in five or six layers they are in the second-to-last",
    counts="more than half of them in every model",
    paper="mostly second-to-last layer",
    figure="head-positions-mlp",
    command="plots/head_positions.py {runs}/[1-6]L-mlp",
)
def heads_in_the_second_to_last_layer(runs):
    models = [run for run in small(runs, "with MLPs") if run.n_layers >= 5]
    found = by_name(models, lambda run: share_in_layer(run, -2))
    yield check("share", found, lambda share: share > 0.5, ".0%")


@claim(
    name="Q12 (A3)",
    words="In large models they are in the first half",
    counts="more than half of them in every model of 24 layers or more",
    paper="in 24 and 40 layers most come before half the depth",
    figure="head-positions-width",
    command="plots/head_positions.py {runs}/2L {runs}/2L-d*",
)
def heads_in_the_first_half(runs):
    def share(run):
        layers = np.array([layer for layer, _ in run.heads_that_match()])
        return (layers < run.n_layers / 2).mean() if len(layers) else NONE

    large = [run for run in runs.values() if run.n_layers >= 24]
    shares = by_name(large, share)
    yield check("24 layers or more", shares, lambda share: share > 0.5, ".0%", of_large=True)
    yield check("models of layers", by_name(runs.values(), lambda run: run.n_layers), form="d")


def of_heads(models, *names):
    """Numbers of all heads at the end of training (circuits.json), one array for each name; heads
    that lack one of them left out.
    """
    rows = [row for run in models for row in run.circuits["snapshots"][-1]["heads"]]
    numbers = [[row[name] for name in names] for row in rows]
    return np.array([row for row in numbers if None not in row]).reshape(-1, len(names)).T


def coefficients(x, y, least):
    """Checks of Pearson's and Spearman's coefficient, least(number of heads) the smallest that
    counts.
    """
    if len(x) < 3:
        return
    holds = functools.partial(operator.le, least(len(x)))
    for name, coefficient in ("Pearson", analysis.pearson), ("Spearman", analysis.spearman):
        yield check(f"{name}, {len(x)} heads", {"": coefficient(x, y)}, holds)


def two_errors(n):
    """Above 0 by two standard errors of the coefficient of n pairs that have nothing in common."""
    return 2 / (n - 1) ** 0.5


@claim(
    name="Q13 (A4)",
    words="Heads that match prefixes copy",
    counts="both coefficients of correlation, over all heads of plain models, above 0 by two"
    " standard errors, 2 / sqrt(heads - 1)",
    paper="heads do both or neither",
    figure="head-scatter",
    command="plots/head_scatter.py {runs}/[1-6]L {runs}/[1-6]L-mlp {runs}/[12]L-smear {runs}/2L-d*",
)
def matching_heads_copy(runs):
    rows = [row for run in small(runs) for row in run.summary["heads"]]
    x, y = ([row[score] for row in rows] for score in ("prefix_matching", "copying"))
    yield from coefficients(x, y, two_errors)


@claim(
    name="Q13 (A5)",
    words="Copying is what the eigenvalues of OV say: their sum by the sum of their moduli",
    counts="both coefficients 0.5 or more, on the direct path",
    paper="strong positive correlation",
    figure="eigenvalues",
    command="plots/eigenvalues.py {runs}/[1-6]L {runs}/[12]L-[12]",
)
def copying_is_in_the_eigenvalues(runs):
    models = having(small(runs, "attention-only"), "circuits.json")
    yield from coefficients(*of_heads(models, "ov_copying_direct", "copying"), lambda n: 0.5)


@claim(
    name="Q13 (A6)",
    words="Prefix matching is what the trace of QK through previous-token heads says",
    counts="both coefficients above 0 by two standard errors, on the direct path",
    paper="positive",
    figure="eigenvalues",
    command="plots/eigenvalues.py {runs}/[1-6]L {runs}/[12]L-[12]",
)
def prefix_matching_is_in_the_trace(runs):
    models = having(small(runs, "attention-only"), "circuits.json")
    yield from coefficients(*of_heads(models, "qk_match_direct", "prefix_matching"), two_errors)


# --- models of different sizes


@claim(
    name="Q14 (score)",
    words="The in-context learning score is the same for all sizes",
    counts="its range over the models of two layers and more is a quarter of its mean or less",
    paper="about 0.4 nats for all",
    figure="sizes-depth",
    command="plots/sizes.py {runs}/[2-6]L",
)
def same_score_for_all_sizes(runs):
    def spread(models):
        return analysis.relative_range([*scores(models, "score").values()])

    yield from of_families(families(runs), spread, lambda spread: spread <= 0.25, ".0%")


@claim(
    name="Q14 (F16)",
    words="Loss by context index, less that at the last one, is the same for all sizes",
    counts="from the 10th token on models differ by a quarter or less of what comes after the 10th",
    paper="the curves nearly coincide",
    figure="sizes-width",
    command="plots/sizes.py {runs}/2L {runs}/2L-d*",
)
def same_curve_for_all_sizes(runs):
    def difference(models):
        losses = np.stack([run.evaluation["loss_by_position"][-1] for run in models])
        positions, curves = analysis.loss_to_last(losses)
        late = curves[:, positions >= 10]
        return np.ptp(late, axis=0).max() / abs(late[:, 0].mean())

    found = families({run.name: run for run in evaluated(runs.values())})
    yield from of_families(found, difference, lambda share: share <= 0.25, ".0%")


@claim(
    name="Q14 (F17)",
    words="Most of a large model's lead is there by the 10th token",
    counts="more than half of each smaller model's gap to the largest, if that is 0.12 nats or more"
    " at the end of the context, four times its noise",
    paper="formed in the first 10 tokens, then flat",
    figure="sizes-width",
    command="plots/sizes.py {runs}/2L {runs}/2L-d*",
)
def lead_by_the_tenth_token(runs):
    yield from against_largest(runs, analysis.gap_share, lambda share: share > 0.5, ".0%")


@claim(
    name="Q14 (note 27)",
    words="Around the 100th token small models gain more from context",
    counts="d loss / d ln position from token 50 to 200 is lower than in the largest model, if it"
    " differs by two standard errors",
    paper="slightly steeper",
    figure="sizes-width",
    command="plots/sizes.py {runs}/2L {runs}/2L-d*",
)
def small_models_are_steeper(runs):
    def steeper(losses, largest):
        lead = losses - largest, 50, 200
        slope, error = analysis.context_slope(*lead), analysis.context_slope_error(*lead)
        return slope if abs(slope) > 2 * error else NONE

    yield from against_largest(runs, steeper, lambda slope: slope < 0, "+.3f")


def against_largest(runs, value, holds, form):
    """A check for each family of value(losses by position, those of the largest model), where it
    can be told.
    """
    for name, models in families({run.name: run for run in evaluated(runs.values())}).items():
        losses = by_name(models, lambda run: run.evaluation["loss_by_position"][-1])
        smaller = {run.name: value(losses[run.name], [*losses.values()][-1]) for run in models[:-1]}
        told = {run: number for run, number in smaller.items() if not np.isnan(number)}
        of_all = f", {len(told)} of {len(smaller)} beyond noise" * (0 < len(told) < len(smaller))
        missing = WITHIN_NOISE if smaller else "no records"
        yield check(name + of_all, told, holds, form, missing=missing)


def of_families(found, value, holds, form):
    """A check of value(models) for each family."""
    for name, models in found.items():
        what = f"{name} ({len(models)} models)" if models else name
        yield check(what, {"": value(models)} if models else {}, holds, form)


@claim(
    name="Q15",
    words="Before the window small models learn faster, after it large ones",
    counts="rank correlation of size and -d loss / d ln tokens: -0.5 or less, then +0.5 or more",
    paper="the order of the curves inverts",
    figure="sizes-width",
    command="plots/sizes.py {runs}/2L {runs}/2L-d*",
)
def order_inverts(runs):
    def order(models, when):
        curves, windows = [*map(loss_curve, models)], [run.window for run in models]
        return analysis.order_of_learning([*map(size, models)], curves, windows)[when]

    found = families({name: run for name, run in runs.items() if is_over(run)}, least=3)
    before = {f"before, {name}": models for name, models in found.items()}
    after = {f"after, {name}": models for name, models in found.items()}
    yield from of_families(before, lambda models: order(models, 0), lambda r: r <= -0.5, "+.2f")
    yield from of_families(after, lambda models: order(models, 1), lambda r: r >= 0.5, "+.2f")


# --- the experiment itself


@claim(
    name="Q16",
    words="The evidence is of many models, examples, ablations and snapshots",
    counts="no fewer than the paper's",
    paper="34 models; 10,000 examples of 512 tokens; more than 50,000 ablations; 200 snapshots",
    figure="",
    command="reproduce.py --scale {runs.name}",
)
def evidence(runs):
    def n_examples(run):
        """The fewest that any snapshot is measured or ablated on."""
        ablated = run.ablations["examples"].min() if run.has("ablations.npz") else np.inf
        return min(run.measurements["per_token_loss"].shape[1], ablated)

    if not runs:
        return
    ablated = having(runs.values(), "ablations.npz")
    every = {(str(run.made["config"]), run.made["corpus"]["sha256"]) for run in runs.values()}
    found = {
        "models, seeds not counted": (len(every), 34),
        "examples, at least": (min(map(n_examples, runs.values())), 10_000),
        "ablations": (sum(run.ablations["icl_attribution"].size for run in ablated), 50_000),
        "snapshots, at least": (min(len(run.millions) for run in runs.values()), 200),
    }
    for what, (number, wanted) in found.items():
        yield check(what, {"": number}, lambda n, wanted=wanted: n >= wanted, ",")


@claim(
    name="Q17",
    words="No change of the schedule makes the window",
    counts="warm-up ends before it starts, and weight decay does not change before it ends",
    paper="warm-up ends at 1.5 billion tokens; weight decay falls after the window",
    figure="phase-change-attention-only",
    command="plots/phase_change.py {runs}/[1-6]L",
)
def schedule_does_not_make_it(runs):
    def changes(run):
        later = run.made["recipe"]["weight_decay_later"]
        return later is not None and later[0] <= run.summary["phase_change"]["end_step"]

    models = [run for run in runs.values() if run.window]
    warmup = by_name(models, lambda run: run.made["recipe"]["warmup_tokens"] / 1e6 / run.window[0])
    yield check("warm-up, by the start of the window", warmup, lambda share: share < 1, ".0%")
    yield check("weight decay does not change", by_name(models, changes), operator.not_, "")


@claim(
    name="Q18",
    words="Heads are rules: the previous token; what followed earlier copies; longer copies first",
    counts="of what ablating the head costs, 89 %, then 55 % is recovered (the paper's less ten"
    " points), and 5 points more by the last rule",
    paper="99 %, 65 %, +10 % (A. Scherlis's replication)",
    figure="",
    command="ablate.py runs/NAME/snapshots/LAST.pt --substitute induction",
)
def heads_are_rules(runs):
    models = [run for run in deep(runs, "attention-only") if run.n_layers == 2]

    def recovered(rule):
        return {
            f"{run.name} {row['heads'][0]}": (row["recovered_zero_free"] or [NONE])[0]
            for run in having(models, f"substitute-{rule}.json")
            for row in run.substituted(rule)
            if len(row["heads"]) == 1
        }

    previous, copies, longer = map(recovered, ("previous", "induction", "induction2"))
    more = {head: longer[head] - copies[head] for head in copies if head in longer}
    yield check("previous token", previous, lambda share: share >= 0.89, ".0%")
    yield check("earlier copies", copies, lambda share: share >= 0.55, ".0%")
    yield check("longer copies", more, lambda gain: gain >= 0.05, "+.0%")
