"""IoU of masks and its mean by size of the object (Tables 2 and 3)."""

import math

import numpy as np

__all__ = ["SIZES", "mask_iou", "mean_iou"]

SIZES = {"all": (0, math.inf), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # COCO's


def mask_iou(pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """Intersection over union of masks, in percent.

    Args:
        pred: (N, H, W) bool.
        gt: (N, H, W) bool.

    Returns:
        (N,) float64. Two empty masks have 0, as in the official script.
    """
    intersection = np.count_nonzero(pred & gt, axis=(1, 2))
    union = np.count_nonzero(pred | gt, axis=(1, 2))
    return intersection / (union + 1e-7) * 100


def mean_iou(
    areas: list[float], ious: list[float], *, inclusive_sizes: bool = True
) -> tuple[dict[str, float | None], dict[str, int]]:
    """Mean over objects, by size.

    Args:
        areas: N areas in pixels, as the annotations state them.
        ious: N IoUs.
        inclusive_sizes: both bounds belong to a size class (official); otherwise the lower one only.

    Returns:
        means and counts for "all", "small", "medium", "large"; the mean of an empty class is None.
    """
    size, iou = np.asarray(areas, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    means, counts = {}, {}
    for name, (low, high) in SIZES.items():
        inside = (size >= low) & ((size <= high) if inclusive_sizes else (size < high))
        counts[name] = int(inside.sum())
        means[name] = float(iou[inside].mean()) if inside.any() else None
    return means, counts
