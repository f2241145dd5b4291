"""Surfaces of generated objects: value fields in [0, 1] that mix two colours, and shading.

Own design, explained in notebook 03. Only IEEE-exact operations (+ - * / sqrt, floor, comparisons) and raw bytes of the
bit generator, so that the same bytes come out on every machine.
"""

import numpy as np

from .shapes import Draw

__all__ = ["Noise", "blur", "colour", "hard", "pattern", "ramp", "saw", "shade"]

F = np.float32


class Noise:
    """Full-size random fields of one scene, cut into windows by the textures."""

    def __init__(self, draw: Draw, height: int, width: int) -> None:
        self.pink = _pink(draw, height, width)
        white = draw.bytes(height * width).reshape(height, width)
        self.white = white.astype(F) * F(1 / 255)
        self.hair = _box_rows(white, 9)
        self.fibre = _box_rows(white.reshape(width, height), 9).T

    def window(self, field: np.ndarray, draw: Draw, h: int, w: int) -> np.ndarray:
        y = draw.integer(0, field.shape[0] - h)
        x = draw.integer(0, field.shape[1] - w)
        return field[y : y + h, x : x + w]


def _pink(draw: Draw, height: int, width: int) -> np.ndarray:
    """(height, width) float32 in [0, 1]: octaves of noise, each half as strong as the one before (about 1/f)."""
    levels = 1
    while (3 << levels) < max(height, width):
        levels += 1
    shape = [((side - 1) >> levels) + 2 for side in (height, width)]
    field = draw.bytes(shape[0] * shape[1]).reshape(shape).astype(F)
    gain = F(0.62)
    amplitude = F(1.0)
    for level in range(levels - 1, -1, -1):
        rows = np.empty((2 * field.shape[0] - 1, field.shape[1]), F)
        rows[0::2] = field
        rows[1::2] = (field[1:] + field[:-1]) * F(0.5)
        field = np.empty((rows.shape[0], 2 * rows.shape[1] - 1), F)
        field[:, 0::2] = rows
        field[:, 1::2] = (rows[:, 1:] + rows[:, :-1]) * F(0.5)
        field = field[: ((height - 1) >> level) + 2, : ((width - 1) >> level) + 2]
        amplitude = amplitude * gain
        if level > 0:  # the finest octave is left smooth: sensor noise comes later
            field = field + draw.bytes(field.size).reshape(field.shape).astype(F) * amplitude
    field = field[:height, :width]
    low, high = field.min(), field.max()
    return (field - low) / (high - low + F(1e-6))


def _box_rows(values: np.ndarray, length: int) -> np.ndarray:
    """Running mean along rows by an integer cumulative sum, stretched to about [0, 1]."""
    padded = np.concatenate([values[:, -length:], values], axis=1).astype(np.int32)
    total = np.cumsum(padded, axis=1)
    mean = (total[:, length:] - total[:, :-length]).astype(F) * F(1 / (255 * length))
    return np.clip((mean - F(0.5)) * F(2.2) + F(0.5), F(0), F(1))


def blur(image: np.ndarray) -> np.ndarray:
    """One pass of (1, 2, 1) / 4 along both axes; the last two axes are rows and columns, edges repeat."""
    for axis in (-1, -2):
        image = np.swapaxes(image, axis, -1)
        out = image * F(0.5)
        out[..., 1:] += image[..., :-1] * F(0.25)
        out[..., :-1] += image[..., 1:] * F(0.25)
        out[..., 0] += image[..., 0] * F(0.25)
        out[..., -1] += image[..., -1] * F(0.25)
        image = np.swapaxes(out, axis, -1)
    return image


def colour(draw: Draw, palette: list[np.ndarray] | None = None, *, near: np.ndarray | None = None) -> np.ndarray:
    """(3,) float32 RGB in 0..255: a jittered palette colour, a free one (mostly muted), or one close to `near`."""
    if near is not None:
        sign = 1.0 if draw.chance(0.5) else -1.0
        light = sign * draw(12.0, 34.0)
        rgb = [float(v) + light + draw(-12.0, 12.0) for v in near]
    elif palette and draw.chance(0.55):
        base = palette[draw.integer(0, len(palette) - 1)]
        light = draw(-35.0, 35.0)
        rgb = [float(v) + light + draw(-14.0, 14.0) for v in base]
    else:
        u = draw()
        strength = 20.0 + 200.0 * u * u
        light = draw(15.0, 240.0)
        rgb = [light + strength * draw(-0.6, 0.6) for _ in range(3)]
    return np.array([min(max(v, 4.0), 251.0) for v in rgb], dtype=F)


