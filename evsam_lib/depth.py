"""Where a region is deepest: which of its pixels lies farthest from its outside, without measuring all of them.

The click rule of Table 2 (`prompts.next_clicks`, notebook 08) asks for one pixel of every error region; a distance
transform measures all. Here bounds rule out nearly all pixels first. Distances are squared whole numbers throughout,
so the answer is the transform's own, ties included.

Blocks of 8 x 8 pixels bound the distances: one that is not full holds a pixel outside. A *thin* region, where such a
block is always near, becomes one long integer, a bit a pixel, and is eroded by discs, thousands of pixels at a time. In
a *thick* one blocks are halved as long as they may still hold the answer: from one pixel to another at distance r the
depth changes by at most r.
"""

from math import ceil, isqrt, sqrt

import numpy as np
from scipy.ndimage import distance_transform_edt

__all__ = ["deepest"]

_BLOCK = 8  # pixels; a row of a block is then one 64-bit word of eight bools
_FULL = np.uint64(0x0101010101010101)
_ACROSS = sqrt(2) * (_BLOCK - 1)  # from corner to corner of a block, between centres of pixels
_NOTHING = 0, (0, 0)


def deepest(region: np.ndarray, clicked: np.ndarray, *, at_least: int = 1) -> tuple[int, tuple[int, int]]:
    """The pixel of a region that is farthest from its outside; beyond the image is outside, too.

    Args:
        region: (H, W) bool.
        clicked: (P, 2) int, XY of pixels that cannot be chosen; they are inside all the same.
        at_least: look no further where no pixel can have this squared distance, 1 or more.

    Returns:
        The largest squared distance and the first pixel (x, y), in raster order, that has it; 0 and (0, 0) if no pixel
        that may be chosen has `at_least`.
    """
    if np.count_nonzero(region) < at_least:  # a disc holds more pixels than its squared radius says
        return _NOTHING
    rows = np.flatnonzero(region.any(axis=1))
    columns = np.flatnonzero(region[rows[0] : rows[-1] + 1].any(axis=0))
    corner = np.array((columns[0], rows[0]))
    crop = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # what it leaves out is outside
    if ((min(crop.shape) + 1) // 2) ** 2 < at_least:
        return _NOTHING
    near = _blocks_to_outside(crop)
    reach = _BLOCK * near.max() + _ACROSS  # no distance is larger
    if reach**2 < at_least:
        return _NOTHING
    clicked = clicked - corner
    clicked = clicked[((clicked >= 0) & (clicked < crop.shape[::-1])).all(axis=1)]
    # Every pixel of the innermost block has this distance or more, and with so few clicks one of them is not clicked.
    floor = max(_BLOCK * near.max() - _ACROSS, 0) if len(clicked) < _BLOCK**2 else 0
    blocks = np.argwhere(_BLOCK * near + _ACROSS >= floor)
    at_least = max(at_least, int(floor**2))
    if near.max() <= 2 and (len(blocks) > 200 or crop.size < 10_000):
        squared, y, x = _by_bits(crop, clicked, at_least)
    else:
        squared, y, x = _by_halves(crop, clicked, at_least, _BLOCK * blocks, int(reach))
    return (squared, (int(x + corner[0]), int(y + corner[1]))) if squared else _NOTHING


def _blocks_to_outside(crop: np.ndarray) -> np.ndarray:
    """Distance of every block to the nearest one that is not full, in blocks; those have 0 themselves."""
    height, width = (ceil(side / _BLOCK) for side in crop.shape)
    padded = np.zeros((height * _BLOCK, width * _BLOCK), dtype=bool)
    padded[: crop.shape[0], : crop.shape[1]] = crop
    full = (padded.view(np.uint64) == _FULL).reshape(height, _BLOCK, width).all(axis=1)
    if not full.any():
        return np.zeros(full.shape)
    # pyrefly: ignore[bad-assignment]: the stub does not say what the flags make of the return
    distance: np.ndarray = distance_transform_edt(np.pad(full, 1))
    return distance[1:-1, 1:-1]


def _by_bits(crop: np.ndarray, clicked: np.ndarray, at_least: int) -> tuple[int, int, int]:
    """Squared distance, y, x of the deepest pixel. The region is eroded by discs until nothing is left of it.

    Args:
        crop: (h, w) bool, the region.
        clicked: (P, 2) XY inside the crop.
        at_least: squared distance below which nothing is looked for.
    """
    stride = _BLOCK * ceil(crop.shape[1] / _BLOCK) + 4 * _BLOCK  # more than any pixel's way out: no run meets the next
    padded = np.zeros((crop.shape[0], stride), dtype=bool)
    padded[:, : crop.shape[1]] = crop
    inside = int.from_bytes(np.packbits(padded).tobytes())  # the first pixel is the highest bit
    chosen = inside
    for x, y in clicked.tolist():
        chosen &= ~(1 << padded.size - 1 - y * stride - x)
    runs = [inside]  # runs[k]: k pixels on the left and k on the right are inside, too

    def deeper(squared: int) -> int:
        """Pixels farther than this from the outside: a disc around them fits, its rows being runs."""
        radius = isqrt(squared)
        for k in range(len(runs), radius + 1):
            runs.append(runs[-1] & (inside << k) & (inside >> k))
        left = chosen & runs[radius]
        for dy in range(1, radius + 1):
            if not left:
                break
            run = runs[isqrt(squared - dy * dy)]
            left &= (run << dy * stride) & (run >> dy * stride)
        return left

    below = at_least - 1
    left = deeper(below)
    if not left:
        return 0, 0, 0
    above = (isqrt(below) + 1) ** 2
    while further := deeper(above):
        left, below, above = further, above, (isqrt(above) + 1) ** 2
    while above - below > 1:
        middle = (below + above) // 2
        if further := deeper(middle):
            left, below = further, middle
        else:
            above = middle
    return above, *divmod(padded.size - left.bit_length(), stride)


def _by_halves(
    crop: np.ndarray, clicked: np.ndarray, at_least: int, corners: np.ndarray, reach: int
) -> tuple[int, int, int]:
    """Squared distance, y, x of the deepest pixel. Cells, blocks at first, are measured at one pixel, and halved.

    Args:
        crop: (h, w) bool, the region.
        clicked: (P, 2) XY inside the crop.
        at_least: squared distance below which nothing is looked for.
        corners: (N, 2) YX of the first pixels of the blocks that may hold the deepest.
        reach: no distance in the region is larger.
    """
    top, bottom = corners[:, 0].min(), min(corners[:, 0].max() + _BLOCK, crop.shape[0])
    ways = np.zeros((bottom - top, crop.shape[1] + 2 * reach), dtype=np.int32)
    ways[:, reach:-reach] = _up_or_down(crop, top, bottom) ** 2
    ways = np.lib.stride_tricks.sliding_window_view(ways, 2 * reach + 1, axis=1)  # around every pixel
    aside = np.arange(-reach, reach + 1, dtype=np.int32) ** 2
    open_ = np.ones(crop.shape, dtype=bool)
    open_[clicked[:, 1], clicked[:, 0]] = False
    best, side = at_least, _BLOCK
    while True:
        y, x = np.minimum(corners + side // 2, np.array(crop.shape) - 1).T
        squared = (ways[y - top, x] + aside).min(axis=1)  # by way of some pixel of the same row, then up or down
        choosable = np.where(open_[y, x], squared, 0)
        best = max(best, int(choosable.max(initial=0)))
        if side == 1:
            break
        # No pixel of a cell is farther than this from the one measured; the last term outweighs rounding.
        corners = corners[np.sqrt(squared) + sqrt(2) * (side // 2) + 1e-6 >= sqrt(best)]
        side //= 2
        corners = (corners[:, None] + side * np.array([(0, 0), (0, 1), (1, 0), (1, 1)])).reshape(-1, 2)
        corners = corners[(corners < crop.shape).all(axis=1)]
    found = np.flatnonzero(choosable == best)
    if len(found) == 0:
        return 0, 0, 0
    first = found[np.lexsort((x[found], y[found]))[0]]
    return best, int(y[first]), int(x[first])


def _up_or_down(crop: np.ndarray, top: int, bottom: int) -> np.ndarray:
    """(bottom - top, w) int32: how far it is from each pixel of these rows to the outside, straight up or down."""
    rows = np.arange(1, len(crop) + 1, dtype=np.int32)[:, None]  # row 0 is outside
    middle = slice(top, bottom)
    last = np.where(crop[middle], 0, rows[middle])  # last row outside, from above
    if top:
        np.maximum(last[0], np.where(crop[:top], 0, rows[:top]).max(axis=0), out=last[0])
    following = np.where(crop[middle], len(crop) + 1, rows[middle])
    if bottom < len(crop):
        beyond = np.where(crop[bottom:], len(crop) + 1, rows[bottom:]).min(axis=0)
        np.minimum(following[-1], beyond, out=following[-1])
    last = np.maximum.accumulate(last, axis=0)
    following = np.minimum.accumulate(following[::-1], axis=0)[::-1]
    return np.minimum(rows[middle] - last, following - rows[middle])
