"""Phase 2: the whole model learns masks from prompts.

Paper: Sec. 3.2, "End-to-End Training": box or 1-10 points with equal probability, up to 64 masks per image, three
masks per prompt, focal : dice = 20 : 1 on the best of them. Explained in notebook 05. `recipe` follows the paper's text
or the official trainer where they disagree:

====================  =====================================  =======================================================
what                  paper                                  official
====================  =====================================  =======================================================
loss                  focal + dice on all pixels             cross entropy + dice on 12,544 uncertain points
masks per prompt      always three                           a coin per step: three, or the single mask
masks per image       up to `masks_per_image`                exactly as many, repeated if there are fewer
targets               the decoder's resolution (our choice)  the encoder's input size
gradient clipping     none                                   by value, 2.0
points drawn from     target pixels above 0.5, or above 0    target pixels above 0
                      where there is none above 0.5
a point lies at       the target pixel's centre              the target pixel times frame / target
====================  =====================================  =======================================================

Step functions (`collate`, `phase2_loss`) take tensors only, so other loops can use them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from evsam_lib.models.prompt_encoder import PADDING_LABEL, prompt_tokens
from evsam_lib.prompts import sample_prompt
from evsam_lib.training import loop, losses
from evsam_lib.training.samples import training_sample

__all__ = ["Batch", "collate", "low_res_px", "phase2_loss", "train", "train_mode"]

OFFICIAL_CLIP = 2.0  # official configs/default.yaml, by value


@dataclass(frozen=True)
class Batch:
    """Images with padded prompts: N and P are the largest numbers of prompts and tokens in the batch.

    Attributes:
        images: (B, 3, S, S) float32.
        targets: (B, N, T, T) float32 in [0, 1].
        coords: (B, N, P, 2) float32, XY pixels of the prompt frame.
        labels: (B, N, P) int64.
        valid: (B, N, P) bool; False: this token does not exist.
        kept: (B, N) bool; False: this prompt does not exist and is left out of the loss.
    """

    images: torch.Tensor
    targets: torch.Tensor
    coords: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    kept: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


def train(
    model: nn.Module,
    data: Any,
    *,
    recipe: str = "paper",
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    log_csv: str | Path,
    masks_per_image: int = 64,
    box_probability: float = 0.5,
    max_points: int = 10,
    target_px: int | None = None,
    hflip: float = 0.5,
    weight_decay: float = loop.WEIGHT_DECAY,
    freeze_batchnorm: bool = False,
    iou_weight: float = 0.0,
    amp: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    workers: int = 0,
    progress: Any = None,
) -> pd.DataFrame:
    """Train encoder, prompt encoder and mask decoder together, in place; the model is left in eval mode.

    Args:
        model: a `Sam`, on the device to train on; normally distilled and given the teacher's decoder.
        data: a `Sa1bFolder`.
        recipe: "paper" or "official", see the table above.
        steps: optimiser steps; the learning rate falls to 0 over them.
        batch_size: images per step.
        lr: of the first step. Paper: 2e-6 for L, 1e-6 for XL, at batch 256.
        seed: of everything random.
        log_csv: step, loss, pixel, dice, iou (of the best mask), iou_error, lr, seconds, images_per_s.
        masks_per_image: prompts per image.
        box_probability: share of images prompted by boxes; the others by points.
        max_points: points per mask are 1 to this many, equally likely, the same for all masks of an image.
        target_px: side of the targets; None takes the recipe's.
        hflip: probability of mirroring an image.
        weight_decay: of all weights but norms and biases.
        freeze_batchnorm: keep the running statistics as they are (for small batches).
        iou_weight: weight of the IoU head's squared error; 0 in both recipes, 1 in SAM.
        amp: torch.bfloat16 for mixed precision; losses are float32 always.
        checkpoint: folder of the checkpoint.
        checkpoint_every: steps between checkpoints.
        resume: go on from the checkpoint.
        workers: processes that prepare samples.
        progress: wraps the step iterator, for example `tqdm`.

    Returns:
        The log.

    Raises:
        ValueError: unknown recipe, empty data, or a checkpoint of other settings.
        FloatingPointError: the loss is not finite.
    """
    _check_recipe(recipe)
    official = recipe == "official"
    if target_px is None:
        target_px = model.image_size if official else low_res_px(model)
    settings = {
        "phase": "end to end", "model": model.name, "images": len(data), "recipe": recipe, "batch_size": batch_size,
        "seed": seed, "masks_per_image": masks_per_image, "box_probability": box_probability,
        "max_points": max_points, "target_px": target_px, "hflip": hflip, "freeze_batchnorm": freeze_batchnorm,
        "iou_weight": iou_weight, "amp": str(amp),
    }  # fmt: skip
    batches = _Batches(model, data, settings)

    def loss_of(batch: Batch, step: int) -> dict[str, torch.Tensor]:
        generator = loop.generator_for(seed, loop.STEP, step)
        multimask = not official or torch.rand((), generator=generator).item() >= 0.5
        points = loop.generator_for(seed, loop.STEP, step, 1, device=model.device)
        return phase2_loss(
            model, batch.to(model.device), recipe=recipe, multimask=multimask, generator=points,
            iou_weight=iou_weight, amp=amp,
        )  # fmt: skip

    train_mode(model, freeze_batchnorm=freeze_batchnorm)
    try:
        return loop.fit(
            model, batches, loss_of=loss_of, steps=steps, lr=lr, images_per_step=batch_size, settings=settings,
            log_csv=log_csv, weight_decay=weight_decay, clip_value=OFFICIAL_CLIP if official else None,
            checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume, workers=workers,
            progress=progress,
        )  # fmt: skip
    finally:
        model.eval()


def phase2_loss(
    model: nn.Module,
    batch: Batch,
    *,
    recipe: str,
    multimask: bool = True,
    generator: torch.Generator | None = None,
    iou_weight: float = 0.0,
    amp: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Loss of one step, from tensors on the model's device.

    Args:
        model: a `Sam`.
        batch: from `collate`.
        recipe: "paper" or "official".
        multimask: three masks per prompt, or the single one.
        generator: of the official recipe's sampled points.
        iou_weight: weight of the IoU head's squared error. At 0 the head gets no gradient at all (rather than a zero
            one), so that weight decay leaves it alone, as in the official trainer.
        amp: mixed precision of the forward pass.

    Returns:
        "loss" with a gradient, and for the log "pixel", "dice", "iou" (of the best mask) and "iou_error", () each.
    """
    with loop.autocast(batch.images.device, amp):
        embedding = model.encode(batch.images)  # (B, C, h, w)
        logits, predicted = model.decode(
            embedding, batch.coords, batch.labels, multimask_output=multimask, valid=batch.valid
        )  # (B, N, K, 4h, 4w), (B, N, K)
    logits, predicted, targets = logits[batch.kept], predicted[batch.kept], batch.targets[batch.kept]
    mask = losses.mask_loss(logits, targets, recipe=recipe, generator=generator)
    actual = losses.mask_iou(logits, targets)  # (sum of prompts, K)
    iou_error = losses.iou_loss(predicted, actual)
    return {
        "loss": mask.total + iou_weight * iou_error if iou_weight else mask.total,
        "pixel": mask.pixel,
        "dice": mask.dice,
        "iou": actual.gather(1, mask.best[:, None]).mean() if len(actual) else actual.sum(),
        "iou_error": iou_error.detach(),
    }


