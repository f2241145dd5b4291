"""Reading pictures, JSON and masks from disk, with errors that name the file.

Shared by the loaders of this package; explained in notebook 03.
"""

import json
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

__all__ = [
    "check_segmentation",
    "decode_rgb",
    "decode_segmentation",
    "excerpt",
    "has_no_mask",
    "image_hw",
    "is_finite",
    "parse_json",
    "picture_oddities",
    "read_json",
    "read_rgb",
    "rle_text",
    "why_absent",
]

_EXIF_ORIENTATION = 0x0112
_MOST_PIXELS = 178_956_970  # where Pillow refuses a picture too
_FARTHEST = 1e6  # pixels; a polygon's coordinates beyond it, or an outline of more, would take gigabytes to draw
LONGEST_NUMBER = 7  # characters of compressed counts: 35 bits, more than any image has pixels


def read_rgb(path: Path) -> np.ndarray:
    """Reads a picture as (H, W, 3) uint8 RGB, in the order its pixels are stored.

    As the official evaluation does, with Pillow: grey, palette and CMYK pictures are converted, an alpha channel is
    dropped, and an EXIF rotation is not applied, since COCO's annotations are made for the pixels as they are stored.
    Other than there, the high byte of 16-bit grey is kept: Pillow's own conversion turns all above 255 into white.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no readable picture, is cut short, or has more than 16 bits a channel.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Image {path} {why_absent(path)}.")
    return decode_rgb(path, name=path)


def decode_rgb(source: Path | BinaryIO, *, name: str | Path) -> np.ndarray:
    """A picture, in a file or in memory, as (H, W, 3) uint8 RGB.

    Raises:
        ValueError: if it is no readable picture; `name` says which.
    """
    try:
        with Image.open(source) as picture:
            if picture.mode[0] in "IF":  # I;16, I;16B, or 32 bits
                return _eight_bits(np.asarray(picture), picture.mode)
            return np.array(picture.convert("RGB"))
    except Exception as error:  # Pillow's many readers have as many ways to stumble
        raise ValueError(f"Image {name} cannot be read, it is corrupt or no picture: {excerpt(error)}.") from error


def picture_oddities(path: Path) -> list[str]:
    """What `read_rgb` has to convert in a picture, or leaves as it is though one may expect otherwise."""
    with Image.open(path) as picture:  # reads the head of the file only
        found = [] if picture.mode == "RGB" else [f"picture of mode {picture.mode}, converted to RGB"]
        if picture.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            found.append("picture with an EXIF rotation, which is not applied")
    return found


def _eight_bits(levels: np.ndarray, mode: str) -> np.ndarray:
    """(H, W) of 16 bits, possibly kept in 32 -> (H, W, 3) uint8."""
    if mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its pixels are of mode {mode}, expected 8 or 16 bits a channel")
    return np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2)


def read_json(path: Path, *keys: str) -> dict:
    """Reads a JSON object that must hold `keys`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, not an object, or lacks a key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Annotation file {path} {why_absent(path)}.")
    return parse_json(path.read_bytes(), *keys, name=path)


def why_absent(path: Path) -> str:
    """Why there is no such file, or no such folder: something else may have its name."""
    if path.is_dir():
        return "is a folder, expected a file"
    return "is a file, expected a folder" if path.is_file() else "does not exist"


def parse_json(content: bytes, *keys: str, name: str | Path) -> dict:
    """A JSON object that must hold `keys`.

    Raises:
        ValueError: if it is not JSON, not an object, or lacks a key; `name` says which file.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are no text
        raise ValueError(f"Annotation file {name} is not valid JSON: {excerpt(error)}.") from error
    for key in keys:
        if not isinstance(parsed, dict) or key not in parsed:
            raise ValueError(f"Annotation file {name} must be a JSON object with {key!r}, which is missing.")
    return parsed


def is_finite(value: object) -> bool:
    """Whether a value read from JSON is a number, and neither infinite nor NaN, which Python's reader lets pass."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def image_hw(height: object, width: object) -> tuple[int, int]:
    """The size of an image as an annotation file states it.

    Raises:
        ValueError, TypeError, OverflowError: if these are no numbers, or no picture has that size.
    """
    size = int(height), int(width)
    if min(size) < 1 or size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"no picture has {size[0]} x {size[1]} pixels (H x W)")
    return size


