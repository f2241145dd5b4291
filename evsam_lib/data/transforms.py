"""Geometry between an image and a model: pixels in, prompts along, masks back (efficientvit/.../sam.py).

Two frames matter. The encoder's input has `image_size` pixels on its longest side (512 or 1024); prompts and masks
live in a frame of 1024 for every official model, also where the encoder sees 512. Notebook 03 draws both.

A model is given one of two ways between an image and its frame: `LongestSide` (SAM and all that follow it) or
`Stretch` (EfficientSAM). Each has `preprocess`, `to_frame` and `upscale`, and nothing else in the library asks which.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PIXEL_MEAN = (123.675, 116.28, 103.53)  # SAM's, on 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # EfficientSAM's, on 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LongestSide:
    """Keeps the aspect: the longest side becomes `image_size`, zeros fill the rest on the right and below.

    Attributes:
        image_size: S, side of the encoder's input in pixels.
        frame_size: side of the prompt frame in pixels.
        pixel_scale: pixels are divided by it before they are normalised: 255 in EfficientViT-SAM's code, 1 in SAM's.
            The result differs in the last digit, which a network can make visible (EdgeSAM with random weights: 2e-4).
    """

    image_size: int = 1024
    frame_size: int = 1024
    pixel_scale: float = 255.0

    def preprocess(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, S, S) float32: PIL's antialiased resize, SAM's normalisation, then the padding.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        check_image(image)
        image = resize_longest(image, self.image_size)
        return normalize_and_pad(image, self.image_size, pixel_scale=self.pixel_scale)

    def to_frame(self, coords: Tensor | np.ndarray, original_hw: tuple[int, int]) -> Tensor:
        """(..., 2) points or (..., 4) boxes in XY pixels of the original image -> the prompt frame, float32."""
        return to_frame(torch.as_tensor(coords), original_hw, self.frame_size)

    def upscale(self, low_res: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Low-res logits (N, K, h, w) -> (N, K, H, W) float32: up to the frame, crop the padding, down to the original.

        Both steps bilinear, as in SAM.
        """
        height, width = resized_hw(*original_hw, self.frame_size)
        size = (self.frame_size, self.frame_size)
        logits = F.interpolate(low_res.float(), size, mode="bilinear", align_corners=False)
        logits = logits[..., : max(height, 1), : max(width, 1)]
        return F.interpolate(logits, original_hw, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Stretch:
    """Fills the square: both sides become `image_size`, each by its own factor (EfficientSAM, efficient_sam.py).

    Attributes:
        image_size: S, side of the encoder's input and of the prompt frame in pixels.
    """

    image_size: int = 1024

    @property
    def frame_size(self) -> int:
        return self.image_size

    def preprocess(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, S, S) float32: to [0, 1], bilinear without antialias, ImageNet's normalisation.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        check_image(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)[None]
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (pixels - mean) / std

    def to_frame(self, coords: Tensor | np.ndarray, original_hw: tuple[int, int]) -> Tensor:
        """(..., 2) points or (..., 4) boxes in XY pixels of the original image -> the prompt frame, float32."""
        coords = torch.as_tensor(coords).float()
        sides = torch.tensor([original_hw[1], original_hw[0]], dtype=torch.float32, device=coords.device)
        return coords * self.image_size / sides.repeat(coords.shape[-1] // 2)

    def upscale(self, low_res: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Low-res logits (N, K, h, w) -> (N, K, H, W) float32, in one bicubic step."""
        return F.interpolate(low_res.float(), original_hw, mode="bicubic", align_corners=False)


Frame = LongestSide | Stretch


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
    image: np.ndarray,
    size: int,
    mean: tuple[float, ...] = PIXEL_MEAN,
    std: tuple[float, ...] = PIXEL_STD,
    *,
    pixel_scale: float = 255.0,
) -> Tensor:
    """(h, w, 3) uint8 -> (3, size, size) float32: scaled, normalised, then zeros added right and below.

    Args:
        image: as above, at its final size.
        size: side of the square.
        mean: per channel, on 0..255.
        std: per channel, on 0..255.
        pixel_scale: see `LongestSide`.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(pixel_scale)
    shift, scale = (torch.tensor([value / pixel_scale for value in values])[:, None, None] for values in (mean, std))
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