def collate(
    images: torch.Tensor,
    masks: list[torch.Tensor],
    boxes: list[torch.Tensor],
    *,
    recipe: str,
    frame_size: int,
    generators: list[torch.Generator],
    box_probability: float = 0.5,
    max_points: int = 10,
) -> Batch:
    """Draw prompts for each image and pad them to one batch.

    Args:
        images: (B, 3, S, S) float32.
        masks: per image (M, T, T) float in [0, 1]; M may differ, also be 0.
        boxes: per image (M, 4) float, XYXY pixels of the prompt frame.
        recipe: "paper" or "official".
        frame_size: side of the prompt frame.
        generators: one per image, on the CPU.
        box_probability: how often an image gets boxes.
        max_points: the most points per mask.

    Returns:
        A `Batch` on the masks' device.
    """
    drawn = []
    for m, b, generator in zip(masks, boxes, generators, strict=True):
        scale = frame_size / m.shape[-1]  # frame pixels per target pixel
        drawn.append(_tokens(m, b, scale, recipe, generator, box_probability, max_points) if len(m) else None)
    count = max(1, *map(len, masks))
    length = max((coords.shape[1] for coords, _ in filter(None, drawn)), default=1)
    batch = Batch(
        images=images,
        targets=masks[0].new_zeros(len(masks), count, *masks[0].shape[-2:]),
        coords=masks[0].new_zeros(len(masks), count, length, 2),
        labels=torch.full((len(masks), count, length), PADDING_LABEL, device=masks[0].device),
        valid=torch.zeros(len(masks), count, length, dtype=torch.bool, device=masks[0].device),
        kept=torch.zeros(len(masks), count, dtype=torch.bool, device=masks[0].device),
    )
    batch.valid[..., 0] = True  # a prompt that does not exist still decodes, from SAM's padding point
    for i, prompts in enumerate(drawn):
        if prompts is not None:
            coords, labels = prompts
            m, p = labels.shape
            batch.targets[i, :m], batch.kept[i, :m] = masks[i], True
            batch.coords[i, :m, :p], batch.labels[i, :m, :p], batch.valid[i, :m, :p] = coords, labels, True
    return batch


