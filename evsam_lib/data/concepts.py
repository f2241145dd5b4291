"""Generated concepts: scenes of named shapes, and phrases that name all, some or none of them.

Stand-in for SA-Co in the mini profile (SAM3 learns from images with noun phrases, negatives included); explained in
notebook 19. A phrase gives a form and, if it likes, a colour and a texture: "red striped disc", "blue square", "dotted
thing". Phrases without an instance are of two kinds: hard ones differ from something in the image in one word, others
are drawn at random. Sizes run from small to large, so that quality can be told by size.

`concept_scene(seed, index, size=...)` is a pure function: any index, any order, any machine, the same bytes.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from .shapes import Draw, circle, fill, place
from .textures import F, Noise, blur, hard, ramp, saw

__all__ = [
    "COLOURS", "FORMS", "TEXTURES", "VERSION", "ConceptScene", "Instance", "Item", "Phrase", "background",
    "concept_scene", "item_mask", "paint_item", "vocabulary",
]  # fmt: skip

VERSION = 1  # raised whenever the bytes of a scene change
COLOURS = {
    "red": (205, 35, 35),
    "green": (40, 165, 55),
    "blue": (45, 75, 215),
    "yellow": (235, 210, 40),
    "purple": (150, 50, 175),
    "white": (240, 240, 240),
}
TEXTURES = ("plain", "striped", "dotted")
ANY = "thing"  # stands for every form
RADII = (0.06, 0.3)  # of a thing, as a part of the image's short side
LEAN = 0.1  # tangent of half the angle that a thing leans at most, about 11 degrees
FINE = 0.09  # things of a smaller radius are plain: nobody could tell stripes from dots
MIN_PIXELS = 12  # of a thing
MIN_VISIBLE = 0.75  # part of a thing that later ones leave uncovered
PHRASES = 6  # most phrases with an instance; as many without


def _outlines() -> dict[str, list[np.ndarray]]:
    """Closed contours in the unit frame; a second one is a hole."""
    points = circle()
    star = points[np.arange(10) * 48 // 10] * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    arm = 0.33
    cross = [(1, arm), (arm, arm), (arm, 1), (-arm, 1), (-arm, arm), (-1, arm)]
    cross = np.array(cross + [(-x, -y) for x, y in cross])
    return {
        "disc": [points * 0.85],
        "square": [np.array([(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)])],
        "triangle": [np.array([(0.0, -1.0), (0.9, 0.65), (-0.9, 0.65)])],
        "star": [star * 1.1],
        "ring": [points * 0.95, points * 0.5],
        "cross": [cross * 0.9],
    }


FORMS = _outlines()


@dataclass(frozen=True)
class Item:
    """What a thing looks like and where it lies, before anything covers it.

    Attributes:
        form: a key of `FORMS`.
        colour: a key of `COLOURS`.
        texture: one of `TEXTURES`.
        x: of the centre, pixels from the left.
        y: of the centre, pixels from the top.
        radius: pixels.
        direction: unit vector of its turn.
        rgb: its own shade of the colour, 0..255.
        surface: seed of its texture's place and period.
    """

    form: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    direction: tuple[float, float]
    rgb: tuple[float, float, float]
    surface: int

    def fits(self, words: tuple[str | None, str | None, str]) -> bool:
        """Whether texture, colour and form of a phrase name it; None fits everything."""
        texture, colour, form = words
        return texture in (None, self.texture) and colour in (None, self.colour) and form in (ANY, self.form)


@dataclass(frozen=True)
class Instance:
    """A thing of a scene: the item, and the (H, W) bool mask of what is seen of it."""

    item: Item
    mask: np.ndarray = dataclasses.field(repr=False)


@dataclass(frozen=True)
class Phrase:
    """A noun phrase and the numbers of the instances it names.

    Attributes:
        text: such as "red striped disc".
        instances: into `ConceptScene.instances`; () for a phrase that names nothing in the image.
        kind: "positive", "hard" (one word off something in the image) or "absent".
    """

    text: str
    instances: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class ConceptScene:
    """An image (H, W, 3) uint8, its instances (masks are disjoint), and phrases, positive ones first."""

    image: np.ndarray
    instances: tuple[Instance, ...]
    phrases: tuple[Phrase, ...]

    @property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool."""
        return np.stack([instance.mask for instance in self.instances])


