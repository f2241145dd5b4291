"""Phase 2: the whole model learns masks from prompts.

Paper: Sec. 3.2, "End-to-End Training": box or 1-10 points with equal probability, up to 64 masks per image, three
masks per prompt, focal : dice = 20 : 1 on the best of them. Explained in notebook 05. `recipe` follows the paper's text
or the official trainer where they disagree:

====================  =====================================  =======================================================
what                  paper                                  official
====================  =====================================  =======================================================
loss                  focal + dice on all pixels             cross entropy + dice on 12,544 uncertain points
masks per prompt      always three                           a coin per pass: three, or the single mask
masks per image       up to `masks_per_image`                exactly as many, repeated if there are fewer
targets               the decoder's resolution (our choice)  the encoder's input size
gradient clipping     none                                   by value, 2.0
batch size            256                                    128: the authors' own launch, 32 GPUs with 4 images
learning rate         2e-6 (L), 1e-6 (XL)                    8e-7 (L), 4e-7 (XL), times images per step / 4
points drawn from     target pixels above 0.5, or above 0    target pixels above 0
                      where there is none above 0.5
a point lies at       the target pixel's centre              the target pixel times frame / target
====================  =====================================  =======================================================

In common: two epochs, AdamW and cosine (`training.loop`), BatchNorm in ordinary training mode, mirroring, no mixed
precision, no average of weights, everything trained but the IoU head. Step functions (`collate`, `phase2_loss`) take
tensors only, so other loops can use them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.checkpoint import checkpoint

from evsam_lib.models.prompt_encoder import PADDING_LABEL, prompt_tokens
from evsam_lib.models.sam import Sam
from evsam_lib.prompts import sample_prompt
from evsam_lib.training import loop, losses
from evsam_lib.training.batches import STEP, Batches, generator_for
from evsam_lib.training.clock import Clock
from evsam_lib.training.held_out import HeldOut
from evsam_lib.training.samples import Sample, training_sample
from evsam_lib.training.settings import EndToEnd

__all__ = ["Batch", "Prompts", "batches_of", "collate", "decoded", "low_res_px", "phase2_loss", "train"]

OFFICIAL_CLIP = 2.0  # official configs/default.yaml, by value
DECODER = ("prompt_encoder.", "mask_decoder.")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Padded prompts: N and P are the largest numbers of prompts and tokens in the batch.

    Attributes:
        coords: (B, N, P, 2) float32, XY pixels of the prompt frame.
        labels: (B, N, P) int64.
        valid: (B, N, P) bool; False: this token does not exist.
    """

    coords: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch(Prompts):
    """Images with padded prompts.

    Attributes:
        images: (B, 3, S, S) float32.
        targets: (B, N, T, T) float32 in [0, 1].
        kept: (B, N) bool; False: this prompt does not exist and is left out of the loss.
        image_ids: (B,) int64, for messages.
    """

    images: torch.Tensor
    targets: torch.Tensor
    kept: torch.Tensor
    image_ids: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


