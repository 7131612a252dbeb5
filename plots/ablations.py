"""What each head causes: in-context learning through training, and what ablating a head changes.

    python plots/ablations.py RUN [RUN ...] --out FILE.png

Figure F11 of the paper ("Argument 3") and, below it, row R8 of its table: each head's result is
replaced by zero, all attention patterns kept. Above zero, in-context learning is the worse for the
ablation. The score is the one between bands of positions, which has a quarter of the noise of the
paper's two positions. Along the before-and-after vector an ablation at -1 undoes all that the phase
change did. Records: ablate.py.
"""

import sys
from pathlib import Path

# `python plots/ablations.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import style
from plots.panels import grid


def draw(runs):
    """-> a figure with three rows and a column for each run."""
    note = "Figure F11 of the paper, and R8 of its table."
    return grid(runs, ("R5", "R9", "R8"), note, height=1.9)


main = style.script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main())
