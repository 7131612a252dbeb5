"""Records of runs made by hand, in which every claim of the paper holds or, by a knob, does not."""

import json

import numpy as np

from heads import head_class, head_named, name_of

TOKENS = np.linspace(0, 8e6, 89)
WINDOW = 3.4e6, 4.6e6
EVALUATED = np.array([1e5, *WINDOW, 8e6])
HALF_WAYS = {"matching": 3.95e6, "icl": 4.02e6, "copying": 4.5e6}

GOOD = {
    # in-context learning, nats: where the window starts, where it ends, at the end
    "before": -0.05,
    "after": -0.39,
    "end": -0.4,
    "one_end": 0.0,  # of one layer
    "apart": 1,  # snapshots
    "window": True,
    "one_window": False,
    "bump": 0.3,
    "late_bump": 0.0,  # another one after the window, and the only one of one layer
    "prefix": 0.6,  # of the one head of a model that matches prefixes
    "copying": 0.2,
    "one_prefix": 0.02,
    "slope_before": 0.0,  # d loss / d ln position
    "slope_after": -0.1,
    "one_slope": 0.0,
    "turn": 80,  # degrees, in the window
    "turn_after": 80,
    "one_turn": 10,
    "second_turn": 20,  # of a model on a second corpus
    "smear_end": -0.4,
    "smear_half": 20,  # snapshots
    "half": 45,
    "attribution": 0.3,  # of that head, and of all others
    "other_attribution": -0.01,
    "left": 0.0,
    "along": -1.0,  # the before-and-after vector, with an error of 0.1
    "layer": -1,  # where that head is
    "mlp_layer": -2,
    "eigenvalues": 1.0,  # their sum, by the score that they should agree with
    "spread": 0.0,  # of scores over sizes
    "context_spread": 0.0,
    "early_share": 1.0,  # of the gap between sizes
    "steeper": 1e-5,  # of smaller sizes around the 100th token
    "order": (-0.1, 0.05),  # speed that a larger size adds before and after
    "warmup": 1e5,
    "decay_later": None,
    "previous": 0.95,
    "copies": 0.6,
    "longer": 0.1,
    "examples": 400,
}
WORST = GOOD | {
    "before": -0.3,
    "after": -0.45,
    "end": -0.9,
    "one_end": -0.9,
    "apart": 10,
    "one_window": True,
    "bump": 0.0,
    "late_bump": 0.3,
    "prefix": 0.45,
    "copying": -0.99,
    "one_prefix": 0.6,
    "slope_before": -0.3,
    "slope_after": 0.0,
    "one_slope": -0.3,
    "turn": 20,
    "one_turn": 60,
    "smear_end": -0.1,
    "smear_half": 70,
    "attribution": 0.1,
    "other_attribution": 0.3,
    "left": -0.4,
    "along": 0.5,
    "layer": 0,
    "mlp_layer": 0,
    "eigenvalues": -1.0,
    "spread": 0.4,
    "context_spread": -0.5,
    "early_share": 0.1,
    "steeper": -0.6,
    "order": (0.1, -0.05),
    "warmup": 5e6,
    "decay_later": (1000, 0.01),
    "previous": 0.3,
    "copies": 0.2,
    "longer": 0.0,
}


def make_world(folder, **knobs):
    """Runs as reproduce.py names them, in the folder."""
    knobs = GOOD | knobs
    for n in 1, 2, 3, 4:
        make_run(folder / f"{n}L", knobs, n, rank=n - 2)
    for n in 1, 2, 5, 6:
        make_run(folder / f"{n}L-mlp", knobs, n, mlp=True, rank=max(0, n - 4))
    for n, width in (-1, 64), (1, 192):
        make_run(folder / f"2L-d{width}", knobs, 2, width=width, rank=n)
    for n in 1, 2:
        make_run(folder / f"{n}L-smear", knobs, n, smear=True)
    make_run(folder / "2L-books", knobs | {"one_turn": knobs["second_turn"]}, 2, corpus="books")
    return folder


