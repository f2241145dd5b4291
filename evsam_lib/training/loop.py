"""The loop both training phases share: AdamW, cosine to 0, any number of processes, exact resume.

Optimizer and schedule follow the official trainer (the paper gives only AdamW, its learning rate and the cosine).
Explained in notebooks 04 and 05.

A step's batch is cut into forward passes of equal size, dealt to the processes in turn. Each pass weighs as many units
(images, prompts) as it holds, and the sum of the gradients is divided by all units of the step: so neither the number
of processes nor that of passes changes what a step computes, beyond the order of a sum.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evsam_lib.training import checkpoint
from evsam_lib.training.batches import Batches
from evsam_lib.training.clock import PARTS, Clock
from evsam_lib.training.ranks import Ranks, batchnorm_mode
from evsam_lib.training.settings import Settings

__all__ = ["Objective", "autocast", "cosine", "fit", "parameter_groups", "read_log"]

BETAS, EPS = (0.9, 0.999), 1e-8  # official configs/default.yaml
NO_DECAY = ("norm", "bias")  # parts of a name; the same file
LISTED = 16  # image ids that an error names


class Objective(nn.Module):
    """A model and what it is trained for. A phase overrides `prepare` and `forward`.

    Attributes:
        model: what is trained; its whole state is saved.
        columns: names of the logged numbers, "loss" first.
        trained: beginnings of the names of the parameters that learn; those of all if empty.
        clip_value: largest absolute value of a gradient entry, None for no clipping.
        clip_norm: largest norm of all gradients together, None for no clipping.
        last_part: which part of the step (see `Clock`) the end of the backward pass belongs to.
        clock: takes the time of the step's parts.
    """

    columns: tuple[str, ...] = ("loss",)
    trained: tuple[str, ...] = ()
    clip_value: float | None = None
    clip_norm: float | None = None
    last_part: str = "student"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.clock = Clock(next(model.parameters()).device)

    def train_mode(self) -> None:
        """Puts those parts of the model into training mode that learn."""
        self.model.train()

    def prepare(self, batch: Any) -> Any:
        """A batch as `forward` takes it, on the model's device; nothing in here gets a gradient."""
        return batch

    def forward(self, batch: Any, step: int, part: int) -> dict[str, torch.Tensor]:
        """Loss and logged numbers of one forward pass, () each, and "weight", the units they are means over.

        Args:
            batch: from `prepare`.
            step: 0-based.
            part: number of this pass among all of the step, over all processes.
        """
        raise NotImplementedError

    def rate(self, step: int, steps: int) -> float:
        """Factor of the learning rate at a step, 0-based."""
        return cosine(step, steps)

    def share(self, name: str) -> float:
        """Factor of the learning rate of one parameter, by its name."""
        return 1.0

    def image_ids(self, batch: Any) -> list[int]:
        """Of the images of a batch."""
        return batch.image_ids.tolist()


@dataclass
class _Run:
    """What a step needs and changes."""

    objective: Objective
    settings: Settings
    ranks: Ranks
    wrapped: nn.Module = field(init=False)
    named: list[tuple[str, nn.Parameter]] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    ema: dict[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        wanted = self.objective.trained or ("",)
        self.named = [(n, p) for n, p in self.objective.model.named_parameters() if n.startswith(wanted)]
        groups = parameter_groups(self.named, weight_decay=self.settings.weight_decay, share=self.objective.share)
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, betas=BETAS, eps=EPS)

    def wrap(self) -> None:
        """Shares gradients between processes; parameters that do not learn are left alone for that time."""
        self.wrapped = self.objective
        if self.ranks.world > 1:
            # Which heads a step uses may vary. With that said, DDP keeps its first arrangement of gradients, so that a
            # resumed run adds them up in the same order.
            self.wrapped = DistributedDataParallel(self.objective, find_unused_parameters=True)


