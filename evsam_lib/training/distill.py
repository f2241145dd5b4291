"""Phase 1: the student's image encoder learns the teacher's image embedding.

Paper: Sec. 3.2, "Training": an L2 loss between the embeddings of SAM-ViT-H and the student, then the teacher's prompt
encoder and mask decoder as the start of phase 2. The authors released neither code nor settings of this phase, so what
the text leaves open is chosen here and said: the loss is the mean of squared differences over all values, the cells of
the padding included, and optimizer and schedule are those of phase 2. Explained in notebook 04.

Teacher and student each preprocess the image for themselves, so their input sizes may differ (1024 and 512 for L, both
1024 for XL); the embeddings must have one shape, which is what the student's neck is for.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from evsam_lib.models.sam import Sam
from evsam_lib.training import loop
from evsam_lib.training.batches import Batches
from evsam_lib.training.held_out import HeldOut, different
from evsam_lib.training.settings import Distillation
from evsam_lib.training.teacher import Cache, cache_embeddings, teacher_embedding

__all__ = ["adopt_decoder", "distill", "phase1_loss"]


def distill(
    student: Sam,
    teacher: Sam,
    data: Any,
    settings: Distillation,
    *,
    out: str | Path,
    cache: str | Path | None = None,
    held_out: HeldOut | None = None,
    record: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> pd.DataFrame:
    """Train `student.image_encoder` in place; the student is left in the mode it had, the teacher untouched.

    Args:
        student: on the device to train on.
        teacher: in eval mode, with an embedding of the same shape.
        data: a folder, tars or chunks; only images are used.
        settings: how long, how fast, how cut.
        out: folder of logs and checkpoints, see `training.checkpoint`.
        cache: folder of the teacher's embeddings, made if missing; None is `out`/teacher. Unused with cache="none".
        held_out: measured every `settings.held_out_every` steps and at the end.
        record: what else a resumed run must have in common with this one (flat, plain values).
        resume: go on from the last checkpoint.
        progress: wraps the step iterator, for example `tqdm`.

    Returns:
        The log, see `loop.read_log`; its losses are l2 and cosine.

    Raises:
        ValueError: embeddings of different shapes, empty data, or see `loop.fit`, as for other errors.
    """
    settings = settings.complete(model=student.name, images=len(data))
    _check_shapes(student, teacher)
    stored = None
    if settings.cache != "none":
        folder = Path(out) / "teacher" if cache is None else cache
        stored = cache_embeddings(teacher, data, folder, kind=settings.cache, amp=settings.amp)
    own = {"phase": "distillation", "student": student.name, "teacher": teacher.name, "images": len(data)}
    return loop.fit(
        _Distillation(student, teacher, settings),
        Batches(data, _Sample(student, teacher, stored, settings.hflip), _collate),
        settings, out=out, record={**own, **(record or {})}, resume=resume, measure=held_out,
        measured=[] if held_out is None else held_out.names, progress=progress,
    )  # fmt: skip


def phase1_loss(
    student: Sam, images: torch.Tensor, target: torch.Tensor, *, amp: str = "none"
) -> dict[str, torch.Tensor]:
    """Loss of one forward pass, from tensors on the student's device.

    Args:
        student: in any mode.
        images: (B, 3, S, S) float32, preprocessed for the student.
        target: (B, C, h, w) float, the teacher's embedding of the same images.
        amp: "none" or "bf16", of the forward pass.

    Returns:
        "loss" with a gradient, and for the log "l2" (the same) and "cosine" (mean over cells), () float32 each.

    Raises:
        ValueError: the embeddings differ in shape.
    """
    with loop.autocast(images.device, amp):
        embedding = student.encode(images)
    return _compare(embedding, target)


def adopt_decoder(student: Sam, teacher: Sam) -> None:
    """Copy the teacher's prompt encoder and mask decoder into the student, the start of phase 2.

    Raises:
        ValueError: the two have different names or shapes.
    """
    for part in ("prompt_encoder", "mask_decoder"):
        try:
            getattr(student, part).load_state_dict(getattr(teacher, part).state_dict(), strict=True)
        except RuntimeError as error:
            first = str(error).split("\n")[1].strip()
            raise ValueError(f"the {part} of {teacher.name} does not fit {student.name}: {first}") from error


class _Distillation(loop.Objective[Sam]):
    columns = ("loss", "l2", "cosine")
    trained = ("image_encoder.",)

    def __init__(self, student: Sam, teacher: Sam, settings: Distillation) -> None:
        super().__init__(student)
        self.settings = settings
        self._teacher = (teacher,)  # in a tuple it is no part of this module

    def train_mode(self) -> None:
        self.model.eval()
        self.model.image_encoder.train()

    def prepare(self, batch: "_Batch") -> "_Batch":
        target, device = batch.teacher, self.model.device
        if self.settings.cache == "none":
            target = teacher_embedding(self._teacher[0], target, amp=self.settings.amp)
        found = _Batch(batch.image_ids, batch.images.to(device), target.to(device))
        self.clock.mark("teacher")
        return found

    def forward(self, batch: "_Batch", step: int, part: int) -> dict[str, torch.Tensor]:
        with loop.autocast(batch.images.device, self.settings.amp):
            embedding = self.model.encode(batch.images)
        self.clock.mark("student")
        found = _compare(embedding, batch.teacher)
        self.clock.mark("loss")
        return found | {"weight": embedding.new_tensor(len(batch.images), dtype=torch.float32)}


@dataclass(frozen=True)
class _Batch:
    """image_ids (B,); images (B, 3, S, S); teacher: its images (B, 3, St, St), or its embeddings (B, C, h, w)."""

    image_ids: torch.Tensor
    images: torch.Tensor
    teacher: torch.Tensor


@dataclass(frozen=True)
class _Sample:
    """(record, generator) -> image id, image for the student, image for the teacher or its stored embedding."""

    student: Sam
    teacher: Sam
    stored: Cache | None
    hflip: float

    def __call__(self, record: Any, generator: torch.Generator) -> tuple:
        image = record.image
        if torch.rand((), generator=generator).item() < self.hflip:
            image = np.ascontiguousarray(image[:, ::-1])
        theirs = self.teacher.preprocess(image) if self.stored is None else self.stored[record.image_id]
        return record.image_id, self.student.preprocess(image), theirs


def _collate(samples: list[tuple]) -> _Batch:
    ids, images, theirs = zip(*samples, strict=True)
    return _Batch(torch.tensor(ids), torch.stack(images), torch.stack(theirs))


def _compare(embedding: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    if embedding.shape != target.shape:
        raise ValueError(different(embedding, target))
    embedding, target = embedding.float(), target.float()
    l2 = F.mse_loss(embedding, target)
    cosine = F.cosine_similarity(embedding.detach(), target, dim=1).mean()
    return {"loss": l2, "l2": l2.detach(), "cosine": cosine}


def _check_shapes(student: Sam, teacher: Sam) -> None:
    shapes = {sam.name: (sam.embed_dim, sam.grid, sam.grid) for sam in (student, teacher)}
    if (student.embed_dim, student.grid) != (teacher.embed_dim, teacher.grid):
        told = " and ".join(f"{shape} of {name}" for name, shape in shapes.items())
        raise ValueError(f"student and teacher must embed alike, got {told} (C, h, w)")
