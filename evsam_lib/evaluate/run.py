"""A whole evaluation: what is asked of which image, the loop over batches, and the summary of what came out."""

import os
import platform
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evsam_lib import __version__, scores
from evsam_lib.data.coco import CocoImages
from evsam_lib.evaluate import parts
from evsam_lib.evaluate.batch import Job, load, measure, read_ahead
from evsam_lib.evaluate.metrics import mean_iou
from evsam_lib.evaluate.plan import plan_annotations, plan_detections
from evsam_lib.models.sam import Sam
from evsam_lib.models.weights import sha256
from evsam_lib.predict import BatchPredictor

__all__ = ["DATASETS", "PROMPTS", "evaluate", "merge"]

PROMPTS = ("gt-box", "points", "detector-box")
DATASETS = ("coco", "lvis", "sginw")


def evaluate(
    model: Sam,
    images: CocoImages,
    *,
    prompt: str = "gt-box",
    clicks: int = 1,
    detections=None,
    dataset: str = "coco",
    limit: int | None = None,
    keep_crowds: bool = True,
    inclusive_sizes: bool = True,
    min_area: float = 1,
    corner_clicks: bool = True,
    choose: str = "predicted_iou",
    refine: int = 0,
    pad_shards: int = 0,
    batch: int | None = None,
    workers: int | None = None,
    evaluator: str | None = None,
    out: str | Path | None = None,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
    weights: str | Path | None = None,
    progress: bool = False,
) -> dict | None:
    """Measures a model on images with annotations.

    Args:
        model: the model, on whatever device and in whatever dtype it is. Evaluation mode is set and put back.
        images: images with annotations in COCO's form.
        prompt: "gt-box", the annotation's own box; "points", clicks simulated against the annotation's mask; or
            "detector-box", the boxes of `detections`, all of them, whatever their score.
        clicks: number of clicks; "points" only.
        detections: "detector-box" only: `by_image[image_id]`, lists of {"image_id", "category_id", "bbox", "score"},
            boxes XYWH, as `evsam_lib.data.detections` reads them; the file at its `path` is noted.
        dataset: whose AP detector boxes are scored by: "coco", "lvis", or "sginw", which is COCO's, set by set.
        limit: stop after this many images: for annotations those that have objects, for detections any; in the order
            of the annotation file.
        keep_crowds: annotations with `iscrowd` count too (not for AP, where COCO says what crowds mean).
        inclusive_sizes: both bounds belong to a size class, so that an area on a bound counts twice.
        min_area: annotations whose `area` is smaller are left out.
        corner_clicks: a mask without a wrong pixel gets its next click all the same, a negative one at (0, 0), and may
            be lost by it; if False, the object is done.
        choose: of three masks, the one of highest "predicted_iou" (official), or of highest "stability", or what the
            "model" itself goes by (`Sam.quality`); "single" asks for one mask.
        refine: how often the chosen mask is fed back with its prompt. Officially never; in SAM's paper once, for boxes.
        pad_shards: as if this many processes had run with torch's DistributedSampler, which hands out the first images
            a second time until all processes have equally many: 8 for the authors' launch. 0 counts every image once.
        batch: images encoded together; None is 1 on a CPU and 16 on a GPU.
        workers: threads that read ahead; None is none on a CPU and up to 8 on a GPU.
        evaluator: of AP, see `evsam_lib.scores`; None is pycocotools for COCO, faster-coco-eval for LVIS.
        out: path of the result to be, which the caller writes. Given one, a part file beside it (`part_path`) holds
            what is done, image by image; it stays.
        shard: (i, n), do the i-th of n shares (from 1); n above 1 needs `out`.
        resume: go on with the part file that an earlier run with the same settings left; a run that several
            processes have finished is taken as it is.
        weights: file the model was read from, for the summary.
        progress: show a progress bar.

    Returns:
        {"summary": ..., "objects": ...}, ready for JSON. The summary has, for annotations, `mIoU` in percent and
        `counts`, each by size: "all", "small", "medium", "large" (the mIoU of an empty class is None), and for points
        `mIoU_after_click`, the same under "1", "2", ...; for detections `AP, AP50, AP75, AP_S, AP_M, AP_L`, and for
        LVIS `AP_r, AP_c, AP_f`, in percent; `skipped`, input that could not be used, and `noted`, used but odd, both
        counted by reason; and what the numbers depend on. Objects have `image_id, ann_id, area, iou` (percent) and for
        points `clicks`, a list of [x, y, label], and `iou_after_click`; detections `image_id, category_id, score, bbox,
        area`, and there is a third entry, "results", the detections in COCO's results form, with masks as run lengths.
        With several shards: None as long as others are not done, else the result of all.

    Raises:
        ValueError: an unknown prompt, data set or choice, clicks or limit below 1, an image or annotation that cannot
            be used, or a part file of other settings.
    """
    _check(prompt, dataset, clicks=clicks, limit=limit, batch=batch, detections=detections, shard=shard, out=out)
    on_cpu = model.device.type == "cpu"
    workers = (0 if on_cpu else min(8, os.cpu_count() or 1)) if workers is None else workers
    if prompt == "detector-box":
        lvis = dataset == "lvis"
        scores.check_scoring(evaluator or _default(dataset), lvis=lvis, annotations=images.annotations_json)
        plan = plan_detections(images, detections, limit=limit, pad_shards=pad_shards)
    else:
        left_out = {"keep_crowds": keep_crowds, "min_area": min_area}
        plan = plan_annotations(images, limit=limit, pad_shards=pad_shards, **left_out)
        if not plan.jobs:
            left = f"{plan.counts['tiny_left_out']} tiny ones and {plan.counts['crowds_left_out']} crowds were left out"
            raise ValueError(f"{images.annotations_json} has no object to score: {left}.")
    rules = {"keep_crowds": keep_crowds, "inclusive_sizes": inclusive_sizes, "min_area": min_area, "limit": limit}
    rules |= {"corner_clicks": corner_clicks, "choose": choose, "refine": refine, "pad_shards": pad_shards}
    skipped = Counter(getattr(images, "skipped", {})) + Counter(getattr(detections, "skipped", {}))
    settings = {"prompt": prompt, "clicks": clicks if prompt == "points" else None, "dataset": dataset}
    noted = Counter(getattr(images, "noted", {})) + Counter(getattr(detections, "noted", {}))
    settings |= plan.counts | {"skipped": dict(sorted(skipped.items())), "noted": dict(noted), "rules": rules}
    settings |= {"batch": batch or (1 if on_cpu else 16)} | _provenance(model, images, weights, detections)
    header = {"jobs": len(plan.jobs), "shard": list(shard), "image_ids": plan.image_ids, "twice": plan.twice}
    header |= {"settings": settings}
    predictor = BatchPredictor(model, choose=choose, refine=refine)
    if out is None:
        lines = []
        _run(predictor, images, plan.jobs, settings, lines.extend, workers=workers, progress=progress)
        return _finish(header, lines, evaluator=evaluator)
    if resume and shard == (1, 1) and (files := parts.finished(out, header)):
        return merge(files, annotations=images.annotations_json, evaluator=evaluator)
    done, part = parts.open_part(parts.part_path(out, shard), header, resume=resume)
    with part:
        shares = parts.share(plan.jobs, settings["batch"], shard, done)
        jobs = [job for share in shares for job in share]
        _run(predictor, images, jobs, settings, partial(parts.append, part), workers=workers, progress=progress)
    files = [parts.part_path(out, (number, shard[1])) for number in range(1, shard[1] + 1)]
    return None if parts.incomplete(files) else merge(files, annotations=images.annotations_json, evaluator=evaluator)


