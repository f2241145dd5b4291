"""Generated clips: named shapes that move, turn, scale, cross, hide one another, leave and return.

Stand-in for SA-V in the mini profile (EfficientSAM3's stage 2 learns from SA-V); explained in notebook 18. The shapes
are those of `concepts`. Half of the objects have a twin of the same form, colour and texture, so that looks alone do
not tell which is which: one has to remember where it was. What happens to an object is one of four plots: it wanders,
crosses the middle (where another hides it, or it another), leaves the picture and returns, or leaves for good.

`clip(seed, index, ...)` is a pure function: any index, any order, any machine, the same bytes. Written to disk and read
back by `videos`.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from .concepts import COLOURS, FORMS, TEXTURES, Item, background, item_mask, paint_item
from .shapes import Draw
from .textures import F, blur

__all__ = ["PLOTS", "VERSION", "Clip", "clip"]

VERSION = 1  # raised whenever the bytes of a clip change
PLOTS = ("wander", "cross", "return", "leave")
RADII = (0.09, 0.2)  # of an object in the first frame, as a part of the image's short side
TWINS = 0.5  # probability that an object has the looks of the one before it
MIN_PIXELS = 12  # seen of an object in the first frame
MIN_VISIBLE = 0.6  # part of it that others leave uncovered there


@dataclass(frozen=True)
class Clip:
    """A short video and what is seen of its objects.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        masks: (N, T, H, W) bool, visible parts, disjoint; every object is seen in the first frame.
        plots: N of `PLOTS`.
        twins: (N,) bool, whether another object looks the same.
    """

    frames: np.ndarray
    masks: np.ndarray = dataclasses.field(repr=False)
    plots: tuple[str, ...]
    twins: np.ndarray


def clip(seed: int, index: int, *, size: tuple[int, int], frames: int = 8, objects: int = 3) -> Clip:
    """Generates one clip.

    Args:
        seed: of the whole data set, 0 or more.
        index: of the clip, 0 or more.
        size: (height, width) in pixels, each at least 64.
        frames: T, 2 or more; plots are played from the first to the last, whatever their number.
        objects: at most so many, 1 or more.

    Returns:
        The clip, with 1 to `objects` objects.

    Raises:
        ValueError: an argument out of its range.
    """
    height, width = (int(side) for side in size)
    if seed < 0 or index < 0 or frames < 2 or objects < 1 or min(height, width) < 64:
        raise ValueError(
            "a clip needs seed and index of 0 or more, 2 frames or more, an object or more and sides of at least 64 "
            f"pixels, got {seed}, {index}, {frames}, {objects} and {height} x {width}"
        )
    draw = Draw(seed, index)
    cast = _cast(draw, objects, height, width)
    pan = [draw(-0.06, 0.06) * side for side in (height, width)]  # of the camera, over the whole clip
    margin = int(0.07 * max(height, width)) + 1
    wall = background(draw, height + 2 * margin, width + 2 * margin)
    pictures, labels = [], []
    for t in range(frames):
        at = t / (frames - 1)
        top, left = (margin + round((at - 0.5) * way) for way in pan)
        rgb = np.ascontiguousarray(wall[:, top : top + height, left : left + width])
        items = [actor.at(at) for actor in cast]
        label = np.zeros((height, width), np.int16)
        for number, item in enumerate(items, start=1):
            paint_item(rgb, item)
            label[item_mask(item, height, width)] = number
        noise = draw.bytes(rgb.size).reshape(rgb.shape).astype(F) * F(1 / 32) - F(4)
        pictures.append(np.moveaxis(np.clip(blur(rgb) + noise, 0, 255).astype(np.uint8), 0, 2))
        labels.append(label)
    masks = np.stack(labels)[None] == np.arange(1, len(cast) + 1)[:, None, None, None]
    looks = [actor.looks for actor in cast]
    return Clip(
        frames=np.stack(pictures),
        masks=masks,
        plots=tuple(actor.plot for actor in cast),
        twins=np.array([looks.count(one) > 1 for one in looks]),
    )


@dataclass(frozen=True)
class _Actor:
    """An item, and how it moves: along a parabola through three points, evenly turning and growing."""

    item: Item
    plot: str
    via: tuple[float, float]  # where it is half way
    end: tuple[float, float]
    turn: float  # half angle's tangent, of the whole clip
    growth: float  # factor of the radius at the end

    @property
    def looks(self) -> tuple[str, str, str]:
        return self.item.form, self.item.colour, self.item.texture

    def at(self, time: float) -> Item:
        """The item at a time from 0 to 1."""
        start = (self.item.x, self.item.y)
        weights = (1 - time) * (1 - 2 * time), 4 * time * (1 - time), time * (2 * time - 1)
        x, y = (sum(w * p[k] for w, p in zip(weights, (start, self.via, self.end), strict=True)) for k in (0, 1))
        t = self.turn * time
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # rational, so the same on every machine
        dx, dy = self.item.direction
        radius = self.item.radius * (1 + (self.growth - 1) * time)
        return dataclasses.replace(self.item, x=x, y=y, radius=radius, direction=(dx * c - dy * s, dx * s + dy * c))


def _cast(draw: Draw, objects: int, height: int, width: int) -> list[_Actor]:
    """Actors from the back to the front, all seen in the first frame."""
    cast: list[_Actor] = []
    count = draw.integer((objects + 1) // 2, objects)
    for _ in range(12 * count):
        if len(cast) == count:
            break
        actor = _actor(draw, cast, height, width)
        masks = [item_mask(one.item, height, width) for one in (*cast, actor)]
        seen = [mask & ~np.any(masks[k + 1 :], axis=0) for k, mask in enumerate(masks)]
        counts = [(np.count_nonzero(s), np.count_nonzero(mask)) for s, mask in zip(seen, masks, strict=True)]
        if all(s >= max(MIN_PIXELS, MIN_VISIBLE * whole) for s, whole in counts):
            cast.append(actor)
    return cast


def _actor(draw: Draw, cast: list[_Actor], height: int, width: int) -> _Actor:
    short, plot = min(height, width), PLOTS[min(draw.integer(0, 4), 3)]
    looks = tuple(_pick(draw, among) for among in (FORMS, COLOURS, TEXTURES))
    surface, radius = draw.integer(0, 1 << 30), draw(*RADII) * short
    if cast and draw.chance(TWINS):
        looks, surface = cast[-1].looks, cast[-1].item.surface
    form, colour, texture = looks
    light = draw(-10.0, 10.0)
    red, green, blue = (min(max(v + light, 0.0), 255.0) for v in COLOURS[colour])
    x, y = draw(radius, width - radius), draw(radius, height - radius)
    item = Item(form, colour, texture, x, y, radius, draw.direction(), (red, green, blue), surface)
    ways = draw(0.2, 0.8) * width, draw(0.2, 0.8) * height
    middle = draw(0.4, 0.6) * width, draw(0.4, 0.6) * height
    side, along = draw.integer(0, 3), draw(0.2, 0.8)
    reach = 1.6 * radius  # enough for what has grown, with all its corners
    outside = ((-reach, along * height), (width + reach, along * height), (along * width, -reach))
    outside = (*outside, (along * width, height + reach))[side]
    far = width - x, height - y  # opposite of the start
    via, end = {
        "wander": (((x + ways[0]) / 2, (y + ways[1]) / 2), ways),
        "cross": (middle, far),
        "return": (outside, ways),
        "leave": (((x + outside[0]) / 2, (y + outside[1]) / 2), outside),
    }[plot]
    return _Actor(item, plot, via, end, draw(-0.7, 0.7), draw(0.75, 1.35))


def _pick(draw: Draw, among) -> str:
    names = tuple(among)
    return names[draw.integer(0, len(names) - 1)]
