"""The study's look: one matplotlib style, and the few drawings that notebooks share. Not part of the paper.

Images stay pictures: no axes, one thin frame. Objects take the colours of Okabe and Ito, which people with any common
colour vision tell apart. A positive point is a green disc with a plus, a negative one a red-orange square with a minus,
so that they differ in shape as well. Notebook 00_start_here shows them all.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

__all__ = ["PALETTE", "curve", "panel", "show_boxes", "show_image", "show_masks", "show_points", "split_bar", "style"]

# Okabe and Ito (2008), "Color Universal Design"; their black is left to text and axes.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
POSITIVE, NEGATIVE = PALETTE[2], PALETTE[5]
INK, FAINT = "#22282F", "#D5D9DE"

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#8A929B",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.figsize": (7.0, 4.0),
    "font.family": "DejaVu Sans",  # comes with matplotlib: never missing, and the same everywhere
    "font.size": 10,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
    "xtick.color": "#4A525B",
    "xtick.labelsize": 9,
    "ytick.color": "#4A525B",
    "ytick.labelsize": 9,
}


def style() -> AbstractContextManager:
    """The study's matplotlib style, for `with style():`; nothing outside the block changes."""
    return plt.rc_context(_STYLE)


def show_image(image: np.ndarray, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Shows a picture without axes.

    Args:
        image: (H, W, 3) uint8 RGB, or (H, W) any number or bool, shown in greys.
        ax: where to draw; a new figure if None.
        title: stands above, at the left.

    Returns:
        The axes, in pixels: masks, points and boxes of the image can be drawn on them.

    Raises:
        ValueError: the array is no picture.
    """
    image = np.asarray(image)
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 3):
        raise ValueError(f"image has shape {image.shape}; expected (H, W, 3) or (H, W)")
    if ax is None:
        _, ax = plt.subplots(figsize=(5.0, 5.0 * image.shape[0] / image.shape[1]))
    ax.imshow(image, cmap="gray" if image.ndim == 2 else None)
    _picture_axes(ax)
    if title:
        ax.set_title(title, fontsize="medium")  # pictures are narrow; a sentence should fit above one
    return ax


def show_masks(
    ax: Axes, masks: np.ndarray, *, colors: Sequence[str] = PALETTE, alpha: float = 0.45, outline: float = 1.6
) -> Axes:
    """Lays masks over a picture, each with its colour and outline; colours repeat after the last one.

    Args:
        ax: axes that show the picture, in its pixels.
        masks: (N, H, W) or (H, W) bool.
        colors: taken in turn, one per mask.
        alpha: opacity of the fill, 0 to 1.
        outline: width of the outline, points; 0 for none.

    Raises:
        ValueError: the masks have another shape.
    """
    masks = np.asarray(masks, dtype=bool)
    if masks.ndim not in (2, 3):
        raise ValueError(f"masks have shape {masks.shape}; expected (N, H, W) or (H, W)")
    masks = masks.reshape(-1, *masks.shape[-2:])
    height, width = masks.shape[-2:]
    # Large masks first: a small object within a large one stays on top.
    for index in np.argsort(-masks.sum((1, 2)), kind="stable"):
        mask, rgb = masks[index], to_rgb(colors[index % len(colors)])
        if not mask.any():
            continue
        fill = np.zeros((height, width, 4), np.float32)
        fill[mask] = (*rgb, alpha)
        ax.imshow(fill, interpolation="nearest")
        if outline:
            # A rim of False closes the outline of a mask that touches the border.
            field = np.pad(mask, 1).astype(np.float32)
            x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
            ax.contour(x, y, field, levels=[0.5], colors=["white"], linewidths=outline + 1.2, alpha=0.7)
            ax.contour(x, y, field, levels=[0.5], colors=[rgb], linewidths=outline)
    _keep_to_image(ax, height, width)
    return ax


def show_points(ax: Axes, points: np.ndarray, labels: np.ndarray, *, size: float = 110.0) -> Axes:
    """Marks clicks: a positive one is a green disc with a plus, a negative one a red-orange square with a minus.

    Args:
        ax: axes that show the picture, in its pixels.
        points: (P, 2) float, XY pixels of the picture.
        labels: (P,) int, 1 positive or 0 negative.
        size: area of a mark, square points.

    Raises:
        ValueError: points and labels do not go together.
    """
    points, labels = np.asarray(points, float), np.asarray(labels)
    if points.ndim != 2 or points.shape[1] != 2 or labels.shape != points.shape[:1]:
        raise ValueError(f"points have shape {points.shape}, labels {labels.shape}; expected (P, 2) and (P,)")
    for label, color, frame, sign in ((1, POSITIVE, "o", "+"), (0, NEGATIVE, "s", "_")):
        chosen = points[labels == label]
        if len(chosen):
            x, y = chosen.T
            ax.scatter(x, y, s=size, c=color, marker=frame, edgecolors="white", linewidths=1.4, zorder=5)
            ax.scatter(x, y, s=0.38 * size, c="white", marker=sign, linewidths=1.6, zorder=6)
    return ax


def show_boxes(ax: Axes, boxes: np.ndarray, *, colors: Sequence[str] = PALETTE, width: float = 1.8) -> Axes:
    """Draws boxes as dashed frames with a light edge, visible on light and dark ground; colours as in `show_masks`.

    Args:
        ax: axes that show the picture, in its pixels.
        boxes: (N, 4) or (4,) float, XYXY pixels of the picture.
        colors: taken in turn, one per box.
        width: of the line, points.

    Raises:
        ValueError: the boxes have another shape.
    """
    boxes = np.asarray(boxes, float)
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4:
        raise ValueError(f"boxes have shape {boxes.shape}; expected (N, 4) or (4,)")
    for index, (left, top, right, bottom) in enumerate(boxes.reshape(-1, 4)):
        rim = [patheffects.withStroke(linewidth=width + 1.6, foreground="white", alpha=0.8)]
        frame = Rectangle((left, top), right - left, bottom - top, fill=False, linestyle=(0, (4, 2)), linewidth=width)
        frame.set(edgecolor=colors[index % len(colors)], path_effects=rim, zorder=4)
        ax.add_patch(frame)
    return ax


def panel(
    images: Sequence[np.ndarray], titles: Sequence[str] = (), columns: int = 4, *, width: float = 2.6
) -> tuple[Figure, np.ndarray]:
    """Shows pictures side by side, in rows.

    Args:
        images: pictures as `show_image` takes them, of any sizes.
        titles: one per picture, or none.
        columns: pictures in a row, at most.
        width: of one picture, inches.

    Returns:
        The figure and (len(images),) array of axes, in the order of the pictures.

    Raises:
        ValueError: there is no picture, or not one title for each.
    """
    if not len(images) or (len(titles) and len(titles) != len(images)):
        raise ValueError(f"{len(images)} images and {len(titles)} titles; expected images, and as many titles or none")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    tall = [np.shape(image)[0] / np.shape(image)[1] for image in images]
    heights = [width * max(tall[i : i + columns]) + (0.3 if len(titles) else 0.0) for i in range(0, len(tall), columns)]
    figure, grid = plt.subplots(
        rows, columns, figsize=(columns * width, sum(heights)), height_ratios=heights, squeeze=False
    )
    axes = grid.ravel()
    for spare in axes[len(images) :]:
        spare.remove()
    for ax, image, title in zip(axes, images, titles or [""] * len(images), strict=False):
        show_image(image, ax, title=title)
    return figure, axes[: len(images)]


def curve(ax: Axes, frame: pd.DataFrame, x: str, y: str, *, window: int = 1, label: str | None = None) -> Axes:
    """Draws a training curve: every value faintly, and their running median, which a few wild steps do not move.

    Args:
        ax: where to draw; further curves take further colours.
        frame: one row per step, in order.
        x: name of the column to the right.
        y: name of the column upwards.
        window: steps the median runs over; 1 draws the values themselves.
        label: name in the legend; `y` if None.
    """
    middle = frame[y].rolling(window, center=True, min_periods=1).median()
    (line,) = ax.plot(frame[x], middle, label=y if label is None else label)
    if window > 1:
        ax.plot(frame[x], frame[y], color=line.get_color(), alpha=0.25, linewidth=0.8, label="_all values")
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    return ax


def split_bar(ax: Axes, seconds: Mapping[str, float]) -> Axes:
    """Draws where a step's time goes: one bar, a piece for each part, with its share where there is room.

    Args:
        ax: where to draw, wide and low.
        seconds: of every part, in order.
    """
    left, total = 0.0, sum(seconds.values())
    for color, (part, value) in zip(PALETTE, seconds.items(), strict=False):
        ax.barh(0, value, left=left, height=0.8, color=color, label=part)
        if value > 0.06 * total:
            ax.text(left + value / 2, 0, f"{value / total:.0%}", ha="center", va="center", color="white", weight="bold")
        left += value
    ax.set(yticks=[], xlabel="seconds a step (median)", xlim=(0, left or 1))
    ax.grid(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return ax


def _picture_axes(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.8)


def _keep_to_image(ax: Axes, height: int, width: int) -> None:
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