def concept_scene(seed: int, index: int, *, size: tuple[int, int]) -> ConceptScene:
    """Generates one scene.

    Args:
        seed: of the whole data set, 0 or more.
        index: of the image, 0 or more.
        size: (height, width) in pixels, each at least 64.

    Returns:
        The scene: 1 to 8 instances, up to 6 phrases that name some and as many that name none.

    Raises:
        ValueError: if seed or index is negative or a side is under 64.
    """
    height, width = (int(side) for side in size)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be 0 or more, got {seed} and {index}")
    if min(height, width) < 64:
        raise ValueError(f"size (height, width) must be at least 64 on each side, got {height} x {width}")
    draw = Draw(seed, index)
    rgb = background(draw, height, width)
    items, labels = _arrange(draw, height, width)
    for item in items:
        paint_item(rgb, item)
    instances = tuple(Instance(item, labels == number) for number, item in enumerate(items, start=1))
    noise = draw.bytes(rgb.size).reshape(rgb.shape).astype(F) * F(1 / 32) - F(4)
    image = np.clip(blur(rgb) + noise, 0, 255).astype(np.uint8)
    return ConceptScene(np.ascontiguousarray(np.moveaxis(image, 0, 2)), instances, _phrases(draw, items))


def vocabulary() -> list[str]:
    """Every phrase that a scene can have."""
    forms = (*FORMS, ANY)
    return [_text((t, c, f)) for t in (None, *TEXTURES) for c in (None, *COLOURS) for f in forms]


def item_mask(item: Item, height: int, width: int) -> np.ndarray:
    """(height, width) bool: all that the item covers inside the image."""
    contours = [place(c, item.x, item.y, item.radius, item.direction) for c in FORMS[item.form]]
    return fill(contours, height, width)


def paint_item(rgb: np.ndarray, item: Item) -> None:
    """Paints an item over (3, H, W) float32 colours, 0..255, in place."""
    height, width = rgb.shape[1:]
    mask = item_mask(item, height, width)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    mix = _texture(item, rows[0], columns[0], *mask[window].shape)
    main = np.array(item.rgb, F)[:, None, None]
    other = main * F(0.3) if sum(item.rgb) > 330 else main * F(0.4) + F(150)  # light on dark, dark on light
    np.copyto(rgb[:, *window], main + (other - main) * mix, where=mask[window])


def _texture(item: Item, top: int, left: int, h: int, w: int) -> np.ndarray:
    """(h, w) float32, how much of the second colour a pixel has; tied to the item, so that it moves with it."""
    draw = Draw(item.surface, 0)
    period = max(4.0, item.radius * draw(0.4, 0.5))
    shift_x, shift_y = left - int(item.x) + 8 * period, top - int(item.y) + 8 * period
    if item.texture == "striped":
        field = ramp(draw, h + 1, w + 1, period)  # its direction is the stripes'
        step_x, step_y = field[0, 1] - field[0, 0], field[1, 0] - field[0, 0]
        return hard(saw(field[:h, :w] + F(shift_x) * step_x + F(shift_y) * step_y), 0.5)
    if item.texture == "dotted":
        x = saw((np.arange(w, dtype=F) + F(shift_x)) * F(1 / period)) - F(0.5)
        y = saw((np.arange(h, dtype=F) + F(shift_y)) * F(1 / period)) - F(0.5)
        return ((x * x)[None, :] + (y * y)[:, None] < F(0.1)).astype(F)
    return np.zeros((h, w), F)


def background(draw: Draw, height: int, width: int) -> np.ndarray:
    """(3, H, W) float32: muted, mottled, lit from one side."""
    grey, noise = draw(60.0, 165.0), Noise(draw, height, width)
    tint = np.array([draw(-18.0, 18.0) for _ in range(3)], F)[:, None, None] + F(grey)
    slope = ramp(draw, height, width, 6.0 * max(height, width))
    return tint + (noise.pink - F(0.5)) * F(draw(15.0, 60.0)) + (slope - slope.mean()) * F(draw(0.0, 160.0))


