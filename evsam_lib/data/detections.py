"""Boxes that a detector found, from a file in COCO's results format, indexed once by image.

Paper: Sec. 4.3 prompts with the boxes of ViTDet (Table 4), YOLOv8 and Grounding DINO (Table 5), Sec. 4.4 with those of
Grounding DINO. Explained in notebook 03. The official evaluation uses every box of the file, without a threshold, and
scans the whole file for every image; so do the defaults here, but the scan is made once. Boxes lie in arrays, 56 bytes
each: LVIS's file has 300 for each of 19,809 images.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .coco import CocoImages
from .files import excerpt, is_finite, why_absent

__all__ = ["Detections"]

_KEYS = {"image_id", "category_id", "bbox", "score"}
_NO_IMAGE = "detection of an image that the annotation file does not list"
_NO_CATEGORY = "detection of a category that the annotation file does not list"


class Detections:
    """Detections of the images of an annotation file. `len` is the number of usable ones.

    Attributes:
        path: of the file.
        by_image: {image id: its detections, a list in the order of the file}, for every image of the annotation file;
            a detection is {"image_id", "category_id": int, "bbox": [x, y, w, h] in pixels, "score": float}.
        skipped: {reason: count} of detections that are left out.
        noted: {reason: count} of detections that are odd, but used as the official evaluation uses them.
    """

    def __init__(
        self, json_path: str | Path, images: CocoImages, *, min_score: float = 0.0, max_per_image: int | None = None
    ) -> None:
        """Reads and indexes the file.

        Args:
            json_path: a JSON list of {"image_id", "category_id", "bbox" in XYWH, "score"}; more keys do not matter.
            images: whose images and categories the detections are of.
            min_score: leave out detections of a lower score; 0 keeps all.
            max_per_image: keep this many of an image, the best by score, the first of equals; None keeps all.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no list of detections, none of them is of the annotation file's images or categories,
                or an option is out of range.
        """
        if max_per_image is not None and max_per_image < 1:
            raise ValueError(f"max_per_image must be at least 1 or None, got {max_per_image}.")
        self.path = Path(json_path)
        read, skipped, total = _read(self.path, images)
        for reason, of in ((_NO_IMAGE, "images"), (_NO_CATEGORY, "categories")):
            if total and skipped[reason] == total:
                raise ValueError(
                    f"None of the {total} detections in {self.path} is of the {of} of {images.annotations_json}: "
                    "the two files belong to different data sets."
                )
        if min_score:
            read = _keep(read, read[2] >= min_score, skipped, f"detection with a score below {min_score:g}")
        if max_per_image is not None:
            best = _best(read[0], read[2], max_per_image)
            read = _keep(read, best, skipped, f"detection beyond the {max_per_image} best of its image")
        order = np.argsort(read[0], kind="stable")
        positions, self._categories, self._scores, self._boxes_xywh = (column[order] for column in read)
        self._starts = np.searchsorted(positions, np.arange(len(images) + 1))
        self._position = {image.image_id: position for position, image in enumerate(images)}
        self.by_image: Mapping[int, list[dict]] = _ByImage(self)
        self.skipped: dict[str, int] = dict(+skipped)
        self.noted: dict[str, int] = dict(+_oddities(positions, self._boxes_xywh, images))

    def __len__(self) -> int:
        return len(self._scores)

    def of(self, image_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The N detections of an image, in the order of the file.

        Returns:
            boxes (N, 4) float64, XYXY pixels; scores (N,) float64; category ids (N,) int64.

        Raises:
            KeyError: the annotation file has no such image.
        """
        chosen = self._slice(image_id)
        boxes = self._boxes_xywh[chosen].copy()
        boxes[:, 2:] += boxes[:, :2]
        return boxes, self._scores[chosen].copy(), self._categories[chosen].copy()

    def _slice(self, image_id: int) -> slice:
        position = self._position[image_id]
        return slice(int(self._starts[position]), int(self._starts[position + 1]))


