"""What a run shows, on a page and in a line: its phase change, its in-context learning before and
after it, its heads.

A *record* is all that is measured of one snapshot (measure.py).
"""

import numpy as np

import metrics
from curves import half_way, phase_change
from heads import HEAD_SCORES, head_class, name_of


def find_phase_change(records):
    """(first, last) index into records, or None. Found on the band score, the less noisy form of
    the same quantity.
    """
    return phase_change([r["icl_band_score"] for r in records], [r["tokens"] for r in records])


def summarise(records, measure_again, by_hand=None):
    """What a run shows, on a page: the measured part of summary.json.

    The phase change is found in the records of all snapshots, or is `by_hand`, indices of the
    first and the last. The numbers given for its start and end and for the end of training come
    from `measure_again(index)`, which may use more examples.
    """
    last = measure_again(len(records) - 1)
    shown = {
        "examples": len(last["per_token_loss"]),
        "loss": last["loss"],
        **in_context_learning(last, "score"),
        "icl_before": None,
        "icl_after": None,
        "phase_change": None,
        "best_prefix_matching": best_head(last["prefix_matching"]),
        "best_previous_token": best_head(last["previous_token"]),
        "heads": heads_table(last),
    }
    window = by_hand or find_phase_change(records)
    if window:
        start, end = (records[n] for n in window)
        before, after = (measure_again(n) for n in window)
        shown |= {
            **in_context_learning(before, "before"),
            **in_context_learning(after, "after"),
            "best_prefix_matching_before": best_head(before["prefix_matching"]),
            "best_prefix_matching_after": best_head(after["prefix_matching"]),
        }
        shown["phase_change"] = {
            "by_hand": by_hand is not None,
            "start_step": int(start["step"]),
            "end_step": int(end["step"]),
            "start_tokens": int(start["tokens"]),
            "end_tokens": int(end["tokens"]),
            # the snapshots by which score and best head have made half their way: do they come
            # together?
            "icl_half_way_snapshot": half_way([r["icl_band_score"] for r in records]),
            "prefix_matching_half_way_snapshot": half_way(
                [r["prefix_matching"].max() for r in records]
            ),
        }
    return shown


def in_context_learning(record, when):
    """A record's in-context learning scores as a summary names them."""
    return {
        f"{kind}_{when}{error}": record[f"{kind}_score{error}"]
        for kind in ("icl", "icl_band")
        for error in ("", "_error")
    }


def best_head(scores):
    """{"head": "layer:head", "score"} of the highest score in [layer, head]."""
    place = np.unravel_index(scores.argmax(), scores.shape)
    return {"head": name_of(place), "score": round(float(scores[place]), 4)}


def heads_table(record):
    """One row for each head: its name `layer:head`, its three scores and its class."""
    rows = []
    for place in np.ndindex(record["prefix_matching"].shape):
        scores = {name: round(float(record[name][place]), 4) for name in HEAD_SCORES}
        rows.append({"head": name_of(place), **scores, "class": head_class(**scores)})
    return rows


def print_heads(record):
    print("  head  prefix matching  earlier copy  before it  copying  previous token  class")
    controls = (record[name].flat for name in ("match_itself", "match_before"))
    for row, itself, before in zip(heads_table(record), *controls, strict=True):
        print(
            f"{row['head']:>6}  {row['prefix_matching']:>15.3f}  {itself:>12.3f}  {before:>9.3f}"
            f"  {row['copying']:>+7.2f}  {row['previous_token']:>14.3f}  {row['class']}"
        )


def print_copying(record):
    names = [name for name in record if name.startswith("copying")]
    titles = [name.removeprefix("copying_").replace("_", " ") for name in names]
    print("  ".join(["  head", *titles]))
    for place in np.ndindex(record["copying"].shape):
        scores = (f"{record[n][place]:>+{len(t)}.2f}" for n, t in zip(names, titles, strict=True))
        print("  ".join([f"{name_of(place):>6}", *scores]))


def one_line(record):
    """A record's three most telling numbers."""
    matching, previous = best_head(record["prefix_matching"]), best_head(record["previous_token"])
    return (
        f"ICL {record['icl_band_score']:+.2f}"
        f"  prefix matching {matching['head']} {matching['score']:.2f}"
        f"  previous token {previous['head']} {previous['score']:.2f}"
    )


def conclusion(summary):
    """The sentence that a run ends with."""
    matching, previous = summary["best_prefix_matching"], summary["best_previous_token"]
    heads = (
        f"best prefix-matching head {matching['head']} ({matching['score']:.2f}), best"
        f" previous-token head {previous['head']} ({previous['score']:.2f})"
    )
    band, score = (
        f"{summary[name]:+.2f} +- {summary[f'{name}_error']:.2f}"
        for name in ("icl_band_score", "icl_score")
    )
    at_end = (
        f"{band} (token {metrics.LATE} minus token {metrics.EARLY} {score}) on"
        f" {summary['examples']:,} examples; {heads}"
    )
    change = summary["phase_change"]
    if change is None:
        return f"no phase change; in-context learning between bands {at_end}"
    start, end = (change[edge] / 1e6 for edge in ("start_tokens", "end_tokens"))
    before, after = summary["icl_band_before"], summary["icl_band_after"]
    by_hand = ", set by hand," * change["by_hand"]
    return (
        f"phase change{by_hand} from {start:.2f}M to {end:.2f}M tokens: in-context learning"
        f" between bands {before:+.2f} -> {after:+.2f}, at the end {at_end}"
    )


def window_by_hand(summary, records):
    """Where among the records the phase change is that the summary has by hand; None if it has
    none.
    """
    change = summary.get("phase_change")
    return edges_among(records, change) if change and change.get("by_hand") else None


def edges_among(records, change):
    """Indices of the records where a summary's phase change starts and ends; None if they are not
    there.
    """
    steps = [int(record["step"]) for record in records]
    edges = change["start_step"], change["end_step"]
    return [steps.index(edge) for edge in edges] if {*edges} <= {*steps} else None