def fit(
    objective: Objective,
    batches: Batches,
    settings: Settings,
    *,
    out: str | Path,
    record: dict[str, Any],
    resume: bool = False,
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    measured: Iterable[str] = (),
    progress: Callable[[Iterable], Iterable] | None = None,
) -> pd.DataFrame:
    """Train for `settings.steps` optimizer steps, on all processes that torchrun started.

    Args:
        objective: what is trained, for what.
        batches: where the samples come from.
        settings: complete ones.
        out: folder of logs and checkpoints, seen by all processes.
        record: what else the run is made of (flat, plain values); a checkpoint of another run is refused.
        resume: go on from the last checkpoint, if there is one; otherwise those in `out` are removed.
        measure: model in evaluation mode -> numbers of held-out images, called by the first process.
        measured: their names.
        progress: wraps the step iterator of the first process, for example `tqdm`.

    Returns:
        The log, see `read_log`.

    Raises:
        ValueError: nothing to train, a batch that cannot be cut so, a folder in use, or a checkpoint of other settings.
        FloatingPointError: loss or gradient are not finite; the step is not taken and checkpoints stay.
        OSError: the disk is full; checkpoints stay.
    """
    out, ranks = Path(out), Ranks.of_torchrun()
    settings.share(ranks.world)
    run = _Run(objective, settings, ranks)
    kept = {**record, **settings.fixed(), "streamed": batches.streamed}
    lock = checkpoint.locked(out)
    ranks.by_first(lock.__enter__)
    modes = {module: module.training for module in objective.model.modules()}
    learning = {parameter for _, parameter in run.named}
    frozen = [p for p in objective.model.parameters() if p.requires_grad and p not in learning]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        start, sampler, columns = _begin(run, out, kept, resume, list(measured))
        run.wrap()
        objective.train_mode()
        with batchnorm_mode(objective.model, settings.batchnorm):
            source = batches.open(settings, ranks, start=start, sampler=sampler)
            for step in _steps(range(start, settings.steps), progress if ranks.first else None):
                if step == start:
                    stream = iter(source)
                    objective.clock.start()
                row = _step(run, stream, source.passes, step)
                times = objective.clock.seconds()
                if measure is not None and _due(step, settings, settings.held_out_every):
                    row |= _measure(objective.model, measure) if ranks.first else {}
                if ranks.first:
                    _write(out, columns, row, times, objective.clock, settings.batch_size)
                if _due(step, settings, settings.checkpoint_every):
                    _save(run, out, step + 1, kept, source.state())
                objective.clock.start()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
        if ranks.first:
            lock.__exit__(None, None, None)
    ranks.gather(None)  # nobody leaves before the last checkpoint is whole
    return read_log(out)


