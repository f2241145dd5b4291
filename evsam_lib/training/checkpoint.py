"""A training's folder: who may write there, its checkpoints, its loss curve.

    out/run.json                      what the run is made of, and where it came from
    out/log.csv                       one row a step: losses, learning rate, held-out measurements; the same every time
    out/timing.csv                    one row a step: seconds of its parts, images/s, memory
    out/checkpoints/step_00000120/    weights.safetensors (as `load_model` reads them), optimizer.safetensors,
                                      random.safetensors, state.json, log.csv, and ema.safetensors if asked for

A checkpoint is written under a temporary name, brought to the disk and renamed: whatever happens, every `step_...` is
whole. Nothing in it is a pickle. Explained in notebook 05.
"""

import csv
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from evsam_lib.models.weights import load_strictly

__all__ = ["Curve", "checkpoints", "full_disk", "load", "locked", "refuse_other", "save"]

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
_PATTERN = "step_????????"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the system takes the lock back when the process ends, however it ends.

    Raises:
        ValueError: another run is training there.
    """
    import fcntl  # not on Windows, where nothing else of this package needs it

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {who}: wait for it, or name another folder") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def full_disk(what: str, folder: Path) -> Iterator[None]:
    """Says in one sentence that a disk is full, and which checkpoint is left.

    Raises:
        OSError: no space is left (also a quota or a file size limit), with the errno of the cause.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or next((n for n in full if f"os error {n})" in str(error)), None)
        if number not in full:
            raise
        kept = checkpoints(folder)
        left = f"the last checkpoint, {kept[-1].name}, is whole" if kept else "there is no checkpoint yet"
        message = f"{what} cannot be written to {folder}: {os.strerror(number)}; {left}: free some space and resume"
        raise OSError(number, message) from error


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob(_PATTERN))


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    settings: Mapping[str, Any],
    random: Mapping[str, torch.Tensor],
    sampler: list[Any],
    ema: Mapping[str, torch.Tensor] | None = None,
    keep: int = 1,
) -> Path:
    """Writes a checkpoint, then removes all but the last `keep`.

    Args:
        folder: of the run.
        model: its whole state is saved.
        optimizer: of (some of) the model's parameters.
        step: steps done.
        settings: plain values, compared on resuming.
        random: states of random generators.
        sampler: of every process, where its data stand (plain values).
        ema: running average of the parameters, by name.
        keep: how many checkpoints stay.

    Raises:
        OSError: the disk is full; the earlier checkpoints are whole.
    """
    final = folder / "checkpoints" / f"step_{step:08d}"
    temporary = final.with_name(f".{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        with full_disk(f"the checkpoint of step {step}", folder):
            temporary.mkdir(parents=True)
            save_file(state, temporary / "weights.safetensors", metadata={"step": str(step)})
            if ema is not None:
                average = {name: ema.get(name, value).detach().cpu().contiguous() for name, value in state.items()}
                save_file(average, temporary / "ema.safetensors", metadata={"step": str(step)})
            save_file(_named_state(model, optimizer), temporary / "optimizer.safetensors")
            save_file({name: value.contiguous() for name, value in random.items()}, temporary / "random.safetensors")
            if (folder / "log.csv").is_file():
                shutil.copyfile(folder / "log.csv", temporary / "log.csv")
            note = {"step": step, "settings": dict(settings), "sampler": sampler}
            (temporary / "state.json").write_text(json.dumps(note, indent=1) + "\n")
            _to_disk(temporary)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        remove(final)
    temporary.rename(final)
    for old in checkpoints(folder)[:-keep]:
        remove(old)
    return final


def remove(path: Path) -> None:
    """Removes a checkpoint; it stops being one at once."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint's weights and optimizer state in place.

    Returns:
        step, settings, sampler, random (tensors by name) and, where there is one, ema (tensors by name).

    Raises:
        ValueError: a file of it is missing or damaged.
    """
    note = _note(path)
    try:
        files = ("weights", "optimizer", "random", "ema")
        parts = {
            name: load_file(path / f"{name}.safetensors")
            for name in files
            if name != "ema" or (path / "ema.safetensors").is_file()
        }
    except Exception as error:  # safetensors and torch have many words for a damaged file
        raise _damaged(path, error) from error
    own = dict(model.named_parameters())
    try:
        _check(parts, own)
    except ValueError as error:
        raise _damaged(path, error) from error
    load_strictly(model, parts["weights"], source=str(path))
    for key, value in parts["optimizer"].items():
        name, _, kind = key.rpartition("/")
        where = "cpu" if kind == "step" else own[name].device
        optimizer.state[own[name]][kind] = value.to(where)
    return {**note, "random": parts["random"], "ema": parts.get("ema")}


def _note(path: Path) -> dict[str, Any]:
    """step, settings and sampler, as state.json holds them."""
    try:
        note = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if type(note["step"]) is not int or not isinstance(note["settings"], dict) or "sampler" not in note:
            raise ValueError("state.json needs step, settings and sampler")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    return note


def _check(parts: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> None:
    """Whether all tensors have their names, shapes and kinds."""
    moments = parts["optimizer"]
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        shape = torch.Size([]) if kind == "step" else own[name].shape if name in own else None
        whole = all(f"{name}/{other}" in moments for other in ADAM)
        if name not in own or kind not in ADAM or not whole or value.shape != shape or not value.is_floating_point():
            raise ValueError(f"optimizer.safetensors holds {key}, expected AdamW's state of the model's parameters")
    for name, value in parts["random"].items():
        try:
            if name.endswith(".cpu"):  # a GPU's can be tried on a GPU only
                torch.Generator().set_state(value)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"random.safetensors holds {name}, expected the state of a generator") from error
    for name, value in (parts.get("ema") or {}).items():
        if name not in own or value.shape != own[name].shape:
            raise ValueError(f"ema.safetensors holds {name}, expected the model's parameters")


def _damaged(path: Path, error: Exception) -> ValueError:
    told = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"the checkpoint {path} is damaged ({told}): remove that folder to go on from the one before")


