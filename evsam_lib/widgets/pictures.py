"""Pictures for the widget: anything that is one becomes RGB bytes, samples to try, masks as small PNG files.

Used by `segmenter` and `prompt_widget`; shown in notebook 14.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

__all__ = ["SAMPLES", "jpeg", "mask_png", "sample", "to_rgb"]

# What a person sees -> skimage.data's name; they travel with scikit-image, no download. "" is a generated scene.
SAMPLES = {
    "Coins": "coins",
    "Coffee": "coffee",
    "Cat": "chelsea",
    "Cameraman": "camera",
    "Astronaut": "astronaut",
    "Rocket": "rocket",
    "Eye (large)": "retina",
    "Generated scene": "",
}


def sample(name: str) -> np.ndarray:
    """A sample of `SAMPLES`, (H, W, 3) uint8.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SAMPLES:
        raise ValueError(f"There is no sample {name!r}; there are {', '.join(SAMPLES)}.")
    if not SAMPLES[name]:
        from evsam_lib.data.generate import scene

        return scene(11, 7, size=(384, 512)).image
    from skimage import data

    return to_rgb(getattr(data, SAMPLES[name])())


def to_rgb(image: np.ndarray | Image.Image | str | Path | bytes) -> np.ndarray:
    """Any picture as (H, W, 3) uint8 RGB.

    Transparent pixels are laid on white. A photograph is turned as its EXIF entry says. Values other than uint8 and
    bool (16 bits, floats) are stretched, so that the darkest becomes 0 and the brightest 255.

    Args:
        image: array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of any number type; a PIL image; a path; a file's bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no picture, or an array of another shape or with values that are not finite.
    """
    if isinstance(image, str | Path | bytes | bytearray | memoryview):
        image = _opened(image)
    if isinstance(image, Image.Image):
        image = _pil_array(image)
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"A picture has shape (H, W), (H, W, 3) or (H, W, 4), got {image.shape}.")
    image = _to_bytes(image)
    if image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / 255
        image = (image[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _opened(source: str | Path | bytes) -> np.ndarray:
    name = f"The picture {source}" if isinstance(source, str | Path) else "The file"
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} does not exist.")
    try:
        with Image.open(source if isinstance(source, str | Path) else io.BytesIO(source)) as picture:
            return _pil_array(picture)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; make it smaller first.") from error
    except Exception as error:  # Pillow's many readers have as many ways to stumble
        raise ValueError(f"{name} cannot be read: it is no picture, damaged, or of a kind unknown here.") from error


def _pil_array(picture: Image.Image) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 and 32 bits: their range is kept
        return np.asarray(picture)
    see_through = "A" in picture.getbands() or "transparency" in picture.info
    return np.asarray(picture.convert("RGBA" if see_through else "RGB"))


def _to_bytes(image: np.ndarray) -> np.ndarray:
    """(H, W, C) of any number type -> uint8."""
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * 255
    if image.dtype.kind not in "uif":
        raise ValueError(f"A picture holds numbers, got {image.dtype}.")
    colour = image[..., :3].astype(np.float32)
    if not np.isfinite(colour).all():
        raise ValueError("A picture holds finite numbers, got NaN or infinity.")
    low, high = float(colour.min()), float(colour.max())
    colour = ((colour - low) * (255 / (high - low) if high > low else 0.0) + 0.5).astype(np.uint8)
    if image.shape[2] < 4:
        return colour
    full = np.iinfo(image.dtype).max if image.dtype.kind in "ui" else 1.0
    alpha = np.clip(image[..., 3:].astype(np.float32) * (255 / full), 0, 255).astype(np.uint8)
    return np.concatenate([colour, alpha], axis=2)


def jpeg(image: np.ndarray, hw: tuple[int, int]) -> bytes:
    """(H, W, 3) uint8 -> a file for the browser at the size `hw`: JPEG, or PNG for a picture so small that one sees
    its pixels.
    """
    picture = Image.fromarray(image)
    if image.shape[:2] != hw:
        picture = picture.resize(hw[::-1], Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if hw[0] * hw[1] < 2**14:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def mask_png(mask: np.ndarray, color: str = "#FFFFFF") -> bytes:
    """(H, W) bool -> PNG of one bit a pixel: the mask in `color` (#RRGGBB), all else transparent."""
    rows = np.ascontiguousarray(mask, dtype=np.uint8)
    picture = Image.frombytes("P", rows.shape[::-1], rows.tobytes())
    picture.putpalette([0, 0, 0, *bytes.fromhex(color[1:])])
    file = io.BytesIO()
    picture.save(file, "PNG", bits=1, transparency=0, compress_level=6)
    return file.getvalue()
