"""The loop both training phases share: AdamW, cosine to 0, a csv log, atomic checkpoints, exact resume.

Optimiser and schedule follow the official trainer (the paper gives only AdamW, its learning rate and the cosine).
Explained in notebooks 04 and 05.

Every random choice of a run comes from `generator_for(seed, ...)`, so a batch is a pure function of (seed, step): a run
that stops and resumes sees the same batches as one that does not, and in one process ends with the same bits.

A checkpoint is a folder with one subfolder ``step_00000120/`` that holds ``weights.safetensors`` (the whole model, as
`load_model` reads it) and ``state.pt`` (optimiser, step, settings; plain tensors and numbers). It is written under a
temporary name and renamed, so a crash leaves the previous one whole.
"""

import csv
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["WEIGHT_DECAY", "autocast", "cosine", "epoch_positions", "fit", "generator_for", "parameter_groups"]

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.1  # official configs/default.yaml
NO_DECAY = ("norm", "bias")  # parts of a name; the same file
ORDER, SAMPLE, STEP = 0, 1, 2  # second number of a generator's key: order of an epoch, one sample, one step


def fit(
    model: nn.Module,
    make_batch: Callable[[int], Any],
    *,
    loss_of: Callable[[Any, int], dict[str, torch.Tensor]],
    steps: int,
    lr: float,
    images_per_step: int,
    settings: dict[str, Any],
    log_csv: str | Path,
    trained: str = "",
    weight_decay: float = WEIGHT_DECAY,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    schedule: Callable[[int, int], float] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    workers: int = 0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> pd.DataFrame:
    """Train `model` for `steps` optimiser steps.

    Args:
        model: the module whose whole state is saved; its mode (train or eval) is the caller's business.
        make_batch: step -> batch, a pure function; may run in worker processes.
        loss_of: (batch, step) -> dict of () tensors; "loss" is back-propagated, all are logged.
        steps: length of the schedule, which is also where it stops.
        lr: learning rate of step 0.
        images_per_step: for the images/s column.
        settings: what the run is made of (flat, JSON-like); a checkpoint of other settings is refused.
        log_csv: one row per step; a fresh run starts a fresh file, a resumed one appends.
        trained: prefix of the parameter names to train; "" trains all that require a gradient.
        weight_decay: of every trained parameter whose name contains neither "norm" nor "bias".
        clip_value: largest absolute value of a gradient entry (2.0 in the official code); None for no clipping.
        clip_norm: largest norm of all gradients together; None for no clipping.
        schedule: (step, steps) -> factor of the learning rate; None is `cosine`.
        checkpoint: folder of the checkpoint; None for none.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        resume: go on from the checkpoint, if there is one; otherwise an existing one is removed.
        workers: processes that prepare batches ahead; 0 prepares them in the loop. Does not change the result.
        progress: wraps the step iterator, for example `tqdm`.

    Returns:
        The whole log: step, the loss and its parts, lr, seconds (batch and step, without checkpoint), images_per_s.

    Raises:
        ValueError: nothing to train, or a checkpoint that belongs to other settings.
        FloatingPointError: the loss is not finite; checkpoints written before it stay.
    """
    named = [(name, p) for name, p in model.named_parameters() if name.startswith(trained)]
    optimizer = torch.optim.AdamW(parameter_groups(named, weight_decay=weight_decay), lr=lr, betas=BETAS, eps=EPS)
    settings = json.loads(json.dumps({**settings, "steps": steps, "lr": lr, "weight_decay": weight_decay,
                                      "clip_value": clip_value, "trained": trained}))  # fmt: skip
    settings |= {} if clip_norm is None else {"clip_norm": clip_norm}
    folder = None if checkpoint is None else Path(checkpoint)
    start = _begin(folder, model, optimizer, settings, resume)
    log = _Log(Path(log_csv), keep=start)
    batches = zip(range(start, steps), _batches(make_batch, start, steps, workers), strict=True)
    began = time.perf_counter()
    for step, batch in batches if progress is None else progress(batches):
        factor = (schedule or cosine)(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        parts = loss_of(batch, step)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        if clip_value is not None:
            nn.utils.clip_grad_value_([p for _, p in named], clip_value)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([p for _, p in named], clip_norm)
        values = _numbers(parts, step)  # waits for the device, and stops before a bad step is taken
        optimizer.step()
        seconds = time.perf_counter() - began
        log.add({"step": step + 1, **values, "lr": lr * factor, "seconds": seconds,
                 "images_per_s": images_per_step / seconds})  # fmt: skip
        due = step + 1 == steps or (checkpoint_every is not None and (step + 1) % checkpoint_every == 0)
        if folder is not None and due:
            _save(folder, model, optimizer, step + 1, settings)
        began = time.perf_counter()
    return log.frame()


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not, by name, as the official trainer does.

    Args:
        named: (name, parameter) pairs of a model; those without `requires_grad` are left out.
        weight_decay: for names containing neither "norm" nor "bias".

    Returns:
        One or two optimiser groups.

    Raises:
        ValueError: no parameter is left.
    """
    groups: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(any(part in name for part in NO_DECAY), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: no parameter of the chosen part requires a gradient")
    return [{"params": group, "weight_decay": 0.0 if plain else weight_decay} for plain, group in groups.items()]


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: 1 at step 0, 0 at `steps`, per step, without warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def generator_for(seed: int, *numbers: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on its arguments only: equal numbers give equal draws, whatever was drawn before."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(2, np.uint32)
    return torch.Generator(device=device).manual_seed((int(state[0]) << 31) ^ int(state[1]))


def epoch_positions(seed: int, step: int, *, batch_size: int, count: int) -> list[tuple[int, int]]:
    """Which images step `step` uses: every image once per epoch, in an order shuffled anew for each epoch.

    Args:
        seed: of the run.
        step: 0-based.
        batch_size: images per step; a batch may reach over the end of an epoch.
        count: images in the set.

    Returns:
        `batch_size` pairs (epoch, index).

    Raises:
        ValueError: the set is empty.
    """
    if count < 1:
        raise ValueError("the training set is empty: expected at least one image")
    positions = (divmod(position, count) for position in range(step * batch_size, (step + 1) * batch_size))
    return [(epoch, _order(seed, epoch, count)[place].item()) for epoch, place in positions]


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch; SA-1B's order takes half a second to draw
def _order(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator_for(seed, ORDER, epoch))


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision for a forward pass, or nothing where `dtype` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


class _StepBatches(Dataset):
    def __init__(self, make_batch: Callable[[int], Any], start: int, steps: int):
        self.make_batch, self.start, self.steps = make_batch, start, steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, offset: int) -> Any:
        return self.make_batch(self.start + offset)


def _batches(make_batch: Callable[[int], Any], start: int, steps: int, workers: int) -> Iterable:
    if workers == 0:
        return map(make_batch, range(start, steps))
    # Its own generator: a DataLoader otherwise takes a number from torch's global one.
    batches = _StepBatches(make_batch, start, steps)
    return DataLoader(batches, batch_size=None, num_workers=workers, generator=torch.Generator())


def _numbers(parts: dict[str, torch.Tensor], step: int) -> dict[str, float]:
    values = torch.stack([value.detach().float() for value in parts.values()]).tolist()
    numbers = dict(zip(parts, values, strict=True))
    if not math.isfinite(numbers["loss"]):
        raise FloatingPointError(f"the loss of step {step + 1} is {numbers['loss']}: training stopped before that step")
    return numbers


class _Log:
    """A csv file of one row per step; rows after `keep` steps are dropped when it is opened."""

    def __init__(self, path: Path, keep: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = _rows(path, keep) if keep else []
        temporary = path.with_name(path.name + ".tmp")
        _write_rows(temporary, self.rows)
        temporary.replace(path)

    def add(self, row: dict[str, float]) -> None:
        first = not self.rows
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if first:
                writer.writeheader()
            writer.writerow(row)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


def _rows(path: Path, keep: int) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    rows = [{**row, "step": int(row["step"])} for row in rows]
    return [row for row in rows if row["step"] <= keep]


def _write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def _begin(
    folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], resume: bool
) -> int:
    """Load the checkpoint (resume) or clear the folder; returns the number of steps already done."""
    if folder is None:
        if resume:
            raise ValueError("resume=True needs the checkpoint folder to resume from, got checkpoint=None")
        return 0
    found = sorted(folder.glob("step_????????"))
    if not resume:
        for old in found:
            shutil.rmtree(old)
        return 0
    if not found:
        return 0
    state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
    saved = state["settings"]
    other = [name for name in sorted(saved.keys() | settings.keys()) if saved.get(name) != settings.get(name)]
    if other:
        told = ", ".join(f"{name} {saved.get(name)!r} (now {settings.get(name)!r})" for name in other)
        raise ValueError(f"the checkpoint {found[-1]} was made with other settings: {told}")
    model.load_state_dict(load_file(found[-1] / "weights.safetensors"), strict=True)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: dict[str, Any]
) -> None:
    """Write step_<step>.tmp, rename it, then remove older ones: at every moment one whole checkpoint exists."""
    final = folder / f"step_{step:08d}"
    temporary = folder / (final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, temporary / "weights.safetensors", metadata={"step": str(step)})
    torch.save({"step": step, "settings": settings, "optimizer": optimizer.state_dict()}, temporary / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in sorted(folder.glob("step_????????"))[:-1]:
        shutil.rmtree(old)
