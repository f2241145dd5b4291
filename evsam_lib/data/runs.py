"""Masks as run lengths: from COCO's text to soft training targets, without ever making the full-size mask.

Paper: Sec. 3.2 trains on up to 64 masks an image; decoding them at full size is most of the official loader's time.
Explained in notebook 03.

The official loader resizes full-size masks with torch's antialiased bilinear filter. That filter is linear and
separable, so its result is a sum over the runs' ends: with C[i, r] the filter's weight for target row i at or below
source row r, a run from row a to row b of column x adds (C[i, a] - C[i, b]) * w[j, x] to target (i, j). C is 0 or 1
but for a few rows around r; so each end of a run touches some ten numbers, and a running sum down the columns gives the
official values to rounding (float64 here, float32 there).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from .files import LONGEST_NUMBER, decode_segmentation, excerpt, rle_text
from .rle import encode_masks
from .transforms import resized_hw

__all__ = ["Runs", "read_runs"]

_ZERO = 1e-9  # rounding of the running sum stays below, true values above all but never


@dataclass(frozen=True)
class Runs:
    """M masks of one image as runs of ones, column by column.

    Attributes:
        height: H of the masks.
        width: W of the masks.
        count: M.
        starts: (R,) int64, first pixel of each run: mask * H * W + x * H + y, increasing.
        ends: (R,) int64, one past its last pixel; a run stays in its mask but may go on over columns.
    """

    height: int
    width: int
    count: int
    starts: np.ndarray
    ends: np.ndarray

    def soft(self, size: int, *, flip: bool = False) -> np.ndarray:
        """Training targets: long side resized to `size` (antialiased bilinear, as officially), zeros right and below.

        Args:
            size: T, side of the targets in pixels.
            flip: mirror left to right before padding.

        Returns:
            (M, T, T) float32 in [0, 1]; exactly 0 wherever no pixel of the mask has any weight.
        """
        height, width = _small_hw(self, size)
        rows, columns = _axis(self.height, height), _axis(self.width, width)
        column, edge, sign = _edges(self)
        mask, x = np.divmod(column, self.width)
        top, left = rows.first_below[edge], columns.first[x]
        values = (sign[:, None] * rows.below[edge])[:, :, None] * columns.weight[x][:, None]  # (edges, rows, columns)
        out = np.zeros((self.count, size, size), np.float32)
        inside = out[:, :height, :width][:, :, :: -1 if flip else 1]
        limits = np.searchsorted(mask, np.arange(self.count + 1))
        for target, (low, high) in zip(inside, pairwise(limits), strict=True):
            if high > low:
                _add_up(target, top[low:high], left[low:high], values[low:high])
        return out

    def shrink(self, size: int) -> list[dict]:
        """Re-encodes masks at training size: pixels whose soft target is at least half the mask's largest.

        That is 0.5 wherever a mask covers a pixel; a line thinner than a new pixel stays a line and does not vanish.

        Args:
            size: long side of the new masks in pixels.

        Returns:
            M segmentations {"size": [h, w], "counts": str} with max(h, w) = size.
        """
        height, width = _small_hw(self, size)
        soft = self.soft(size)[:, :height, :width]
        level = soft.max(axis=(1, 2), initial=0.0, keepdims=True) / 2
        hard = (soft >= level) & (level > 0)
        return encode_masks(hard)


def read_runs(segmentations: Sequence[list | dict], height: int, width: int, *, where: str) -> Runs:
    """Reads all segmentations of an image at once, compressed run lengths without decoding them.

    Args:
        segmentations: M times {"size": [H, W], "counts": str, bytes or list of int}, or polygons.
        height: H that they must have.
        width: W that they must have.
        where: the image they belong to, for error messages.

    Raises:
        ValueError: if one is malformed or of another size; says which and why.
    """
    try:
        texts = [rle_text(segmentation, height, width) for segmentation in segmentations]
        numbers, first = _numbers(texts)
        bounds = _bounds(numbers, first, height * width)
    except ValueError as error:
        for index, segmentation in enumerate(segmentations):  # the slow way knows which one it is
            decode_segmentation(segmentation, height, width, where=f"annotation {index} of {where}")
        raise ValueError(f"A segmentation of {where} cannot be read: {excerpt(error)}.") from error
    place = np.arange(len(bounds)) - np.repeat(first[:-1], np.diff(first))  # of each number in its mask
    ones = np.flatnonzero(place & 1)  # zeros come first, then ones and zeros in turn
    starts, ends = bounds[ones - 1], bounds[ones]
    real = ends > starts
    return Runs(height, width, len(texts), starts[real], ends[real])


def _small_hw(runs: Runs, size: int) -> tuple[int, int]:
    height, width = resized_hw(runs.height, runs.width, size)
    return max(height, 1), max(width, 1)  # a sliver keeps one pixel


def _numbers(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of all texts as they are written, and where each text's begin (one more: the end)."""
    part = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48  # six bits a character, see files.py
    ends = np.flatnonzero(part & 32 == 0) + 1  # the sixth bit says that the number goes on
    starts = np.concatenate([[0], ends])
    lengths = np.diff(starts)
    text_ends = np.cumsum([0, *map(len, texts)])
    first = np.searchsorted(starts, text_ends)
    strange = (part < 0).any() or (part > 63).any()
    if strange or (lengths > LONGEST_NUMBER).any() or not np.isin(text_ends, starts).all():
        raise ValueError("malformed counts")
    starts = starts[:-1]
    if not len(starts):
        return np.zeros(0, np.int64), first
    shift = 5 * (np.arange(len(part)) - np.repeat(starts, lengths))
    values = np.add.reduceat((part & 31) << shift, starts)
    return values - np.where(part[ends - 1] & 16, 1 << (5 * lengths), 0), first


