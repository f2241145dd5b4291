"""Segment everything: a grid of clicks over an image, and the masks that survive (Figure 3; Kirillov et al. 2023, B).

SAM's pipeline with its defaults and its records: each grid point gives three masks; kept are those whose predicted IoU
and stability are high and whose box does not end where a crop ends; of masks that say the same, non-maximum suppression
keeps the one of highest predicted IoU. The same records as SAM's generator, faster: the predicted IoU is asked before a
mask is brought to the image's size, masks wait as bits, the image's side of the decoder is computed once for all
points. `approximate` measures stability on low-res logits, before the enlarging too; its records differ a little, and
say so.
Notebook 13 shows it.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from evsam_lib.data.rle import encode_masks, run_lengths
from evsam_lib.models.sam import Sam, stability_score

__all__ = ["crop_boxes", "nms", "point_grid", "segment_everything"]

EDGE = 20.0  # pixels: a box that ends this near to a crop's inner edge belongs to an object that goes on beyond it
OUTPUTS = ("binary_mask", "coco_rle", "uncompressed_rle")


@dataclass
class Masks:
    """Masks of N points or fewer, each field with one row per mask; `bits` are packed along the pixels.

    Attributes:
        boxes: (N, 4) int64, XYXY pixels of the image, right and bottom inclusive as in SAM.
        iou: (N,) float32, predicted.
        stability: (N,) float32.
        points: (N, 2) float64, XY pixels of the image.
        crops: (N, 4) int64, XYXY of the crop each mask was found in.
        bits: (N, ceil(H W / 8)) uint8, the masks at the image's size.
    """

    boxes: Tensor
    iou: Tensor
    stability: Tensor
    points: Tensor
    crops: Tensor
    bits: Tensor

    def __getitem__(self, rows: Tensor) -> "Masks":
        return Masks(**{name: value[rows] for name, value in vars(self).items()})

    @staticmethod
    def joined(parts: list["Masks"]) -> "Masks":
        return Masks(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@torch.inference_mode()
def segment_everything(
    model: Sam,
    image: np.ndarray,
    *,
    points_per_side: int | None = 32,
    points_per_batch: int | None = None,
    pred_iou_thresh: float = 0.88,
    stability_score_thresh: float = 0.95,
    stability_score_offset: float = 1.0,
    box_nms_thresh: float = 0.7,
    crop_n_layers: int = 0,
    crop_nms_thresh: float = 0.7,
    crop_overlap_ratio: float = 512 / 1500,
    crop_n_points_downscale_factor: int = 1,
    point_grids: list[np.ndarray] | None = None,
    min_mask_region_area: int = 0,
    output_mode: str = "binary_mask",
    approximate: bool = False,
) -> list[dict[str, Any]]:
    """Masks for all that a grid of points finds. Names, defaults and records are those of SAM's generator.

    Args:
        model: of the zoo.
        image: (H, W, 3) uint8 RGB.
        points_per_side: the grid has its square of points.
        points_per_batch: points decoded together, which changes no result; None is 4 on a CPU, 256 on a GPU.
        pred_iou_thresh: masks at or below it are dropped; 0 keeps all.
        stability_score_thresh: masks below it are dropped; 0 keeps all.
        stability_score_offset: in logits.
        box_nms_thresh: of two masks of one crop whose boxes overlap more, the one of lower predicted IoU is dropped.
        crop_n_layers: also look at 4, 16, ... overlapping crops of the image.
        crop_nms_thresh: the same between crops; masks of smaller crops stay.
        crop_overlap_ratio: of neighbouring crops, as a share of the image's shorter side.
        crop_n_points_downscale_factor: the grid of crop layer i has its i-th power times fewer points a side.
        point_grids: (P, 2) float in [0, 1], XY, one per layer, instead of `points_per_side`.
        min_mask_region_area: islands and holes of fewer pixels are removed.
        output_mode: "binary_mask", "coco_rle" (compressed) or "uncompressed_rle".
        approximate: measure stability on low-res logits, so that fewer masks are brought to the image's size. Not what
            SAM does: the score moves in the third digit, and a mask near the threshold may come or go.

    Returns:
        One record per mask: `segmentation` ((H, W) bool or RLE), `area` in pixels, `bbox` (XYWH), `predicted_iou`,
        `point_coords` ([[x, y]]), `stability_score`, `crop_box` (XYWH); with `approximate`, also `approximate: True`.

    Raises:
        ValueError: the image is not uint8 RGB, not exactly one kind of grid is given, or the output mode is unknown.
    """
    if output_mode not in OUTPUTS:
        raise ValueError(f"output_mode must be one of {', '.join(OUTPUTS)}, got {output_mode!r}.")
    if (points_per_side is None) == (point_grids is None):
        raise ValueError("Give points_per_side or point_grids, one of the two.")
    if point_grids is None:
        scale = crop_n_points_downscale_factor
        point_grids = [point_grid(int(points_per_side / scale**i)) for i in range(crop_n_layers + 1)]
    batch = points_per_batch or (4 if model.device.type == "cpu" else 256)
    looks = _Look(model, pred_iou_thresh, stability_score_thresh, stability_score_offset, batch, approximate)
    found = []
    for box, layer in crop_boxes(image.shape[:2], crop_n_layers, crop_overlap_ratio):
        masks = looks(image, box, point_grids[layer])
        found.append(masks[nms(masks.boxes, masks.iou, box_nms_thresh)])
    masks = Masks.joined(found)
    if len(found) > 1:
        left, top, right, bottom = masks.crops.unbind(1)
        masks = masks[nms(masks.boxes, 1 / ((right - left) * (bottom - top)).float(), crop_nms_thresh)]
    if min_mask_region_area > 0:
        masks = _without_specks(masks, image.shape[:2], min_mask_region_area, max(box_nms_thresh, crop_nms_thresh))
    return [_record(masks, i, image.shape[:2], output_mode, approximate) for i in range(len(masks.iou))]


def point_grid(side: int) -> np.ndarray:
    """(side^2, 2) float64 in [0, 1], XY: the centres of side x side cells, row by row."""
    centres = np.linspace(0.5 / side, 1 - 0.5 / side, side)
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def crop_boxes(hw: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[tuple[int, int, int, int], int]]:
    """(XYXY, layer) of the whole image and of the 4, 16, ... crops of each layer, column by column."""
    height, width = hw
    found = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(hw) * (2 / count))
        crop_w, crop_h = (math.ceil((overlap * (count - 1) + side) / count) for side in (width, height))
        starts = product(*([int((side - overlap) * i) for i in range(count)] for side in (crop_w, crop_h)))
        found += [((x, y, min(x + crop_w, width), min(y + crop_h, height)), layer) for x, y in starts]
    return found


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4), XYXY.
        scores: (N,) float.
        threshold: a box is dropped if its IoU with a kept one of higher (or equal and earlier) score is above it.

    Returns:
        (K,) int64, the kept rows, highest score first.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].float()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    alive, kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device), []
    while len(rest := alive.nonzero()[:, 0]):
        first = rest[0]
        kept.append(first)
        inner = torch.minimum(boxes[rest, 2:], boxes[first, 2:]) - torch.maximum(boxes[rest, :2], boxes[first, :2])
        shared = inner.clamp(min=0).prod(1)
        alive[rest] = ~(shared / (area[rest] + area[first] - shared) > threshold)  # 0 / 0 of two empty boxes: both stay
        alive[first] = False
    return order[torch.stack(kept)] if kept else order


@dataclass(frozen=True)
class _Look:
    """What the points of a grid find in one crop, filtered, not yet suppressed."""

    model: Sam
    pred_iou_thresh: float
    stability_thresh: float
    stability_offset: float
    batch: int
    approximate: bool

    def __call__(self, image: np.ndarray, crop: tuple[int, int, int, int], grid: np.ndarray) -> Masks:
        left, top, right, bottom = crop
        window = np.ascontiguousarray(image[top:bottom, left:right])
        pixels = self.model.preprocess(window)[None].to(self.model.device, self.model.dtype)
        embedding, code = self.model.encode(pixels), self.model.prompt_encoder.dense_position()
        points = torch.from_numpy(grid * np.array(window.shape[1::-1]))  # (P, 2) XY pixels of the crop
        parts = [
            self._batch(embedding, code, part, image.shape[:2], crop) for part in points.split(self.batch) if len(part)
        ]
        return Masks.joined(parts)

    def _batch(self, embedding: Tensor, code: Tensor, points: Tensor, image_hw, crop) -> Masks:
        hw = (crop[3] - crop[1], crop[2] - crop[0])
        frame = self.model.to_frame(points, hw)[None, :, None]  # (1, P, 1, 2)
        coords, labels = self.model.prompt_encoder.tokens(frame, torch.ones(frame.shape[:3]))
        coords, labels = coords.to(self.model.device), labels.to(self.model.device)
        low_res, iou = self.model.decode(embedding, coords, labels, image_code=code)
        low_res, iou = low_res[0].flatten(0, 1).float(), iou[0].flatten().float()  # (3 P, h, w), (3 P,)
        origin = torch.arange(len(points), device=iou.device).repeat_interleave(len(iou) // len(points))
        if self.pred_iou_thresh > 0:
            sure = iou > self.pred_iou_thresh
            low_res, iou, origin = low_res[sure], iou[sure], origin[sure]
        if self.approximate and self.stability_thresh > 0:
            stable = self._stability(low_res) >= self.stability_thresh
            low_res, iou, origin = low_res[stable], iou[stable], origin[stable]
        found = [self._full_size(part, hw) for part in low_res.split(8)]
        if not found:
            found = [self._full_size(low_res, hw)]
        masks, stability = (torch.cat(column) for column in zip(*found, strict=True))
        boxes = _boxes_of(masks)
        good = ~_cut_off(boxes, crop, image_hw)
        if self.stability_thresh > 0:
            good &= stability >= self.stability_thresh
        shift = torch.tensor([crop[0], crop[1]], device=boxes.device)
        return Masks(
            boxes=(boxes + shift.repeat(2))[good],
            iou=iou[good],
            stability=stability[good],
            points=points[origin.cpu()][good.cpu()] + shift.cpu(),
            crops=torch.tensor(crop, device=boxes.device).expand(int(good.sum()), 4),
            bits=_packed(masks[good], image_hw, crop),
        )

    def _full_size(self, low_res: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Masks (N, H, W) bool and their stability, of the crop's size."""
        logits = self.model.upscale(low_res[:, None], hw)[:, 0] if len(low_res) else low_res.new_zeros(0, *hw)
        stability = self._stability(low_res if self.approximate else logits)
        return logits > self.model.mask_threshold, stability

    def _stability(self, logits: Tensor) -> Tensor:
        return stability_score(logits, threshold=self.model.mask_threshold, offset=self.stability_offset)