def excerpt(value: object, limit: int = 200) -> str:
    """What a file holds, or the error of another library says, in one line that fits into a sentence."""
    try:
        text = " ".join(str(value).split())
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        text = ""
    return (text or type(value).__name__)[:limit].rstrip(".")


def has_no_mask(segmentation: object) -> bool:
    """No polygon at all, as tools write that know boxes only; anything else malformed is an error when decoded."""
    return segmentation is None or (isinstance(segmentation, list) and not any(segmentation))


def decode_segmentation(segmentation: list | dict, height: int, width: int, *, where: str) -> np.ndarray:
    """Decodes a COCO segmentation.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], or {"size": [H, W], "counts": str or list of int}.
        height: of the image.
        width: of the image.
        where: what the segmentation belongs to, for error messages.

    Returns:
        (H, W) uint8, 0 or 1.

    Raises:
        ValueError: if it is malformed or made for another image size.
    """
    try:
        text = rle_text(segmentation, height, width)
        if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
            _check(text, height * width)
        return coco_mask.decode({"size": [height, width], "counts": text})
    except ValueError as error:
        raise ValueError(f"Segmentation of {where} cannot be decoded: {excerpt(error)}.") from error


def check_segmentation(segmentation: list | dict, height: int, width: int, *, where: str) -> None:
    """Raises the ValueError of `decode_segmentation`, arguments alike, without decoding."""
    try:
        if isinstance(segmentation, list):
            _check_polygons(segmentation)
            return
        text = rle_text(segmentation, height, width)
        if not isinstance(segmentation["counts"], list):
            _check(text, height * width)
    except ValueError as error:
        raise ValueError(f"Segmentation of {where} cannot be decoded: {excerpt(error)}.") from error


def rle_text(segmentation: list | dict, height: int, width: int) -> bytes:
    """The compressed counts of a COCO segmentation; those that come as text are passed on unchecked.

    Args:
        segmentation: as for `decode_segmentation`.
        height: of the image.
        width: of the image.

    Raises:
        ValueError: if it is no segmentation, is made for another size, a polygon is none, or listed counts do not fill
            the image.
    """
    if isinstance(segmentation, list):
        _check_polygons(segmentation)
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))["counts"]
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("it must be a list of polygons, or an object with size and counts")
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        made = " x ".join(excerpt(side, 20) for side in size) if isinstance(size, list | tuple) else size
        raise ValueError(f"it is made for {excerpt(made, 60)} pixels (H x W), the image has {height} x {width}")
    if isinstance(counts, list):
        if not all(isinstance(count, int | np.integer) for count in counts):
            raise ValueError("its counts must be text or a list of whole numbers")
        if sum(counts) != height * width or min(counts) < 0:
            raise ValueError(f"its counts sum to {sum(counts)}, not to {height} x {width} pixels")
        whole = {"size": [height, width], "counts": counts}
        return coco_mask.frPyObjects(whole, height, width)["counts"]
    if not isinstance(counts, str | bytes):
        raise ValueError(f"its counts must be text or a list of whole numbers, they are {type(counts).__name__}")
    return counts.encode("ascii") if isinstance(counts, str) else counts


def _check_polygons(polygons: list) -> None:
    for polygon in polygons or [None]:
        if not isinstance(polygon, list | tuple) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon needs at least three x, y pairs")
        if not all(map(is_finite, polygon)):
            raise ValueError("a polygon holds something else than finite numbers")
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        outline = abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
        if max(outline, abs(corners).max()) > _FARTHEST:
            raise ValueError(f"a polygon is {outline:.3g} pixels around, beyond any image")


def _check(counts: bytes, pixels: int) -> None:
    """Refuses compressed counts that do not fill the image exactly: pycocotools would read past their end."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        part = byte - 48  # COCO's text form: six bits a character, the lowest five are data, the sixth says "more"
        if not 0 <= part < 64:
            raise ValueError(f"character {chr(byte)!r} does not occur in compressed counts")
        value |= (part & 31) << shift
        shift += 5
        if shift > 5 * LONGEST_NUMBER:
            raise ValueError("a number in its counts does not end")
        if not part & 32:
            if part & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))  # from the fourth on: difference to two before
            value = shift = 0
    if shift or sum(runs) != pixels or min(runs) < 0:
        raise ValueError(f"its counts sum to {sum(runs)}, the image has {pixels} pixels")
