"""The model analysis table: all that is measured of each model through training, side by side.

    python plots/analysis_table.py RUN [RUN ...] --out FILE.png
    python plots/analysis_table.py RUN [RUN ...] --rows R2,R3,R4,R5 --out FILE.png

One column a model, the rows of the paper's table ("Model analysis"):

    R1  path in the plane of the first two principal components (trajectories.py)
    R2  loss                        R3  loss by position of the token in its context
    R4  derivative of R3            R5  in-context learning score
    R6  prefix matching of every head, by layer
    R7  trace of each head's QK circuit with what previous-token heads tell a key of the token
        before, on the direct path: how much higher a matching key scores (circuits.py)
    R8  ablation of each head: its change of the losses along the before-and-after vector, which is
        as long as the phase change's
    R9  ablation of each head: its change of the in-context learning score, between bands

The paper has R2 to R5 alone for smeared keys and for the second corpus.
"""

import sys
from pathlib import Path

# `python plots/analysis_table.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import style, trajectories
from plots.panels import ROWS, grid
from plots.runs import load_run
from safety import BadInput

EVERY_ROW = ",".join(ROWS)


def draw(runs, rows=EVERY_ROW, plane=()):
    """-> a figure; plane: folders of other runs that share R1's plane."""
    names = rows.split(",")
    for name in names:
        if name not in ROWS:
            raise BadInput(f"--rows {name}: no such row: they are {', '.join(ROWS)}")
    others = [load_run(folder) for folder in plane]
    return grid(runs, names, "Model analysis table of the paper.", others)


def add_flags(add):
    add("--rows", default=EVERY_ROW, help="R1,R2,...: which (default: all)")
    trajectories.add_plane_flag(add)


main = style.script(__doc__, draw, add_flags)

if __name__ == "__main__":
    sys.exit(main())