def _boxes_of(masks: Tensor) -> Tensor:
    """(N, H, W) bool -> (N, 4) int64 XYXY, right and bottom inclusive; an empty mask has the box 0, 0, 0, 0."""
    sides = []
    for line in (masks.any(1), masks.any(2)):  # (N, W), (N, H)
        length = line.shape[1]
        first = line.byte().argmax(1)
        last = length - 1 - line.flip(1).byte().argmax(1)
        empty = ~line.any(1)
        sides.append((first.masked_fill(empty, 0), last.masked_fill(empty, 0)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1)


def _cut_off(boxes: Tensor, crop: tuple[int, int, int, int], image_hw: tuple[int, int]) -> Tensor:
    """(N,) bool: boxes (in the crop's pixels) that end at an edge of the crop that is none of the image."""
    height, width = image_hw
    edges, border = torch.tensor([crop, (0, 0, width, height)], device=boxes.device)
    boxes = boxes + edges[:2].repeat(2)
    return (((boxes - edges).abs() <= EDGE) & ((boxes - border).abs() > EDGE)).any(1)


def _packed(masks: Tensor, image_hw: tuple[int, int], crop: tuple[int, int, int, int]) -> Tensor:
    """Masks of a crop -> bits of masks of the image."""
    left, top, right, bottom = crop
    whole = np.zeros((len(masks), *image_hw), dtype=bool)
    whole[:, top:bottom, left:right] = masks.cpu().numpy()
    return torch.from_numpy(np.packbits(whole.reshape(len(masks), math.prod(image_hw)), axis=1))


def _unpacked(bits: Tensor, hw: tuple[int, int]) -> np.ndarray:
    """(ceil(H W / 8),) uint8 -> (H, W) bool."""
    return np.unpackbits(bits.numpy(), count=math.prod(hw)).reshape(hw).astype(bool)


def _without_specks(masks: Masks, hw: tuple[int, int], least: int, threshold: float) -> Masks:
    """Fills small holes, removes small islands, then suppresses again, preferring masks that needed no change."""
    changed, bits, boxes = [], [], []
    for i in range(len(masks.iou)):
        whole = _unpacked(masks.bits[i], hw)
        background, had_holes = _without_islands(~whole, least, keep_largest=False)
        mask, had_islands = _without_islands(~background, least, keep_largest=True)
        changed.append(had_holes or had_islands)
        bits.append(np.packbits(mask))
        boxes.append(_boxes_of(torch.from_numpy(mask)[None])[0])
    if not changed:
        return masks
    touched = torch.tensor(changed)
    clean = torch.stack(boxes).to(masks.boxes.device)
    kept = nms(clean, 1.0 - touched.float().to(clean.device), threshold)
    masks = Masks(**(vars(masks) | {"boxes": torch.where(touched.to(clean.device)[:, None], clean, masks.boxes)}))
    masks.bits = torch.from_numpy(np.stack(bits))
    return masks[kept]


def _without_islands(mask: np.ndarray, least: int, *, keep_largest: bool) -> tuple[np.ndarray, bool]:
    """Without the 8-connected parts of fewer than `least` pixels, but the largest if one must stay; were there any?"""
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    keep = sizes >= least
    keep[0] = False
    small = count - keep.sum()
    if small and not keep.any() and keep_largest:
        keep[1 + sizes[1:].argmax()] = True
    return keep[parts], bool(small)


def _record(masks: Masks, i: int, hw: tuple[int, int], output_mode: str, approximate: bool) -> dict[str, Any]:
    mask = _unpacked(masks.bits[i], hw)
    left, top, right, bottom = masks.boxes[i].tolist()
    x0, y0, x1, y1 = masks.crops[i].tolist()
    segmentation = mask
    if output_mode == "coco_rle":
        (segmentation,) = encode_masks(mask[None])
    elif output_mode == "uncompressed_rle":
        segmentation = {"size": list(hw), "counts": run_lengths(mask)}
    record = {
        "segmentation": segmentation,
        "area": int(mask.sum()),
        "bbox": [left, top, right - left, bottom - top],
        "predicted_iou": masks.iou[i].item(),
        "point_coords": [masks.points[i].tolist()],
        "stability_score": masks.stability[i].item(),
        "crop_box": [x0, y0, x1 - x0, y1 - y0],
    }
    return record | ({"approximate": True} if approximate else {})
