"""What happens to some images: they are read ahead, encoded together, prompted together, and their masks measured."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from torch import Tensor

from evsam_lib.data.coco import CocoImage, CocoImages
from evsam_lib.data.files import picture_oddities
from evsam_lib.data.rle import encode_masks
from evsam_lib.evaluate.metrics import mask_iou
from evsam_lib.models.sam import Sam
from evsam_lib.predict import BatchPredictor
from evsam_lib.prompts import next_clicks, xywh_to_xyxy

__all__ = ["Job", "Loaded", "evaluate_image", "load", "measure", "read_ahead"]


@dataclass(frozen=True)
class Job:
    """What is asked about one image.

    Attributes:
        position: number of the job in the whole run.
        record: the image.
        asked: annotations to score, or detections to segment.
    """

    position: int
    record: CocoImage
    asked: list[dict]


@dataclass(frozen=True)
class Loaded:
    """A job with all that it needs.

    Attributes:
        asked: as in `Job`, N of them.
        pixels: (3, S, S) float, ready for the encoder.
        size: (H, W) of the image.
        masks: (N, H, W) bool, the annotations' masks; None for detections.
        noted: what is odd about the picture.
    """

    asked: list[dict]
    pixels: Tensor
    size: tuple[int, int]
    masks: np.ndarray | None = None
    noted: tuple[str, ...] = ()

    @property
    def truth(self) -> np.ndarray:
        """`masks`, where there must be some.

        Raises:
            ValueError: they were not read.
        """
        if self.masks is None:
            raise ValueError(f"{len(self.asked)} prompts came without the masks to measure by; read them with masks.")
        return self.masks


def load(images: CocoImages, model: Sam, job: Job, *, masks: bool) -> Loaded:
    """Reads the image of a job and, if asked to, decodes its annotations' masks.

    Raises:
        ValueError: image and annotations differ in size, or one of them cannot be read.
    """
    image = images.read(job.record)
    stated = (job.record.height, job.record.width)
    _check_size(job.record.image_id, image, stated)
    # Decoded column by column; clicks and IoUs go over it row by row, many times.
    gt = np.ascontiguousarray([images.mask(annotation) for annotation in job.asked]) if masks else None
    return Loaded(job.asked, model.preprocess(image), stated, gt, tuple(picture_oddities(job.record.path)))


def _check_size(image_id: int, image: np.ndarray, stated: tuple[int, int]) -> None:
    if image.shape[:2] != stated:
        raise ValueError(
            f"Image {image_id} has {image.shape[0]} x {image.shape[1]} pixels (H x W), its "
            f"annotations are made for {stated[0]} x {stated[1]}."
        )


def read_ahead(read: Callable[[Job], Loaded], jobs: Iterable[Job], *, workers: int, ahead: int) -> Generator[Loaded]:
    """`map(read, jobs)` with `workers` threads that are at most `ahead` jobs in front; without workers, just that."""
    if workers == 0:
        yield from map(read, jobs)
        return
    jobs = iter(jobs)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="evsam-read")
    try:
        waiting = deque(pool.submit(read, job) for job in islice(jobs, ahead))
        while waiting:
            loaded = waiting.popleft().result()
            waiting.extend(pool.submit(read, job) for job in islice(jobs, 1))
            yield loaded
    finally:
        pool.shutdown(cancel_futures=True)


def measure(
    predictor: BatchPredictor, batch: list[Loaded], *, prompt: str, clicks: int = 0, corner_clicks: bool = True
) -> list[list[dict]]:
    """Encodes B images together, decodes all their prompts together, and measures or packs the masks.

    Args:
        predictor: holds the model.
        batch: B images with what is asked about them.
        prompt: "gt-box", "points" or "detector-box".
        clicks: of every object, for "points".
        corner_clicks: see `evaluate`.

    Returns:
        B lists of records, as `evaluate` describes them; those of detections with their `segmentation`.
    """
    predictor.set_images([item.pixels for item in batch], [item.size for item in batch])
    owners = np.repeat(np.arange(len(batch)), [len(item.asked) for item in batch])  # (N,) of all prompts
    ways = {
        "gt-box": _boxes,
        "points": partial(_click, clicks=clicks, corner_clicks=corner_clicks),
        "detector-box": _segment,
    }
    records = iter(ways[prompt](predictor, batch, owners))
    return [list(islice(records, len(item.asked))) for item in batch]


def evaluate_image(
    predictor: BatchPredictor,
    image: np.ndarray,
    *,
    annotations: list[dict],
    masks: np.ndarray,
    clicks: int = 0,
    corner_clicks: bool = True,
) -> list[dict]:
    """Scores all objects of one image: the image is encoded once, and the prompts of all objects are decoded together.

    Args:
        predictor: holds the model.
        image: (H, W, 3) uint8, RGB.
        annotations: N annotations in COCO's form.
        masks: (N, H, W) bool, their masks.
        clicks: number of clicks; 0 prompts with the annotations' boxes.
        corner_clicks: see `evaluate`.

    Returns:
        N records, as `evaluate` describes them.

    Raises:
        ValueError: masks and image differ in size.
    """
    _check_size(annotations[0]["image_id"], image, masks.shape[1:])
    loaded = Loaded(annotations, predictor.model.preprocess(image), image.shape[:2], masks)
    prompt = "points" if clicks else "gt-box"
    return measure(predictor, [loaded], prompt=prompt, clicks=clicks, corner_clicks=corner_clicks)[0]


def _boxes(predictor: BatchPredictor, batch: list[Loaded], owners: np.ndarray) -> list[dict]:
    """Records of all annotations, by their own boxes."""
    asked = [annotation for item in batch for annotation in item.asked]
    place = _places(owners)
    ious = np.zeros(len(owners))
    for part, masks in predictor.masks(owners, boxes=_corners(asked)):
        ious[part] = mask_iou(masks, batch[owners[part.start]].truth[place[part]])
    return [_record(a) | {"iou": iou} for a, iou in zip(asked, ious.tolist(), strict=True)]


def _segment(predictor: BatchPredictor, batch: list[Loaded], owners: np.ndarray) -> list[dict]:
    """Records of all detections, with the mask of each as run lengths and its area in pixels."""
    asked = [detection for item in batch for detection in item.asked]
    records = []
    for part, masks in predictor.masks(owners, boxes=_corners(asked)):
        areas = np.count_nonzero(masks, axis=(1, 2)).tolist()
        for detection, area, rle in zip(asked[part], areas, encode_masks(masks), strict=True):
            kept = {key: detection[key] for key in ("image_id", "category_id", "score", "bbox")}
            records.append(kept | {"area": area, "segmentation": rle})
    return records


def _click(
    predictor: BatchPredictor, batch: list[Loaded], owners: np.ndarray, *, clicks: int, corner_clicks: bool
) -> list[dict]:
    """Clicks on all objects of all images side by side: click k of every object is decoded in one go."""
    truths = [item.truth for item in batch]
    preds = [np.zeros_like(truth) for truth in truths]
    place = _places(owners)
    points, labels = np.empty((len(owners), 0, 2), dtype=np.int64), np.empty((len(owners), 0), dtype=np.int64)
    objects = [_record(a) | {"iou": 0.0, "clicks": [], "iou_after_click": []} for item in batch for a in item.asked]
    active = np.arange(len(owners))
    for _ in range(clicks):
        if not corner_clicks:
            wrong = [(pred != truth).any(axis=(1, 2)) for pred, truth in zip(preds, truths, strict=True)]
            active = np.flatnonzero(np.concatenate(wrong))
        new = [
            next_clicks(truth, pred, points[owners == b])
            for b, (truth, pred) in enumerate(zip(truths, preds, strict=True))
        ]
        points = np.concatenate([points, np.concatenate([xy for xy, _ in new])[:, None]], axis=1)  # (N, k, 2)
        labels = np.concatenate([labels, np.concatenate([sign for _, sign in new])[:, None]], axis=1)  # (N, k)
        for part, masks in predictor.masks(owners[active], points=points[active], labels=labels[active]):
            rows = active[part]
            preds[owners[rows[0]]][place[rows]] = masks
        for i in active:
            objects[i]["clicks"].append([*points[i, -1].tolist(), int(labels[i, -1])])
        ious = np.concatenate([mask_iou(pred, truth) for pred, truth in zip(preds, truths, strict=True)])
        for record, iou in zip(objects, ious.tolist(), strict=True):
            record["iou"] = iou
            record["iou_after_click"].append(iou)
    return objects


def _places(owners: np.ndarray) -> np.ndarray:
    """(N,) position of each prompt among those of its own image."""
    return np.arange(len(owners)) - np.searchsorted(owners, owners)


def _corners(asked: list[dict]) -> np.ndarray:
    """(N, 4) XYXY of the boxes."""
    return xywh_to_xyxy(np.array([entry["bbox"] for entry in asked], dtype=np.float64).reshape(-1, 4))


def _record(annotation: dict) -> dict:
    return {"image_id": annotation["image_id"], "ann_id": annotation["id"], "area": annotation["area"]}
