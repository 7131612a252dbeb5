"""Imports run one way, and the README tells the truth."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# which of our files each imports; plots are of numpy alone
IMPORTS = {
    "safety": "",
    "parallel": "safety",
    "metrics": "",
    "curves": "",
    "heads": "safety",
    "documents": "safety",
    "vocabulary": "safety documents",
    "data": "safety",
    "corpora": "safety data documents vocabulary",
    "kernels": "",
    "model": "safety kernels",
    "snapshots": "safety model",
    "records": "safety snapshots",
    "machine": "safety",
    "measure": "safety metrics data kernels",
    "summary": "curves heads metrics",
    "loading": "safety machine corpora snapshots records measure summary",
    "progress": "model measure summary",
    "evaluate": "safety curves machine parallel metrics records measure summary loading progress",
    "circuits": "plots safety heads machine parallel metrics model measure loading progress",
    "tasks": "safety heads machine parallel vocabulary model measure loading",
    "passage": "safety machine parallel vocabulary records loading tasks",
    "sweep": "model kernels",
    "substitute": "heads metrics measure sweep",
    "attribution": "safety heads machine parallel metrics records measure summary loading sweep",
    "ablate": "plots safety heads machine parallel metrics data records measure loading progress"
    " substitute attribution",
    "train": "progress safety machine parallel data corpora model snapshots records measure"
    " summary",
    "bench_kernels": "safety parallel metrics kernels",
    "bench": "safety machine parallel corpora model train bench_kernels sweep",
    "plots": "safety curves heads",
    "reproduce": "safety",
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
    found = {name: set() for name in IMPORTS}
    for path in files:
        owner = path.relative_to(ROOT).parts[0].removesuffix(".py")
        found[owner] |= {*imported(path)} & {*IMPORTS} - {owner}
    assert found == {owner: {*names.split()} for owner, names in IMPORTS.items()}


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
    shared = (ROOT / "loading.py").read_text()  # those of everything that measures
    for script, arguments in commands:
        source = (ROOT / script).read_text() + figures * script.startswith("plots/")
        source += shared * ("loading" in {*imported(ROOT / script)})
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert f'"{flag}"' in source, (script, flag)
