"""Figures as small files that carry their own captions.

A drawing has few colours: a palette keeps it exact to the eye at a third of the size, as PNG. A figure with photographs
or scenes in it becomes a JPEG, at fewer pixels an inch. Which of the two it is, what a palette would lose decides.
So a whole run of the study, pictures in files and in executed notebooks, stays small enough to be kept with it.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["encode", "labels"]

DRAWING_DPI, PHOTOGRAPH_DPI = 144, 108
SCREEN_DPI = 96
LOSS = (
    2.0  # levels of 255, root mean square, that a palette may lose; drawings lose up to 1.1, photographs 2.3 and more
)
QUALITY = 70


def encode(fig: Any, text: dict[str, str]) -> tuple[str, bytes, int]:
    """A matplotlib figure as a file.

    Args:
        fig: the figure; it stays open.
        text: what the file says of itself, read back by `labels`.

    Returns:
        The suffix, ".png" or ".jpg", the file's bytes, and how wide it is shown on a screen, in pixels.
    """
    drawn = _rendered(fig, DRAWING_DPI)
    palette = drawn.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    lost = np.asarray(palette.convert("RGB"), np.float32) - np.asarray(drawn, np.float32)
    buffer = io.BytesIO()
    if np.sqrt(np.square(lost).mean()) <= LOSS:
        info = PngInfo()
        for key, value in text.items():
            info.add_itxt(key, value)
        palette.save(buffer, "PNG", optimize=True, pnginfo=info)
        return ".png", buffer.getvalue(), drawn.width * SCREEN_DPI // DRAWING_DPI
    drawn = _rendered(fig, PHOTOGRAPH_DPI)
    comment = json.dumps(text).encode()
    drawn.save(buffer, "JPEG", quality=QUALITY, optimize=True, progressive=True, comment=comment)
    return ".jpg", buffer.getvalue(), drawn.width * SCREEN_DPI // PHOTOGRAPH_DPI


def labels(file: str | Path) -> dict[str, str]:
    """What `encode` wrote into a file; empty for a picture that says nothing of itself."""
    with Image.open(file) as picture:
        if "comment" not in picture.info:
            return dict(getattr(picture, "text", {}))
        try:
            found = json.loads(picture.info["comment"])
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}


def _rendered(fig: Any, dpi: int) -> Image.Image:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    return Image.open(buffer).convert("RGB")
