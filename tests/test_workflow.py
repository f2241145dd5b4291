"""The Snakefile: it covers every notebook and table, and really runs what has changed, in order."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[1]
SNAKEMAKE = next(filter(Path.is_file, [ROOT / ".venv-workflow/bin/snakemake"]), None) or shutil.which("snakemake")
NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]

pytestmark = pytest.mark.skipif(SNAKEMAKE is None, reason="Snakemake is not installed: make workflow ARGS=--version")


def snakemake(folder: Path, *arguments: str) -> str:
    command = [str(SNAKEMAKE), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned(folder: Path, *config: str) -> str:
    return snakemake(folder, "--dry-run", "--forceall", "--printshellcmds", *(["--config", *config] if config else []))


@pytest.fixture
def study(tmp_path) -> Path:
    """The repository's notebooks and parameters, without results."""
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_mini_is_every_notebook_once(study):
    plan = planned(study)
    for name in NOTEBOOKS:
        assert plan.count(f"evsam_lib.run --profile mini {name}\n") == 1
    assert "evsam_lib.evaluate" not in plan


def test_paper_evaluates_each_table_data_set_and_model_on_all_gpus(study):
    plan = planned(study, "study=paper", "gpus=8")
    assert all(plan.count(f"evsam_lib.run --profile paper {name}\n") == 1 for name in NOTEBOOKS)
    lines = {line for line in plan.splitlines() if "evsam_lib.evaluate" in line}
    # Tables 2 and 3: two models on two data sets; Table 4: nine on two; Table 5: two with the boxes of two detectors
    assert len(lines) == 2 * 2 * 2 + 9 * 2 + 2 * 2
    assert all("--nproc_per_node 8 " in line and "--resume --keep-part" in line for line in lines)
    (line,) = (line for line in lines if "coco-points-efficientvit-sam-xl1" in line)
    assert "--clicks 5" in line and "--annotations data/coco/annotations/instances_val2017.json" in line
    (line,) = (line for line in lines if "lvis_vitdet-detector-box-mobile-sam" in line)
    assert "--dataset lvis" in line and "--detections data/coco/source_json_file/lvis_vitdet.json" in line


def test_without_gpus_notebooks_evaluate_by_themselves(study):
    assert "evsam_lib.evaluate" not in planned(study, "study=paper")


def toy(folder: Path, name: str, value: int, needs: list[str]) -> None:
    opening = f"from evsam_lib.study import begin\nstudy = begin({name!r}, profile=profile)"
    saving = f'study.table("x", {{"a": {{"b": {value}}}}})\nstudy.save()'
    head = new_code_cell('profile: str = "mini"  # p', metadata={"tags": ["parameters"]})
    book = new_notebook(cells=[head, new_code_cell(opening), new_code_cell(saving)])
    book.metadata |= {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book.metadata["evsam"] = {"needs": needs}
    nbformat.write(book, folder / "notebooks" / f"{name}.ipynb")


@pytest.mark.slow
def test_two_rules_run_in_order_and_only_what_changed_runs_again(tmp_path):
    for name in ("notebooks", "params"):
        (tmp_path / name).mkdir()
    (tmp_path / "pyproject.toml").touch()
    shutil.copytree(ROOT / "results/reference", tmp_path / "results/reference")
    shutil.copytree(ROOT / "evsam_lib", tmp_path / "evsam_lib", ignore=shutil.ignore_patterns("*.safetensors", "__*__"))
    for file in ROOT.glob("evsam_lib/**/__*__.py"):
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    toy(tmp_path, "01_one", 1, [])
    toy(tmp_path, "02_two", 2, ["01_one"])
    arguments = ("--cores", "1", "--config", f"python={sys.executable}")

    def runs() -> dict[str, str]:
        files = {name: tmp_path / "results/mini" / name / "metrics.json" for name in ("01_one", "02_two")}
        return {name: json.loads(file.read_text())["run_id"] for name, file in files.items()}

    snakemake(tmp_path, *arguments)
    first = runs()
    assert first["01_one"] < first["02_two"]
    assert "Nothing to be done" in snakemake(tmp_path, *arguments)
    toy(tmp_path, "02_two", 3, ["01_one"])
    snakemake(tmp_path, *arguments)
    second = runs()
    assert second["01_one"] == first["01_one"] and second["02_two"] != first["02_two"]