def low_res_px(model: nn.Module) -> int:
    """Side of the decoder's masks: four pixels per embedding cell."""
    return 4 * model.grid


def train_mode(model: nn.Module, *, freeze_batchnorm: bool = False) -> None:
    """Put a model in training mode, its BatchNorms optionally left with the statistics they have."""
    model.train()
    if freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


class _Batches:
    """step -> Batch on the CPU, a pure function of the settings and the step."""

    def __init__(self, model: nn.Module, data: Any, settings: dict[str, Any]):
        self.model, self.data, self.settings = model, data, settings

    def __call__(self, step: int) -> Batch:
        s = self.settings
        picked = loop.epoch_positions(s["seed"], step, batch_size=s["batch_size"], count=s["images"])
        generators = [loop.generator_for(s["seed"], loop.SAMPLE, epoch, index) for epoch, index in picked]
        samples = [
            training_sample(
                self.data, self.data[index], model=self.model, target_px=s["target_px"], hflip=s["hflip"],
                masks_per_image=s["masks_per_image"], exact=s["recipe"] == "official", generator=generator,
            )
            for (_, index), generator in zip(picked, generators, strict=True)
        ]  # fmt: skip
        return collate(
            torch.stack([sample.image for sample in samples]),
            [sample.masks for sample in samples],
            [sample.boxes for sample in samples],
            recipe=s["recipe"],
            frame_size=self.model.frame_size,
            generators=generators,
            box_probability=s["box_probability"],
            max_points=s["max_points"],
        )


def _tokens(
    masks: torch.Tensor,
    boxes: torch.Tensor,
    scale: float,
    recipe: str,
    generator: torch.Generator,
    box_probability: float,
    max_points: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of one image in the frame, with SAM's padding point after points: coords (M, P, 2), labels (M, P)."""
    inside = masks if recipe == "official" else _inside(masks)
    coords, labels = sample_prompt(
        inside,
        boxes / scale,
        generator=generator,
        recipe=recipe,
        box_probability=box_probability,
        max_points=max_points,
    )
    if (labels != 1).any():  # a box: corners 2 and 3, already whole
        return coords * scale, labels
    coords = coords * scale if recipe == "official" else (coords + 0.5) * scale - 0.5
    return prompt_tokens(coords, labels)


def _inside(masks: torch.Tensor) -> torch.Tensor:
    """(M, T, T) bool without the soft rim, whose clicks can miss the object; a mask that is all rim keeps it."""
    core = masks > 0.5
    only_rim = ~core.flatten(1).any(dim=1)
    core[only_rim] = masks[only_rim] > 0
    return core


def _check_recipe(recipe: str) -> None:
    if recipe not in losses.RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: expected one of {', '.join(losses.RECIPES)}")
