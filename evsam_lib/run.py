"""The runner: chosen notebooks, one kernel each, strictly.

    python -m evsam_lib.run --profile mini [NN ...] [-p key value]... [--resume]

papermill executes; this adds what it leaves open. Unknown or mistyped parameters stop everything before anything runs;
a notebook counts as run only if every cell ran and it saved its results, which are published then and not before; one
that fails stops what builds on it and nothing else. Exit code 0: all ran; 1: some failed; 2: wrong request; 130:
interrupted. Notebook 00_start_here explains how to read the results.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from evsam_lib.study import params
from evsam_lib.study.paths import digest, publish, repo_root, resolve, shown, work_folder, write_text
from evsam_lib.study.record import RUNNER
from evsam_lib.study.report import build_report

__all__ = ["main", "run"]

EVERYTHING = "*"  # in a notebook's `needs`: whatever other results exist, none of them required
TIMEOUT_S = {"mini": 1800}  # a cell that takes longer in this profile hangs; other profiles have no limit

# For the kernels, unless set already: keep freed memory, and back large tensors by huge pages. A fresh page costs more
# than the arithmetic on it; on a virtual machine this halves the mask decoder's time. glibc and torch read it at start.
KERNEL_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "THP_MEM_ALLOC_ENABLE": "1",
}


@dataclass(frozen=True)
class Notebook:
    """A notebook of the study: its file and the notebooks whose results it builds on (metadata `evsam.needs`)."""

    path: Path
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem


class ThisInterpreter(AsyncKernelManager):
    """Starts `python3` kernels with the interpreter that runs us, whatever kernels are registered on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The command that starts a kernel."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")

    async def _async_interrupt_kernel(self) -> None:
        if not self.shutting_down:  # an idle kernel that is asked to stop would only complain of being interrupted
            await super()._async_interrupt_kernel()

    interrupt_kernel = _async_interrupt_kernel


class NotebookError(RuntimeError):
    """A notebook did not run whole; the message says where and why, in one line."""


def run(
    chosen: list[str],
    *,
    profile: str = "mini",
    command_line: dict[str, str] | None = None,
    resume: bool = False,
    notebooks_dir: str | Path = "notebooks",
    params_dir: str | Path = "params",
) -> bool:
    """Runs notebooks in the order of their numbers.

    Args:
        chosen: numbers or names ("4", "04", "04_distill_encoder"); empty for all.
        profile: "mini", or one with files under `params_dir`.
        command_line: parameters by name, as typed.
        resume: skip what is already good for the same parameters, code and inputs.
        notebooks_dir: folder of notebooks; like the next, a relative path counts from the repository root.
        params_dir: folder of parameter files.

    Returns:
        Whether all ran whole.

    Raises:
        UsageError: unknown notebook, profile or parameter, or a mistyped value; nothing has run then.
    """
    every = _notebooks(resolve(notebooks_dir))
    selected = _select(chosen, every)
    folder = resolve(params_dir)
    if profile != "mini" and not (folder / profile).is_dir() and not (folder / f"{profile}.yaml").is_file():
        known = sorted({"mini", *(path.stem for path in folder.glob("*") if path.stem != "local")})
        raise params.UsageError(f"unknown profile {profile!r}; there are {', '.join(known)}")
    declared = {notebook.name: params.declared(notebook.path) for notebook in every}
    passed = params.merge(
        {notebook.name: declared[notebook.name] for notebook in selected},
        declared,
        folder=folder,
        profile=profile,
        command_line=command_line or {},
    )
    logging.getLogger("papermill").setLevel(logging.ERROR)
    failed: dict[str, str] = {}
    touched: set[Path] = set()
    began = time.monotonic()
    for number, notebook in enumerate(selected, start=1):
        print(f"[{number}/{len(selected)}] {notebook.name} ... ", end="", flush=True)
        values = {name: p.default for name, p in declared[notebook.name].items()} | passed[notebook.name]
        started = time.monotonic()
        blocked = [need for need in notebook.needs if need in failed]
        try:
            if blocked:
                raise NotebookError(f"not started, it builds on {', '.join(blocked)}")
            done = _run_one(notebook, values, passed[notebook.name], resume=resume)
            touched.update([_results(values)] if done else [])
            print(f"{time.monotonic() - started:.0f} s ok" if done else "up to date", flush=True)
        except NotebookError as error:
            failed[notebook.name] = str(error)
            print(f"{time.monotonic() - started:.0f} s FAILED: {error}", flush=True)
    for results in touched:
        if (results / "RESULTS.md").is_file():  # notebook 20 made it once; from then on it tells what lies beside it
            build_report(results.parent, results.name)
    print(
        f"{len(selected) - len(failed)} of {len(selected)} notebooks ran whole, {time.monotonic() - began:.0f} s in all"
    )
    return not failed


