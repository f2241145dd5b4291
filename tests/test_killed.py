"""The runner, killed: in results lies the last good result, whole, and the next run ends as if nothing had been.

`kill -9` at random moments, and, since the moments that matter are short, an end before each single file operation.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from evsam_lib import run as runner
from evsam_lib.study import begin, params
from evsam_lib.study.paths import recover, repo_root, work_folder
from evsam_lib.study.tables import read_table
from tests.test_run import SAVE, place, write

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.slow
CELLS = (
    'study.file("kept.txt").write_text(str(n) * 100_000)',
    'from matplotlib import pyplot as plt\nfigure, ax = plt.subplots()\nax.plot([0, n])\nstudy.figure(figure, "rise")',
    SAVE,
)
FILES = {"table.csv", "table.md", "metrics.json", "provenance.json", "stamp.json", "run.ipynb", "kept.txt"}
KILLS = 10


def whole(folder: Path) -> float:
    """The value of `n` that a result was made with, everywhere in it."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == FILES | {"figures/rise.png"}
    table = read_table(folder)
    (n,) = table["value"]
    stamp, metrics, origin = (
        json.loads((folder / f"{x}.json").read_text()) for x in ("stamp", "metrics", "provenance")
    )
    book = nbformat.read(folder / "run.ipynb", as_version=4)
    assert {metrics["run_id"], origin["run_id"]} == set(table["run_id"])
    assert stamp["parameters"]["n"] == origin["parameters"]["n"] == book.metadata.papermill.parameters["n"] == n
    assert (folder / "kept.txt").read_text() == str(int(n)) * 100_000
    Image.open(folder / "figures/rise.png").load()
    return n


def test_ten_times_at_random_moments(place):
    write(place, "01_one", *CELLS)
    folder, chance = place / "results/mini/01_one", random.Random(0)
    command = [sys.executable, "-m", "evsam_lib.run", "--resume", "--notebooks-dir", str(place / "notebooks")]
    command += ["--params-dir", str(place / "params"), "-p", "results_root", str(place / "results"), "-p", "n"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": repo_root()}
    began = time.monotonic()
    subprocess.run([*command, "0"], check=True, **quiet)
    usual_s = time.monotonic() - began
    undisturbed = shutil.copytree(folder, place / "undisturbed")
    good = 0
    for n in range(1, KILLS + 1):
        process = subprocess.Popen([*command, str(n)], start_new_session=True, **quiet)
        try:
            process.wait(chance.uniform(0.1, 1.0) * usual_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its kernel, in a group of its own, finds out within a second
            process.wait()
        there = folder if folder.exists() else work_folder(folder, "old")  # between the two renames of `publish`
        assert whole(there) in (good, n)
        good = whole(there)
    command.remove("--resume")
    subprocess.run([*command, "0"], check=True, **quiet)
    assert whole(folder) == 0
    ours, theirs = (json.loads((at / "metrics.json").read_text())["run_id"] for at in (folder, undisturbed))
    for name in FILES - {"run.ipynb", "provenance.json", "table.md"}:  # which hold times
        assert (folder / name).read_text().replace(ours, theirs) == (undisturbed / name).read_text()
    assert (folder / "figures/rise.png").read_bytes() == (undisturbed / "figures/rise.png").read_bytes()
    assert list((folder.parent / ".work").iterdir()) == []


def test_before_each_of_its_file_operations(place, monkeypatch):
    write(place, "01_one", *CELLS)
    folder = place / "results/mini/01_one"
    monkeypatch.setattr(runner, "_execute", here(place))
    monkeypatch.setattr("evsam_lib.study.provenance.ask", lambda *command: None)  # git and nvidia-smi take their time
    go(place, 0)
    absent, good, operation, code = False, 0, 0, None
    while code != 0:
        operation += 1
        code = killed_at(operation, place)
        absent |= not folder.exists()
        recover(folder)  # as the next start does
        assert whole(folder) in (good, operation)
        good = whole(folder)
    assert good == operation > 30  # so many there are at least
    assert absent  # the moment between the two renames was met
    go(place, 0)
    assert whole(folder) == 0


def go(place: Path, n: int) -> None:
    """What the runner does for one notebook."""
    book = runner._notebooks(place / "notebooks")[0]
    values = {"results_root": str(place / "results"), "profile": "mini", "n": n}
    assert runner._run_one(book, values, values, resume=True)


def killed_at(operation: int, place: Path) -> int:
    """Exit code of a forked child that ends before its so-manieth file operation; not even a buffer is flushed then."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = operation

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        ours = event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(place) in str(arguments[0])
        left -= ours
        if ours and left == 0:
            os._exit(9)

    sys.addaudithook(count)
    code = 1
    try:
        go(place, operation)
        code = 0
    finally:
        os._exit(code)


def here(place: Path):
    """In the place of papermill: the notebook's calls, in this process."""
    figure = plt.figure(figsize=(1, 1))
    figure.savefig(place / "rise.png")
    plt.close(figure)
    png = (place / "rise.png").read_bytes()

    def execute(notebook, copy, passed, *, timeout_s):
        book = params.read_notebook(notebook.path)
        for count, cell in enumerate(book.cells):
            cell.execution_count = count
        book.metadata["papermill"] = {"parameters": passed, "input_path": str(notebook.path), "output_path": str(copy)}
        nbformat.write(book, copy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(runner.RUNNER, notebook.name)
            study = begin(notebook.name, results_root=passed["results_root"], n=passed["n"])
            study.file("kept.txt").write_text(str(passed["n"]) * 100_000)
            study._figures["rise"] = (".png", png)
            study.table("x", {"a": {"b": passed["n"]}})
            study.save()

    return execute
