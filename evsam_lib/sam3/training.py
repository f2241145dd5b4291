"""Stage 1 of EfficientSAM3: the image student learns the teacher's trunk, the text student its features of phrases.

What the official code does, and what its documents do not say, are arguments: the squared error summed over channels (a
thousand times the mean, beside which the cosine term is lost), the consistency of phrases counted twice, images padded
and normalised as ImageNet's while the finished model gets them stretched. Defaults are what one would want; `official=`
turns each back. Teacher and student see the same pixels. Not rebuilt: the decay of learning rates from layer to layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.tokens import tokenize
from evsam_lib.training.batches import Batches
from evsam_lib.training.loop import Objective, cosine, fit
from evsam_lib.training.settings import Settings

__all__ = [
    "adopt_heads", "distil_image", "distil_text", "image_loss", "teacher_maps", "text_loss", "training_frame",
    "trunk_cosine", "warm_cosine",
]  # fmt: skip

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # mean, spread
OWN = ("vision_encoder.backbone.", "text_encoder.", "text_projection.")  # what students do not share with the teacher


def adopt_heads(student, teacher) -> int:
    """Copies everything of the teacher but its trunk and its text encoder; returns how many tensors.

    Args:
        student: of `load_sam3`.
        teacher: of `load_sam3`, of the same scale and image size.

    Raises:
        ValueError: the two differ in more than trunk and text.
    """
    own, theirs = (
        {k: v for k, v in model.state_dict().items() if not k.removeprefix("detector_model.").startswith(OWN)}
        for model in (student, teacher)
    )
    odd = sorted(set(own) ^ set(theirs)) or [key for key in own if own[key].shape != theirs[key].shape]
    if odd:
        raise ValueError(f"Student and teacher differ beyond trunk and text, in {len(odd)} tensors, first {odd[0]}.")
    student.load_state_dict(theirs, strict=False)
    return len(theirs)


def training_frame(image: np.ndarray, side: int, *, official: bool = False) -> tuple[Tensor, Tensor]:
    """One image as the trunk gets it in training.

    Args:
        image: (H, W, 3) uint8 RGB.
        side: of the frame, pixels, a multiple of 14.
        official: longest side to `side`, zeros below and right, ImageNet's mean and spread; else as at inference.

    Returns:
        (3, side, side) float32 pixels, and (side/14, side/14) bool: which cells show the image.
    """
    cells = side // 14
    if not official:
        return pixels(image, side), torch.ones(cells, cells, dtype=torch.bool)
    height, width = (round(n * side / max(image.shape[:2])) for n in image.shape[:2])
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    resized = F.interpolate(tensor, (height, width), mode="bilinear", align_corners=False, antialias=True)
    normal = ((resized - IMAGENET[0]) / IMAGENET[1])[0]
    centres = torch.arange(cells) * 14 + 7
    return F.pad(normal, (0, side - width, 0, side - height)), (centres < height)[:, None] & (centres < width)


def warm_cosine(step: int, steps: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Factor of the learning rate: up to 1 over `warmup` steps, then by a cosine down towards `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return floor + (1 - floor) * cosine(step - warmup, max(steps - warmup, 1))


def image_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, *, cosine_weight: float = 1.0, official: bool = False
) -> dict[str, Tensor]:
    """Squared error and direction of trunk maps.

    Args:
        student: (B, T, C) tokens.
        teacher: (B, T, C) tokens.
        valid: (B, T) bool, cells that show the image.
        cosine_weight: of one minus the cosine over channels; 1 in the official code.
        official: divide the squared error by cells alone, not by cells and channels.

    Returns:
        () tensors: "loss", "l2" (as it stands in the loss), "cosine" (mean over valid cells).

    Raises:
        ValueError: no cell is valid.
    """
    if not valid.any():
        raise ValueError("No cell of the batch shows an image; a loss needs at least one.")
    s, t = student[valid].float(), teacher[valid].float()  # (cells, C)
    squared = (s - t).square().sum(1)
    l2 = squared.mean() if official else squared.mean() / s.shape[1]
    along = F.cosine_similarity(s, t, dim=1).mean()
    return {"loss": l2 + cosine_weight * (1 - along), "l2": l2.detach(), "cosine": along.detach()}


def text_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    shuffled: Tensor,
    *,
    cosine_weight: float = 2.0,
    consistency_weight: float = 0.1,
    official: bool = False,
) -> dict[str, Tensor]:
    """Squared error and direction of token features, and their steadiness under another order of words.

    Args:
        student: (B, L, C) features.
        teacher: (B, L, C) features.
        mask: (B, L) bool, tokens.
        shuffled: (B, L, C) the student's features of the same words in another order.
        cosine_weight: of one minus the cosine; 2 in the official code.
        consistency_weight: of the squared change of the mean feature; 0.05 to 0.1 there.
        official: count the last term twice, as the official code does.

    Returns:
        () tensors: "loss", "l2", "cosine", "consistency".
    """
    s, t = student[mask].float(), teacher[mask].float()
    l2, along = F.mse_loss(s, t), F.cosine_similarity(s, t, dim=1).mean()
    means = [(x.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for x in (student, shuffled)]
    consistency = F.mse_loss(*means)
    weight = consistency_weight * (2 if official else 1)
    loss = l2 + cosine_weight * (1 - along) + weight * consistency
    return {"loss": loss, "l2": l2.detach(), "cosine": along.detach(), "consistency": consistency.detach()}


@torch.inference_mode()
def teacher_maps(teacher, images: Sequence[np.ndarray], *, official: bool = False) -> Tensor:
    """The teacher's trunk maps, computed once: (N, T, C) float16. At SAM3's scale an image takes 10.6 MB (`nbytes`)."""
    trunk, side = teacher.detector_model.vision_encoder.backbone, teacher.config.image_size
    frames = (training_frame(image, side, official=official)[0][None].to(teacher.device) for image in images)
    return torch.cat([trunk(frame).last_hidden_state.half().cpu() for frame in frames])


def distil_image(
    student,
    teacher,
    images: Sequence[np.ndarray],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    out: str | Path,
    targets: Tensor | None = None,
    cosine_weight: float = 1.0,
    weight_decay: float = 0.01,
    warmup_steps: int = 0,
    lr_floor: float = 0.0,
    clip_norm: float = 5.0,
    official: Sequence[str] = (),
) -> pd.DataFrame:
    """Trains the student's trunk and head in place, from the teacher's maps; everything else stays.

    Args:
        student: of `load_sam3`, an image student.
        teacher: of `load_sam3`, of the same scale and image size.
        images: (H, W, 3) uint8 RGB each, of any sizes.
        steps: optimiser steps; the learning rate falls over them by a cosine.
        batch_size: images a step.
        lr: the highest learning rate.
        seed: of the order.
        out: folder of logs and checkpoints.
        targets: of `teacher_maps`, made with the same frames; None asks the teacher at every step.
        cosine_weight: see `image_loss`.
        weight_decay: of weights; 0.01 in the official code.
        warmup_steps: over which the learning rate rises; 5 epochs in the official code.
        lr_floor: what the learning rate ends at, as a part of `lr`; 0.01 in the official code.
        clip_norm: largest norm of the gradient; 5 in the official code.
        official: which of the official code's ways to take: "loss" (see `image_loss`), "frame" (see `training_frame`).

    Returns:
        The log, see `training.loop.read_log`: step, loss, l2, cosine, lr, seconds and more.

    Raises:
        ValueError: an unknown way, or targets for other images.
        FloatingPointError: the loss is not finite.
    """
    if unknown := set(official) - {"loss", "frame"}:
        raise ValueError(f"official takes 'loss' and 'frame', got {', '.join(sorted(unknown))}.")
    if targets is not None and len(targets) != len(images):
        raise ValueError(
            f"{len(targets)} targets for {len(images)} images; make them by teacher_maps(teacher, images)."
        )
    side, padded = student.config.image_size, "frame" in official
    trunk, theirs = (model.detector_model.vision_encoder.backbone for model in (student, teacher))

    def make(record: _Record, generator: torch.Generator) -> tuple[Tensor, ...]:
        known = () if targets is None else (targets[record.image_id],)
        return torch.tensor(record.image_id), *training_frame(record.value, side, official=padded), *known

    objective = _ImageObjective(trunk, theirs, cosine_weight=cosine_weight, official="loss" in official)
    objective.clip_norm, objective.warmup, objective.floor = clip_norm, warmup_steps, lr_floor
    settings = Settings(seed=seed, steps=steps, batch_size=batch_size, lr=lr, weight_decay=weight_decay, hflip=0.0)
    record = {"stage": "image", "official": sorted(official), "cosine_weight": cosine_weight, "clip_norm": clip_norm}
    return fit(objective, Batches(_records(images), make, _stacked), settings, out=out, record=record)


@torch.inference_mode()
def trunk_cosine(student, teacher, images: Sequence[np.ndarray]) -> float:
    """Mean cosine of student's and teacher's maps on images as the finished model gets them."""
    trunks = [model.detector_model.vision_encoder.backbone for model in (student, teacher)]
    frames = [pixels(image, student.config.image_size)[None].to(student.device) for image in images]
    maps = [[trunk(frame).last_hidden_state for trunk in trunks] for frame in frames]
    return float(np.mean([F.cosine_similarity(s, t, dim=-1).mean().item() for s, t in maps]))


def distil_text(
    student,
    teacher,
    phrases: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    out: str | Path,
    consistency_weight: float = 0.1,
    weight_decay: float = 0.05,
    warmup_steps: int = 0,
    lr_floor: float = 0.0,
    clip_norm: float = 1.0,
    official: bool = False,
) -> pd.DataFrame:
    """Trains the student's text encoder and its projection in place, from the teacher's features of phrases.

    Args:
        student: of `load_sam3`, with a text student.
        teacher: of `load_sam3`, with SAM3's text and features of the same width.
        phrases: noun phrases, which must fit both contexts.
        steps: optimiser steps; the learning rate falls over them by a cosine.
        batch_size: phrases a step.
        lr: the highest learning rate.
        seed: of order and of shuffled words.
        out: folder of logs and checkpoints.
        consistency_weight: see `text_loss`.
        weight_decay: of weights; 0.05 in the official code.
        warmup_steps: over which the learning rate rises; 10 epochs in the official code.
        lr_floor: what the learning rate ends at, as a part of `lr`.
        clip_norm: largest norm of the gradient; 1 in the official code.
        official: see `text_loss`.

    Returns:
        The log, see `training.loop.read_log`: step, loss, l2, cosine, consistency, lr, seconds and more.

    Raises:
        ValueError: a phrase that is empty or too long.
        FloatingPointError: the loss is not finite.
    """
    detector = student.detector_model
    context = detector.config.text_config.max_position_embeddings
    wide = teacher.detector_model.config.text_config.max_position_embeddings
    length = min(context, wide)
    tokenize(list(phrases), length)  # every phrase, before the first step

    def make(record: _Record, generator: torch.Generator) -> tuple[Tensor, ...]:
        words = record.value.split()
        mixed = " ".join(words[i] for i in torch.randperm(len(words), generator=generator))
        ids = (tokenize([text], context)[0][0] for text in (record.value, mixed))
        return torch.tensor(record.image_id), *(x[0] for x in tokenize([record.value], wide)), *ids

    weights = {"consistency_weight": consistency_weight, "official": official}
    objective = _TextObjective(detector, teacher.detector_model, length, weights)
    objective.clip_norm, objective.warmup, objective.floor = clip_norm, warmup_steps, lr_floor
    settings = Settings(seed=seed, steps=steps, batch_size=batch_size, lr=lr, weight_decay=weight_decay, hflip=0.0)
    record = {"stage": "text", "clip_norm": clip_norm, **weights}
    return fit(objective, Batches(_records(phrases), make, _stacked), settings, out=out, record=record)


@dataclass(frozen=True)
class _Record:
    """An image or a phrase, and its place."""

    image_id: int
    value: Any


def _records(values: Sequence) -> list[_Record]:
    return [_Record(i, value) for i, value in enumerate(values)]


def _stacked(samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))


class _Stage1(Objective):
    """What both students share: batches that are tuples, places first, and the schedule."""

    warmup: int = 0
    floor: float = 0.0

    def rate(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, warmup=self.warmup, floor=self.floor)

    def prepare(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        places, *rest = batch
        with torch.no_grad():
            found = places, *self.with_target(*(x.to(self.clock.device) for x in rest))
        self.clock.mark("teacher")
        return found

    def image_ids(self, batch: tuple[Tensor, ...]) -> list[int]:
        return batch[0].tolist()


class _ImageObjective(_Stage1):
    columns = ("loss", "l2", "cosine")

    def __init__(self, trunk: nn.Module, teacher: nn.Module, **weights) -> None:
        super().__init__(trunk)
        self._teacher, self.weights = (teacher,), weights  # in a tuple it is no part of this module

    def with_target(self, frames: Tensor, valid: Tensor, known: Tensor | None = None) -> tuple[Tensor, ...]:
        wanted = self._teacher[0](frames).last_hidden_state if known is None else known
        return frames, valid.flatten(1), wanted

    def forward(self, batch: tuple[Tensor, ...], step: int, part: int) -> dict[str, Tensor]:
        _, frames, valid, wanted = batch
        seen = self.model(frames).last_hidden_state
        self.clock.mark("student")
        return image_loss(seen, wanted, valid, **self.weights) | {"weight": valid.sum().float()}


class _TextObjective(_Stage1):
    columns = ("loss", "l2", "cosine", "consistency")
    trained = ("text_",)

    def __init__(self, detector: nn.Module, teacher: nn.Module, length: int, weights: dict[str, Any]) -> None:
        super().__init__(detector)
        self._teacher, self.length, self.weights = (teacher,), length, weights

    def train_mode(self) -> None:
        self.model.eval()
        self.model.text_encoder.train()
        self.model.text_projection.train()

    def with_target(self, ids: Tensor, mask: Tensor, own: Tensor, mixed: Tensor) -> tuple[Tensor, ...]:
        wanted = self._teacher[0].get_text_features(ids, attention_mask=mask).pooler_output[:, : self.length]
        return own, mixed, mask[:, : self.length].bool(), wanted

    def forward(self, batch: tuple[Tensor, ...], step: int, part: int) -> dict[str, Tensor]:
        _, own, mixed, mask, wanted = batch
        seen, other = (self.model.get_text_features(x).pooler_output[:, : self.length] for x in (own, mixed))
        self.clock.mark("student")
        weight = torch.tensor(float(len(own)), device=seen.device)
        return text_loss(seen, wanted, mask, other, **self.weights) | {"weight": weight}
