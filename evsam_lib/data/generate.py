"""Generated scenes: dead leaves with textures, shading, shadows and parts, and their exact masks.

Stand-in for SA-1B and COCO in the mini profile (paper Sec. 4.1 trains on SA-1B); explained in notebook 03. Images of
overlapping opaque shapes whose sizes follow a power law share the scale invariance and occlusion statistics of
photographs, so a model trained on them alone learns edges, shading and objects that carry over in part.

`scene(seed, index, size=...)` is a pure function: any index, any order, any machine, the same bytes. Needs numpy only.
"""

from dataclasses import dataclass

import numpy as np

from .shapes import Draw, Thing, fill, make_thing, place
from .textures import F, Noise, blur, colour, pattern, shade

__all__ = ["VERSION", "Scene", "scene"]

VERSION = 1  # raised whenever the bytes of a scene change
MIN_PIXELS = 16  # visible pixels that an annotated mask has at least
MIN_VISIBLE = 0.15  # visible share of what was painted inside the image
MAX_UNITS = 250  # painted pieces of one scene: labels are bytes, 0 is the background


@dataclass(frozen=True)
class Scene:
    """One generated image and its annotations; masks are visible parts, after occlusion.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        masks: (N, H, W) bool. Whole things are disjoint; a part lies inside its whole.
        category_ids: (N,) int64, COCO category ids; a part has that of its whole.
        parents: (N,) int64, index of the whole that a part belongs to, -1 for a whole.
        crowd: (H, W) bool, many small things of one kind that are not annotated one by one, or None.
        crowd_category_id: the crowd's category, 0 without a crowd.
    """

    image: np.ndarray
    masks: np.ndarray
    category_ids: np.ndarray
    parents: np.ndarray
    crowd: np.ndarray | None
    crowd_category_id: int


def scene(seed: int, index: int, *, size: tuple[int, int]) -> Scene:
    """Generates one scene.

    Args:
        seed: of the whole data set, 0 or more.
        index: of the image, 0 or more.
        size: (height, width) in pixels, each at least 32.

    Returns:
        The scene, with at least one mask.

    Raises:
        ValueError: if seed or index is negative or a side is under 32.
    """
    height, width = (int(side) for side in size)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be 0 or more, got {seed} and {index}")
    if min(height, width) < 32:
        raise ValueError(f"size (height, width) must be at least 32 on each side, got {height} x {width}")
    canvas = _Canvas(Draw(seed, index), height, width)
    _paint_background(canvas)
    for job in _plan(canvas):
        job(canvas)
    return canvas.finish()


class _Canvas:
    """The picture while it is painted: colours, the label of the topmost piece, and what each thing painted."""

    def __init__(self, draw: Draw, height: int, width: int) -> None:
        self.draw, self.height, self.width = draw, height, width
        self.short = min(height, width)
        self.scale = float(np.sqrt(height * width))
        self.rgb = np.empty((3, height, width), F)
        self.labels = np.zeros((height, width), np.uint8)
        self.noise = Noise(draw, height, width)
        self.light = draw.direction()
        self.palette = [colour(draw) for _ in range(draw.integer(2, 5))]
        self.backdrop = self.palette[0]  # colour behind the things, which hidden ones come close to
        self.units = 0
        self.things = []  # (first unit, last unit, category, crowd?, [(unit, pixels)], pixels painted, window)

    def paint(self, contours: list[np.ndarray], label: int | None, surface: "_Surface") -> tuple | None:
        """Fills one piece in its window; returns its window and pixel count, None if nothing is inside the image."""
        corners = np.concatenate(contours)
        x0, y0 = (int(v) for v in np.clip(np.floor(corners.min(axis=0)), 0, [self.width, self.height]))
        x1, y1 = (int(v) for v in np.clip(np.ceil(corners.max(axis=0)), 0, [self.width, self.height]))
        if x1 <= x0 or y1 <= y0:
            return None
        mask = fill([c - np.array([x0, y0]) for c in contours], y1 - y0, x1 - x0)
        pixels = int(np.count_nonzero(mask))
        if pixels == 0:
            return None
        values = surface.values(self, x0, y0, x1, y1)
        np.copyto(self.rgb[:, y0:y1, x0:x1], values, where=mask)
        if label is not None:
            self.labels[y0:y1, x0:x1][mask] = label
        return (x0, y0, x1, y1), pixels

    def finish(self) -> Scene:
        masks, categories, parents = [], [], []
        crowd, crowd_category = None, 0
        for first, last, category, is_crowd, parts, painted, (x0, y0, x1, y1) in self.things:
            window = self.labels[y0:y1, x0:x1]
            whole = (window >= first) & (window <= last)
            pixels = int(np.count_nonzero(whole))
            if is_crowd:
                crowd = np.zeros(self.labels.shape, bool)
                crowd[y0:y1, x0:x1] = whole
                crowd, crowd_category = (crowd, category) if pixels >= MIN_PIXELS else (None, 0)
                continue
            if pixels < max(MIN_PIXELS, MIN_VISIBLE * painted):
                continue
            parent = len(masks)
            found = [(whole, -1)]
            for unit, part_painted in parts:
                part = window == unit
                count = int(np.count_nonzero(part))
                if max(MIN_PIXELS, MIN_VISIBLE * part_painted) <= count <= 0.9 * pixels:
                    found.append((part, parent))
            for mask, owner in found:
                full = np.zeros(self.labels.shape, bool)
                full[y0:y1, x0:x1] = mask
                masks.append(full)
                categories.append(category)
                parents.append(owner)
        return Scene(
            image=_develop(self),
            masks=np.stack(masks),
            category_ids=np.array(categories, dtype=np.int64),
            parents=np.array(parents, dtype=np.int64),
            crowd=crowd,
            crowd_category_id=crowd_category,
        )


