"""Masks as COCO's run lengths, written from the thresholded arrays themselves.

COCO counts down the columns. Only the mask's bounding box is walked, so a small object in a large image costs little;
pycocotools packs the counts into COCO's text form, and the text is the one that its own `encode` would give.
"""

import numpy as np
from pycocotools import mask as coco_mask

__all__ = ["encode_masks", "run_lengths"]


def encode_masks(masks: np.ndarray) -> list[dict]:
    """Run lengths of N masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        N times {"size": [H, W], "counts": str}, ready for JSON.

    Raises:
        ValueError: masks are not bool (N, H, W).
    """
    if masks.ndim != 3 or masks.dtype != bool:
        raise ValueError(f"masks must be bool (N, H, W), got {masks.dtype} {masks.shape}.")
    height, width = masks.shape[1:]
    runs = [{"size": [height, width], "counts": run_lengths(mask)} for mask in masks]
    packed = coco_mask.frPyObjects(runs, height, width) if runs else []
    return [{"size": [height, width], "counts": rle["counts"].decode("ascii")} for rle in packed]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Uncompressed counts of a mask (H, W) bool, the first of zeros."""
    height = len(mask)
    rows = np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        return [mask.size]
    top, bottom = rows[0], rows[-1] + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = columns[0], columns[-1] + 1
    crop = np.zeros((right - left, bottom - top + 2), dtype=bool)  # columns as rows, a zero at both ends of each
    crop[:, 1:-1] = mask[top:bottom, left:right].T
    column, row = divmod(np.flatnonzero(crop[:, 1:] != crop[:, :-1]), crop.shape[1] - 1)
    places = (left + column) * height + top + row  # where a run starts or ends, in COCO's order
    if bottom - top == height:  # a run that leaves a column at its foot and goes on at the next one's head is one run
        joined = np.flatnonzero(places[1:] == places[:-1])
        places = np.delete(places, np.concatenate([joined, joined + 1]))
    if places[-1] < mask.size:
        places = np.append(places, mask.size)
    return np.diff(places, prepend=0).tolist()