def read_log(out: str | Path) -> pd.DataFrame:
    """Loss curve and timing of a run, finished or not: one row per step.

    Args:
        out: folder of the run.

    Returns:
        step, loss and its parts, grad_norm, lr, held-out measurements (NaN in other steps), seconds, a column
        <part>_s for each part of the step, images_per_s, memory_gb.
    """
    log, timing = (pd.read_csv(Path(out) / name) for name in ("log.csv", "timing.csv"))
    return log.merge(timing, on="step", how="left")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, share: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not, by name, as the official trainer does.

    Args:
        named: (name, parameter) pairs of a model; those without `requires_grad` are left out.
        weight_decay: for names containing neither "norm" nor "bias".
        share: name -> factor of the learning rate, kept in the group as "share".

    Returns:
        One or two optimizer groups for each factor.

    Raises:
        ValueError: no parameter is left.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault((any(part in name for part in NO_DECAY), share(name)), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: no parameter of the chosen part requires a gradient")
    return [
        {"params": group, "weight_decay": 0.0 if plain else weight_decay, "share": factor}
        for (plain, factor), group in groups.items()
    ]


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: 1 at step 0, 0 at `steps`, per step, without warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """Mixed precision for a forward pass: nothing for "none", bfloat16 for "bf16"."""
    return nullcontext() if amp == "none" else torch.autocast(device.type, dtype=torch.bfloat16)


def _due(step: int, settings: Settings, every: int) -> bool:
    return step + 1 == settings.steps or (every > 0 and (step + 1) % every == 0)


def _steps(steps: Iterable[int], progress: Callable[[Iterable], Iterable] | None) -> Iterable[int]:
    return steps if progress is None else progress(steps)


def _step(run: _Run, stream: Iterator[Any], passes: int, step: int) -> dict[str, float]:
    """One optimizer step; returns its row of the log."""
    objective, settings, ranks = run.objective, run.settings, run.ranks
    clock, ids, sums = objective.clock, [], 0
    lr = settings.lr * objective.rate(step, settings.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["share"]
    run.optimizer.zero_grad(set_to_none=True)
    for part in range(passes):
        batch = next(stream)
        ids += objective.image_ids(batch)
        clock.mark("data")
        batch = objective.prepare(batch)
        alone = part + 1 < passes and ranks.world > 1  # gradients are shared once a step
        with run.wrapped.no_sync() if alone else nullcontext():
            found = run.wrapped(batch, step, part * ranks.world + ranks.rank)
            weight = found["weight"].double()
            (found["loss"] * found["weight"]).backward()
        clock.mark(objective.last_part)
        sums = sums + torch.stack([weight, *(weight * found[name].detach().double() for name in objective.columns)])
    sums = ranks.total(sums)
    gradients = [parameter.grad for _, parameter in run.named if parameter.grad is not None]
    units = sums[0].clamp(min=1)
    torch._foreach_mul_(gradients, (ranks.world / units).to(gradients[0].dtype))  # DDP leaves the mean of processes
    norm = nn.utils.get_total_norm(gradients)
    values = torch.cat([(sums[1:] / units), norm.detach().double()[None]]).tolist()  # waits for the device
    row = {"step": step + 1, **dict(zip((*objective.columns, "grad_norm"), values, strict=True))}
    _stop_unless_finite(row, ids, ranks)
    if objective.clip_value is not None:
        nn.utils.clip_grad_value_([parameter for _, parameter in run.named], objective.clip_value)
    if objective.clip_norm is not None:
        nn.utils.clip_grads_with_norm_([parameter for _, parameter in run.named], objective.clip_norm, norm)
    run.optimizer.step()
    if run.ema is not None:
        average = [run.ema[name] for name, _ in run.named]
        torch._foreach_lerp_(average, [parameter.detach() for _, parameter in run.named], 1 - settings.ema)
    clock.mark("update")
    return row | {"lr": lr}


def _stop_unless_finite(row: dict[str, float], ids: list[int], ranks: Ranks) -> None:
    if all(math.isfinite(row[name]) for name in ("loss", "grad_norm")):
        return
    everyone = [number for part in ranks.gather(ids) for number in part]
    told = ", ".join(map(str, everyone[:LISTED])) + (f" and {len(everyone) - LISTED} more" * (len(everyone) > LISTED))
    raise FloatingPointError(
        f"step {row['step']} has loss {row['loss']} and gradient norm {row['grad_norm']}: training stopped before "
        f"that step was taken; its images are {told}"
    )


def _begin(run: _Run, out: Path, kept: dict[str, Any], resume: bool, measured: list[str]) -> tuple[int, Any, Any]:
    """Loads the last checkpoint or clears the folder: steps done, the samplers' states, the two csv files."""
    found = run.ranks.by_first(lambda: _last(out, kept, resume))
    if run.settings.ema:
        run.ema = {name: parameter.detach().clone() for name, parameter in run.named}
    start, sampler = 0, None
    if found is not None:
        state = checkpoint.load(found, run.objective.model, run.optimizer)
        start, sampler = state["step"], state["sampler"]
        _set_random(state["random"], run.ranks.rank)
        if run.ema is not None:
            run.ema = {name: state["ema"][name].to(value.device) for name, value in run.ema.items()}

    def curves() -> tuple[checkpoint.Curve, checkpoint.Curve]:
        header = ["step", *run.objective.columns, "grad_norm", "lr", *measured]
        timing = ["step", "seconds", *(f"{part}_s" for part in PARTS), "images_per_s", "memory_gb"]
        source = None if found is None else found / "log.csv"
        with checkpoint.full_disk("the log", out):
            return (
                checkpoint.Curve(out / "log.csv", header, keep=start, source=source),
                checkpoint.Curve(out / "timing.csv", timing, keep=start),
            )

    return start, sampler, run.ranks.by_first(curves)


def _last(out: Path, kept: dict[str, Any], resume: bool) -> Path | None:
    found = checkpoint.checkpoints(out)
    if resume and found:
        checkpoint.refuse_other(found[-1], kept)
        return found[-1]
    for old in found:
        checkpoint.remove(old)
    (out / "skipped.txt").unlink(missing_ok=True)  # of the run that was here before
    return None


def _write(out: Path, columns: Any, row: dict, times: dict[str, float], clock: Clock, images: int) -> None:
    log, timing = columns
    seconds = times.pop("all")
    spent = {f"{part}_s": round(value, 6) for part, value in times.items()}
    spent |= {"seconds": round(seconds, 6), "images_per_s": round(images / seconds, 3)}
    with checkpoint.full_disk("the log", out):
        log.add(row)
        timing.add({"step": row["step"], **spent, "memory_gb": round(clock.memory_gb(), 3)})


def _measure(model: nn.Module, measure: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return measure(model)
    finally:
        for module, training in modes.items():
            module.training = training


def _save(run: _Run, out: Path, step: int, kept: dict[str, Any], sampler: Any) -> None:
    states = run.ranks.gather((_random(), sampler))
    random = {f"{rank}.{name}": value for rank, (own, _) in enumerate(states) for name, value in own.items()}
    run.ranks.by_first(
        lambda: checkpoint.save(
            out, run.objective.model, run.optimizer, step=step, settings=kept, random=random,
            sampler=[state for _, state in states], ema=run.ema, keep=run.settings.keep,
        )
    )  # fmt: skip


def _random() -> dict[str, torch.Tensor]:
    """States of torch's global generators: nothing here draws from them, but a model's own layers may."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random(states: dict[str, torch.Tensor], rank: int) -> None:
    if f"{rank}.cpu" in states:
        torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
