"""Heads by name and by class: what evaluation, ablation, records and figures call them.

A head is (layer, head), counted from 0; on the command line, in records and in figures it is
written layer:head. Its class is read off its scores (metrics.py). Needs no torch: figures use it.
"""

from safety import BadInput

HEAD_SCORES = ("prefix_matching", "copying", "previous_token")
# scores from where on a head is of a class; the paper names none, and in its scatter plots heads
# are near 0 or above 0.5
PREFIX_MATCHING, PREVIOUS_TOKEN = 0.4, 0.4

# sets of heads by name: which rows of a table of heads are in them
CLASSES = {
    "prefix-matching": lambda row: row["prefix_matching"] >= PREFIX_MATCHING,
    "induction": lambda row: row["class"] == "induction",
    "previous-token": lambda row: row["class"] == "previous token",
}


def name_of(head):
    """(1, 3) -> "1:3"."""
    return "{}:{}".format(*head)


def head_named(name):
    """ "1:3" -> (1, 3)."""
    layer, head = name.split(":")
    return int(layer), int(head)


def head_class(prefix_matching, copying, previous_token):
    """What its scores make a head: "induction" (matches prefixes and copies), "prefix matching"
    (only that), "previous token" or "other".
    """
    if prefix_matching >= PREFIX_MATCHING:
        return "induction" if copying > 0 else "prefix matching"
    return "previous token" if previous_token >= PREVIOUS_TOKEN else "other"


def pick_heads(table, wanted):
    """wanted: the name of a class, or heads by name, 1:3,1:7 -> [(layer, head)], sorted; none if
    no head is of that class. Raises BadInput for a head that is not in the table.
    """
    names = [row["head"] for row in table]
    if wanted in CLASSES:
        chosen = [row["head"] for row in table if CLASSES[wanted](row)]
    else:
        chosen = wanted.split(",")
        for name in chosen:
            if name not in names:
                raise BadInput(
                    f"--heads {name}: no such head: they are {names[0]} to {names[-1]}"
                    f" (layer:head), or one of {', '.join(CLASSES)}"
                )
    return sorted(map(head_named, set(chosen)))