def _check(prompt: str, dataset: str, *, clicks, limit, batch, detections, shard, out) -> None:
    for what, given, known in (("prompt", prompt, PROMPTS), ("data set", dataset, DATASETS)):
        if given not in known:
            raise ValueError(f"Unknown {what} {given!r}, expected one of {', '.join(known)}.")
    if any(number is not None and number < 1 for number in (clicks, limit, batch)):
        raise ValueError(f"clicks, limit and batch must be at least 1, got {clicks}, {limit} and {batch}.")
    if (detections is None) == (prompt == "detector-box"):
        raise ValueError(f"Detections belong to prompt 'detector-box' and to no other, got prompt {prompt!r}.")
    if not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be i of n with 1 <= i <= n, got {shard[0]} of {shard[1]}.")
    if shard[1] > 1 and out is None:
        raise ValueError("Several shards meet in part files: they need `out`.")


def _run(predictor: BatchPredictor, images, jobs: list[Job], settings: dict, keep, *, workers, progress) -> None:
    """Does jobs, batch by batch; `keep` is called with the lines of each."""
    model, was_training = predictor.model, predictor.model.training
    model.eval()
    read = partial(load, images, model, masks=settings["prompt"] != "detector-box")
    size = settings["batch"]
    ahead = read_ahead(read, jobs, workers=workers, ahead=workers + size)
    way = {"prompt": settings["prompt"], "clicks": settings["clicks"] or 0}
    way |= {"corner_clicks": settings["rules"]["corner_clicks"]}
    bar = tqdm(total=len(jobs), desc=settings["prompt"], unit="image", disable=not progress)
    start = time.perf_counter()
    try:
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            loaded = list(islice(ahead, len(batch)))
            found = measure(predictor, loaded, **way)
            start, seconds = time.perf_counter(), (time.perf_counter() - start) / len(batch)
            keep(
                {"position": job.position, "seconds": round(seconds, 4), "noted": item.noted, "objects": objects}
                for job, item, objects in zip(batch, loaded, found, strict=True)
            )
            bar.update(len(batch))
    finally:
        bar.close()
        ahead.close()
        model.train(was_training)


