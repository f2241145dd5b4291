"""What the stages of EfficientSAM3's training share: settings, schedule, and the way into `training.loop.fit`.

Stage 1 and the geometry fine-tune learn from a teacher (`Stage1`), stages 2 and 3 in their own ways (`StageObjective`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.training.batches import Batches
from evsam_lib.training.loop import Objective, cosine, fit
from evsam_lib.training.losses import dice_loss
from evsam_lib.training.settings import Settings, option

__all__ = [
    "Record", "Samples", "Stage", "Stage1", "StageObjective", "covered", "even_loss", "fit_stage", "stacked",
    "warm_cosine",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stage(Settings):
    """What all stages can be told. `lr` is the highest learning rate."""

    hflip: float = option(0.0, "images are not mirrored")
    warmup_steps: int = option(0, "over which the learning rate rises; epochs in the official code: 5, of text 10")
    lr_floor: float = option(0.0, "what the learning rate ends at, as a part of lr; 0.01 in the official code")
    clip_norm: float = option(5.0, "largest norm of the gradient")


def warm_cosine(step: int, steps: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Factor of the learning rate: up to 1 over `warmup` steps, then by a cosine down towards `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return floor + (1 - floor) * cosine(step - warmup, max(steps - warmup, 1))


@dataclass(frozen=True)
class Record:
    """An image or a phrase, and its place."""

    image_id: int
    value: Any


class Samples(Protocol):
    """What a stage learns from: a sequence, or anything else with a length that makes a sample when asked for it."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Any: ...


def fit_stage(
    objective: "Stage1",
    values: Samples,
    make: Callable[[Record, torch.Generator], tuple[Tensor, ...]],
    settings: Stage,
    *,
    out: str | Path,
    resume: bool = False,
) -> pd.DataFrame:
    """Runs `training.loop.fit` over images, scenes or phrases that are at hand.

    Args:
        objective: what is trained, for what.
        values: one a sample; made when asked for, if the sequence does so.
        make: record and generator -> tensors, of equal shapes for all samples, the record's `image_id` first.
        settings: how long, how fast.
        out: folder of logs and checkpoints.
        resume: go on from the last checkpoint in `out`.
    """
    records = _Records(values)
    objective.settings = settings = settings.complete(model="", images=len(records))
    record = {"stage": type(settings).__name__, "images": len(records)}
    return fit(objective, Batches(records, make, stacked), settings, out=out, record=record, resume=resume)


@dataclass(frozen=True)
class _Records:
    """Values that may be made only when they are asked for."""

    values: Samples

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int) -> Record:
        return Record(place, self.values[place])


def stacked(samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Samples as a batch: tensors of equal shapes, part by part."""
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))


def covered(masks: Tensor, side: int) -> Tensor:
    """How much of each cell objects cover: (N, H, W) bool or 0..1 -> (N, side, side) float32."""
    return F.interpolate(masks[:, None].float(), (side, side), mode="bilinear", antialias=True)[:, 0]


def even_loss(logits: Tensor, targets: Tensor, *others: Tensor) -> Tensor:
    """A cross entropy in which object and rest weigh the same, with dice, for all masks of a prompt.

    From a random start, focal and dice loss of the best mask first teach that most pixels are background. This leads
    past that.

    Args:
        logits: (N, K, h, w).
        targets: (N, h, w) in [0, 1].
        others: further parts of the image (N, h, w) in [0, 1] that weigh as much as object and rest do.

    Returns:
        ().
    """
    truth = targets[:, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    parts = (truth, 1 - truth, *(other[:, None] for other in others))
    even = sum((entropy * part).sum((-1, -2)) / part.sum((-1, -2)).clamp(min=1) for part in parts)
    return (even + dice_loss(logits.flatten(2), truth.flatten(2))).mean()


class StageObjective(Objective[Any]):
    """What all stages share: settings of their own kind, and the schedule."""

    settings: Any

    def __init__(self, model: nn.Module, settings: Stage) -> None:
        super().__init__(model)
        self.settings, self.clip_norm = settings, settings.clip_norm

    def rate(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, warmup=self.settings.warmup_steps, floor=self.settings.lr_floor)


class Stage1(StageObjective):
    """What trainings against a teacher share: batches that are tuples, places first, and the schedule.

    A stage overrides `with_target`: the tensors of a batch, places left out -> what `forward` takes after the places.
    """

    with_target: Callable[..., tuple[Tensor, ...]]  # what `make` gave, with the teacher's answer

    def __init__(self, model: nn.Module, teacher: Any, settings: Stage) -> None:
        super().__init__(model, settings)
        self._teacher = (teacher,)  # in a tuple it is no part of this module

    def prepare(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        places, *rest = batch
        with torch.no_grad():
            found = places, *self.with_target(*(x.to(self.clock.device) for x in rest))
        self.clock.mark("teacher")
        return found

    def image_ids(self, batch: tuple[Tensor, ...]) -> list[int]:
        return batch[0].tolist()
