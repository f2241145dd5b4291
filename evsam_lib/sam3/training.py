"""Stage 1 of EfficientSAM3: the image student learns the teacher's trunk, the text student its features of phrases.

What the official code does, and what its documents do not say, are arguments: the squared error summed over channels (a
thousand times the mean, beside which the cosine term is lost), the consistency of phrases counted twice, images padded
and normalised as ImageNet's while the finished model gets them stretched. Defaults are what one would want; `official=`
turns each back. Teacher and student see the same pixels. Not rebuilt: the decay of learning rates from layer to layer.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.tokens import tokenize
from evsam_lib.training.loop import STEP, cosine, epoch_positions, fit, generator_for

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
    log_csv: str | Path,
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
        log_csv: of the log.
        targets: of `teacher_maps`, made with the same frames; None asks the teacher at every step.
        cosine_weight: see `image_loss`.
        weight_decay: of weights; 0.01 in the official code.
        warmup_steps: over which the learning rate rises; 5 epochs in the official code.
        lr_floor: what the learning rate ends at, as a part of `lr`; 0.01 in the official code.
        clip_norm: largest norm of the gradient; 5 in the official code.
        official: which of the official code's ways to take: "loss" (see `image_loss`), "frame" (see `training_frame`).

    Returns:
        The log: step, loss, l2, cosine, lr, seconds.

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
    trunk, side, device = student.detector_model.vision_encoder.backbone, student.config.image_size, student.device
    teacher_trunk = teacher.detector_model.vision_encoder.backbone

    def make_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = [i for _, i in epoch_positions(seed, step, batch_size=batch_size, count=len(images))]
        frames, valid = zip(
            *(training_frame(images[i], side, official="frame" in official) for i in chosen), strict=True
        )
        return torch.stack(frames), torch.stack(valid).flatten(1), torch.tensor(chosen)

    def loss_of(batch, step: int) -> dict[str, Tensor]:
        frames, valid, chosen = (x.to(device) for x in batch)
        with torch.no_grad():
            known = None if targets is None else targets[chosen.cpu()].to(device)
            wanted = teacher_trunk(frames).last_hidden_state if known is None else known
        seen = trunk(frames).last_hidden_state
        return image_loss(seen, wanted, valid, cosine_weight=cosine_weight, official="loss" in official)

    trunk.train()
    settings = {"stage": "image", "batch_size": batch_size, "seed": seed, "official": sorted(official)}
    log = fit(
        trunk, make_batch, loss_of=loss_of, steps=steps, lr=lr, images_per_step=batch_size, settings=settings,
        log_csv=log_csv, weight_decay=weight_decay, clip_norm=clip_norm,
        schedule=partial(warm_cosine, warmup=warmup_steps, floor=lr_floor),
    )  # fmt: skip
    trunk.eval()
    return log


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
    log_csv: str | Path,
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
        log_csv: of the log.
        consistency_weight: see `text_loss`.
        weight_decay: of weights; 0.05 in the official code.
        warmup_steps: over which the learning rate rises; 10 epochs in the official code.
        lr_floor: what the learning rate ends at, as a part of `lr`.
        clip_norm: largest norm of the gradient; 1 in the official code.
        official: see `text_loss`.

    Returns:
        The log: step, loss, l2, cosine, consistency, lr, seconds.

    Raises:
        ValueError: a phrase that is empty or too long.
        FloatingPointError: the loss is not finite.
    """
    detector, device = student.detector_model, student.device
    context = detector.config.text_config.max_position_embeddings
    wide = teacher.detector_model.config.text_config.max_position_embeddings
    length = min(context, wide)
    tokenize(list(phrases), length)  # every phrase, before the first step

    def make_batch(step: int) -> list[Tensor]:
        chosen = [phrases[i] for _, i in epoch_positions(seed, step, batch_size=batch_size, count=len(phrases))]
        generator = generator_for(seed, STEP, step)
        mixed = [
            " ".join(words[i] for i in torch.randperm(len(words), generator=generator))
            for words in (phrase.split() for phrase in chosen)
        ]
        return [*tokenize(chosen, wide), tokenize(chosen, context)[0], tokenize(mixed, context)[0]]

    def loss_of(batch, step: int) -> dict[str, Tensor]:
        teacher_ids, mask, ids, mixed = (x.to(device) for x in batch)
        with torch.no_grad():
            wanted = teacher.detector_model.get_text_features(teacher_ids, attention_mask=mask).pooler_output
        seen, other = (detector.get_text_features(x).pooler_output[:, :length] for x in (ids, mixed))
        weights = {"consistency_weight": consistency_weight, "official": official}
        return text_loss(seen, wanted[:, :length], mask[:, :length].bool(), other, **weights)

    modules = (detector.text_encoder, detector.text_projection)
    for module in modules:
        module.train()
    settings = {"stage": "text", "batch_size": batch_size, "seed": seed, "official": official}
    log = fit(
        detector, make_batch, loss_of=loss_of, steps=steps, lr=lr, images_per_step=batch_size, settings=settings,
        log_csv=log_csv, trained="text_", weight_decay=weight_decay, clip_norm=clip_norm,
        schedule=partial(warm_cosine, warmup=warmup_steps, floor=lr_floor),
    )  # fmt: skip
    for module in modules:
        module.eval()
    return log
