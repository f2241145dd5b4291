"""What a run asks of which image, decided before anything is computed, so that all its processes agree."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from evsam_lib.data.coco import CocoImages
from evsam_lib.evaluate.batch import Job

__all__ = ["Plan", "plan_annotations", "plan_detections"]

_COUNTS = ("images", "images_without_objects", "crowds_left_out", "tiny_left_out")


@dataclass(frozen=True)
class Plan:
    """What a run asks, whoever computes it.

    Attributes:
        jobs: the images to encode, in the order of the annotation file.
        counts: of images and of what was left out.
        image_ids: of the images that count, with and without objects; None for all of the file.
        twice: ids of the images whose records count twice, see `pad_shards`.
    """

    jobs: list[Job]
    counts: dict[str, int]
    image_ids: list[int] | None
    twice: list[int]


def plan_annotations(
    images: CocoImages, *, limit: int | None, keep_crowds: bool, min_area: float, pad_shards: int
) -> Plan:
    """Jobs of the images that have annotations to score; what is not scored is counted."""
    seen, jobs = Counter(), []
    for record in images:
        if seen["images"] == limit:
            break
        kept = _kept(record.annotations, seen, keep_crowds=keep_crowds, min_area=min_area)
        seen["images" if kept else "images_without_objects"] += 1
        if kept:
            jobs.append(Job(len(jobs), record, kept))
    return Plan(jobs, {key: seen[key] for key in _COUNTS}, None, _twice(images, limit, pad_shards))


def plan_detections(images: CocoImages, detections, *, limit: int | None, pad_shards: int) -> Plan:
    """Jobs of the images that have detections; the others count too, since what is to be found there is missed."""
    records = list(islice(images, limit))
    asked = [(record, detections.by_image.get(record.image_id, [])) for record in records]
    jobs = [Job(n, *pair) for n, pair in enumerate((record, found) for record, found in asked if found)]
    counts = {"images": len(records), "images_without_detections": len(records) - len(jobs)}
    image_ids = None if limit is None else [record.image_id for record in records]
    return Plan(jobs, counts, image_ids, _twice(images, limit, pad_shards))


def _twice(images: CocoImages, limit: int | None, pad_shards: int) -> list[int]:
    """The first images, as many as DistributedSampler repeats for so many processes."""
    count = min(len(images), limit or len(images))
    return [record.image_id for record in islice(images, -count % pad_shards if pad_shards else 0)]


def _kept(annotations: list[dict], seen: Counter, *, keep_crowds: bool, min_area: float) -> list[dict]:
    """Annotations to score; the others are counted in `seen`."""
    kept = []
    for annotation in annotations:
        if annotation["area"] < min_area:
            seen["tiny_left_out"] += 1
        elif annotation.get("iscrowd", 0) and not keep_crowds:
            seen["crowds_left_out"] += 1
        else:
            kept.append(annotation)
    return kept