def _notebooks(folder: Path) -> list[Notebook]:
    found = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        evsam = params.read_notebook(path).metadata.get("evsam", {})
        needs = evsam.get("needs", []) if isinstance(evsam, dict) else None
        if not isinstance(needs, list) or not all(isinstance(name, str) for name in needs):
            raise params.UsageError(f"{path}: metadata evsam.needs must be a list of notebooks' names")
        found.append(Notebook(path, tuple(needs)))
    if not found:
        raise params.UsageError(f"no notebooks (NN_topic.ipynb) in {shown(folder)}")
    return found


def _select(chosen: list[str], every: list[Notebook]) -> list[Notebook]:
    if not chosen:
        return every
    wanted = set()
    for text in chosen:
        key = text.removesuffix(".ipynb")
        matches = [
            n.name for n in every if key in (n.name, n.name[:2]) or (key.isdigit() and f"{int(key):02d}" == n.name[:2])
        ]
        if not matches:
            raise params.UsageError(f"no notebook {text!r}; there are {', '.join(n.name for n in every)}")
        wanted.update(matches)
    return [notebook for notebook in every if notebook.name in wanted]


def _results(values: dict[str, Any]) -> Path:
    return resolve(values.get("results_root", "results")) / values.get("profile", "mini")


def _run_one(notebook: Notebook, values: dict[str, Any], passed: dict[str, Any], *, resume: bool) -> bool:
    """Runs one notebook and publishes its result; False if it was up to date already."""
    folder = _results(values) / notebook.name
    stamp = {"parameters": values, "code": _code_digest(notebook.path), "inputs": _input_runs(notebook, folder.parent)}
    if resume and _read_stamp(folder) == json.loads(json.dumps(stamp)) and _inputs_stand(folder):
        return False
    ready, copy = work_folder(folder, "ready"), work_folder(folder, "ipynb")
    try:
        for stage in ("ready", "new", "files"):  # of a killed run, or of one that filled the disk
            shutil.rmtree(work_folder(folder, stage), ignore_errors=True)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        _execute(notebook, copy, passed, timeout_s=TIMEOUT_S.get(str(values.get("profile"))))
        _check_whole(copy, ready)
        _move_book(copy, ready / "run.ipynb", folder)
        write_text(ready / "stamp.json", json.dumps(stamp, indent=2) + "\n")
        publish(ready, folder)
    except NotebookError:
        _keep_report(copy, folder)
        raise
    except OSError as error:
        which = f" ({error.filename})" if error.filename else ""
        told = f"cannot write under {shown(folder.parent)}: {error.strerror or error}{which}"
        raise NotebookError(told) from error
    shutil.rmtree(work_folder(folder, "files"), ignore_errors=True)
    return True


def _execute(notebook: Notebook, copy: Path, passed: dict[str, Any], *, timeout_s: int | None) -> None:
    before = os.environ.get(RUNNER)
    os.environ[RUNNER] = notebook.name  # inherited by the kernel: `Study.save` then leaves publishing to us
    for key, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        papermill.execute_notebook(
            _literal(notebook.path),
            _literal(copy),
            parameters=passed,
            kernel_name="python3",
            kernel_manager_class=ThisInterpreter,
            cwd=str(repo_root()),
            progress_bar=False,
            execution_timeout=timeout_s,
            extra_arguments=["--IPKernelApp.log_level=40"],  # its warnings would break our progress lines
        )
    except PapermillExecutionError as error:
        last = [line for line in str(error.evalue).strip().splitlines() if line.strip()]
        cell = error.cell_index + (0 if passed else 1)  # papermill puts what was passed into a cell of its own
        raise NotebookError(f"cell {cell}: {error.ename}: {last[0] if last else ''}") from None
    except CellTimeoutError:
        raise NotebookError(f"a cell ran longer than {timeout_s} s") from None
    except DeadKernelError:
        raise NotebookError("its kernel died; most often that is a lack of memory") from None
    except RuntimeError as error:  # as jupyter_client reports a kernel that does not start or answer
        raise NotebookError(f"its kernel did not start: {error}") from None
    finally:
        os.environ.pop(RUNNER) if before is None else os.environ.update({RUNNER: before})