class _Surface:
    """Colours, texture and shading of the pieces of one role of one thing."""

    def __init__(
        self, canvas: _Canvas, x: float, y: float, radius: float, *, near: np.ndarray | None = None, plain: float = 0.3
    ):
        draw = canvas.draw
        self.x, self.y, self.radius, self.plain = x, y, radius, plain
        self.first = colour(draw, canvas.palette, near=near)
        self.second = colour(draw, canvas.palette, near=self.first if draw.chance(0.7) else None)

    def like(self, canvas: _Canvas, x: float, y: float) -> "_Surface":
        """A sibling's surface: nearly the same colours at another place."""
        twin = _Surface(canvas, x, y, self.radius)
        if canvas.draw.chance(0.7):
            twin.first, twin.second = colour(canvas.draw, near=self.first), self.second
        return twin

    def values(self, canvas: _Canvas, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        draw, h, w = canvas.draw, y1 - y0, x1 - x0
        mix = pattern(draw, canvas.noise, h, w, self.radius, plain=self.plain)
        shading = shade(draw, h, w, self.x - x0, self.y - y0, self.radius, canvas.light)
        flat, step = self.first, self.second - self.first
        return (flat[:, None, None] + step[:, None, None] * mix) * shading


def _paint_background(canvas: _Canvas) -> None:
    """One or two textured regions, lit across, with specks far too small to annotate."""
    draw, h, w = canvas.draw, canvas.height, canvas.width
    surface = _Surface(canvas, w / 2, h / 2, canvas.scale * draw(0.1, 0.8), plain=0.75)
    canvas.rgb[:] = surface.values(canvas, 0, 0, w, h)
    if draw.chance(0.5):  # a horizon: floor and wall, ground and sky
        left, right = draw(0.25, 0.75) * h, draw(0.25, 0.75) * h
        if draw.chance(0.6):
            right = left + draw(-0.03, 0.03) * h
        ground = np.array([[-1.0, left], [w + 1.0, right], [w + 1.0, h + 1.0], [-1.0, h + 1.0]])
        canvas.paint([ground], None, _Surface(canvas, w / 2, h, canvas.scale * draw(0.1, 0.8), plain=0.75))
    canvas.backdrop = surface.first
    if draw.chance(0.7):
        limit = max(1, int(canvas.scale * canvas.scale / 1500))
        count = draw.integer(limit // 4, limit)
        specks = draw.bytes(count * 8).reshape(count, 8).astype(np.int64)
        rows = (specks[:, 0] * 256 + specks[:, 1]) * h >> 16
        columns = (specks[:, 2] * 256 + specks[:, 3]) * w >> 16
        change = (specks[:, 4:7] - 128).astype(F) * F(draw(0.2, 0.7))
        tall, wide = specks[:, 7] % 3, specks[:, 7] // 3 % 3
        for dy in range(3):
            for dx in range(3):
                here = (tall >= dy) & (wide >= dx) & (rows + dy < h) & (columns + dx < w)
                canvas.rgb[:, rows[here] + dy, columns[here] + dx] += change[here].T


def _radius(draw: Draw, low: float, high: float, *, cubic: bool) -> float:
    """Radius with density r^-3 (cubic, the scale-invariant law) or r^-2 in low..high, by inverting its integral."""
    u = draw()
    if cubic:
        a, b = 1.0 / (low * low), 1.0 / (high * high)
        return 1.0 / float(np.sqrt(a + u * (b - a)))
    return 1.0 / (1.0 / low + u * (1.0 / high - 1.0 / low))


def _plan(canvas: _Canvas) -> list:
    """Draws what will be painted, far (mostly large) to near (mostly small)."""
    draw = canvas.draw
    low, high = max(2.6, 0.012 * canvas.scale), 0.42 * canvas.short
    u = draw()
    total = 10 + int(34 * u)
    large = draw.integer(1, 5)
    radii = [draw(0.18, 0.46) * canvas.short for _ in range(large)]
    radii += [_radius(draw, 4.0 * low, high, cubic=False) for _ in range((total - large) * 3 // 5)]
    radii += [_radius(draw, low, high, cubic=True) for _ in range(total - len(radii))]
    order = sorted((-radius * draw(0.35, 1.5), radius) for radius in radii)
    jobs = [_single(radius) for _, radius in order]
    if draw.chance(0.35):
        jobs.insert(draw.integer(len(jobs) // 3, len(jobs)), _row)
    if draw.chance(0.3):
        jobs.insert(draw.integer(0, len(jobs)), _crowd)
    return jobs


def _single(radius: float):
    def job(canvas: _Canvas) -> None:
        draw = canvas.draw
        thing = make_thing(draw, small=radius < 0.045 * canvas.scale)
        x, y = draw(-0.05, 1.05) * canvas.width, draw(-0.05, 1.05) * canvas.height
        _paint_thing(canvas, thing, x, y, radius, _pose(draw, thing))

    return job


def _pose(draw: Draw, thing: Thing) -> tuple[float, float]:
    if thing.upright and draw.chance(0.8):
        t = draw(-0.12, 0.12)  # a lean of at most about 14 degrees
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return draw.direction()


def _paint_thing(canvas, thing: Thing, x, y, radius, pose, *, surfaces: dict | None = None, named: bool | None = None):
    """Paints a thing's shadow and parts and records it; returns its surfaces by role."""
    draw = canvas.draw
    if canvas.units + len(thing.parts) > MAX_UNITS:
        return surfaces
    contours = [[place(c, x, y, radius, pose) for c in part.contours] for part in thing.parts]
    if radius > 5 and draw.chance(0.45):
        _cast_shadow(canvas, contours, radius)
    named = draw.chance(0.6) if named is None else named  # whether parts are annotated too, as in SA-1B
    surfaces = {} if surfaces is None else surfaces
    first, parts, windows = canvas.units + 1, [], []
    for part, outline in zip(thing.parts, contours, strict=True):
        if part.role not in surfaces:
            hidden = part.role == 0 and draw.chance(0.15)  # hardly differs from the background
            surfaces[part.role] = _Surface(canvas, x, y, radius, near=canvas.backdrop if hidden else None)
        canvas.units += 1
        done = canvas.paint(outline, canvas.units, surfaces[part.role])
        if done is not None:
            windows.append(done[0])
            if named and part.nameable and len(thing.parts) > 1:
                parts.append((canvas.units, done[1]))
    _record(canvas, first, thing.category_id, False, parts, windows)
    return surfaces


def _record(canvas, first: int, category: int, crowd: bool, parts: list, windows: list) -> None:
    if windows:
        corners = np.array(windows)
        x0, y0 = (int(v) for v in corners[:, :2].min(axis=0))
        x1, y1 = (int(v) for v in corners[:, 2:].max(axis=0))
        painted = int(np.count_nonzero(canvas.labels[y0:y1, x0:x1] >= first))
        canvas.things.append((first, canvas.units, category, crowd, parts, painted, (x0, y0, x1, y1)))


def _cast_shadow(canvas: _Canvas, contours: list, radius: float) -> None:
    """Darkens what lies away from the light, with a soft edge."""
    draw = canvas.draw
    reach = draw(0.04, 0.3) * radius
    dx, dy = -canvas.light[0] * reach, -canvas.light[1] * reach
    soft = 1 + int(0.1 * reach + draw(0, 0.06) * radius)
    corners = np.concatenate([c for outline in contours for c in outline]) + np.array([dx, dy])
    limits = [canvas.width, canvas.height]
    x0, y0 = (int(v) for v in np.clip(np.floor(corners.min(axis=0)) - 2 * soft, 0, limits))
    x1, y1 = (int(v) for v in np.clip(np.ceil(corners.max(axis=0)) + 2 * soft, 0, limits))
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    shift = np.array([dx - x0, dy - y0])
    shadow = np.zeros((y1 - y0, x1 - x0), bool)
    for outline in contours:
        shadow |= fill([c + shift for c in outline], y1 - y0, x1 - x0)
    dark = _box_blur(shadow, soft) * F(draw(0.2, 0.6))
    canvas.rgb[:, y0:y1, x0:x1] *= F(1.0) - dark


def _box_blur(mask: np.ndarray, reach: int) -> np.ndarray:
    """Mean of a (h, w) mask over (2 reach + 1)^2 pixels by integer sums; outside counts as 0."""
    total = mask.astype(np.int32)
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (reach + 1, reach)
        total = np.cumsum(np.pad(total, pad), axis=axis, dtype=np.int32)
        span = 2 * reach + 1
        total = total[span:] - total[:-span] if axis == 0 else total[:, span:] - total[:, :-span]
    return total.astype(F) * F(1.0 / ((2 * reach + 1) * (2 * reach + 1)))


def _row(canvas: _Canvas) -> None:
    """Siblings side by side, touching: books on a shelf, a herd, a fence."""
    draw = canvas.draw
    radius = draw(0.04, 0.12) * canvas.scale
    thing = make_thing(draw, small=False)
    pose = _pose(draw, thing)
    x, y = draw(0.1, 0.6) * canvas.width, draw(0.15, 0.85) * canvas.height
    outline = np.concatenate([place(c, 0, 0, radius, pose) for part in thing.parts for c in part.contours])
    step = float(outline[:, 0].max() - outline[:, 0].min()) * draw(0.75, 1.05)
    surfaces = None
    for _ in range(draw.integer(3, 6)):
        if surfaces:
            surfaces = {role: surface.like(canvas, x, y) for role, surface in surfaces.items()}
        surfaces = _paint_thing(canvas, thing, x, y, radius, pose, surfaces=surfaces, named=False)
        x, y = x + step, y + draw(-0.06, 0.06) * radius


def _crowd(canvas: _Canvas) -> None:
    """A cluster of small things of one kind, recorded as one crowd region."""
    draw = canvas.draw
    radius = draw(0.012, 0.03) * canvas.scale + 1.0
    thing = make_thing(draw, small=True)
    x, y, spread = draw(0.1, 0.9) * canvas.width, draw(0.1, 0.9) * canvas.height, draw(3.0, 7.0) * radius
    first, windows = canvas.units + 1, []
    base = _Surface(canvas, x, y, radius)
    for _ in range(draw.integer(12, 24)):
        if canvas.units >= MAX_UNITS:
            break
        px, py = x + draw(-1, 1) * spread * 1.6, y + draw(-1, 1) * spread * 0.6
        canvas.units += 1
        outline = [place(c, px, py, radius * draw(0.8, 1.2), draw.direction()) for c in thing.parts[0].contours]
        done = canvas.paint(outline, canvas.units, base.like(canvas, px, py))
        if done is not None:
            windows.append(done[0])
    _record(canvas, first, thing.category_id, True, [], windows)


def _develop(canvas: _Canvas) -> np.ndarray:
    """Light across the picture, lens blur, contrast and sensor noise; (H, W, 3) uint8."""
    draw, h, w, image = canvas.draw, canvas.height, canvas.width, canvas.rgb
    amount = draw(0.0, 0.3)
    x = (np.arange(w, dtype=F) * F(2.0 / w) - F(1.0)) * F(canvas.light[0] * amount)
    y = (np.arange(h, dtype=F) * F(2.0 / h) - F(1.0)) * F(canvas.light[1] * amount)
    image = image * (F(1.0) + x[None, :] + y[:, None])
    u = draw()
    for _ in range(0 if u < 0.1 else 1 if u < 0.75 else 2):
        image = blur(image)
    if draw.chance(0.06):  # black and white
        grey = image[0] * F(0.3) + image[1] * F(0.6) + image[2] * F(0.1)
        image = np.stack([grey, grey, grey])
    tint = [draw(0.88, 1.08) for _ in range(3)]
    gain, lift = draw(0.65, 1.1), draw(-12.0, 30.0)
    noise = draw.bytes(2 * image.size).reshape(2, h * w * 3)
    u = draw()
    grain = (noise[0].astype(F) + noise[1].astype(F) - F(255)).reshape(3, h, w) * F(0.004 + 0.07 * u * u)
    scale = np.array([t * gain for t in tint], dtype=F)[:, None, None]
    image = np.clip(image * scale + grain + F(lift + 0.5), F(0), F(255))
    return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))