def merge(files: list[Path], *, annotations: str | Path | None = None, evaluator: str | None = None) -> dict:
    """The result of a run whose shards are all done, in whatever order and by whatever machines.

    Args:
        files: the part files of all shards.
        annotations: file in COCO's form, for AP; None is the one that the shards were run with.
        evaluator: as for `evaluate`.

    Returns:
        what `evaluate` returns for one process.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: parts of different runs, or images that no part has.
    """
    header, lines = parts.join_parts(files)
    header["settings"] |= {} if annotations is None else {"annotations": str(annotations)}
    return _finish(header, lines, evaluator=evaluator)


def _finish(header: dict, lines: list[dict], *, evaluator: str | None) -> dict:
    """Scores all lines of a run. Masks leave the objects and become the results."""
    start, settings, twice = time.perf_counter(), header["settings"], set(header["twice"])
    objects = [record for line in lines for record in line["objects"]]
    objects += [record for record in objects if record["image_id"] in twice]
    result = {}
    if settings["prompt"] == "detector-box":
        keys = ("image_id", "category_id", "score", "segmentation")
        result["results"] = [{key: record[key] for key in keys} for record in objects]
        objects = [{key: value for key, value in record.items() if key != "segmentation"} for record in objects]
        summary = _average_precision(settings, result["results"], header["image_ids"], evaluator)
    else:
        summary = _scores(objects, settings["clicks"] or 0, inclusive_sizes=settings["rules"]["inclusive_sizes"])
    seconds = sum(line["seconds"] for line in lines) + time.perf_counter() - start
    noted = Counter(settings["noted"]) + Counter(reason for line in lines for reason in line["noted"])
    summary |= settings | {"noted": dict(sorted(noted.items())), "seconds": round(seconds, 3)}  # of all processes
    return {"summary": summary, "objects": objects} | result


def _scores(objects: list[dict], clicks: int, *, inclusive_sizes: bool) -> dict:
    areas = [record["area"] for record in objects]
    means, counts = mean_iou(areas, [record["iou"] for record in objects], inclusive_sizes=inclusive_sizes)
    found = {"mIoU": means, "counts": counts}
    if clicks:
        found["mIoU_after_click"] = {
            str(k + 1): mean_iou(areas, [r["iou_after_click"][k] for r in objects], inclusive_sizes=inclusive_sizes)[0]
            for k in range(clicks)
        }
    return found


def _average_precision(settings: dict, results: list[dict], image_ids, evaluator: str | None) -> dict:
    evaluator, lvis = evaluator or _default(settings["dataset"]), settings["dataset"] == "lvis"
    score = scores.lvis_ap if lvis else scores.coco_ap
    found = score(settings["annotations"], results, image_ids=image_ids, evaluator=evaluator)
    return found | {"detections": len(results), "evaluator": scores.check_scoring(evaluator, lvis=lvis)}


def _default(dataset: str) -> str:
    return (scores.LVIS_EVALUATORS if dataset == "lvis" else scores.COCO_EVALUATORS)[0]


def _provenance(model: Sam, images: CocoImages, weights: str | Path | None, detections) -> dict:
    files = {"weights": weights, "annotations": images.annotations_json}
    if detections is not None:
        files["detections_file"] = getattr(detections, "path", None)
    found = {"model": model.name, **getattr(model, "variant", {}), "images_dir": str(images.images_dir)}
    for name, path in files.items():
        found |= {name: None if path is None else str(path)}
        found |= {f"{name}_sha256": None if path is None else sha256(path)}
    return found | {
        "generated": images.generated,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "evsam": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
