"""Generated pictures like a microscope's: pale cells that hardly differ from what lies around them.

A second kind of generated data, unlike the scenes of `generate`, on which the mini weights were trained: notebook 05
fine-tunes on it as on somebody's own data (not part of the paper). What is annotated is the whole cell; what catches
the eye is its nucleus. `cells(seed, index, size=...)` is a pure function, as `generate.scene` is, and exact likewise.
"""

import numpy as np

from .generate import MIN_PIXELS, MIN_VISIBLE, Scene
from .shapes import Draw, blob, fill, place
from .textures import F, Noise, blur

__all__ = ["cells"]

CATEGORIES = [{"id": 1, "name": "cell", "supercategory": "cell"}]


def cells(seed: int, index: int, *, size: tuple[int, int]) -> Scene:
    """Generates one picture.

    Args:
        seed: of the whole data set, 0 or more.
        index: of the image, 0 or more.
        size: (height, width) in pixels, each at least 32.

    Returns:
        The picture; every mask is a whole cell, of one category, in part hidden by cells above it.

    Raises:
        ValueError: if seed or index is negative or a side is under 32.
    """
    height, width = (int(side) for side in size)
    if min(seed, index) < 0 or min(height, width) < 32:
        raise ValueError(f"expected seed and index from 0 and sides from 32, got {seed}, {index}, {height} x {width}")
    draw = Draw(seed, index)
    noise = Noise(draw, height, width)
    grey = F(draw(120.0, 165.0)) + (noise.pink - F(0.5)) * F(draw(10.0, 30.0))
    labels, painted = np.zeros((height, width), np.uint8), []
    scale = float(np.sqrt(height * width))
    while len(painted) < 10 + draw.integer(0, 14) or not painted:
        pixels = _paint(draw, noise, grey, labels, len(painted) + 1, scale)
        painted.append(pixels)
    masks = []
    for label, pixels in enumerate(painted, start=1):
        mask = labels == label
        if mask.sum() >= max(MIN_PIXELS, MIN_VISIBLE * pixels):
            masks.append(mask)
    return Scene(
        image=_develop(draw, grey),
        masks=np.stack(masks),
        category_ids=np.full(len(masks), CATEGORIES[0]["id"], dtype=np.int64),
        parents=np.full(len(masks), -1, dtype=np.int64),
        crowd=None,
        crowd_category_id=0,
    )


def _paint(draw: Draw, noise: Noise, grey: np.ndarray, labels: np.ndarray, label: int, scale: float) -> int:
    """One cell: a bright halo, a pale grained body with a thin dark rim, a dark nucleus; returns its pixels."""
    height, width = grey.shape
    x, y, radius = draw(0.05, 0.95) * width, draw(0.05, 0.95) * height, draw(0.05, 0.13) * scale
    outline, turn = blob(draw, 0.5), draw.direction()
    outline[:, 1] *= draw(0.5, 1.0)

    def inside(share: float, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
        return fill([place(outline, x + dx, y + dy, radius * share, turn)], height, width)

    body, rim = inside(1.0), F(draw(8.0, 22.0))
    grain = (noise.white - F(0.5)) * F(draw(14.0, 30.0)) + (noise.pink - F(0.5)) * F(30.0)
    grey[inside(1.06) & ~body] += F(draw(6.0, 18.0))
    grey[body] = F(0.55) * grey[body] + F(0.45) * grey.mean() + grain[body]
    grey[body & ~inside(0.96)] -= rim
    nucleus = inside(draw(0.25, 0.4), draw(-0.2, 0.2) * radius, draw(-0.2, 0.2) * radius)
    grey[nucleus & body] -= F(draw(35.0, 75.0))
    labels[body] = label
    return int(body.sum())


def _develop(draw: Draw, grey: np.ndarray) -> np.ndarray:
    """Lens blur and sensor noise; nearly grey, tinted a little; (H, W, 3) uint8."""
    grey = blur(grey)
    noise = draw.bytes(grey.size).reshape(grey.shape).astype(F) - F(127.5)
    grey = grey + noise * F(draw(0.02, 0.06))
    tint = np.array([draw(0.92, 1.05) for _ in range(3)], dtype=F)
    return np.clip(grey[:, :, None] * tint, 0, 255).astype(np.uint8)