def _bounds(numbers: np.ndarray, first: np.ndarray, pixels: int) -> np.ndarray:
    """Where each run ends, counted on over the masks; from the fourth number on they are differences to two before."""
    for low, high in pairwise(first):
        one = numbers[low:high]
        one[1::2] = one[1::2].cumsum()
        one[2::2] = one[2::2].cumsum()
    if (abs(numbers) > pixels).any():
        raise ValueError("a count beyond the image")  # and no sum of the others overflows
    bounds = numbers.cumsum()
    whole = pixels * np.arange(1, len(first))
    if (np.diff(first) < 1).any() or (numbers < 0).any() or (bounds[first[1:] - 1] != whole).any():
        raise ValueError("counts that do not fill the image")
    return bounds


def _edges(runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column (counted on over the masks, increasing), row and sign of every step from 0 to 1 (+) or 1 to 0 (-)."""
    first, last = runs.starts // runs.height, (runs.ends - 1) // runs.height
    more = last - first  # further columns that a run goes on to; in each it starts at row 0
    further = np.repeat(first + 1, more) + np.arange(more.sum()) - np.repeat(more.cumsum() - more, more)
    column = np.concatenate([first, further, last])
    row = np.concatenate([runs.starts - first * runs.height, np.zeros_like(further), runs.ends - last * runs.height])
    sign = np.ones(len(column))
    sign[len(first) + len(further) :] = -1  # where a run leaves a column at its foot there is no step to count
    order = np.argsort(column, kind="stable")
    return column[order], row[order], sign[order]


@dataclass(frozen=True)
class _Axis:
    """The filter along one side of n source and m target pixels.

    Attributes:
        first: (n,) first target pixel that a source pixel touches.
        weight: (n, K) its weight there and in the next ones; 0 past the end.
        first_below: (n + 1,) first target pixel with weight at or after a source row.
        below: (n + 1, L) how much more weight at or after that row it and each next one has than its predecessor.
    """

    first: np.ndarray
    weight: np.ndarray
    first_below: np.ndarray
    below: np.ndarray


@lru_cache(maxsize=256)
def _axis(n: int, m: int) -> _Axis:
    """Triangle filter of torch's antialiased bilinear resize: as wide as the step where it shrinks."""
    scale = n / m
    support = max(scale, 1.0)
    centres = (np.arange(m) + 0.5) * scale
    start = np.floor(centres - support).astype(np.int64)
    taps = start[:, None] + np.arange(int(np.ceil(2 * support)) + 2)  # (m, taps) source pixels
    weight = np.maximum(1 - abs(taps + 0.5 - centres[:, None]) / support, 0)
    weight[(taps < 0) | (taps >= n)] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    before = np.pad(weight.cumsum(axis=1), ((0, 0), (1, 0)))  # (m, taps + 1) weight before each tap
    before /= before[:, -1:]

    def of(table: np.ndarray, target: np.ndarray, source: np.ndarray) -> np.ndarray:
        """`table` of target pixels at source pixels, broadcast; beyond its ends the nearest entry."""
        target = target.clip(0, m - 1)
        return table[target, (source - start[target]).clip(0, table.shape[1] - 1)]

    source = np.arange(n)[:, None]
    touched = _first(source + 0.5, support, scale) + np.arange(int(np.ceil(2 * support / scale)))
    weights = np.where(touched < m, of(np.pad(weight, ((0, 0), (1, 1))), touched, source + 1), 0)
    source = np.arange(n + 1)[:, None]
    steps = _first(source + 0.5, support, scale) + np.arange(int(np.ceil((2 * support - 1) / scale)) + 2)
    after = 1 - of(before, steps, source)
    below = np.where(steps < m, np.diff(after, axis=1, prepend=0), 0)
    return _Axis(touched[:, 0], weights, steps[:, 0], below)


def _first(position: np.ndarray, support: float, scale: float) -> np.ndarray:
    """First target pixel whose filter reaches beyond a source position from above."""
    return np.maximum(np.floor((position - support) / scale - 0.5).astype(np.int64) + 1, 0)


def _add_up(target: np.ndarray, top: np.ndarray, left: np.ndarray, values: np.ndarray) -> None:
    """Writes one mask into target (h, w): steps (edges, rows, columns) at their places, summed down the columns."""
    row, column = top.min(), left.min()
    height, width = top.max() - row + values.shape[1], left.max() - column + values.shape[2]
    place = (top - row) * width + left - column
    place = place[:, None, None] + (np.arange(values.shape[1]) * width)[:, None] + np.arange(values.shape[2])
    steps = np.bincount(place.reshape(-1), values.reshape(-1), minlength=height * width)
    soft = steps.reshape(height, width)[: target.shape[0] - row, : target.shape[1] - column].cumsum(axis=0)
    soft[soft < _ZERO] = 0
    target[row : row + len(soft), column : column + soft.shape[1]] = soft