def refuse_other(path: Path, settings: Mapping[str, Any]) -> None:
    """Compares a checkpoint's settings with those of the run that wants to go on with it.

    Raises:
        ValueError: they differ; names what differs and how. Or the checkpoint is damaged.
    """
    saved = _note(path)["settings"]
    settings = json.loads(json.dumps(settings))
    other = [name for name in sorted(saved.keys() | settings.keys()) if saved.get(name) != settings.get(name)]
    if other:
        told = ", ".join(f"{name} {saved.get(name)!r} (now {settings.get(name)!r})" for name in other)
        raise ValueError(f"the checkpoint {path} was made with other settings: {' '.join(told.split())[:500]}")


class Curve:
    """A csv file of one row per step; a resumed run drops the rows after the step it goes on from."""

    def __init__(self, path: Path, columns: list[str], *, keep: int = 0, source: Path | None = None) -> None:
        """Opens the file.

        Args:
            path: of the file.
            columns: its header.
            keep: steps to keep of what is there.
            source: where those are read; None is the file itself.
        """
        self.path, self.columns = path, columns
        source = source if source is not None and source.is_file() else path
        rows = []
        if keep and source.is_file():
            rows = _rows(source, keep)
        temporary = path.with_name(f".{path.name}.new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)

    def add(self, row: Mapping[str, float]) -> None:
        """Appends a row; columns that it lacks stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


def _rows(source: Path, keep: int) -> list[dict]:
    """The rows up to a step."""
    try:
        with source.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if int(row["step"]) <= keep]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{source} is damaged, expected a table with a column of steps: remove it to go on") from error


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as <parameter name>/<kind>; parameters that never had a gradient have none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{kind}": value.detach().cpu().contiguous()
        for parameter, kinds in optimizer.state.items()
        for kind, value in kinds.items()
    }


def _to_disk(folder: Path) -> None:
    """Waits until all files of a folder are on the disk: a rename must never come before what it renames."""
    for file in [*folder.iterdir(), folder]:
        handle = os.open(file, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems cannot for folders
                os.fsync(handle)
        finally:
            os.close(handle)
