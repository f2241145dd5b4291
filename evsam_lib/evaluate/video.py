"""J and F of masks followed through a video, as DAVIS 2017 and SA-V define them.

J is the overlap of regions (intersection over union), F the harmonic mean of precision and recall of their outlines,
which may miss each other by 0.8 % of the picture's diagonal (Perazzi et al., CVPR 2016). An object's numbers are means
over its frames without the first, whose mask was given, and the last; a set's are means over objects. Tests hold them
equal to the official evaluation's. Notebook 18 uses them.
"""

import numpy as np
import pandas as pd
from scipy.ndimage import distance_transform_edt

__all__ = ["FATES", "boundary_f", "fates", "mean_jf", "region_j", "score_video"]

FATES = ("seen", "partly hidden", "gone", "back")
HALF = 0.5  # of its largest area: an object that shows less is partly hidden
TOLERANCE = 0.008  # of the diagonal; davis2017-evaluation, metrics.py


def region_j(predicted: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool; 1 where both are empty."""
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def boundary_f(predicted: np.ndarray, true: np.ndarray) -> float:
    """How well outlines of two masks (H, W) bool agree; 1 where both are empty, 0 where one is."""
    reach = np.ceil(TOLERANCE * np.hypot(*true.shape))
    ours, theirs = _outline(predicted), _outline(true)
    counts = np.count_nonzero(ours), np.count_nonzero(theirs)
    if not all(counts):
        return float(counts[0] == counts[1])
    precision = np.count_nonzero(ours & (distance_transform_edt(~theirs) <= reach)) / counts[0]
    recall = np.count_nonzero(theirs & (distance_transform_edt(~ours) <= reach)) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def score_video(predicted: np.ndarray, true: np.ndarray, *, annotated: np.ndarray | None = None) -> pd.DataFrame:
    """J and F of every object in every frame that counts.

    Args:
        predicted: (N, T, H, W) bool.
        true: (N, T, H, W) bool.
        annotated: (T,) bool, frames with true masks; None for all. The first and the last of them do not count.

    Returns:
        Columns object, frame, J, F in 0..1, and fate, one of `FATES`.

    Raises:
        ValueError: shapes differ, or there are fewer than three annotated frames.
    """
    if predicted.shape != true.shape or true.ndim != 4:
        raise ValueError(f"Masks must be (N, T, H, W), predicted as true ones; got {predicted.shape} and {true.shape}.")
    frames = np.arange(true.shape[1]) if annotated is None else np.flatnonzero(annotated)
    if len(frames) < 3:
        raise ValueError(f"J and F leave out the first and the last frame; {len(frames)} frames leave none to score.")
    fate = fates(true[:, frames])
    rows = [
        (n, t, region_j(predicted[n, t], true[n, t]), boundary_f(predicted[n, t], true[n, t]), fate[n, i])
        for n in range(len(true))
        for i, t in enumerate(frames[1:-1], start=1)
    ]
    return pd.DataFrame(rows, columns=["object", "frame", "J", "F", "fate"])


def fates(masks: np.ndarray) -> np.ndarray:
    """What happens to objects, (N, T) of `FATES`, told from their masks (N, T, H, W) bool.

    "gone" has no pixel, "back" is seen after it was gone, "partly hidden" shows less than half of its largest area.
    """
    areas = masks.sum((2, 3))
    gone = areas == 0
    was_gone = np.logical_or.accumulate(gone, axis=1)
    partly = areas < HALF * areas.max(1, keepdims=True)
    return np.select([gone, was_gone, partly], ["gone", "back", "partly hidden"], "seen")


def mean_jf(scores: pd.DataFrame) -> dict[str, float]:
    """J, F and J&F in percent: means over frames, then over objects.

    Args:
        scores: rows of `score_video`; where several videos are together, with a column `video`.
    """
    keys = [key for key in ("video", "object") if key in scores]
    objects = scores.groupby(keys)[["J", "F"]].mean()
    j, f = (100 * float(objects[name].mean()) for name in ("J", "F"))
    return {"J": j, "F": f, "J&F": (j + f) / 2}


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their neighbour below, to the right, or both; at the lower and right rim from one."""
    below, right, both = (np.zeros_like(mask) for _ in range(3))
    below[:-1], right[:, :-1], both[:-1, :-1] = mask[1:], mask[:, 1:], mask[1:, 1:]
    outline = (mask ^ below) | (mask ^ right) | (mask ^ both)
    outline[-1], outline[:, -1] = mask[-1] ^ right[-1], mask[:, -1] ^ below[:, -1]
    outline[-1, -1] = False
    return outline
