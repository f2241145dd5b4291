"""Runs a detector over images and writes its boxes as the files of Tables 4 and 5 have them, COCO's results format.

The authors published such files for COCO and LVIS (Sec. 4.3), none for SGinW (Sec. 4.4), and no code that makes any.
Notebooks 11 and 12 read files unless they are told to run one of these:

- `yolov8`: Ultralytics, as in Table 5. Package and weights are AGPL-3.0, which the study's own licence is not: that is
  why the package is in no extra and has to be installed by whoever accepts its licence.
- `grounding-dino`: IDEA Research, as in Table 5 and Sec. 4.4, asked for the categories' names. Apache-2.0.
- `rt-detr`: trained on COCO's classes, in place of ViTDet (Table 4), which transformers has as a backbone only; any
  folder that transformers loads as an object detector will do. Apache-2.0.

Detectors and data sets are matched by the names of categories. A run that was stopped goes on where it was.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evsam_lib.compat import ensure_torchvision

from .coco import CocoImages

__all__ = ["DETECTORS", "Detector", "detect"]

Found = tuple[np.ndarray, np.ndarray, list[str]]  # boxes (N, 4) XYXY pixels, scores (N,), names of categories
Find = Callable[[np.ndarray], Found]

# Pascal VOC's words for COCO's categories; some detectors that were trained on COCO use them.
_ALIASES = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
_ALIASES |= {"diningtable": "dining table", "pottedplant": "potted plant"}
_TEXT_TOKENS = 256  # Grounding DINO reads no more at once (its max_text_len)


@dataclass(frozen=True)
class Detector:
    """A detector that can be run.

    Attributes:
        package: that runs it.
        install: what to install where it is missing.
        weights: that it is run with, unless others are given: a name that the package fetches itself.
        licence: of package and weights.
        load: (weights, names of categories, device) -> what finds the boxes of an (H, W, 3) uint8 RGB image.
    """

    package: str
    install: str
    weights: str
    licence: str
    load: Callable[[str, list[str], torch.device], Find]


def detect(
    images: CocoImages,
    path: str | Path,
    *,
    detector: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    min_score: float = 0.001,
    max_per_image: int = 100,
    limit: int | None = None,
) -> Path:
    """Runs a detector over images and writes its boxes for `Detections`. A finished file of the same run is kept.

    Beside the file, `<name>.detected.json` says what made it; `<name>.part` holds a run that is not done.

    Args:
        images: what to look at, and the categories to look for.
        path: JSON file to write.
        detector: a key of `DETECTORS`.
        weights: a file or folder, or another name that the detector's package knows; None is the detector's own.
        device: to run on.
        min_score: boxes of a lower score are left out.
        max_per_image: so many are kept of an image, those of highest score.
        limit: look at the first so many images only.

    Returns:
        path.

    Raises:
        ValueError: an unknown detector, or one that knows none of the categories.
        ImportError: its package is not installed.
        FileNotFoundError: its weights are neither here nor can they be fetched.
        FileExistsError: path was made otherwise, or a run that is not done was.
    """
    if detector not in DETECTORS:
        raise ValueError(f"Unknown detector {detector!r}, expected one of {', '.join(DETECTORS)}.")
    if not 0 <= min_score <= 1 or max_per_image < 1:
        raise ValueError(f"min_score must be from 0 to 1, max_per_image above 0, got {min_score} and {max_per_image}.")
    row, path = DETECTORS[detector], Path(path)
    run: dict[str, Any] = {"detector": detector, "weights": str(weights or row.weights), "licence": row.licence}
    run |= {"min_score": min_score, "max_per_image": max_per_image, "limit": limit}
    run |= {"annotations_sha256": hashlib.sha256(images.annotations_json.read_bytes()).hexdigest()}
    mark, part = path.with_suffix(".detected.json"), path.with_suffix(".part")
    if path.exists():
        if mark.is_file() and json.loads(mark.read_text()) == run:
            return path
        raise FileExistsError(f"{path} holds boxes that were made otherwise; remove it, or name another file.")
    find = _loaded(detector, run["weights"], images, torch.device(device))
    lines = _open_part(part, run)
    ids = {_plain(name): number for number, name in images.categories.items()}
    with part.open("a") as file:
        if not lines:
            file.write(json.dumps(run) + "\n")
        for image in list(images)[len(lines[1:]) : limit]:
            records = _records(image.image_id, find(images.read(image)), ids, min_score, max_per_image)
            file.write(json.dumps(records) + "\n")
            file.flush()
    records = [record for line in part.read_text().splitlines()[1:] for record in json.loads(line)]
    for target, content in ((mark, run), (path, records)):
        new = target.with_name(f".{target.name}.new")
        new.write_text(json.dumps(content))
        new.replace(target)
    part.unlink()
    return path


def _loaded(detector: str, weights: str, images: CocoImages, device: torch.device) -> Find:
    row = DETECTORS[detector]
    if importlib.util.find_spec(row.package) is None:
        raise ImportError(f"not run: {detector} needs {row.package}, which is not installed: {row.install}")
    if not images.categories:
        raise ValueError(f"{images.annotations_json} names no categories to look for.")
    try:
        return row.load(weights, list(images.categories.values()), device)
    except OSError as error:  # of both packages, whether a file is missing or the network
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"not run: {detector} has no weights {weights} and cannot fetch them: {reason}"
        ) from error


def _open_part(part: Path, run: dict) -> list[str]:
    """Whole lines of this run where it was stopped, the first of which says what it is."""
    lines = part.read_text().splitlines(keepends=True) if part.is_file() else []
    if lines and not lines[-1].endswith("\n"):  # killed while it wrote
        lines.pop()
    if lines and json.loads(lines[0]) != run:
        raise FileExistsError(
            f"{part} holds a run with other settings that is not done; remove it, or name another file."
        )
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("".join(lines))
    return lines


def _records(image_id: int, found: Found, ids: dict[str, int], min_score: float, max_per_image: int) -> list[dict]:
    """The best detections of one image in COCO's results format; those of other categories are left out."""
    records: list[dict[str, Any]] = []
    for (left, top, right, bottom), score, name in zip(*found, strict=True):
        category = ids.get(_plain(name))
        if category is not None and score >= min_score:
            box = [round(float(side), 3) for side in (left, top, right - left, bottom - top)]
            records.append(
                {"image_id": image_id, "category_id": category, "bbox": box, "score": round(float(score), 6)}
            )
    return sorted(records, key=lambda record: -record["score"])[:max_per_image]