def make_run(folder, knobs, n_layers, mlp=False, width=128, smear=False, rank=0, corpus="python"):
    """rank: the place of its size among those that it is compared with; 0 the smallest, or the
    middle one.
    """
    folder.mkdir(parents=True)
    lacks = (n_layers == 1 and not smear) or corpus == "books"
    has_window = knobs["one_window" if lacks else "window"]
    config = {"n_layers": n_layers, "n_heads": 2, "d_model": width, "smear": smear}
    config["d_mlp"] = 4 * width if mlp else 0
    recipe = {"warmup_tokens": knobs["warmup"], "weight_decay_later": knobs["decay_later"]}
    recipe |= {"n_examples": 88, "whole": 0.25}
    made = {"config": config, "recipe": recipe, "seed": 0, "scale": "mini"}
    made |= {
        "corpus": {"data": corpus, "sha256": corpus},
        "machine": {"device": "by hand", "dtype": "float32"},
    }
    heads = make_heads(knobs, n_layers, lacks, knobs["mlp_layer" if mlp else "layer"])
    best = {"head": f"{n_layers - 1}:0", "score": 0.5}
    end = knobs["one_end"] if lacks else knobs["smear_end"] if smear and n_layers == 1 else None
    end = knobs["end"] * (1 + knobs["spread"] * rank) if end is None else end
    half = knobs["smear_half"] if smear else knobs["half"]
    change = {"start_tokens": WINDOW[0], "end_tokens": WINDOW[1], "end_step": 1200}
    change |= {"icl_half_way_snapshot": half, "prefix_matching_half_way_snapshot": half}
    change["icl_half_way_snapshot"] += knobs["apart"]
    summary = {
        "parameters": (100 * n_layers + width) * 1000,
        "examples": knobs["examples"],
        "phase_change": change if has_window else None,
        "icl_band_before": knobs["before"] if has_window else None,
        "icl_band_after": knobs["after"] if has_window else None,
        **{"icl_score": end, "icl_score_error": 0.1, "icl_band_score": end},
        **{"icl_band_score_error": 0.02, "loss": 3.0, "tokens": 8_000_000, "seconds": 90},
        **{f"best_prefix_matching{when}": best for when in ("", "_before", "_after")},
        **{"best_previous_token": best, "heads": heads},
    }
    write(folder / "run.json", made)
    write(folder / "summary.json", summary)
    np.savez(
        folder / "measurements.npz",
        tokens=TOKENS,
        loss=loss_curve(knobs, lacks, rank),
        per_token_loss=np.zeros((len(TOKENS), 88)),
        icl_band_score=-0.4 * way(TOKENS, HALF_WAYS["icl"]),
        prefix_matching=way(TOKENS, HALF_WAYS["matching"])[:, None, None] * scores_of(heads),
    )
    slope = "one_slope" if lacks else "slope_after"
    turns = [knobs["one_turn"]] * 2 if lacks else [knobs["turn"], knobs["turn_after"]]
    slopes = [knobs["one_slope" if lacks else "slope_before"], knobs[slope], knobs[slope]]
    np.savez(
        folder / "evaluation.npz",
        tokens=EVALUATED,
        loss_by_position=[context_curve(knobs, x, rank) for x in (slopes[0], *slopes)],
        per_token_loss=path(*turns),
    )
    if n_layers > 1:
        write_ablations(folder, knobs, heads, n_layers)
    snapshots = [
        {"tokens": float(tokens), "heads": circuits(heads, knobs, raised)}
        for tokens, raised in zip(TOKENS, way(TOKENS, HALF_WAYS["copying"]), strict=True)
    ]
    write(folder / "circuits.json", {"snapshots": snapshots})
    if folder.name == "2L":
        copies = knobs["copies"]
        shares = {"previous": knobs["previous"], "induction": copies}
        for rule, share in (shares | {"induction2": copies + knobs["longer"]}).items():
            rows = [{"heads": ["1:0"], "recovered_zero_free": [share, 0.01]}]
            write(folder / f"substitute-{rule}.json", {"rows": rows})


