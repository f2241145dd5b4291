"""Prompts made from masks: what training shows the model, and where a simulated user clicks.

`sample_prompt` draws the prompts of end-to-end training (Sec. 3.2: a box or 1-10 points of the mask, at random;
notebook 05). `next_clicks` is the rule of the point protocol (Table 2; notebook 08): each click goes to the place that
lies deepest inside the error of the current mask.
"""

import numpy as np
import torch
from torch import Tensor

from evsam_lib.depth import deepest
from evsam_lib.models.prompt_encoder import BOX_LABELS

__all__ = ["mask_box", "next_clicks", "sample_points", "sample_prompt", "xywh_to_xyxy"]

RECIPES = ("paper", "official")


def sample_prompt(
    masks: Tensor,
    boxes: Tensor,
    *,
    generator: torch.Generator,
    recipe: str = "paper",
    box_probability: float = 0.5,
    max_points: int = 10,
) -> tuple[Tensor, Tensor]:
    """Draws the prompts of one training image: boxes for all of its masks, or the same number of points for each.

    The recipes differ only where a mask has fewer pixels than the points drawn. `official` then gives boxes to the
    whole image, so that small objects pull their neighbours away from points. `paper`, whose text is silent here,
    keeps the points: a small mask shows all its pixels, some of them again; a mask without any is clicked at the
    centre of its box.

    SAM's padding point is not included: `models.prompt_encoder.prompt_tokens` adds it to points.

    Args:
        masks: (M, H, W) bool or number; every pixel above 0 is inside, the faint rim of a resized mask too.
        boxes: (M, 4) float, XYXY pixels of the masks.
        generator: the only source of randomness, on the CPU.
        recipe: "paper" or "official".
        box_probability: how often an image gets boxes.
        max_points: the number of points is uniform in 1..max_points.

    Returns:
        coords (M, P, 2) float32, XY pixels of the masks, and labels (M, P) int64: P = 2 with labels 2, 3 (a box's
        corners), or P points with label 1.

    Raises:
        ValueError: an unknown recipe, or masks and boxes that do not belong together.
    """
    if recipe not in RECIPES:
        raise ValueError(f"Unknown recipe {recipe!r}, expected one of {', '.join(RECIPES)}.")
    if masks.ndim != 3 or len(masks) == 0 or boxes.shape != (len(masks), 4):
        raise ValueError(
            f"Expected masks (M, H, W) and boxes (M, 4) with M > 0, got {tuple(masks.shape)} and {tuple(boxes.shape)}."
        )
    if torch.rand((), generator=generator) < box_probability:
        return _boxes_as_points(boxes)
    n = int(torch.randint(1, max_points + 1, (), generator=generator))
    pixels = _pixels(masks)
    if recipe == "official" and min(map(len, pixels)) < n:
        return _boxes_as_points(boxes)
    centres = (boxes[:, :2] + boxes[:, 2:]).float() / 2  # (M, 2)
    coords = [
        _draw(inside, n, masks.shape[2], generator).to(boxes.device) if len(inside) else centre.repeat(n, 1)
        for inside, centre in zip(pixels, centres, strict=True)
    ]
    return torch.stack(coords), torch.ones(len(masks), n, dtype=torch.int64, device=boxes.device)


