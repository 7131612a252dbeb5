"""Imports run one way, and the README tells the truth."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# each file may import those before it in its line, and what those may
ALLOWED = {
    "safety": set(),
    "parallel": {"safety"},
    "metrics": set(),
    "vocabulary": {"safety", "corpora"},  # the corpus for its own command line, inside main
    "data": {"safety"},
    "corpora": {"safety", "data", "vocabulary"},
    "kernels": set(),
    "model": {"safety", "kernels"},
    "snapshots": {"safety", "model"},
    "records": {"safety", "snapshots"},
    "machine": {"safety"},
    "measure": {"safety", "metrics", "data", "kernels"},
    "evaluate": {
        "safety",
        "machine",
        "parallel",
        "metrics",
        "data",
        "corpora",
        "kernels",
        "snapshots",
        "records",
        "measure",
    },
    "circuits": {
        "plots",  # coefficients of correlation: numpy alone
        "safety",
        "machine",
        "parallel",
        "metrics",
        "model",
        "snapshots",
        "records",
        "measure",
        "evaluate",
    },
    "tasks": {
        "safety",
        "machine",
        "parallel",
        "vocabulary",
        "model",
        "snapshots",
        "records",
        "measure",
        "evaluate",
    },
    "passage": {
        "safety",
        "machine",
        "parallel",
        "vocabulary",
        "snapshots",
        "records",
        "measure",
        "evaluate",
        "tasks",
    },
    "progress": {"model", "measure", "evaluate"},
    "sweep": {"model", "kernels"},
    "substitute": {"metrics", "measure", "evaluate", "sweep"},
    "attribution": {
        "safety",
        "machine",
        "parallel",
        "metrics",
        "snapshots",
        "records",
        "measure",
        "evaluate",
        "sweep",
    },
    "ablate": {
        "plots",
        "progress",
        "safety",
        "machine",
        "parallel",
        "metrics",
        "data",
        "records",
        "measure",
        "evaluate",
        "substitute",
        "attribution",
    },
    "train": {
        "progress",
        "safety",
        "machine",
        "parallel",
        "data",
        "corpora",
        "model",
        "snapshots",
        "records",
        "measure",
        "evaluate",
    },
    "bench_kernels": {"safety", "parallel", "metrics", "kernels"},
    "bench": {
        "safety",
        "machine",
        "parallel",
        "data",
        "corpora",
        "model",
        "measure",
        "train",
        "kernels",
        "bench_kernels",
        "sweep",
    },
    "plots": {"safety", "plots"},
    "reproduce": {"safety"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_run_one_way():
    files = [
        p
        for p in ROOT.rglob("*.py")
        if p.relative_to(ROOT).parts[0] not in ("tests", "corpus", "runs")
    ]
    files = [
        p for p in files if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
    ]
    assert len(files) > 10
    for path in files:
        owner = path.relative_to(ROOT).parts[0].removesuffix(".py")
        ours = {name for name in imported(path) if name in ALLOWED}
        assert ours <= ALLOWED[owner] | {owner}, path


def test_figures_need_no_torch():
    for path in (ROOT / "plots").glob("*.py"):
        assert "torch" not in set(imported(path))


def test_the_readme_lists_every_file_and_no_other():
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^([a-z_]+\.py|[a-z]+/) ", readme, re.MULTILINE))
    files = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{name}/" for name in ("kernels", "plots", "results", "tests", "vocabularies")}
    assert listed == files | folders


def test_every_command_of_the_readme_names_a_file_and_flags_that_exist():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:python|torchrun [-\w ]*?)\s*(\S+\.py)(.*)$", readme, re.MULTILINE)
    assert len(commands) >= 5
    figures = (ROOT / "plots" / "style.py").read_text()  # the flags that all of them have
    for script, arguments in commands:
        source = (ROOT / script).read_text() + figures * script.startswith("plots/")
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert f'"{flag}"' in source, (script, flag)
