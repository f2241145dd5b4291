"""Training samples: one SA-1B record becomes an input image, soft mask targets and boxes.

Paper: Sec. 3.2 (up to 64 masks per image); mirroring is the only augmentation of the official code. Notebook 03.

Geometry follows the official loader: flip first, then resize the long side, then pad right and below with zeros. Masks
are resized with the same antialiased bilinear filter as images and never binarised, so targets have soft edges. Two
deliberate differences: the image is resized as the Predictor does it (on uint8; at most one grey level apart, and about
20 times faster), and targets are computed from the run lengths (`data.runs`: 2e-5 apart at most), or, where they are
decoded, one at a time, which keeps the memory of one full-size mask instead of 64.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from evsam_lib.data import transforms
from evsam_lib.models.sam import Sam

if TYPE_CHECKING:  # the step functions must import without pycocotools, which the reader of folders needs
    from evsam_lib.data.sa1b import Sa1bFolder, Sa1bRecord

__all__ = [
    "Sample",
    "boxes_to_frame",
    "choose_masks",
    "flip_boxes",
    "flip_points",
    "resize_and_pad",
    "soft_masks",
    "training_sample",
]

TARGETS = ("sampled", "official")


@dataclass(frozen=True)
class Sample:
    """One image ready for training.

    Attributes:
        image_id: of the record.
        image: (3, S, S) float32, resized, normalised and padded.
        masks: (M, T, T) float32 in [0, 1], soft targets, padded like the image; T is the target size.
        boxes: (M, 4) float32, XYXY pixels of the prompt frame.
        flipped: whether image, masks and boxes are mirrored.
    """

    image_id: int
    image: torch.Tensor
    masks: torch.Tensor
    boxes: torch.Tensor
    flipped: bool


def training_sample(
    data: "Sa1bFolder",
    record: "Sa1bRecord",
    *,
    model: Sam,
    target_px: int,
    masks_per_image: int = 64,
    exact: bool = False,
    hflip: float = 0.5,
    how: str = "sampled",
    generator: torch.Generator,
) -> Sample:
    """Make a training sample of a record; a pure function of its arguments and the generator's state.

    Args:
        data: what the record comes from; it has `runs` (folder, tars, stream) or `masks` (anything else).
        record: image, masks and boxes.
        model: gives the input size, the prompt frame and `preprocess`.
        target_px: T, side of the mask targets: the input size S in the official recipe; the decoder's own resolution
            (a quarter of the 1024 frame) makes targets 4 to 16 times cheaper.
        masks_per_image: how many masks to draw.
        exact: official rule, see `choose_masks`.
        hflip: probability of mirroring.
        how: "sampled" computes targets from the run lengths, where `data` has them; "official" decodes masks at full
            size and resizes them. The same values to 2e-5.
        generator: drawn from in this order: flip, masks.

    Returns:
        A `Sample`.

    Raises:
        ValueError: unknown `how`, or the model stretches its images (EfficientSAM); targets and boxes here keep the
            aspect.
    """
    if how not in TARGETS:
        raise ValueError(f"unknown way to make targets {how!r}: expected one of {', '.join(TARGETS)}")
    if not isinstance(model.frame, transforms.LongestSide):
        raise ValueError(f"{model.name} stretches its images; training needs a model that keeps their aspect.")
    height, width = record.image.shape[:2]
    flipped = torch.rand((), generator=generator).item() < hflip
    chosen = choose_masks(len(record.boxes_xywh), masks_per_image, exact=exact, generator=generator)
    boxes = torch.as_tensor(np.asarray(record.boxes_xywh, dtype=np.float32).reshape(-1, 4))[chosen]
    image = record.image[:, ::-1] if flipped else record.image
    boxes = flip_boxes(boxes, width) if flipped else boxes
    return Sample(
        image_id=record.image_id,
        image=model.preprocess(np.ascontiguousarray(image)),
        masks=soft_masks(data, record, chosen, target_px, flipped=flipped, how=how),
        boxes=boxes_to_frame(boxes, (height, width), image_size=model.image_size, frame_size=model.frame_size),
        flipped=flipped,
    )


def choose_masks(count: int, wanted: int, *, exact: bool, generator: torch.Generator) -> torch.Tensor:
    """Which of an image's masks to train on.

    Args:
        count: masks the image has.
        wanted: masks per sample.
        exact: False (paper, "up to 64"): `wanted` without replacement, or all there are. True (official code): always
            `wanted`, an image with fewer repeats all of them and is topped up without replacement.
        generator: source of the draws.

    Returns:
        int64 indices; empty if the image has no mask.
    """
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    if count > wanted:
        return torch.randperm(count, generator=generator)[:wanted]
    if not exact:
        return torch.arange(count)
    repeats, missing = divmod(wanted, count)
    return torch.cat([torch.arange(count).repeat(repeats), torch.randperm(count, generator=generator)[:missing]])


def flip_points(points: torch.Tensor, width: int) -> torch.Tensor:
    """Mirror points left to right: x becomes width - x, the official rule.

    Args:
        points: (..., 2) float, XY pixels of an image of that width.
        width: of the image, in pixels.
    """
    return torch.stack([width - points[..., 0], points[..., 1]], dim=-1)


def flip_boxes(boxes_xywh: torch.Tensor, width: int) -> torch.Tensor:
    """Mirror boxes left to right.

    Args:
        boxes_xywh: (..., 4) float, XYWH pixels of an image of that width.
        width: of the image, in pixels.
    """
    x, y, w, h = boxes_xywh.unbind(-1)
    return torch.stack([width - w - x, y, w, h], dim=-1)


def boxes_to_frame(
    boxes_xywh: torch.Tensor, original_hw: tuple[int, int], *, image_size: int, frame_size: int
) -> torch.Tensor:
    """Boxes in the prompt frame, with the rounding of the training targets.

    The official loader scales to the encoder's input (sizes rounded at S) and then doubles where S is 512; for odd
    sizes that is up to one frame pixel from `Sam.to_frame`, which rounds at the frame. Kept, because targets of size S
    are rounded the same way.

    Args:
        boxes_xywh: (M, 4) float, XYWH pixels of the original image.
        original_hw: its height and width.
        image_size: S, the encoder's input size.
        frame_size: side of the prompt frame.

    Returns:
        (M, 4) float32, XYXY pixels of the prompt frame.
    """
    x, y, w, h = transforms.to_frame(boxes_xywh, original_hw, image_size).unbind(-1)
    return torch.stack([x, y, x + w, y + h], dim=-1) * (frame_size / image_size)


def resize_and_pad(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Antialiased bilinear resize of the long side to `size`, then zeros right and below.

    Args:
        maps: (M, H, W) float, masks or channels.
        size: side of the square result in pixels.

    Returns:
        (M, size, size) float32.
    """
    height, width = maps.shape[-2:]
    height, width = (max(side, 1) for side in transforms.resized_hw(height, width, size))
    small = F.interpolate(maps[None].float(), (height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    return F.pad(small, (0, size - width, 0, size - height))


def soft_masks(
    data: "Sa1bFolder",
    record: "Sa1bRecord",
    chosen: torch.Tensor,
    size: int,
    *,
    flipped: bool = False,
    how: str = "sampled",
) -> torch.Tensor:
    """Soft targets of some of a record's masks.

    Args:
        data: what the record comes from, see `training_sample`.
        record: image and masks.
        chosen: (M,) int64, which of its masks; one may occur often.
        size: T, side of the targets in pixels.
        flipped: mirror them.
        how: "sampled" or "official", see `training_sample`.

    Returns:
        (M, T, T) float32 in [0, 1].
    """
    if how == "sampled" and hasattr(data, "runs"):
        return torch.from_numpy(data.runs(record, chosen.tolist()).soft(size, flip=flipped))
    targets = torch.zeros(len(chosen), size, size)
    for index in chosen.unique().tolist():  # one at a time; a repeated mask is done once
        mask = torch.from_numpy(np.asarray(data.masks(record, [index]))).float()  # (1, H, W)
        targets[chosen == index] = resize_and_pad(mask.flip(-1) if flipped else mask, size)[0]
    return targets
