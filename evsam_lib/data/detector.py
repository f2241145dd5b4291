"""A made-up detector: boxes with scores, made from true ones, in COCO's results format.

Stand-in for the files of ViTDet, YOLOv8 and Grounding DINO (paper Tables 4 and 5) in the mini profile; explained in
notebook 03. It misses objects, small ones more often, shifts the edges of the others, takes some twice or for another
category, and finds things where there are none. Scores follow the quality of a box, loosely.
"""

import hashlib
import json
import os
from pathlib import Path

from .files import read_json
from .shapes import Draw

__all__ = ["write_detections"]

VERSION = 1  # raised whenever the bytes of a file change
_STREAM = 1_000_000_007  # added to the seed: other draws than the scenes'
_SMALL = 32**2  # pixels; COCO's bound


def write_detections(path: str | Path, annotations_json: str | Path, *, seed: int, skill: float = 0.75) -> Path:
    """Writes what a detector might find, image by image in the order of the annotation file.

    The detections of an image depend on the seed, the skill, the image's number and its annotations alone. Beside the
    file lies `<name>.generated.json`, which says what it was made from.

    Args:
        path: file to make; reused if it already holds exactly this.
        annotations_json: of COCO or LVIS.
        seed: 0 or more.
        skill: from 0, which misses nearly half and places boxes badly, to 1, exact boxes of nearly all objects.

    Returns:
        path.

    Raises:
        FileNotFoundError: if the annotation file is missing.
        ValueError: if the skill is out of range or the annotation file unusable.
        FileExistsError: if path holds something that was not generated.
    """
    if not 0 <= skill <= 1 or seed < 0:
        raise ValueError(f"skill must be from 0 to 1 and seed 0 or more, got {skill} and {seed}.")
    path, source = Path(path), Path(annotations_json)
    content = read_json(source, "images", "annotations", "categories")
    wanted = {"generated_by": "evsam_lib.data.detector", "layout": "detections", "seed": seed, "skill": skill}
    wanted |= {"annotations_sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "version": VERSION}
    mark = path.with_suffix(".generated.json")
    if path.exists():
        told = json.loads(mark.read_text()) if mark.is_file() else {}
        if path.is_dir() or told.pop("sha256", None) != hashlib.sha256(path.read_bytes()).hexdigest():
            raise FileExistsError(f"{path} was not generated; expected no file or a generated one.")
        if told == wanted:
            return path
        path.unlink()  # before its mark: a crash in between must leave nothing that looks like a stranger's file
    text = json.dumps(_detect(content, seed, skill))
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    for file, words in ((mark, json.dumps(wanted, indent=1) + "\n"), (path, text)):
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        part.write_text(words)
        part.replace(file)
    return path


def _detect(content: dict, seed: int, skill: float) -> list[dict]:
    grouped: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    categories = sorted(category["id"] for category in content["categories"])
    found = []
    for image in content["images"]:
        look = _Look(Draw(seed + _STREAM, image["id"]), image, categories, skill)
        for annotation in grouped[image["id"]]:
            look.at(annotation)
        look.at_nothing()
        found += look.found
    return found


class _Look:
    """One image while it is looked at."""

    def __init__(self, draw: Draw, image: dict, categories: list[int], skill: float) -> None:
        self.draw, self.categories, self.skill = draw, categories, skill
        self.image_id, self.width, self.height = image["id"], image["width"], image["height"]
        self.found: list[dict] = []

    def at(self, annotation: dict) -> None:
        draw, skill, category = self.draw, self.skill, annotation["category_id"]
        x, y, w, h = annotation["bbox"]
        if annotation.get("iscrowd"):  # some of its members, which the annotation has as one
            for _ in range(draw.integer(1, 3)):
                part = [x + draw(0, 0.7) * w, y + draw(0, 0.7) * h, 0.3 * w, 0.3 * h]
                self._add(part, category, draw(0.1, 0.6))
            return
        seen = 0.55 + 0.43 * skill - (0.25 * (1 - skill) if annotation["area"] < _SMALL else 0)
        if not draw.chance(seen):
            return
        box, quality = self._shifted(annotation["bbox"], 0.5 * (1 - skill))
        score = min(0.99, 0.7 * quality * quality + 0.3 * draw())
        if draw.chance(0.1):  # right place, wrong name
            self._add(box, self._any_category(), 0.8 * score)
            score *= draw(0.3, 1.0)
        self._add(box, category, score)
        if draw.chance(0.15):  # found twice
            again, _ = self._shifted(annotation["bbox"], 0.1 + 0.5 * (1 - skill))
            self._add(again, category, score * draw(0.3, 0.8))

    def at_nothing(self) -> None:
        draw = self.draw
        for _ in range(draw.integer(1, 4)):
            w, h = draw(0.05, 0.4) * self.width, draw(0.05, 0.4) * self.height
            box = [draw(0, self.width - w), draw(0, self.height - h), w, h]
            self._add(box, self._any_category(), draw(0.02, 0.4))

    def _shifted(self, box: list[float], amount: float) -> tuple[list[float], float]:
        """The box with each edge moved by up to `amount` of its side, small moves more often; and its IoU with it."""
        x, y, w, h = box
        left, top, right, bottom = (amount * (self.draw() + self.draw() - 1) for _ in range(4))
        x0, y0 = min(max(x + left * w, 0), self.width - 1), min(max(y + top * h, 0), self.height - 1)
        x1 = min(max(x + w + right * w, x0 + 1), self.width)
        y1 = min(max(y + h + bottom * h, y0 + 1), self.height)
        common = max(min(x1, x + w) - max(x0, x), 0) * max(min(y1, y + h) - max(y0, y), 0)
        return [x0, y0, x1 - x0, y1 - y0], common / (w * h + (x1 - x0) * (y1 - y0) - common)

    def _any_category(self) -> int:
        return self.categories[self.draw.integer(0, len(self.categories) - 1)]

    def _add(self, box: list[float], category: int, score: float) -> None:
        box = [round(float(side), 2) for side in box]
        record = {"image_id": self.image_id, "category_id": category, "bbox": box, "score": round(score, 4)}
        self.found.append(record)
