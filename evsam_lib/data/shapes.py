"""Outlines of generated objects: what a thing is made of, as filled polygons.

Own design (the paper trains on photographs); explained in notebook 03. Every outline is a list of closed contours in a
unit frame (x right, y down, the thing roughly inside [-1, 1]); several contours are filled by the even-odd rule, so a
second contour inside the first is a hole. Directions on the circle are rational points, never sines, and every float
operation is one IEEE-exact step, so that the same numbers come out on every machine.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["Draw", "Part", "Thing", "blob", "circle", "fill", "make_thing", "place"]


class Draw:
    """Random draws built on `Generator.random` alone, whose stream is fixed by its definition."""

    def __init__(self, seed: int, index: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence([seed, index]))
        self._random = np.random.Generator(self.bits).random

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self._random()

    def integer(self, low: int, high: int) -> int:
        """Integer in low..high, both included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def direction(self) -> tuple[float, float]:
        """Unit vector, every direction equally likely (rejection in the disc)."""
        while True:
            x, y = self(-1.0, 1.0), self(-1.0, 1.0)
            square = x * x + y * y
            if 0.01 < square < 1.0:
                length = float(np.sqrt(square))
                return x / length, y / length

    def bytes(self, count: int) -> np.ndarray:
        """(count,) uint8, little-endian bytes of the raw stream."""
        return self.bits.random_raw((count + 7) // 8).astype("<u8").view(np.uint8)[:count]


@dataclass(frozen=True)
class Part:
    """One separately painted piece: contours [(K, 2) float64 XY], its role, and whether it may be annotated alone."""

    contours: list[np.ndarray]
    role: int = 0  # parts of equal role share colours and texture
    nameable: bool = True


@dataclass(frozen=True)
class Thing:
    """Parts in painting order, the COCO category it stands for, and whether it usually stands upright."""

    parts: list[Part]
    category_id: int
    upright: bool = False


def fill(contours: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Even-odd fill at pixel centres.

    Args:
        contours: closed polygons, each (K, 2) float64, XY pixels of the window.
        height: rows of the window.
        width: columns of the window.

    Returns:
        (height, width) bool.
    """
    start = np.concatenate(contours)
    end = np.concatenate([np.concatenate([c[1:], c[:1]]) for c in contours])
    x0, y0, x1, y1 = start[:, :1], start[:, 1:], end[:, :1], end[:, 1:]
    rows = np.arange(height) + 0.5
    crosses = (y0 <= rows) != (y1 <= rows)  # (edges, height)
    edge, row = np.nonzero(crosses)
    x0, y0, x1, y1 = x0[edge, 0], y0[edge, 0], x1[edge, 0], y1[edge, 0]
    x = x0 + (row + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    toggles = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).reshape(height, width + 1)
    return (np.cumsum(toggles.astype(np.int16), axis=1)[:, :width] & 1).astype(bool)


@cache
def circle(points: int = 48) -> np.ndarray:
    """(points, 2) rational points of the unit circle, in order of angle; points divides by four."""
    t = np.arange(points // 4) / (points // 4)
    x, y = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return np.stack([np.concatenate([x, -y, -x, y]), np.concatenate([y, x, -y, -x])], axis=1)


@cache
def _harmonics(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """cos(k a), sin(k a) of the circle's points for k = 1..count, by repeated rotation."""
    c, s = circle()[:, 0], circle()[:, 1]
    found = [(c, s)]
    for _ in range(count - 1):
        ck, sk = found[-1]
        found.append((ck * c - sk * s, ck * s + sk * c))
    return found


def _move(contour: np.ndarray, x: float, y: float, sx: float = 1.0, sy: float = 1.0) -> np.ndarray:
    return np.stack([contour[:, 0] * sx + x, contour[:, 1] * sy + y], axis=1)


def _turn(contour: np.ndarray, direction: tuple[float, float]) -> np.ndarray:
    c, s = direction
    x, y = contour[:, 0], contour[:, 1]
    return np.stack([x * c - y * s, x * s + y * c], axis=1)


def _ellipse(x: float = 0.0, y: float = 0.0, rx: float = 1.0, ry: float = 1.0) -> np.ndarray:
    return _move(circle(), x, y, rx, ry)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def _squircle(x: float = 0.0, y: float = 0.0, rx: float = 1.0, ry: float = 1.0) -> np.ndarray:
    points = circle()
    return _move(np.sign(points) * np.sqrt(np.abs(points)), x, y, rx, ry)


def blob(draw: Draw, rough: float, terms: int = 6) -> np.ndarray:
    """Smooth random outline (48, 2) within the unit circle: a Fourier radius whose k-th term falls as 1/k."""
    radius = np.full(len(circle()), 1.0)
    for k, (c, s) in enumerate(_harmonics(terms), start=1):
        amount = rough / k
        radius = radius + draw(-amount, amount) * c + draw(-amount, amount) * s
    radius = np.maximum(radius, 0.2)
    return circle() * (radius / radius.max())[:, None]


def _polygon(draw: Draw, corners: int, low: float) -> np.ndarray:
    """Star-shaped polygon: circle points at jittered steps, radii in low..1."""
    step = 48 / corners
    which = [int(k * step + draw(0, 0.6 * step)) % 48 for k in range(corners)]
    return circle()[which] * np.array([[draw(low, 1.0)] for _ in which])


def _smooth(contour: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Corner cutting (Chaikin): each round replaces a corner by two points at a quarter of its edges."""
    for _ in range(rounds):
        following = np.concatenate([contour[1:], contour[:1]])
        pair = np.stack([0.75 * contour + 0.25 * following, 0.25 * contour + 0.75 * following], axis=1)
        contour = pair.reshape(-1, 2)
    return contour


def _stroke(p0, p1, p2, wide: float, narrow: float, points: int = 16) -> np.ndarray:
    """Outline of a quadratic curve p0..p2 (control p1) whose half width runs from wide to narrow."""
    p0, p1, p2 = (np.asarray(p, dtype=np.float64) for p in (p0, p1, p2))
    t = (np.arange(points) / (points - 1))[:, None]
    spine = (1 - t) * (1 - t) * p0 + 2 * t * (1 - t) * p1 + t * t * p2
    tangent = (1 - t) * (p1 - p0) + t * (p2 - p1)
    length = np.sqrt(tangent[:, 0] * tangent[:, 0] + tangent[:, 1] * tangent[:, 1]) + 1e-9
    half = wide + (narrow - wide) * t[:, 0]
    offset = np.stack([-tangent[:, 1] / length * half, tangent[:, 0] / length * half], axis=1)
    return np.concatenate([spine + offset, (spine - offset)[::-1]])


def _ball(draw: Draw) -> Thing:
    return Thing([Part([_ellipse(rx=1.0, ry=draw(0.85, 1.0))])], 37)


def _oval(draw: Draw) -> Thing:
    return Thing([Part([_ellipse(ry=draw(0.3, 0.8))])], 53)


def _stone(draw: Draw) -> Thing:
    return Thing([Part([blob(draw, draw(0.15, 0.4))])], 57)


def _cloud(draw: Draw) -> Thing:
    return Thing([Part([_move(blob(draw, draw(0.5, 0.9)), 0, 0, 1.0, draw(0.6, 1.0))])], 58)


def _slab(draw: Draw) -> Thing:
    half = draw(0.25, 1.0)
    slant = draw(-0.3, 0.3) if draw.chance(0.4) else 0.0
    taper = draw(0.6, 1.0) if draw.chance(0.4) else 1.0
    return Thing(
        [Part([np.array([[-1, -half], [1, -half * taper + slant], [1, half * taper + slant], [-1, half]])])], 84
    )


def _tile(draw: Draw) -> Thing:
    return Thing([Part([_squircle(ry=draw(0.4, 1.0))])], 77)


def _shard(draw: Draw) -> Thing:
    return Thing([Part([_polygon(draw, draw.integer(3, 7), draw(0.55, 0.9))])], 38)


def _star(draw: Draw) -> Thing:
    count, inner = draw.integer(4, 8), draw(0.3, 0.6)
    which = [int(k * 48 / (2 * count)) for k in range(2 * count)]
    radii = np.array([[1.0 if k % 2 == 0 else inner] for k in range(2 * count)])
    return Thing([Part([circle()[which] * radii])], 34)


def _leaf(draw: Draw) -> Thing:
    return Thing([Part([_smooth(_polygon(draw, draw.integer(4, 8), draw(0.15, 0.5)))])], 64)


def _ring(draw: Draw) -> Thing:
    inner, ry = draw(0.45, 0.88), draw(0.5, 1.0)
    hole = _ellipse(draw(-0.05, 0.05), draw(-0.05, 0.05), inner, inner * ry)
    return Thing([Part([_ellipse(ry=ry), hole])], 60)


def _rod(draw: Draw) -> Thing:
    wide = draw(0.03, 0.12)
    return Thing([Part([_stroke((-1, 0), (0, 0), (1, 0), wide, wide * draw(0.3, 1.0), 4)])], 39)


def _rope(draw: Draw) -> Thing:
    ends = [(-0.9, draw(-0.5, 0.5)), (draw(-0.5, 0.5), draw(-1.6, 1.6)), (0.9, draw(-0.5, 0.5))]
    return Thing([Part([_stroke(*ends, draw(0.04, 0.16), draw(0.01, 0.16))])], 52)


def _vase(draw: Draw) -> Thing:
    """A turned profile: mirror-symmetric, random widths from foot to rim."""
    count = draw.integer(4, 6)
    y = [-1.0 + 2.0 * k / (count - 1) for k in range(count)]
    half = [draw(0.12, 0.6) for _ in y]
    right = np.array([[h, v] for h, v in zip(half, y, strict=True)])
    outline = np.concatenate([right, right[::-1] * np.array([-1.0, 1.0])])
    body = Part([_smooth(outline, 2)])
    parts = [body]
    if draw.chance(0.5):
        parts.append(Part([_box(-0.7 * half[0], -1.05, 0.7 * half[0], -0.7)], role=1))
    return Thing(parts, 86, upright=True)


def _figure(draw: Draw) -> Thing:
    wide, lean = draw(0.2, 0.32), draw(-0.1, 0.1)
    legs = [_stroke((s * 0.12, 0.2), (s * draw(0.1, 0.3), 0.6), (s * draw(0.05, 0.4), 1), 0.13, 0.08) for s in (-1, 1)]
    arms = [
        _stroke((s * wide * 0.8, -0.4), (s * draw(0.3, 0.6), -0.2), (s * draw(0.2, 0.7), draw(-0.6, 0.3)), 0.09, 0.06)
        for s in (-1, 1)
    ]
    torso = _squircle(0, -0.12, wide, 0.42)
    head = _ellipse(lean, -0.76, draw(0.15, 0.2), draw(0.2, 0.25))
    parts = (
        [Part([leg], role=2) for leg in legs]
        + [Part([torso], role=1)]
        + [Part([a], role=draw.integer(0, 1)) for a in arms]
    )
    parts.append(Part([head], role=0))
    if draw.chance(0.5):  # hair or a hat
        parts.append(Part([_ellipse(lean, -0.88, 0.2, 0.12)], role=3))
    return Thing(parts, 1, upright=True)


def _beast(draw: Draw) -> Thing:
    body = _move(blob(draw, 0.2), 0, 0, 0.65, draw(0.3, 0.42))
    legs = [
        _stroke((x, 0.15), (x + draw(-0.1, 0.1), 0.45), (x + draw(-0.12, 0.12), 0.8), 0.1, 0.06)
        for x in (-0.45, -0.28, 0.3, 0.45)
    ]
    y = draw(-0.5, -0.15)
    head = _move(blob(draw, 0.2), 0.75, y, 0.27, 0.22)
    ear = _stroke((0.7, y - 0.1), (0.68, y - 0.25), (0.62, y - 0.4), 0.09, 0.02, 6)
    tail = _stroke((-0.6, -0.1), (-0.9, draw(-0.5, 0.2)), (-1.0, draw(-0.6, 0.5)), 0.08, 0.02)
    neck = _stroke((0.4, -0.1), (0.6, -0.15), (0.75, y), 0.2, 0.14, 6)
    plain = [Part([c], nameable=False) for c in (tail, neck)]
    return Thing(
        [
            *plain[:1],
            *(Part([leg]) for leg in legs),
            Part([body], nameable=False),
            *plain[1:],
            Part([head]),
            Part([ear]),
        ],
        18,
        upright=True,
    )


def _cart(draw: Draw) -> Thing:
    roof = draw(0.3, 0.6)
    cabin = np.array([[-0.6, -0.1], [-roof, -0.55], [roof * 0.8, -0.55], [0.65, -0.1]])
    body = _squircle(0, 0.1, 1.0, 0.3)
    glass = [_move(_box(-0.9, -1, 0.9, 1), x, -0.3, 0.22, 0.14) for x in (-0.22, 0.22)]
    wheels = [_ellipse(x, 0.4, 0.2, 0.2) for x in (-0.55, 0.55)]
    hubs = [_ellipse(x, 0.4, 0.09, 0.09) for x in (-0.55, 0.55)]
    parts = [Part([cabin], nameable=False), Part([body], nameable=False), *(Part([g], role=1) for g in glass)]
    parts += [Part([w], role=2) for w in wheels] + [Part([h], role=3, nameable=False) for h in hubs]
    return Thing(parts, 3, upright=True)


def _tree(draw: Draw) -> Thing:
    trunk = _stroke((0, 1), (draw(-0.1, 0.1), 0.5), (0, 0), draw(0.08, 0.16), 0.07, 8)
    crown = _move(blob(draw, 0.5), 0, -0.35, draw(0.5, 0.8), 0.6)
    return Thing([Part([trunk], role=1), Part([crown])], 64, upright=True)


def _table(draw: Draw) -> Thing:
    thick, spread = draw(0.04, 0.12), draw(0.6, 0.95)
    legs = [
        _stroke((s * spread, -0.2), (s * spread, 0.3), (s * spread * draw(0.9, 1.1), 0.9), 0.05, 0.03, 4)
        for s in (-1, 1)
    ]
    top = _box(-1, -0.25 - thick, 1, -0.25 + thick)
    back = [Part([_box(-1, -1, -0.85, -0.2)])] if draw.chance(0.4) else []
    return Thing([*(Part([leg]) for leg in legs), *back, Part([top], role=draw.integer(0, 1))], 67, upright=True)


def _cup(draw: Draw) -> Thing:
    side = 0.75
    handle = [_ellipse(side, 0, 0.32, 0.4), _ellipse(side, 0, 0.18, 0.26)]
    foot = draw(0.45, 0.75)
    body = np.array([[-side, -0.7], [side, -0.7], [foot, 0.7], [-foot, 0.7]])
    parts = [Part(handle), Part([body], nameable=False), Part([_ellipse(0, -0.7, side, 0.16)], role=1, nameable=False)]
    return Thing(parts, 47, upright=True)


def _house(draw: Draw) -> Thing:
    half, rows, columns = draw(0.4, 0.9), draw.integer(1, 4), draw.integer(1, 4)
    parts = [Part([_box(-half, -0.6, half, 1)], nameable=False)]
    if draw.chance(0.6):
        parts.append(Part([np.array([[-half * 1.15, -0.6], [0, -1.1], [half * 1.15, -0.6]])], role=1))
    dx, dy = 2 * half / columns, 1.6 / rows
    for r in range(rows):
        for c in range(columns):
            x, y = -half + (c + 0.5) * dx, -0.6 + (r + 0.5) * dy
            parts.append(Part([_box(x - 0.28 * dx, y - 0.3 * dy, x + 0.28 * dx, y + 0.3 * dy)], role=2))
    return Thing(parts, 72, upright=True)


def _flower(draw: Draw) -> Thing:
    count, size = draw.integer(5, 8), draw(0.25, 0.4)
    spots = [circle()[int(k * 48 / count)] * 0.6 for k in range(count)]
    petals = [Part([_ellipse(float(x), float(y), size, size)], nameable=False) for x, y in spots]
    return Thing([*petals, Part([_ellipse(rx=0.38, ry=0.38)], role=1)], 64)


def _patched(draw: Draw) -> Thing:
    """A body with a contrasting piece on it, whole and piece both nameable."""
    base = THINGS[draw.integer(0, 7)](draw)
    size, x, y = draw(0.2, 0.5), draw(-0.3, 0.3), draw(-0.2, 0.2)
    inner = [_ellipse(), _squircle(), blob(draw, 0.4), _box(-1, -0.6, 1, 0.6)][draw.integer(0, 3)]
    body = Part(base.parts[0].contours, nameable=False)
    return Thing([body, Part([_move(inner, x, y, size, size * draw(0.5, 1.0))], role=1)], base.category_id)


# Plain outlines first: `_patched` picks its body among the first eight.
THINGS = [_ball, _oval, _stone, _cloud, _slab, _tile, _shard, _leaf, _star, _ring, _rod, _rope]
THINGS += [_vase, _figure, _beast, _cart, _tree, _table, _cup, _house, _flower, _patched]
_WEIGHTS = [3, 3, 6, 4, 5, 4, 5, 5, 1, 3, 3, 4, 4, 4, 4, 3, 3, 3, 3, 3, 2, 6]


@cache
def _lottery() -> list[int]:
    return [kind for kind, weight in enumerate(_WEIGHTS) for _ in range(weight)]


def make_thing(draw: Draw, *, small: bool) -> Thing:
    """Draws a kind of thing and one of that kind; small things are plain outlines only."""
    while True:
        kind = _lottery()[draw.integer(0, len(_lottery()) - 1)]
        if not small or kind < 13:
            return THINGS[kind](draw)


def place(contour: np.ndarray, x: float, y: float, radius: float, direction: tuple[float, float]) -> np.ndarray:
    """Unit frame to pixels: turned by a unit vector, scaled by radius, centred at x, y."""
    return _turn(contour, direction) * radius + np.array([x, y])
