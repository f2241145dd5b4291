"""Points and boxes through the tracker's half of SAM3, many at once and with gradients.

From a trunk's tokens the tracker's neck makes maps of four sizes; its mask decoder reads three of them: one cell for 14
pixels, and two finer ones for sharp edges. `Sam3Processor` asks for one object at a time; here a batch of images has
several prompts each, as the geometry fine-tune (`evsam_lib.sam3.geometry`) and the mini teacher's own training
(`evsam_lib.sam3.click_training`) want it. Notebook 17 shows what boxes give.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from evsam_lib.prompts import mask_box, sample_prompt
from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.stages import covered

__all__ = ["Asked", "ask", "box_iou_by_object", "click_maps", "decode", "mean_by_size"]

PADDING = -1  # label of a point that is none, as SAM has it


class Asked(NamedTuple):
    """Prompts of one image, or of a batch with B before every shape.

    Attributes:
        coords: (N, P, 2) float32, XY pixels of the model's frame.
        labels: (N, P) int64: 1 the object, 0 not the object, 2 and 3 a box's corners, -1 no point.
        targets: (N, 4h, 4w) float32, how much of a cell of the decoder's masks the object covers, 0 to 1.
    """

    coords: Tensor
    labels: Tensor
    targets: Tensor


def ask(
    masks: np.ndarray,
    side: int,
    *,
    prompts: int,
    generator: torch.Generator,
    max_points: int = 3,
    box_probability: float = 0.5,
    box_jitter: float = 0.0,
) -> Asked:
    """Draws prompts for objects of one image: a box for all of them, or some points on each.

    Args:
        masks: (M, H, W) bool, M > 0; small images draw an object more than once.
        side: of the model's frame, pixels.
        prompts: how many.
        generator: of all draws.
        max_points: points are 1 to so many.
        box_probability: how often an image gets boxes.
        box_jitter: spread of a box's corners, as a part of its sides; at most 20 pixels.

    Raises:
        ValueError: there is no mask.
    """
    if masks.ndim != 3 or not len(masks):
        raise ValueError(f"Prompts need masks (M, H, W) with M > 0, got {masks.shape}.")
    order = torch.randperm(len(masks), generator=generator)[torch.arange(prompts) % len(masks)]
    chosen = masks[order.numpy()]
    boxes = torch.from_numpy(np.stack([mask_box(mask) for mask in chosen])).float()
    options = {"box_probability": box_probability, "max_points": max_points}
    coords, labels = sample_prompt(torch.from_numpy(chosen), boxes, generator=generator, **options)
    if labels[0, 0] == 2 and box_jitter:
        sides = (boxes[:, 2:] - boxes[:, :2])[:, None]
        shift = torch.randn(coords.shape, generator=generator) * box_jitter * sides
        coords = coords + shift.clamp(-20, 20)  # as the official fine-tune bounds it
    coords = coords * torch.tensor([side / masks.shape[2], side / masks.shape[1]])
    missing = max(max_points, 2) - coords.shape[1]
    coords, labels = F.pad(coords, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=PADDING)
    return Asked(coords, labels, covered(torch.from_numpy(chosen), 4 * side // 14))


def click_maps(model, tokens: Tensor, *, level: int = 0) -> list[Tensor]:
    """What the mask decoder reads of an image.

    Args:
        model: of `load_sam3`; its tracker's neck and heads are used.
        tokens: (B, T, C) of a trunk, a student's or the teacher's.
        level: 0 for the three finest maps, as at inference, the coarsest of them with one cell for 14 pixels; 1 for
            the three coarsest, with 28 pixels a cell, as the official geometry fine-tune takes them.

    Returns:
        Three maps, the finest first; cells of the last one are those that the decoder attends to.
    """
    rows, columns = model.tracker_model.prompt_encoder.image_embedding_size
    grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))  # (B, C, h, w)
    *finer, coarsest = model.tracker_neck(grid)[0][level : level + 3]
    heads = model.tracker_model.mask_decoder
    maps = [conv(x) for conv, x in zip((heads.conv_s0, heads.conv_s1), finer, strict=True)]
    return [*maps, coarsest + model.tracker_model.no_memory_embedding.view(1, -1, 1, 1)]


def decode(
    model,
    maps: Sequence[Tensor],
    coords: Tensor,
    labels: Tensor,
    *,
    multimask: bool = True,
    mask_input: Tensor | None = None,
    code: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of every prompt.

    Args:
        model: of `load_sam3`.
        maps: of `click_maps`.
        coords: (B, N, P, 2) float, XY pixels of the model's frame.
        labels: (B, N, P) int64, see `Asked`.
        multimask: three masks, K = 3, or one, K = 1.
        mask_input: (B, 1, 4h, 4w) float, low-res logits of an earlier answer, one an image.
        code: (1, C, h, w), of the positions of cells, if the caller has it already.

    Returns:
        logits (B, N, K, 4h, 4w), predicted IoU (B, N, K), and logits (B, N, 1) of there being an object.
    """
    tracker, size = model.tracker_model, maps[-1].shape[-2:]
    sparse, dense = tracker.prompt_encoder(coords, labels, None, mask_input)
    masks, iou, _, present = tracker.mask_decoder(
        image_embeddings=maps[-1],
        image_positional_embeddings=(_positions(tracker, size) if code is None else code).expand(
            len(maps[-1]), -1, -1, -1
        ),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense[..., : size[0], : size[1]],  # the same in every cell
        multimask_output=multimask,
        high_resolution_features=list(maps[:-1]),
    )
    return masks, iou, present


