"""Geometry between an image and a model's input: resize, pad, the official rounding (efficientvit/.../sam.py).

Two frames matter. The encoder's input has `image_size` pixels on its longest side (512 or 1024); prompts and masks
live in a frame of 1024 for every official model, also where the encoder sees 512. Notebook 03 draws both.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PIXEL_MEAN = (123.675, 116.28, 103.53)  # SAM's, on 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


def check_image(image: np.ndarray) -> None:
    """Raises ValueError unless `image` is (H, W, 3) uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"An image must be a numpy array (H, W, 3) of uint8 RGB, got {given}.")
    if 0 in image.shape:
        raise ValueError(f"An image must have pixels, got shape {image.shape}.")


def resized_hw(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Size with `long_side` pixels on the longest side, rounded the official way: int(x * scale + 0.5)."""
    scale = long_side / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_longest(image: np.ndarray, long_side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 by PIL's antialiased bilinear filter; untouched if it fits already."""
    height, width = image.shape[:2]
    if max(height, width) == long_side:
        return image
    new_height, new_width = resized_hw(height, width, long_side)
    size = (max(new_width, 1), max(new_height, 1))  # a sliver must keep one pixel
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def normalize_and_pad(
    image: np.ndarray, size: int, mean: tuple[float, ...] = PIXEL_MEAN, std: tuple[float, ...] = PIXEL_STD
) -> Tensor:
    """(h, w, 3) uint8 -> (3, size, size) float32: to [0, 1], normalised, then zeros added right and below.

    Args:
        image: as above, at its final size.
        size: side of the square.
        mean: per channel, on 0..255.
        std: per channel, on 0..255.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    shift, scale = (torch.tensor([value / 255 for value in values])[:, None, None] for values in (mean, std))
    padded = torch.zeros(3, size, size)
    padded[:, : image.shape[0], : image.shape[1]] = (pixels - shift) / scale
    return padded


def to_frame(coords: Tensor, original_hw: tuple[int, int], long_side: int) -> Tensor:
    """Original pixels -> prompt frame; x and y have their own factor, since sizes are rounded.

    Args:
        coords: (..., 2) points or (..., 4) boxes, float, XY pixels of the original image.
        original_hw: (H, W) of the original image.
        long_side: side of the prompt frame.
    """
    height, width = resized_hw(*original_hw, long_side)
    scale = torch.tensor([width / original_hw[1], height / original_hw[0]], dtype=torch.float32, device=coords.device)
    return coords.float() * scale.repeat(coords.shape[-1] // 2)
