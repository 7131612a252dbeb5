"""The phase change: loss, in-context learning score, prefix matching of every head and the value of
context, over training.

    python plots/phase_change.py RUN [RUN ...] --out FILE.png

One column a run, as the paper's figures F3 to F6: in the shaded window in-context learning and
induction heads appear together, the loss curve has its bump, and the loss begins to fall with
context beyond the first fifty tokens.
"""

import sys
from pathlib import Path

# `python plots/phase_change.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import style
from plots.panels import grid


def draw(runs):
    """-> a figure with four rows and a column for each run."""
    return grid(runs, ("R2", "R5", "R6", "R4"), "Figures F3-F6 of the paper.")


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