def _boxes_as_points(boxes: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.tensor(BOX_LABELS, device=boxes.device).repeat(len(boxes), 1)  # (M, 2)
    return boxes.float().reshape(-1, 2, 2), labels


def sample_points(masks: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Draws n pixels of every mask without replacement; a mask with fewer repeats them once all have been drawn.

    Args:
        masks: (M, H, W) bool or number, inside where above 0.
        n: points per mask.
        generator: the only source of randomness, on the CPU.

    Returns:
        (M, n, 2) float32, XY pixels.

    Raises:
        ValueError: a mask without a single pixel inside.
    """
    pixels = _pixels(masks)
    for i, inside in enumerate(pixels):
        if len(inside) == 0:
            raise ValueError(f"Mask {i} of {len(masks)} has no pixel to draw a point from.")
    return torch.stack([_draw(inside, n, masks.shape[2], generator) for inside in pixels]).to(masks.device)


def _pixels(masks: Tensor) -> list[np.ndarray]:
    """Raster indices of the pixels inside each of M masks. NumPy finds them ten times faster than torch does."""
    return [np.flatnonzero(mask) for mask in (masks > 0).cpu().numpy()]


def _draw(inside: np.ndarray, n: int, width: int, generator: torch.Generator) -> Tensor:
    """n of the raster indices (A,) inside a mask, as XY: (n, 2) float32."""
    order = torch.randperm(len(inside), generator=generator)  # as the official sampler: same stream, same points
    chosen = torch.from_numpy(inside)[order[torch.arange(n) % len(order)]]
    return torch.stack([chosen % width, chosen // width], dim=1).float()


def next_clicks(gt: np.ndarray, pred: np.ndarray, clicked: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Places the next click of every object, by the official rule (that of RITM, Sofiiuk et al. 2021).

    Of all wrong pixels not yet clicked, the one farthest from the edge of its error region; the image's border is an
    edge too. A missed pixel gives a positive click, a superfluous one a negative click. The larger distance decides,
    negative when both are equal; among equals the first in raster order is taken. Distances are compared as squared
    whole numbers, so that ties are ties on every machine; only pixels that may be the deepest are measured (`depth`).

    An object without wrong pixels (or with all of them clicked) gets what the official code gives it: a negative
    click at (0, 0).

    Args:
        gt: (N, H, W) bool, the masks wanted.
        pred: (N, H, W) bool, the masks so far; all False before the first click.
        clicked: (N, P, 2) int, XY pixels of the earlier clicks.

    Returns:
        coords (N, 2) int64, XY pixels, and labels (N,) int64: 1 positive, 0 negative.

    Raises:
        ValueError: arrays that are not bool, or whose shapes do not belong together.
    """
    if gt.ndim != 3 or gt.shape != pred.shape or gt.dtype != bool or pred.dtype != bool:
        raise ValueError(
            "Expected gt and pred as bool (N, H, W) of one shape, "
            f"got {gt.dtype} {gt.shape} and {pred.dtype} {pred.shape}."
        )
    if clicked is None:
        clicked = np.empty((len(gt), 0, 2), dtype=np.int64)
    if clicked.ndim != 3 or clicked.shape[0] != len(gt) or clicked.shape[2] != 2:
        raise ValueError(f"Expected clicked as ({len(gt)}, P, 2), XY pixels for every object, got {clicked.shape}.")
    coords = np.zeros((len(gt), 2), dtype=np.int64)
    labels = np.zeros(len(gt), dtype=np.int64)
    for i in range(len(gt)):
        missed, extra = gt[i] & ~pred[i], pred[i] & ~gt[i]
        if np.count_nonzero(missed) > np.count_nonzero(extra):  # the larger first: it often rules the other out
            depth, positive = deepest(missed, clicked[i])
            other, negative = deepest(extra, clicked[i], at_least=max(depth, 1))
            labels[i] = depth > other
        else:
            depth, negative = deepest(extra, clicked[i])
            other, positive = deepest(missed, clicked[i], at_least=depth + 1)
            labels[i] = other > depth
        coords[i] = positive if labels[i] else negative
    return coords, labels


def mask_box(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (4,) float32, the tight box XYXY, pixel corners at integers; zeros for an empty mask."""
    if not mask.any():
        return np.zeros(4, np.float32)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """(..., 4) COCO boxes, left, top, width, height, as (..., 4) corners XYXY; floats stay floats."""
    boxes_xywh = np.asarray(boxes_xywh)
    return np.concatenate([boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]], axis=-1)