def train(
    model: Sam,
    data: Any,
    settings: EndToEnd,
    *,
    out: str | Path,
    held_out: HeldOut | None = None,
    record: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> pd.DataFrame:
    """Train encoder, prompt encoder and mask decoder together, in place; the model is left in the mode it had.

    Args:
        model: on the device to train on; normally distilled and given the teacher's decoder.
        data: a folder, tars, chunks or images in COCO's form, see `training.sources`.
        settings: how long, how fast, how cut, and the recipe.
        out: folder of logs and checkpoints, see `training.checkpoint`.
        held_out: measured every `settings.held_out_every` steps and at the end.
        record: what else a resumed run must have in common with this one (flat, plain values).
        resume: go on from the last checkpoint.
        progress: wraps the step iterator, for example `tqdm`.

    Returns:
        The log, see `loop.read_log`; its losses are pixel, dice, iou (of the best mask) and iou_error.

    Raises:
        ValueError: a model that stretches its images, empty data, or see `loop.fit`, as for other errors.
    """
    settings = settings.complete(model=model.name, images=len(data))
    side = model.image_size if settings.recipe == "official" else low_res_px(model)
    settings = replace(settings, target_px=settings.target_px or side)
    own = {"phase": "end to end", "model": model.name, "images": len(data)}
    return loop.fit(
        _EndToEnd(model, settings),
        batches_of(model, data, settings),
        settings, out=out, record={**own, **(record or {})}, resume=resume,
        measure=held_out, measured=[] if held_out is None else held_out.names, progress=progress,
    )  # fmt: skip


def batches_of(model: Sam, data: Any, settings: EndToEnd) -> Batches:
    """The samples of a training with complete settings: prompts drawn, targets made."""
    return Batches(data, partial(_sample, data, model, settings), partial(_collate, settings, model.frame_size))


class _EndToEnd(loop.Objective[Sam]):
    columns = ("loss", "pixel", "dice", "iou", "iou_error")

    def __init__(self, model: Sam, settings: EndToEnd) -> None:
        super().__init__(model)
        self.settings = settings
        self.trained = {"all": (), "encoder": ("image_encoder.",), "decoder": DECODER}[settings.train]
        self.clip_value = OFFICIAL_CLIP if settings.recipe == "official" else None
        self.last_part = "decoder" if settings.train == "decoder" else "student"

    def train_mode(self) -> None:
        self.model.train()
        if self.settings.train == "decoder":
            self.model.image_encoder.eval()

    def prepare(self, batch: Batch) -> Batch:
        found = batch.to(self.model.device)
        self.clock.mark("data")
        return found

    def forward(self, batch: Batch, step: int, part: int) -> dict[str, torch.Tensor]:
        s = self.settings
        coin = torch.rand((), generator=generator_for(s.seed, STEP, step, part)).item()
        return phase2_loss(
            self.model, batch, recipe=s.recipe, multimask=s.recipe == "paper" or coin >= 0.5,
            generator=generator_for(s.seed, STEP, step, part, 1, device=self.model.device),
            iou_weight=s.iou_weight, amp=s.amp, decoder_chunk=s.decoder_chunk, clock=self.clock,
        )  # fmt: skip


def phase2_loss(
    model: Sam,
    batch: Batch,
    *,
    recipe: str,
    multimask: bool = True,
    generator: torch.Generator | None = None,
    iou_weight: float = 0.0,
    amp: str = "none",
    decoder_chunk: int = 0,
    clock: Clock | None = None,
) -> dict[str, torch.Tensor]:
    """Loss of one forward pass, from tensors on the model's device.

    Args:
        model: in any mode.
        batch: from `collate`.
        recipe: "paper" or "official".
        multimask: three masks per prompt, or the single one.
        generator: of the official recipe's sampled points.
        iou_weight: weight of the IoU head's squared error. At 0 the head gets no gradient at all (rather than a zero
            one), so that weight decay leaves it alone, as in the official trainer.
        amp: "none" or "bf16", of the forward pass.
        decoder_chunk: prompts per image that the decoder takes at a time; only their results are kept, and what leads
            to them is computed again for the gradient. 0 takes and keeps all.
        clock: told when encoder, decoder and loss are done.

    Returns:
        "loss" with a gradient; for the log "pixel", "dice", "iou" (of the best mask) and "iou_error"; and "weight", the
        number of prompts that these are means over; () each.
    """
    clock = clock or Clock(batch.images.device)
    with loop.autocast(batch.images.device, amp):
        embedding = clock.mark_backward(model.encode(batch.images))  # (B, C, h, w)
        clock.mark("student")
        logits, predicted = decoded(model, embedding, batch, multimask, decoder_chunk)
        clock.mark("decoder")
    logits, predicted, targets = logits[batch.kept], predicted[batch.kept], batch.targets[batch.kept]
    mask = losses.mask_loss(logits, targets, recipe=recipe, generator=generator)
    actual = losses.mask_iou(logits, targets)  # (sum of prompts, K)
    iou_error = losses.iou_loss(predicted, actual)
    found = {
        "loss": mask.total + iou_weight * iou_error if iou_weight else mask.total,
        "pixel": mask.pixel,
        "dice": mask.dice,
        "iou": actual.gather(1, mask.best[:, None]).mean() if len(actual) else actual.sum(),
        "iou_error": iou_error.detach(),
        "weight": batch.kept.sum().float(),
    }
    clock.mark("loss")
    return found


def decoded(
    model: Sam, embedding: torch.Tensor, batch: Prompts, multimask: bool, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of a batch's prompts, all at once or chunk by chunk.

    Args:
        model: in any mode.
        embedding: (B, C, h, w) float.
        batch: its prompts.
        multimask: three masks per prompt, or the single one.
        chunk: see `phase2_loss`.

    Returns:
        low-res logits (B, N, K, 4h, 4w) and predicted IoU (B, N, K).
    """

    def decode(grid: torch.Tensor, prompts: slice) -> tuple[torch.Tensor, torch.Tensor]:
        coords, labels, valid = (part[:, prompts] for part in (batch.coords, batch.labels, batch.valid))
        return model.decode(grid, coords, labels, multimask_output=multimask, valid=valid)

    count = batch.labels.shape[1]
    if not chunk:
        return decode(embedding, slice(count))
    parts = [slice(first, first + chunk) for first in range(0, count, chunk)]
    found = [checkpoint(decode, embedding, part, use_reentrant=False) for part in parts]
    logits, iou = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
    return logits, iou


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
    image_ids: Sequence[int] = (),
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
        image_ids: of the images, for messages.

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
        image_ids=torch.tensor(image_ids, dtype=torch.int64, device=masks[0].device),
    )
    batch.valid[..., 0] = True  # a prompt that does not exist still decodes, from SAM's padding point
    for i, prompts in enumerate(drawn):
        if prompts is not None:
            coords, labels = prompts
            m, p = labels.shape
            batch.targets[i, :m], batch.kept[i, :m] = masks[i], True
            batch.coords[i, :m, :p], batch.labels[i, :m, :p], batch.valid[i, :m, :p] = coords, labels, True
    return batch


def low_res_px(model: Sam) -> int:
    """Side of the decoder's masks: four pixels per embedding cell."""
    return 4 * model.grid


def _sample(
    data: Any, model: Sam, settings: EndToEnd, record: Any, generator: torch.Generator
) -> tuple[Sample, torch.Generator]:
    """A training sample, and the generator that will draw its prompts."""
    s = settings
    sample = training_sample(
        data, record, model=model, target_px=s.target_px, masks_per_image=s.masks_per_image,
        exact=s.recipe == "official", hflip=s.hflip, how=s.targets, generator=generator,
    )  # fmt: skip
    return sample, generator


def _collate(settings: EndToEnd, frame_size: int, drawn: list[tuple[Sample, torch.Generator]]) -> Batch:
    samples, generators = zip(*drawn, strict=True)
    return collate(
        torch.stack([sample.image for sample in samples]),
        [sample.masks for sample in samples],
        [sample.boxes for sample in samples],
        recipe=settings.recipe,
        frame_size=frame_size,
        generators=list(generators),
        box_probability=settings.box_probability,
        max_points=settings.max_points,
        image_ids=[sample.image_id for sample in samples],
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