def _positions(tracker, size: Iterable[int]) -> Tensor:
    """(1, C, h, w): the code of each cell's middle, for any grid; `tracker` itself knows its own grid only."""
    code = tracker.shared_image_embedding
    y, x = ((torch.arange(n, device=code.positional_embedding.device) + 0.5) / n for n in size)
    places = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
    return code(places).permute(2, 0, 1)[None]


@torch.inference_mode()
def box_iou_by_object(model, scenes: Iterable) -> pd.DataFrame:
    """IoU with every object of some scenes, each asked for by its exact box; the mask of highest predicted IoU.

    Args:
        model: of `load_sam3`, in evaluation mode.
        scenes: with `image` (H, W, 3) uint8 and `masks` (N, H, W) bool.

    Returns:
        One row an object: `iou` in 0..1 at the image's size, and `cells`, the side of a square of the object's area
        in cells of 14 pixels of the model's frame.
    """
    side, rows = model.config.image_size, []
    trunk = model.detector_model.vision_encoder.backbone
    for scene in scenes:
        tokens = trunk(pixels(scene.image, side)[None].to(model.device)).last_hidden_state
        boxes = torch.from_numpy(np.stack([mask_box(mask) for mask in scene.masks])).float()
        height, width = scene.image.shape[:2]
        coords = boxes.view(1, -1, 2, 2) * torch.tensor([side / width, side / height])
        labels = torch.tensor([2, 3]).expand(1, len(boxes), 2)
        masks, iou, _ = decode(model, click_maps(model, tokens), coords.to(model.device), labels.to(model.device))
        best = masks[0].take_along_dim(iou[0].argmax(1)[:, None, None, None], 1)  # (N, 1, 4h, 4w)
        found = F.interpolate(best.float(), (height, width), mode="bilinear")[:, 0].cpu().numpy() > 0
        truth = np.asarray(scene.masks)
        shared, either = (found & truth).sum((1, 2)), (found | truth).sum((1, 2))
        cells = np.sqrt(truth.sum((1, 2)) * (side / width) * (side / height)) / 14
        rows.append(pd.DataFrame({"iou": shared / either, "cells": cells}))
    return pd.concat(rows, ignore_index=True)


def mean_by_size(objects: pd.DataFrame, edges: tuple[float, ...]) -> pd.Series:
    """Mean IoU in percent, of all objects and between sides in cells.

    Args:
        objects: of `box_iou_by_object`.
        edges: rising; classes are below the first, between two, and from the last on.

    Returns:
        Indexed "all", "< 2 cells", "2 to 4 cells", "> 4 cells" for edges (2, 4); NaN where there is no object.
    """
    names = [f"< {edges[0]:g} cells", *(f"{a:g} to {b:g} cells" for a, b in pairwise(edges))]
    names.append(f"> {edges[-1]:g} cells")
    classes = np.digitize(objects.cells, edges)
    found = {name: objects.iou[classes == k].mean() for k, name in enumerate(names)}
    return 100 * pd.Series({"all": objects.iou.mean()} | found)