def _arrange(draw: Draw, height: int, width: int) -> tuple[list[Item], np.ndarray]:
    """Items, large ones first, and (H, W) labels of what is seen: 0 background, then 1 for the first."""
    short, count = min(height, width), draw.integer(2, 8)
    low, high = RADII
    radii = sorted((1 / (1 / high + draw() * (1 / low - 1 / high)) for _ in range(count)), reverse=True)
    items: list[Item] = []
    labels, painted = np.zeros((height, width), np.int16), []
    for radius in radii:
        looks = _looks(draw, items, plain=radius < FINE)
        for _ in range(12):
            item = _placed(draw, looks, radius * short, height, width)
            mask = item_mask(item, height, width)
            left = [np.count_nonzero((labels == k) & ~mask) for k in range(1, len(items) + 1)]
            if all(seen >= max(MIN_PIXELS, MIN_VISIBLE * whole) for seen, whole in zip(left, painted, strict=True)):
                items.append(item)
                painted.append(np.count_nonzero(mask))
                labels[mask] = len(items)
                break
    return items, labels


def _looks(draw: Draw, items: list[Item], *, plain: bool) -> tuple[str, str, str]:
    """Texture, colour and form: of the kind of an earlier item, of its colour or form, or free."""
    texture = "plain" if plain else TEXTURES[draw.integer(0, len(TEXTURES) - 1)]
    colour, form = _pick(draw, COLOURS), _pick(draw, FORMS)
    if items and draw.chance(0.6):
        model, what = items[draw.integer(0, len(items) - 1)], draw.integer(0, 2)
        colour = model.colour if what != 1 else colour
        form = model.form if what != 2 else form
        texture = model.texture if what == 0 and not plain else texture
    return texture, colour, form


def _placed(draw: Draw, looks: tuple[str, str, str], radius: float, height: int, width: int) -> Item:
    texture, colour, form = looks
    light = draw(-14.0, 14.0)
    rgb = tuple(min(max(v + light + draw(-10.0, 10.0), 0.0), 255.0) for v in COLOURS[colour])
    x, y = draw(0.85 * radius, width - 0.85 * radius), draw(0.85 * radius, height - 0.85 * radius)
    t = draw(-LEAN, LEAN)
    turn = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return Item(form, colour, texture, x, y, radius, turn, rgb, draw.integer(0, 1 << 30))


def _pick(draw: Draw, among) -> str:
    names = tuple(among)
    return names[draw.integer(0, len(names) - 1)]


def _text(words: tuple[str | None, str | None, str]) -> str:
    texture, colour, form = words
    return " ".join(word for word in (colour, texture, form) if word)


def _phrases(draw: Draw, items: list[Item]) -> tuple[Phrase, ...]:
    """Up to 6 phrases that name something, and as many that do not, half of those hard ones."""
    found: dict[str, Phrase] = {}

    def add(words: tuple[str | None, str | None, str], kind: str) -> None:
        named = tuple(number for number, item in enumerate(items) if item.fits(words))
        if bool(named) == (kind == "positive") and _text(words) != ANY:
            found.setdefault(_text(words), Phrase(_text(words), named, kind))

    for _ in range(4 * PHRASES):
        if len(found) < PHRASES:
            add(_words(draw, items[draw.integer(0, len(items) - 1)]), "positive")
    positive = len(found)
    for _ in range(8 * PHRASES):
        if len(found) < positive + PHRASES // 2:
            add(_one_off(draw, _words(draw, items[draw.integer(0, len(items) - 1)])), "hard")
    for _ in range(8 * PHRASES):
        if len(found) < 2 * positive:
            free = _pick(draw, TEXTURES), _pick(draw, COLOURS), _pick(draw, FORMS)
            add(_some(draw, free), "absent")
    return tuple(found.values())


def _words(draw: Draw, item: Item) -> tuple[str | None, str | None, str]:
    return _some(draw, (item.texture, item.colour, item.form))


def _some(draw: Draw, words: tuple[str, str, str]) -> tuple[str | None, str | None, str]:
    """Leaves words out: a texture mostly, a colour or a form sometimes."""
    texture, colour, form = words
    return (
        texture if draw.chance(0.35) else None,
        colour if draw.chance(0.7) else None,
        form if draw.chance(0.8) else ANY,
    )


def _one_off(draw: Draw, words: tuple[str | None, str | None, str]) -> tuple[str | None, str | None, str]:
    """Another word in one of the places that have one."""
    places = [k for k, word in enumerate(words) if word not in (None, ANY)]
    if not places:
        return words
    which, changed = places[draw.integer(0, len(places) - 1)], list(words)
    changed[which] = _pick(draw, (TEXTURES, COLOURS, FORMS)[which])
    return tuple(changed)
