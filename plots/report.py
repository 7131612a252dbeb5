"""All of it on one page that needs no network: the claims, an attention viewer, every figure.

    python plots/report.py results/mini --out report.html

The folder holds runs and their figures, in figures/. The viewer shows every run of it that has
passage.npz (passage.py). The page itself is plots/report.html; here it gets its content.
"""

import base64
import html
import io
import json
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image  # comes with matplotlib

# `python plots/report.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from heads import head_named, name_of
from plots.runs import load_all
from plots.tables import claims_table
from plots.text import spell
from safety import ArgumentParser, BadInput, check_out, one_line_errors, write_whole

TEMPLATE = Path(__file__).with_suffix(".html")
LIMIT = 5_000_000  # bytes of the page
WIDTHS = (1600, 1300, 1000, 800, 600)  # of its pictures, pixels: the first with which it fits
QUALITY = 82  # of 100
HEADS = 4  # of each layer in the viewer: those that match prefixes or see the last token best
WHEN = ("before", "start of", "in", "end of", "after")


# --- claims


def claims_html(rows):
    """Rows of text by column, in Markdown as far as `inline` knows it -> <table>, in which every
    cell has its column, and every row its verdict, as its class.
    """
    heads = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    body = ""
    for row in rows:
        cells = (f'<td class="{column}">{inline(cell)}</td>' for column, cell in row.items())
        verdict = row["verdict"].strip("*").replace(" ", "-")
        body += f'<tr class="{verdict}">{"".join(cells)}</tr>\n'
    return f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"


def verdicts(rows):
    """How many claims have each verdict, in a sentence."""
    counts = Counter(row["verdict"].strip("*") for row in rows)
    told = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    return f"Of {len(rows)} claims: {told}."


def inline(text):
    """Markdown's **bold**, *italics*, `code` and <br> -> HTML; [a figure](its file) becomes a link
    to it on the page. All else is shown as it is.
    """
    parts = []
    for n, part in enumerate(html.escape(text).split("`")):
        if n % 2:  # between two backticks
            parts.append(f"<code>{part}</code>")
            continue
        part = part.replace("&lt;br&gt;", "<br>")
        part = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part)
        part = re.sub(r"\*(.+?)\*", r"<em>\1</em>", part)
        parts.append(re.sub(r"\[(.+?)\]\(.+?\)", r'<a href="#\1">\1</a>', part))
    return "".join(parts)


# --- figures


def figures_html(paths, width):
    """The pictures, each in a <figure> that has the file's name as its id."""
    return "\n".join(
        f'<figure id="{html.escape(path.stem)}"><figcaption>{html.escape(path.stem)}</figcaption>'
        f'<img alt="{html.escape(path.stem)}" src="data:image/webp;base64,{in_base64(small)}">'
        "</figure>"
        for path, small in ((path, shrink(path, width)) for path in paths)
    )


def shrink(path, width):
    """A picture -> bytes of a .webp at most so wide."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL's refusals
        raise BadInput(f"{path}: not a picture, damaged or too large: draw it again") from None
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    small = io.BytesIO()
    image.save(small, "webp", quality=QUALITY)
    return small.getvalue()


def in_base64(content):
    return base64.b64encode(content).decode()


# --- the viewer


def viewed(run):
    """What the viewer needs of a run."""
    heads = heads_of(run)
    classes = run.head_classes()
    scores = {row["head"]: row["prefix_matching"] for row in run.summary["heads"]}
    names = [*map(name_of, heads)]
    first = names.index(max(names, key=scores.get))
    return {
        "name": run.name,
        "title": f"{run.title}, seed {run.seed}",
        "heads": [
            {"name": name, "kind": classes[head]} for name, head in zip(names, heads, strict=True)
        ],
        "first": first,
        "snapshots": snapshots_of(run),
        "texts": {name: text_of(run.passage, name, heads, first) for name in ("Python", "prose")},
    }


def heads_of(run):
    """Of each layer the HEADS heads that match prefixes or attend to the last token best."""
    scores = {
        head_named(row["head"]): max(row["prefix_matching"], row["previous_token"])
        for row in run.summary["heads"]
    }
    heads = []
    for layer in sorted({layer for layer, _ in scores}):
        of_layer = (head for head in scores if head[0] == layer)
        heads += sorted(sorted(of_layer, key=scores.get)[-HEADS:])
    return heads


def snapshots_of(run):
    """Of each shown snapshot how far it was trained, and where that is in the phase change."""
    millions = run.passage["tokens"][run.passage["shown"]] / 1e6
    if run.window is None:
        return [f"{m:.2f}M tokens: no phase change" for m in millions]
    start, end = run.window
    labels = []
    for m in millions.tolist():
        passed = (m >= start) + (m > start) + (m >= end) + (m > end)
        labels.append(f"{m:.2f}M tokens: {WHEN[passed]} the phase change")
    return labels


def text_of(passage, name, heads, first):
    """One passage: its tokens, losses [shown, token], and of every head [shown, head, pair] pattern
    and attribution as passage.npz has them, compressed, in base64; and an example to begin with:
    the token of the repeat from which the head `first` attends most to what came next before.
    """
    layer, head = np.array(heads).T
    pattern, steps = (
        passage[f"{name}_{what}"][:, layer, head] for what in ("pattern", "attribution")
    )
    losses = np.nan_to_num(passage[f"{name}_loss"][passage["shown"]].astype(float))
    repeat = int(passage[f"{name}_repeat"])
    queries = np.arange(repeat, losses.shape[1] - 1)
    came_next = queries * (queries + 1) // 2 + queries - repeat + 2
    return {
        "tokens": spell(passage[f"{name}_text"]),
        "example": int(queries[pattern[-1, first, came_next].argmax()]),
        "loss": losses.round(2).tolist(),
        "pattern": in_base64(zlib.compress(pattern.tobytes(), 8)),
        "attribution": in_base64(zlib.compress(steps.tobytes(), 8)),
        "step": passage[f"{name}_attribution_scale"][:, layer, head].round(6).tolist(),
    }


# --- the page


def page(folder):
    """The whole page, with pictures as large as it can hold."""
    runs = [run for run in load_all(folder).values() if run.has("passage.npz")]
    runs.sort(key=lambda run: -run.n_layers)  # the first is shown first
    if not runs:
        raise BadInput(f"{folder}: no run has a passage.npz: python passage.py RUN makes it")
    paths, claims = sorted((folder / "figures").glob("*.png")), claims_table(folder)
    fixed = {
        "folder": html.escape(str(folder)),
        "claims": claims_html(claims),
        "verdicts": verdicts(claims),
        "data": in_script([viewed(run) for run in runs]),
    }
    for width in WIDTHS:
        content = filled(TEMPLATE.read_text(), fixed | {"figures": figures_html(paths, width)})
        if len(content.encode()) < LIMIT:
            return content
    raise BadInput(f"{folder}: the page would be larger than {LIMIT / 1e6:.0f} MB: leave runs out")


def in_script(content):
    """JSON that may stand in a <script>: nothing in it can end that."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def filled(template, content):
    return re.sub(r"{{(\w+)}}", lambda match: content[match[1]], template)


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of runs, with their figures in figures/")
    add("--out", type=Path, default="report.html", help="the page to write (default: report.html)")
    args = parser.parse_args(argv)
    check_out(args.out, ".html")
    content = page(args.folder)
    write_whole(args.out, lambda path: path.write_text(content, encoding="utf-8"))
    print(f"-> {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
