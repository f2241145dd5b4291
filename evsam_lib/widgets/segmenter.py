"""Segmenter: what a person at a picture does, as plain Python: clicks, boxes, objects, undo, export.

`PromptWidget` calls nothing else, so a script that calls it does exactly what a hand does (notebook 14). Each step
makes a new immutable state; undo takes the old one out of the drawer, with its answers, and computes nothing.
"""

import io
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from pycocotools import mask as coco_mask

from evsam_lib.data.rle import encode_masks
from evsam_lib.figures import show_boxes, show_image, show_masks, show_points
from evsam_lib.models.sam import Promptable
from evsam_lib.predict import Predictor
from evsam_lib.widgets.pictures import to_rgb
from evsam_lib.widgets.state import Answer, Item, State

__all__ = ["VIEW_SIDE", "Segmenter"]

VIEW_SIDE = 2048  # longest side of what is shown, pixels; larger pictures are answered at this size, exported at theirs
HISTORY = 200  # steps that can be undone
SUFFIXES = (".png", ".json", ".npz")


class Segmenter:
    """Objects on a picture, from clicks and boxes.

    Every method that can fail raises before it changes anything.

    Attributes:
        model: the model.
        image: (H, W, 3) uint8, or None before `set_image`.
        name: of the picture, for exports.
        view_hw: (h, w) at which masks are shown: the picture's size, at most `VIEW_SIDE` on the longest side.
        feed_back: whether a click on an object that has a mask gives that mask to the model as well.
        encode_ms: milliseconds that the picture's encoding took; once per picture.
        decode_ms: milliseconds of each answer since then, the latest last.
    """

    def __init__(self, model: Promptable):
        self.predictor = Predictor(model)
        self.image: np.ndarray | None = None
        self.name = ""
        self.feed_back = False
        self._start(State(), math.nan)

    @property
    def model(self) -> Promptable:
        return self.predictor.model

    @property
    def items(self) -> tuple[Item, ...]:
        """The objects; the last may be an empty one, waiting for its first click."""
        return self._state.items

    @property
    def current(self) -> Item:
        """The object that the next click is about."""
        return self._state.item

    @property
    def can_undo(self) -> bool:
        return bool(self._past)

    @property
    def can_redo(self) -> bool:
        return bool(self._future)

    @property
    def picture(self) -> np.ndarray:
        """`image`, where there must be one.

        Raises:
            ValueError: there is none.
        """
        if self.image is None:
            raise ValueError("There is no picture yet: choose or upload one, or call set_image(image).")
        return self.image

    @property
    def size_hw(self) -> tuple[int, int]:
        """(H, W) of the picture.

        Raises:
            ValueError: there is none.
        """
        return self.picture.shape[:2]

    @property
    def view_hw(self) -> tuple[int, int]:
        scale = min(1.0, VIEW_SIDE / max(self.size_hw))
        return max(round(self.size_hw[0] * scale), 1), max(round(self.size_hw[1] * scale), 1)

    def set_image(self, image: np.ndarray | Image.Image | str | Path | bytes, *, name: str = "") -> None:
        """Takes a picture and encodes it; objects of the previous one are gone.

        Args:
            image: whatever `pictures.to_rgb` takes: RGB, grey, RGBA or 16-bit arrays, PIL images, a path, a file's
                bytes; any size.
            name: for exports; left out, the file's name.

        Raises:
            ValueError: it is no picture.
            FileNotFoundError: no such file.
        """
        pixels = to_rgb(image)
        predictor, ms = _encoded(self.model, pixels)
        self.predictor, self.image = predictor, pixels
        self.name = name or (Path(image).name if isinstance(image, str | Path) else "picture")
        self._start(State(), ms)

    def set_model(self, model: Promptable) -> None:
        """Takes another model, encodes the picture with it and asks it all that was asked; steps before are forgotten.

        Masks that were fed back belong to the old model and are left out; choices among three masks too.

        Raises:
            ValueError: the model has no such prompts; the old one stays.
        """
        if self.image is None:
            self.predictor = Predictor(model)
            return
        predictor, ms = _encoded(model, self.image)
        answers = [self._ask(item, predictor) if item.points or item.box else None for item in self.items]
        items = tuple(replace(i, choice=None, answer=answer) for i, answer in zip(self.items, answers, strict=True))
        self.predictor = predictor
        self._start(replace(self._state, items=items), ms)
        self.decode_ms.extend(item.answer.ms for item in items if item.answer)

    def add_point(self, x: float, y: float, label: int = 1) -> Item:
        """A click on the current object, positive (1: this) or negative (0: not this); the mask is the model's best.

        Args:
            x: pixels of the picture, from the left; the first pixel is 0.
            y: pixels of the picture, from above.
            label: 1 or 0.

        Raises:
            ValueError: no picture, a place outside of it, another label, or more points than the model takes.
        """
        point = (*self._inside(x, y), _label(label))
        return self._answer(replace(self.current, points=(*self.current.points, point)))

    def set_box(self, x0: float, y0: float, x1: float, y1: float) -> Item:
        """A box around the current object, in place of an earlier one. Corners in any order; what sticks out is cut.

        Raises:
            ValueError: no picture, or a box without area inside it.
        """
        height, width = self.size_hw
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            raise ValueError(f"A box needs four numbers, got {x0}, {y0}, {x1}, {y1}.")
        (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
        box = float(max(x0, 0)), float(max(y0, 0)), float(min(x1, width)), float(min(y1, height))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"The box has no area inside the picture ({width} x {height} pixels): drag a larger one.")
        return self._answer(replace(self.current, box=box))

    def choose(self, choice: int | None) -> Item:
        """Takes one of the current object's three masks: 0, 1, 2, or None for the model's own best.

        Raises:
            ValueError: the object has no mask, or there is no such choice.
        """
        if self.current.answer is None:
            raise ValueError("There is no mask to choose yet: click on the picture first.")
        if choice not in (None, *range(len(self.current.answer.iou))):
            raise ValueError(f"A choice is 0, 1, 2 or None, got {choice!r}.")
        if choice != self.current.choice:
            self._commit(self._state.with_item(replace(self.current, choice=choice)))
        return self.current

    def preview(self, x: float, y: float) -> Answer:
        """What a single click would give; nothing changes.

        Raises:
            ValueError: no picture, or a place outside of it.
        """
        return self._ask(Item(0, points=((*self._inside(x, y), 1),)), self.predictor)

    def next_object(self) -> Item:
        """Turns to a new object. One that is empty already is used; no step of its own for undo."""
        if self._state.items[-1].answer is None:
            self._state = replace(self._state, current=len(self.items) - 1)
        else:
            fresh = Item(max(item.number for item in self.items) + 1)
            self._state = State((*self.items, fresh), len(self.items))
        return self.current

    def select(self, number: int) -> Item:
        """Turns to an object by its number; no step of its own for undo.

        Raises:
            ValueError: there is none of that number.
        """
        self._state = replace(self._state, current=self._index(number))
        return self.current

    def remove(self, number: int) -> None:
        """Removes an object by its number.

        Raises:
            ValueError: there is none of that number.
        """
        index = self._index(number)
        items = (*self.items[:index], *self.items[index + 1 :]) or (Item(1),)
        if items != self.items:
            self._commit(State(items, min(self._state.current - (self._state.current > index), len(items) - 1)))

    def clear(self) -> None:
        """Removes all objects; can be undone."""
        if self._state != State():
            self._commit(State())

    def undo(self) -> bool:
        """Takes back the last step; False if there is none."""
        return self._travel(self._past, self._future)

    def redo(self) -> bool:
        """Does again what was taken back; False if there is nothing."""
        return self._travel(self._future, self._past)

    def masked(self) -> list[Item]:
        """The objects that have a mask."""
        return [item for item in self.items if item.answer is not None]

    def masks(self) -> np.ndarray:
        """(N, H, W) bool at the picture's size, in the order of `masked()`."""
        empty = np.zeros((0, *self.size_hw), bool)
        return np.concatenate([empty, *(item.mask(self.size_hw)[None] for item in self.masked())])

    def labels(self) -> np.ndarray:
        """(H, W) uint8, or uint16 beyond number 255: each pixel has the number of its object, 0 where there is none.

        Where objects overlap the smaller one is on top.
        """
        masks, items = self.masks(), self.masked()
        high = max((item.number for item in items), default=0)
        labels = np.zeros(self.size_hw, np.uint8 if high < 256 else np.uint16)
        for index in np.argsort([-mask.sum() for mask in masks], kind="stable"):
            labels[masks[index]] = items[index].number
        return labels

    def coco(self) -> dict[str, Any]:
        """COCO's format: one image, one annotation per object with its mask as RLE, and how it was asked for."""
        height, width = self.size_hw
        image = {"id": 1, "file_name": self.name, "width": width, "height": height}
        annotations = [_annotation(item, self.size_hw) for item in self.masked()]
        info = {"description": f"masks by {self.model.name}"}
        categories = [{"id": 1, "name": "object"}]
        return {"info": info, "images": [image], "annotations": annotations, "categories": categories}

    def arrays(self) -> dict[str, np.ndarray]:
        """What the .npz holds: masks (N, H, W) bool, numbers (N,) int, predicted iou (N,) float32."""
        items = self.masked()
        numbers = np.array([item.number for item in items], np.int64)
        return {"masks": self.masks(), "numbers": numbers, "iou": np.array([item.iou for item in items], np.float32)}

    def encoded(self, suffix: str) -> bytes:
        """An export as a file's bytes: ".png" labels, ".json" COCO, ".npz" numpy.

        Raises:
            ValueError: there is no picture or no mask, or no such kind.
        """
        if suffix not in SUFFIXES:
            raise ValueError(f"Exports are {', '.join(SUFFIXES)}, got {suffix!r}.")
        if self.size_hw and not self.masked():
            raise ValueError("There is no mask to export yet: click on the picture first.")
        if suffix == ".json":
            return json.dumps(self.coco()).encode()
        file = io.BytesIO()
        if suffix == ".png":
            Image.fromarray(self.labels()).save(file, "PNG")
        else:
            np.savez_compressed(file, **self.arrays())  # pyrefly: ignore[bad-argument-type]: no array is allow_pickle
        return file.getvalue()

    def save(self, path: str | Path) -> Path:
        """Writes an export; the suffix says which, see `encoded`. Returns the path."""
        path = Path(path)
        path.write_bytes(self.encoded(path.suffix.lower()))
        return path

    def show(self, ax: Axes | None = None, *, items: tuple[Item, ...] | None = None, title: str = "") -> Axes:
        """Draws picture, masks and prompts with matplotlib, at the size of the view.

        Args:
            ax: where to draw; a new figure if None.
            items: `items` of an earlier moment; None for those of now.
            title: stands above.
        """
        height, width = self.view_hw
        picture = self.picture
        if picture.shape[:2] != self.view_hw:
            picture = np.asarray(Image.fromarray(picture).resize((width, height)))
        ax = show_image(picture, ax, title=title)
        scale = np.array([width, height]) / self.size_hw[::-1]
        there = [item for item in (self.items if items is None else items) if item.answer is not None]
        for item in sorted(there, key=lambda item: -item.mask(self.view_hw).sum()):
            show_masks(ax, item.mask(self.view_hw), colors=[item.color])
            if item.box:
                show_boxes(ax, np.array(item.box) * np.tile(scale, 2), colors=[item.color])
            if item.points:
                points = np.array(item.points)
                show_points(ax, points[:, :2] * scale, points[:, 2], size=60)
        return ax

    def _start(self, state: State, encode_ms: float) -> None:
        self._state, self._past, self._future = state, [], []
        self.encode_ms, self.decode_ms = encode_ms, []

    def _commit(self, state: State) -> None:
        self._past = [*self._past[1 - HISTORY :], self._state]
        self._state, self._future = state, []

    def _travel(self, source: list[State], target: list[State]) -> bool:
        if not source:
            return False
        target.append(self._state)
        self._state = source.pop()
        return True

    def _answer(self, item: Item) -> Item:
        answer = self._ask(item, self.predictor, self.current if self.feed_back else None)
        self._commit(self._state.with_item(replace(item, choice=None, answer=answer)))
        self.decode_ms.append(answer.ms)
        return self.current

    def _ask(self, item: Item, predictor: Predictor, before: Item | None = None) -> Answer:
        """The model's answer to an object's prompts, with the mask of `before` fed back."""
        start = time.perf_counter()
        points = np.array(item.points, np.float32).reshape(-1, 3)
        coords, labels = (points[:, :2], points[:, 2].astype(int)) if item.points else (None, None)
        last = before.answer.low_res[before.shown][None].cpu().numpy() if before and before.answer else None
        box = None if item.box is None else np.array(item.box)
        low_res, iou = predictor.predict_low_res(coords, labels, box, last)
        best = int(predictor.model.quality(low_res, iou).argmax())
        answer = Answer(predictor.model, low_res, iou.cpu().numpy(), best)
        answer.mask(best, self.view_hw)
        return replace(answer, ms=1e3 * (time.perf_counter() - start))

    def _inside(self, x: float, y: float) -> tuple[float, float]:
        height, width = self.size_hw
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"({x:g}, {y:g}) lies outside the picture, which has {width} x {height} pixels.")
        return float(x), float(y)

    def _index(self, number: int) -> int:
        for index, item in enumerate(self.items):
            if item.number == number:
                return index
        raise ValueError(
            f"There is no object {number}; there are {', '.join(str(item.number) for item in self.items)}."
        )


def _encoded(model: Promptable, image: np.ndarray) -> tuple[Predictor, float]:
    """A predictor with the image set, and the milliseconds that took."""
    start = time.perf_counter()
    predictor = Predictor(model)
    predictor.set_image(image)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return predictor, 1e3 * (time.perf_counter() - start)


def _label(label: int) -> int:
    if label not in (0, 1):
        raise ValueError(f"A click is 1 (this) or 0 (not this), got {label!r}.")
    return int(label)


def _annotation(item: Item, hw: tuple[int, int]) -> dict[str, Any]:
    (rle,) = encode_masks(item.mask(hw)[None])
    return {
        "id": item.number,
        "image_id": 1,
        "category_id": 1,
        "segmentation": rle,
        "area": int(coco_mask.area(rle)),
        "bbox": [float(v) for v in coco_mask.toBbox(rle)],
        "iscrowd": 0,
        "predicted_iou": round(item.iou, 4),
        "prompt": {"points": [list(point) for point in item.points], "box": item.box and list(item.box)},
    }