def ramp(draw: Draw, h: int, w: int, period: float) -> np.ndarray:
    """(h, w) float32 that rises by one every `period` pixels in a random direction."""
    c, s = draw.direction()
    x = np.arange(w, dtype=F) * F(c / period)
    y = np.arange(h, dtype=F) * F(s / period)
    return x[None, :] + y[:, None] + F(draw(0, 8))


def saw(values: np.ndarray) -> np.ndarray:
    """What is left of each value above the integer below it."""
    return values - np.floor(values)


def hard(values: np.ndarray, level: float) -> np.ndarray:
    """1 where a value is above the level, else 0."""
    return (values > F(level)).astype(F)


_IRREGULAR = (0, 1, 2, 3, 4, 7, 12, 13, 14, 15, 16, 16)  # kinds below without hard regular edges


def pattern(draw: Draw, noise: Noise, h: int, w: int, scale: float, *, plain: float) -> np.ndarray:
    """Draws a texture.

    Args:
        draw: source of randomness.
        noise: the scene's noise fields.
        h: rows of the window, at most those of the scene.
        w: columns of the window.
        scale: size of the object in pixels, which sets the period of regular patterns.
        plain: probability of an irregular texture (mottled, cloudy, grained) rather than any kind.

    Returns:
        (h, w) float32 in [0, 1].
    """
    pink = noise.window(noise.pink, draw, h, w)
    kind = _IRREGULAR[draw.integer(0, len(_IRREGULAR) - 1)] if draw.chance(plain) else draw.integer(0, 16)
    period = max(3.0, scale * draw(0.12, 0.6))
    if kind <= 3:  # nearly flat, with slow mottling
        return pink * F(draw(0.05, 0.5))
    if kind == 4:
        return np.clip(ramp(draw, h, w, scale * draw(2.0, 4.0)) * F(0.5) - F(1.0), F(0), F(1))
    if kind <= 6:
        wave = saw(ramp(draw, h, w, period) + pink * F(draw(0.0, 2.0) if kind == 6 else 0.0))
        return hard(wave, draw(0.3, 0.7))
    if kind == 7:  # soft stripes, as on wood when the noise bends them
        return np.abs(saw(ramp(draw, h, w, period) + pink * F(draw(0.0, 4.0))) * F(2) - F(1))
    if kind == 8:
        x = np.floor(np.arange(w, dtype=F) * F(1 / period))[None, :]
        y = np.floor(np.arange(h, dtype=F) * F(1 / period))[:, None]
        return saw((x + y) * F(0.5)) * F(2)
    if kind == 9:  # dots
        x = saw(np.arange(w, dtype=F) * F(1 / period)) - F(0.5)
        y = saw(np.arange(h, dtype=F) * F(1 / period)) - F(0.5)
        return ((x * x)[None, :] + (y * y)[:, None] < F(draw(0.03, 0.14))).astype(F)
    if kind == 10:  # bricks
        y = np.arange(h, dtype=F) * F(1 / period)
        x = np.arange(w, dtype=F)[None, :] * F(0.5 / period) + (saw(np.floor(y) * F(0.5)))[:, None]
        return np.maximum(hard(saw(x), 0.9), hard(saw(y), 0.82)[:, None])
    if kind == 11:
        return hard(pink, draw(0.4, 0.6))
    if kind == 12:
        return saw(pink * F(draw(2.0, 6.0)))
    if kind == 13:
        return noise.window(noise.white, draw, h, w) * F(draw(0.3, 1.0))
    if kind == 14:
        return noise.window(noise.hair, draw, h, w) * F(0.8) + pink * F(0.2)
    if kind == 15:
        return noise.window(noise.fibre, draw, h, w) * F(0.8) + pink * F(0.2)
    return pink


def shade(draw: Draw, h: int, w: int, cx: float, cy: float, radius: float, light: tuple[float, float]) -> np.ndarray:
    """(h, w) float32 factor around 1: flat, slanted or round shading towards the light, some with a highlight."""
    x = (np.arange(w, dtype=F) + F(0.5 - cx)) * F(1 / radius)
    y = (np.arange(h, dtype=F) + F(0.5 - cy)) * F(1 / radius)
    kind = draw.integer(0, 3)
    if kind == 0:
        return np.ones((h, w), F)
    amount = draw(0.1, 0.45)
    slope = (x * F(light[0] * amount))[None, :] + (y * F(light[1] * amount))[:, None] + F(1.0)
    if kind >= 2:
        dx, dy = x - F(0.35 * light[0]), y - F(0.35 * light[1])
        distance = (dx * dx)[None, :] + (dy * dy)[:, None]
        slope = slope - np.minimum(distance, F(2.0)) * F(draw(0.1, 0.3)) + F(0.1)
        if kind == 3:
            spot = np.maximum(F(1.0) - distance * F(draw(4.0, 14.0)), F(0.0))
            slope = slope + spot * spot * F(draw(0.2, 0.8))
    return np.maximum(slope, F(0.15))