def _plain(name: str) -> str:
    """A category's name without case and punctuation, in COCO's words."""
    words = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    return _ALIASES.get(words, words)


def _check_names(known: list[str], wanted: list[str], weights: str) -> None:
    if not {_plain(name) for name in known} & {_plain(name) for name in wanted}:
        raise ValueError(
            f"The detector {weights} knows none of the categories {', '.join(wanted[:5])}, "
            f"only {', '.join(known[:5])} and such; grounding-dino can be asked for any."
        )


def _yolov8(weights: str, names: list[str], device: torch.device) -> Find:
    ensure_torchvision()
    from ultralytics import YOLO

    model = YOLO(weights)
    _check_names(list(model.names.values()), names, weights)

    def find(image: np.ndarray) -> Found:
        # OpenCV's order of colours, which ultralytics expects of arrays; the rest as its own validation on COCO.
        options = {"conf": 0.001, "iou": 0.7, "max_det": 300, "device": str(device), "verbose": False}
        boxes = model.predict(np.ascontiguousarray(image[..., ::-1]), **options)[0].boxes
        labels = [model.names[int(label)] for label in boxes.cls.tolist()]
        return boxes.xyxy.cpu().numpy(), boxes.conf.cpu().numpy(), labels

    return find


def _object_detector(weights: str, names: list[str], device: torch.device) -> Find:
    ensure_torchvision()
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processor = AutoImageProcessor.from_pretrained(weights)
    model = AutoModelForObjectDetection.from_pretrained(weights).to(device).eval()
    _check_names(list(model.config.id2label.values()), names, weights)

    @torch.inference_mode()
    def find(image: np.ndarray) -> Found:
        outputs = model(**processor(images=image, return_tensors="pt").to(device))
        sizes = [image.shape[:2]]
        found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)[0]
        labels = [model.config.id2label[label] for label in found["labels"].tolist()]
        return found["boxes"].cpu().numpy(), found["scores"].cpu().numpy(), labels

    return find


def _grounding_dino(weights: str, names: list[str], device: torch.device) -> Find:
    ensure_torchvision()
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    processor = AutoProcessor.from_pretrained(weights)
    model: Any = GroundingDinoForObjectDetection.from_pretrained(weights)
    model.to(device).eval()
    captions = _captions(processor.tokenizer, names)

    @torch.inference_mode()
    def find(image: np.ndarray) -> Found:
        boxes, scores, labels = [], [], []
        for some, caption, tokens in captions:
            inputs = processor(images=image, text=caption, return_tensors="pt").to(device)
            outputs = model(**inputs)
            belief = outputs.logits[0].float().sigmoid().cpu().numpy()  # (Q, tokens)
            # A category's score is the mean over the tokens of its name, as in the authors' evaluation on COCO.
            by_name = np.stack([belief[:, list(own)].mean(axis=1) for own in tokens], axis=1)  # (Q, names)
            best = np.argsort(-by_name, axis=None, kind="stable")[:300]
            query, name = np.unravel_index(best, by_name.shape)
            boxes.append(_corners(outputs.pred_boxes[0].float().cpu().numpy()[query], image.shape[:2]))
            scores.append(by_name[query, name])
            labels += [some[index] for index in name]
        return np.concatenate(boxes), np.concatenate(scores), labels

    return find


def _captions(tokenizer, names: list[str]) -> list[tuple[list[str], str, list[range]]]:
    """Names in as few captions as can be read at once: the names, "cat. dog.", and the tokens of each name."""
    made, some, words, spans, count = [], [], "", [], 2  # the first and the last token are marks
    for name in names:
        plain = name.lower().replace("_", " ").strip()
        length = len(tokenizer(plain, add_special_tokens=False)["input_ids"])
        if some and count + length + 1 > _TEXT_TOKENS:
            made.append((some, words.strip(), spans))
            some, words, spans, count = [], "", [], 2
        spans.append(range(count - 1, count - 1 + length))
        some, words, count = [*some, name], f"{words}{plain}. ", count + length + 1  # and the full stop
    return [*made, (some, words.strip(), spans)]


def _corners(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, 4) centre and extent as shares of the image -> (N, 4) XYXY pixels."""
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    return corners * np.array([size[1], size[0], size[1], size[0]])


_EXTRA = "pip install 'evsam[detect]'"
DETECTORS: dict[str, Detector] = {
    "yolov8": Detector("ultralytics", "pip install ultralytics (AGPL-3.0)", "yolov8x.pt", "AGPL-3.0", _yolov8),
    "grounding-dino": Detector(
        "transformers", _EXTRA, "IDEA-Research/grounding-dino-base", "Apache-2.0", _grounding_dino
    ),
    "rt-detr": Detector("transformers", _EXTRA, "PekingU/rtdetr_v2_r101vd", "Apache-2.0", _object_detector),
}
