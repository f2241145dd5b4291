"""The mini results that come with the repository are one whole run, small, and the report is what its files give."""

import json
import shutil

import pytest

from evsam_lib.run import _notebooks
from evsam_lib.study import build_report
from evsam_lib.study.paths import repo_root
from evsam_lib.study.tables import read_table

MINI = repo_root() / "results/mini"
KEPT = ("metrics.json", "provenance.json", "run.ipynb", "table.csv", "table.md", "figures")
NAMES = [notebook.name for notebook in _notebooks(repo_root() / "notebooks")]
MEGABYTES = 15


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_left_a_whole_mini_result(name):
    folder = MINI / name
    assert all((folder / kept).exists() for kept in KEPT), f"run `make notebook NB={name[:2]}`, then NB=20"
    assert (read_table(folder).profile == "mini").all()
    book = json.loads((folder / "run.ipynb").read_text(encoding="utf-8"))
    assert all(cell["execution_count"] for cell in book["cells"] if cell["cell_type"] == "code")


def test_the_report_is_what_the_files_give(tmp_path):
    for name in NAMES:
        ignore = shutil.ignore_patterns("*.safetensors", "*.pt")
        shutil.copytree(MINI / name, tmp_path / "mini" / name, ignore=ignore)
    made = build_report(tmp_path, "mini").read_text(encoding="utf-8")
    told = (MINI / "RESULTS.md").read_text(encoding="utf-8")
    assert made == told, "RESULTS.md tells of other files: run `make notebook NB=20`"


def test_the_readme_shows_the_reports_count_of_verdicts():
    told = (MINI / "RESULTS.md").read_text(encoding="utf-8")
    table = told[told.index("| paper ") :].split("\n\n")[0]
    assert table in (repo_root() / "README.md").read_text(encoding="utf-8"), "copy the first table of RESULTS.md"


def test_it_is_small():
    files = [MINI / "RESULTS.md"]
    for name in NAMES:
        files += [f for kept in KEPT for f in (MINI / name / kept, *(MINI / name / kept).glob("*")) if f.is_file()]
    assert sum(file.stat().st_size for file in files) < MEGABYTES * 1e6