def make_heads(knobs, n_layers, lacks, layer):
    """One head matches prefixes: the first of the layer."""
    rows = []
    for place in np.ndindex(n_layers, 2):
        row = {"head": name_of(place), "prefix_matching": 0.0, "previous_token": 0.1}
        row["copying"] = -0.9 + 0.05 * place[0]
        if place == (layer % n_layers, 0):
            row["prefix_matching"] = knobs["one_prefix" if lacks else "prefix"]
            row["copying"] = 0.2 if lacks else knobs["copying"]
        scores = (row[name] for name in ("prefix_matching", "copying", "previous_token"))
        rows.append({**row, "class": head_class(*scores)})
    return rows


def scores_of(heads):
    return np.array([row["prefix_matching"] for row in heads]).reshape(-1, 2)


def way(tokens, centre):
    """From 0 to 1, half of it by that many tokens."""
    return np.interp(tokens, [centre - 5e5, centre + 5e5], [0, 1])


def loss_curve(knobs, lacks, rank):
    def fall(centre, drop):
        return -drop / (1 + np.exp(-(TOKENS - centre) / 1.5e5))

    turn = np.mean(WINDOW)
    seen = TOKENS + 3e5
    speed = [base + rank * more for base, more in zip((0.5, 0.4), knobs["order"], strict=True)]
    loss = 6 - speed[0] * np.log(np.minimum(seen, turn) / turn)
    loss -= speed[1] * np.log(np.maximum(seen, turn) / turn)
    if lacks:
        loss = 6 - speed[0] * np.log(seen / turn)
    return loss + fall(turn, 0 if lacks else knobs["bump"]) + fall(6.5e6, knobs["late_bump"])


def context_curve(knobs, slope, rank):
    """A bend at the 50th token; what a larger model has less."""
    position = np.arange(1, 513)
    slope += knobs["context_spread"] * rank
    loss = 6 - np.log(np.minimum(position, 50)) + slope * np.log(np.maximum(position, 50) / 50)
    loss += knobs["steeper"] * rank * np.log(position.clip(50, 200) / 50)
    return loss - 0.1 * rank * np.where(position <= 12, knobs["early_share"], 1)


def path(within, after):
    """Per-token losses [snapshot, token] that run straight until the window starts; degrees by
    which they turn from there in it and after it.
    """
    turns = np.radians([0, within, after])
    steps = 10 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return np.vstack([(0, 0), steps.cumsum(axis=0)]) @ np.eye(2, 20)


def write_ablations(folder, knobs, heads, n_layers):
    """What is not asked for is as wrong as it can be: attributions before the window, the vector at
    other times than its end, heads together before the end of training.
    """
    attribution = np.full((len(EVALUATED), n_layers, 2), knobs["other_attribution"])
    along = np.zeros_like(attribution)
    best = max(heads, key=lambda row: row["prefix_matching"])
    place = head_named(best["head"])
    attribution[:, *place], along[:, *place] = knobs["attribution"], -knobs["along"]
    attribution[0], along[EVALUATED == WINDOW[1], *place] = 9, knobs["along"]
    together = np.full((len(EVALUATED), 2), 9.0)
    together[-1, 0] = knobs["left"] + 0.4
    np.savez(
        folder / "ablations.npz",
        tokens=EVALUATED,
        examples=np.full(len(EVALUATED), 400),
        icl_attribution=attribution,
        band_attribution=attribution,
        icl_band_score=np.full(len(EVALUATED), -0.4),
        together_band_attribution=together,
        before_and_after=along,
        before_and_after_error=np.full_like(along, 0.1),
    )


def circuits(heads, knobs, raised):
    rows = []
    for row in heads:
        first = row["head"].startswith("0:")
        copying, match = (knobs["eigenvalues"] * row[k] for k in ("copying", "prefix_matching"))
        direct = {"ov_copying_direct": copying, "qk_match_direct": None if first else 10 * match}
        every = {
            "ov_copying": -copying,
            "qk_match": -10 * match,
        }  # on all paths, which do not count
        rows.append({**row, **direct, **every, "ov_raise": 7 * raised})
    return rows


def write(path, content):
    path.write_text(json.dumps(content))
