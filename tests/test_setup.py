"""Set-up: the files that install the study agree with each other, and make treats an environment with care."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SET_UP_FILES = ["pyproject.toml", "requirements.lock", "environment.yml", "Makefile", ".ci/run"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The packages that the study is asked to stand on.
NAMED = {
    "jupyterlab", "papermill", "torch", "torchvision", "timm", "tensorrt", "pycocotools", "matplotlib", "pandas",
    "ipywidgets",
}  # fmt: skip

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def declared(*extras: str) -> dict[str, Requirement]:
    """Requirements of the core and of these extras, by name; references to other extras of the project are followed."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            found |= declared(*requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs), "every line of the lock is name==version"
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(set(names)) == len(names)
    return dict(zip(names, (version for _, version in pairs), strict=True))


def environment() -> tuple[list[str], list[str]]:
    """The conda part and the pip part of environment.yml."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry, str)], pip


def test_every_direct_requirement_is_locked_within_its_range():
    pins = locked()
    for name, requirement in declared("lab", "eval", "onnx", "openvino", "stream", "sam3", "dev").items():
        assert name in pins, f"{name} is not in requirements.lock"
        assert requirement.specifier.contains(pins[name]), f"{requirement} does not admit {pins[name]}"


def test_lock_serves_cpu_and_gpu_machines():
    for name, version in locked().items():
        assert not re.match(r"nvidia|cuda|triton", name), f"{name} belongs to one build of torch"
        assert Version(version).local is None, f"{name}=={version} names one build"


def test_lock_is_what_the_study_was_tested_with():
    pins = locked()
    assert (pins["torch"], pins["torchvision"], pins["timm"]) == ("2.13.0", "0.28.0", "1.0.31")


def test_ranges_of_python_and_torch():
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert declared()["torch"].specifier == Requirement("torch>=2.11,<2.14").specifier
    assert declared()["torchvision"].specifier == Requirement("torchvision>=0.26,<0.29").specifier


def test_conda_environment_equals_pyproject():
    conda, pip = environment()
    (python,) = [entry.partition("=")[2] for entry in conda if entry.startswith("python=")]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(f"{python}.0")
    assert [entry.split("=")[0] for entry in conda] == ["python", "pip"]  # packages come from pip alone

    options = [entry for entry in pip if entry.startswith("-")]
    extras = re.search(r"^EXTRAS := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert options == ["-c requirements.lock", f"-e .[{extras}]"]  # the same installation as make's

    named = {canonicalize_name(r.name): r for r in (Requirement(e) for e in pip if not e.startswith("-"))}
    reference = declared(*extras.split(","))
    assert {name: r.specifier for name, r in named.items()} == {n: reference[n].specifier for n in NAMED - {"tensorrt"}}
    assert "tensorrt" in declared("export")
    assert "tensorrt" not in reference  # its libraries install only where its vendor offers them


def test_set_up_names_no_host():
    for name in SET_UP_FILES:
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|index-url|find-links|file://", text), f"{name} names a place to download from"


# What follows runs the real Makefile with a stand-in for Python that notes its calls instead of installing.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> calls.log
case "$*" in
    "-m $FAKE_FAILS"*) exit 1 ;;
    --version) echo "Python $FAKE_VERSION" ;;
    -c*) test "$FAKE_VERSION" = 3.11.7 ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the set-up files only."""
    for name in SET_UP_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "fakepython"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def call(folder: Path, *command: str, version="3.11.7", fails="nothing"):
    # make hands what was said on its command line down to its children; these tests may be such a child.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in {"ARGS", "NB", "PROFILE"}}
    fakes = {"FAKE_VERSION": version, "FAKE_FAILS": fails, "PYTHON": str(folder / "fakepython"), "CI_BROWSER": "none"}
    return subprocess.run(
        command, cwd=folder, env=inherited | fakes, capture_output=True, text=True, check=False, timeout=60
    )


def calls(folder: Path) -> list[str]:
    log = folder / "calls.log"
    return [line for line in log.read_text().splitlines() if not line.startswith("-c")] if log.exists() else []


@needs_make
def test_make_alone_explains_itself_and_installs_nothing(checkout):
    done = call(checkout, "make")
    assert done.returncode == 0
    for target in ("make mini", "make notebook", "make lab", "make test", "make quick", "make clean", "make distclean"):
        assert target in done.stdout
    assert calls(checkout) == []


@needs_make
def test_targets_set_up_once_and_again_when_the_lock_changes(checkout):
    assert call(checkout, "make", "mini").returncode == 0
    install = "-m pip install --constraint requirements.lock --editable .[lab,eval,onnx,openvino,stream,sam3,dev]"
    mini = "-m evsam_lib.run --profile mini"
    assert calls(checkout) == ["-m venv --clear .venv", install, mini]

    assert call(checkout, "make", "notebook", "NB=04", "ARGS=-p steps 10").returncode == 0
    assert calls(checkout)[3:] == [f"{mini} 04 -p steps 10"]

    later = (checkout / ".venv/.ready").stat().st_mtime + 10
    os.utime(checkout / "requirements.lock", (later, later))
    assert call(checkout, "make", "quick").returncode == 0
    assert calls(checkout)[4:] == [install, "-m pytest -m not slow and not browser"]


@needs_make
def test_failed_installation_is_taken_up_again(checkout):
    done = call(checkout, "make", "test", fails="pip")
    assert done.returncode != 0
    assert not (checkout / ".venv/.ready").exists()
    assert "-m pytest" not in calls(checkout)
    assert call(checkout, "make", "test").returncode == 0
    assert calls(checkout)[-1] == "-m pytest"


@needs_make
def test_unsupported_python_is_named_before_anything_is_made(checkout):
    done = call(checkout, "make", "mini", version="3.9.2")
    assert done.returncode != 0
    assert "Python 3.9.2" in done.stderr
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_notebook_asks_which(checkout):
    done = call(checkout, "make", "notebook")
    assert done.returncode != 0
    assert "make notebook NB=04" in done.stderr


@needs_make
def test_clean_keeps_the_environment_and_the_papers_numbers(checkout):
    kept = [checkout / ".venv/bin/python", checkout / "results/reference/table1.csv", checkout / "notebooks/01.ipynb"]
    removed = [checkout / "results/mini/RESULTS.md", checkout / "evsam_lib/__pycache__/x.pyc"]
    (checkout / "tests").mkdir()
    for file in [*kept, *removed]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert call(checkout, "make", "clean").returncode == 0
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in removed)
    assert call(checkout, "make", "distclean").returncode == 0
    assert not (checkout / ".venv").exists()
    assert all(file.exists() for file in kept[1:])


@needs_make
def test_ci_installs_and_passes_the_verdict_of_the_tests_on(checkout):
    done = call(checkout, ".ci/run")
    assert done.returncode == 0, done.stderr
    assert [call.split()[1] for call in calls(checkout)[-2:]] == ["pytest", "tests.tensorrt_rtx"]
    assert call(checkout, ".ci/run", fails="pytest").returncode != 0
    (checkout / ".venv/.ready").unlink()
    assert call(checkout, ".ci/run", fails="pip").returncode != 0