def _literal(path: Path) -> str:
    """papermill takes braces in a path for a template."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _check_whole(copy: Path, ready: Path) -> None:
    """Every cell ran (an early `sys.exit(0)` passes papermill silently) and the results were saved."""
    try:
        book = params.read_notebook(copy)
    except params.UsageError as error:
        raise NotebookError(f"its executed copy was not written whole: {error}") from None
    for position, cell in enumerate(book.cells, start=1):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise NotebookError(f"cell {position} and what follows never ran; does a cell end the kernel?")
    if not (ready / "metrics.json").is_file():
        raise NotebookError("it ran, but never called study.save()")


def _keep_report(copy: Path, folder: Path) -> None:
    """Leaves the executed cells of a failed run beside an earlier good result, if there is room for them."""
    with suppress(OSError, params.UsageError):
        if copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _move_book(copy, folder / "failed.ipynb", folder)


def _move_book(copy: Path, place: Path, folder: Path) -> None:
    """Puts an executed notebook in its place; the paths papermill notes in it become relative to the repository."""
    book = params.read_notebook(copy)
    noted = book.metadata.get("papermill", {})
    if noted:
        noted["input_path"], noted["output_path"] = shown(noted["input_path"]), shown(folder / place.name)
    nbformat.write(book, copy)
    copy.replace(place)


def _code_digest(notebook: Path) -> str:
    """sha256 of what a result depends on in code: the notebook's cells and the library."""
    total = hashlib.sha256()
    for cell in params.read_notebook(notebook).cells:
        total.update(f"{cell.cell_type}\n{cell.source}\n".encode())
    library = Path(__file__).resolve().parent
    for file in sorted(library.rglob("*.py")):
        total.update(file.relative_to(library).as_posix().encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def _input_runs(notebook: Notebook, results: Path) -> dict[str, str | None]:
    """Run ids of the results this notebook builds on."""
    names = notebook.needs
    if EVERYTHING in names:
        names = [path.parent.name for path in sorted(results.glob("[0-9][0-9]_*/metrics.json"))]
    runs = {}
    for name in names:
        file = results / name / "metrics.json"
        if name != notebook.name:
            runs[name] = _record(file).get("run_id")
    return runs


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    return None if (folder / "failed.ipynb").exists() else _record(folder / "stamp.json")


def _inputs_stand(folder: Path) -> bool:
    """Whether the data sets and checkpoints that a result noted (`Study.input`) are as they were."""
    try:
        noted = [(resolve(one["path"]), one["sha256"]) for one in _record(folder / "provenance.json")["inputs"]]
        return all(path.exists() and digest(path) == sha256 for path, sha256 in noted)
    except (KeyError, TypeError, ValueError, OSError):  # a damaged note is no promise
        return False


def _record(file: Path) -> dict[str, Any]:
    """What a result's JSON file says; nothing where it is absent or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.run", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="numbers or names; all if none is given")
    parser.add_argument("--profile", default="mini", help="mini (default) or paper")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a parameter")
    parser.add_argument("--resume", action="store_true", help="skip what is already good")
    parser.add_argument("--list", action="store_true", help="list the notebooks and their parameters, run nothing")
    parser.add_argument("--notebooks-dir", default="notebooks", help=argparse.SUPPRESS)
    parser.add_argument("--params-dir", default="params", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.list:
            for notebook in _select(options.notebooks, _notebooks(resolve(options.notebooks_dir))):
                print(notebook.name)
                for parameter in params.declared(notebook.path).values():
                    print(f"    {parameter.name}: {parameter.annotation} = {parameter.default!r}")
            return 0
        whole = run(
            options.notebooks,
            profile=options.profile,
            command_line=dict(options.p),
            resume=options.resume,
            notebooks_dir=options.notebooks_dir,
            params_dir=options.params_dir,
        )
    except params.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what is published is whole, --resume goes on with the rest", file=sys.stderr)
        return 130  # what a shell reports for Ctrl-C
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
