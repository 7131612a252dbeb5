"""The tables of README.md and results/README.md, from records: the paper's claims, and the runs.

    python plots/tables.py results/mini                      prints them as Markdown
    python plots/tables.py results/mini --write README.md results/README.md

The latter puts each between its two comments, where a page has them: <!-- claims --> and
<!-- end of claims -->, <!-- runs --> and <!-- end of runs -->.
"""

import re
import sys
from pathlib import Path

# `python plots/tables.py` puts plots/ on the path, not the folder above it
sys.path.append(str(Path(__file__).parent.parent))

from plots import claims, claims_of_models  # noqa: F401  they fill CLAIMS
from plots.checks import CLAIMS, verdict
from plots.runs import load_all
from safety import ArgumentParser, BadInput, one_line_errors, write_whole

WORDS = ("no", "one", "two", "three", "four", "five", "six")


def claims_table(folder):
    """The paper's claims judged by all runs in the folder: rows by column, in text."""
    runs = load_all(folder)
    return [claim_row(claim, runs, folder) for claim in CLAIMS]


def claim_row(claim, runs, folder):
    checks = list(claim.judge(runs))
    picture, command = "", "python " + claim.command.format(runs=folder)
    if claim.figure:
        drawn = folder / "figures" / f"{claim.figure}.png"
        picture = f"[{claim.figure}]({drawn})" if drawn.exists() else ""
        command += f" --out {claim.figure}.png"
    return {
        "": claim.name,
        "claim": f"{claim.words}.<br>*Counts if:* {claim.counts}",
        "paper": claim.paper,
        "ours": "; ".join(map(str, checks)) if any(check.values for check in checks) else "",
        "verdict": f"**{verdict(checks)}**",
        "figure": picture,
        "command": f"`{command}`",
    }


def runs_table(folder):
    """What every run in the folder shows: rows by column, in text."""
    return [run_row(run) for run in sorted(load_all(folder).values(), key=order)]


def order(run):
    config = run.made["config"]
    series = ("attention-only", "with MLPs", "smeared keys", "second corpus", "width")
    return series.index(run.series), run.n_layers, config["smear"], config["d_model"], run.seed


def run_row(run):
    shown, change = run.summary, run.summary["phase_change"]
    across = dict.fromkeys(("heads", "scores", "half way"), "")
    if change:
        heads = [shown[f"best_prefix_matching_{when}"]["score"] for when in ("before", "after")]
        scores = [shown[f"icl_band_{when}"] for when in ("before", "after")]
        halves = [change[f"{what}_half_way_snapshot"] for what in ("icl", "prefix_matching")]
        across = {
            "heads": "{:.2f} to {:.2f}".format(*heads),
            "scores": "{:+.2f} to {:+.2f}".format(*scores),
            "half way": "{}, {} of {}".format(*halves, len(run.millions)),
        }
    return {
        "model": model_name(run),
        "window (M tokens)": window_of(run),
        "best prefix matching across it": across["heads"],
        "ICL score across it, between bands": across["scores"],
        "half way: ICL, prefix matching": across["half way"],
        "at the end: ICL score": with_error(shown, "icl_score"),
        "between bands": with_error(shown, "icl_band_score"),
        "best prefix matching": best(shown["best_prefix_matching"]),
        "best previous token": best(shown["best_previous_token"]),
        "loss": f"{shown['loss']:.2f}",
        "examples": f"{shown['examples']:,}",
        "M tokens": f"{shown['tokens'] / 1e6:,.1f}",
        "minutes": f"{shown['seconds'] / 60:.0f}",
        "machine": "{device}, {dtype}".format(**run.made["machine"]),
    }


def window_of(run):
    if run.window is None:
        return "none"
    return "{:.2f} to {:.2f}".format(*run.window) + " (by hand)" * run.window_is_by_hand


def model_name(run):
    config = run.made["config"]
    word = WORDS[run.n_layers] if run.n_layers < len(WORDS) else str(run.n_layers)
    parts = (
        f"{word} layer{'s' if run.n_layers > 1 else ''}",
        config["d_mlp"] > 0 and "with MLPs",
        config["smear"] and "smeared keys",
        run.series == "width" and f"width {config['d_model']}",
        run.series == "second corpus" and "second corpus",
        f"seed {run.seed}",
    )
    return ", ".join(part for part in parts if part)


def with_error(shown, name):
    return f"{shown[name]:+.2f} ± {shown[f'{name}_error']:.2f}"


def best(head):
    return f"{head['score']:.2f} ({head['head']})"


def markdown(rows):
    """A table with the rows' keys as its header."""
    lines = [rows[0].keys(), ("---" for _ in rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables(folder):
    """{name: Markdown}, as they stand in the pages."""
    return {
        name: markdown(of(folder)) for name, of in (("claims", claims_table), ("runs", runs_table))
    }


def between_comments(text, name):
    """The match of the two comments and of what is between them."""
    found = re.search(rf"(<!-- {name} -->\n)(.*?)\n?(<!-- end of {name} -->)", text, re.DOTALL)
    if not found:
        raise BadInput(f"after <!-- {name} --> there is no <!-- end of {name} -->")
    return found


def put(text, name, table):
    """The text with the table between its two comments."""
    found = between_comments(text, name)
    return f"{text[: found.end(1)]}{table}\n{text[found.start(3) :]}"


def filled_page(page, found):
    """The text of a page with all tables that it has a place for."""
    try:
        text = page.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{page} is missing: --write fills pages that are there") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{page}: not text in UTF-8 ({error.reason})") from None
    places = [name for name in found if f"<!-- {name} -->" in text]
    if not places:
        raise BadInput(f"{page}: no place for a table: <!-- {' --> or <!-- '.join(found)} -->")
    for name in places:
        text = put(text, name, found[name])
    return text


@one_line_errors
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of the records of all runs")
    add(
        "--write",
        type=Path,
        nargs="+",
        metavar="PAGE",
        help="the pages to put them in (default: print them)",
    )
    args = parser.parse_args(argv)
    found = tables(args.folder)
    if not args.write:
        print("\n\n".join(found.values()))
        return
    filled = {page: filled_page(page, found) for page in args.write}  # all of them, or none
    for page, text in filled.items():
        write_whole(page, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        print(f"-> {page}")


if __name__ == "__main__":
    sys.exit(main())