class _ByImage(Mapping):
    """Makes the records of an image when they are asked for."""

    def __init__(self, detections: Detections) -> None:
        self._all = detections

    def __getitem__(self, image_id: int) -> list[dict]:
        chosen = self._all._slice(image_id)
        columns = (self._all._categories, self._all._boxes_xywh, self._all._scores)
        rows = zip(*(column[chosen].tolist() for column in columns), strict=True)
        return [{"image_id": image_id, "category_id": c, "bbox": box, "score": score} for c, box, score in rows]

    def __iter__(self) -> Iterator[int]:
        return iter(self._all._position)

    def __len__(self) -> int:
        return len(self._all._position)


def _read(path: Path, images: CocoImages) -> tuple[tuple[np.ndarray, ...], Counter, int]:
    """Position of the image, category, score and box (4,) of each usable detection; what was left out; how many all."""
    if not path.is_file():
        raise FileNotFoundError(f"Detection file {path} {why_absent(path)}.")
    position = {image.image_id: index for index, image in enumerate(images)}
    numbers, values, skipped, taken = array("q"), array("d"), Counter(), object()

    def take(record: dict) -> object:
        """Called for every JSON object as soon as it is read, so that no list of records ever exists."""
        if not record.keys() >= _KEYS:
            return record
        reason = _unusable(record, position, images.categories)
        if reason:
            skipped[reason] += 1
        else:
            numbers.extend((position[record["image_id"]], int(record["category_id"])))
            values.extend((record["score"], *record["bbox"]))
        return taken

    try:
        content = json.loads(path.read_bytes(), object_hook=take)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are no text
        raise ValueError(f"Detection file {path} is not valid JSON: {excerpt(error)}.") from error
    if not isinstance(content, list):
        raise ValueError(f"Detection file {path} must be a JSON list of detections, got {type(content).__name__}.")
    for index, record in enumerate(content):
        if record is not taken:
            lacks = ", ".join(sorted(_KEYS - set(record))) if isinstance(record, dict) else "everything"
            raise ValueError(f"Detection {index} in {path} is {excerpt(record, 60)}, which lacks {lacks}.")
    if len(numbers) // 2 + sum(skipped.values()) != len(content):
        raise ValueError(f"A detection in {path} holds another one, expected a flat list.")
    keys, rows = np.frombuffer(numbers, np.int64).reshape(-1, 2), np.frombuffer(values, np.float64).reshape(-1, 5)
    return (keys[:, 0], keys[:, 1], rows[:, 0], rows[:, 1:]), skipped, len(content)


def _unusable(record: dict, position: dict, categories: dict) -> str | None:
    """Why a detection cannot be used; None if it can."""
    image_id, category_id, box, score = record["image_id"], record["category_id"], record["bbox"], record["score"]
    if not isinstance(image_id, int | str) or image_id not in position:
        return _NO_IMAGE
    if not isinstance(category_id, int) or abs(category_id) >= 2**63 or (categories and category_id not in categories):
        return _NO_CATEGORY
    if not is_finite(score):
        return "detection whose score is no finite number"
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)) or not is_finite(sum(map(abs, box))):
        return "detection whose box is not four finite numbers"
    return None


def _keep(read: tuple[np.ndarray, ...], mask: np.ndarray, skipped: Counter, reason: str) -> tuple[np.ndarray, ...]:
    skipped[reason] += int(np.count_nonzero(~mask))
    return tuple(column[mask] for column in read)


def _best(positions: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """(N,) bool: whether a detection is among the `count` best of its image."""
    order = np.lexsort((-scores, positions))  # by image, then best first; stable
    rank = np.arange(len(order)) - np.searchsorted(positions[order], positions[order])
    found = np.empty(len(order), dtype=bool)
    found[order] = rank < count
    return found


def _oddities(positions: np.ndarray, boxes_xywh: np.ndarray, images: CocoImages) -> Counter:
    sizes = np.array([(image.width, image.height) for image in images], dtype=np.float64).reshape(-1, 2)[positions]
    start, extent = boxes_xywh[:, :2], boxes_xywh[:, 2:]
    flat = (extent <= 0).any(axis=1)
    outside = ((start >= sizes) | (start + extent <= 0)).any(axis=1) & ~flat
    return Counter(
        {
            "detection whose box has no area": int(flat.sum()),
            "detection whose box lies outside its image": int(outside.sum()),
        }
    )
