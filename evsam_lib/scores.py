"""Average precision of instance masks: COCO's and LVIS's numbers, from a results file.

Tables 4 and 5 (notebooks 10 and 11) and SGinW (notebook 12). Nothing is matched here: pycocotools scores COCO,
faster-coco-eval scores LVIS, whose own package fails on NumPy 2; the tests hold them and hotcoco, a fast third, equal.
What is ours is what the three need alike: areas that come from masks and not from boxes, LVIS's 300 detections an
image, scores of some images only, results that belong to the annotations.
"""

import contextlib
import importlib
import importlib.metadata
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from evsam_lib.data.files import check_segmentation, has_no_mask, read_json

__all__ = ["check_scoring", "coco_ap", "lvis_ap"]

COCO_EVALUATORS = ("pycocotools", "faster-coco-eval", "hotcoco")
LVIS_EVALUATORS = ("faster-coco-eval", "hotcoco")
LVIS_MAX_DETECTIONS = 300  # an image, over all categories (Gupta et al. 2019; lvis/results.py)
_EXTRA = {"faster-coco-eval": "eval", "hotcoco": "dev"}
_COCO_NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")  # the order of COCO's summary
_LVIS_NAMES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_S": "APs", "AP_M": "APm", "AP_L": "APl"}
_LVIS_NAMES |= {"AP_r": "APr", "AP_c": "APc", "AP_f": "APf"}


def coco_ap(
    annotations: str | Path,
    results: list[dict],
    *,
    image_ids: list[int] | None = None,
    evaluator: str = "pycocotools",
) -> dict[str, float | None]:
    """COCO's AP of masks: up to 100 detections of a category in an image, IoU 0.50 to 0.95.

    Args:
        annotations: file in COCO's form.
        results: detections in COCO's results form, with `image_id, category_id, score, segmentation` (compressed run
            lengths). A `bbox` is not looked at: areas come from masks. The list and its records stay as they are.
        image_ids: score these images only; None for all of the file.
        evaluator: "pycocotools", "faster-coco-eval" or "hotcoco"; they agree.

    Returns:
        `AP, AP50, AP75, AP_S, AP_M, AP_L` in percent; None where there is no object to find.

    Raises:
        ValueError: an unknown evaluator, an unusable file, or a result that does not belong to it.
        ImportError: the evaluator is not installed.
    """
    check_scoring(evaluator, lvis=False)
    truth = _truth(annotations, lvis=False)
    results = _checked(truth, results, image_ids)
    if evaluator == "hotcoco":
        stats = _hotcoco(truth, results, image_ids, lvis=False).stats
    else:
        stats = _evaluate(evaluator, truth, results, image_ids).stats
    return _percent(dict(zip(_COCO_NAMES, stats, strict=False)))


def lvis_ap(
    annotations: str | Path,
    results: list[dict],
    *,
    image_ids: list[int] | None = None,
    evaluator: str = "faster-coco-eval",
) -> dict[str, float | None]:
    """LVIS's AP of masks: the 300 best detections of an image, on categories that were looked for in it.

    Args:
        annotations: file in LVIS's form, with frequencies of categories and, of images, `neg_category_ids` and
            `not_exhaustive_category_ids`.
        results: as for `coco_ap`.
        image_ids: as for `coco_ap`.
        evaluator: "faster-coco-eval" or "hotcoco"; they agree.

    Returns:
        `AP, AP50, AP75, AP_S, AP_M, AP_L` and, for rare, common and frequent categories, `AP_r, AP_c, AP_f`, in
        percent; None where there is no object to find.

    Raises:
        ValueError: an unknown evaluator, an unusable file, or a result that does not belong to it.
        ImportError: the evaluator is not installed.
    """
    check_scoring(evaluator, lvis=True)
    truth = _truth(annotations, lvis=True)
    results = _looked_for(truth, _best(_checked(truth, results, image_ids)))
    if evaluator == "hotcoco":
        stats = _hotcoco(truth, results, image_ids, lvis=True).get_results()
        return _percent({ours: stats[theirs] for ours, theirs in _LVIS_NAMES.items()})
    stats = _evaluate(evaluator, truth, results, image_ids, lvis=True).all_stats
    return _percent(dict(zip((*_COCO_NAMES, "AP_r", "AP_c", "AP_f"), (*stats[:6], *stats[-3:]), strict=True)))


def check_scoring(evaluator: str, *, lvis: bool, annotations: str | Path | None = None) -> str:
    """Makes sure that there will be a score, before hours are spent on results.

    Args:
        evaluator: its name.
        lvis: the score is LVIS's.
        annotations: file to look into, if one is given.

    Returns:
        the evaluator's name and version.

    Raises:
        ValueError: no evaluator of this score, or an unusable file.
        ImportError: the evaluator is not installed.
    """
    known = LVIS_EVALUATORS if lvis else COCO_EVALUATORS
    if evaluator not in known:
        score = "LVIS's AP" if lvis else "COCO's AP"
        raise ValueError(f"{evaluator!r} is no evaluator of {score}, expected one of {', '.join(known)}.")
    if annotations is not None:
        _truth(annotations, lvis=lvis)
    try:
        return f"{evaluator} {importlib.metadata.version(evaluator)}"
    except importlib.metadata.PackageNotFoundError as error:
        source = f"evsam[{_EXTRA[evaluator]}]" if evaluator in _EXTRA else "evsam"
        raise ImportError(f"{evaluator} is not installed; it comes with {source}.") from error


def _truth(annotations: str | Path, *, lvis: bool) -> dict:
    truth = read_json(Path(annotations), "images", "annotations", "categories")
    if lvis and any("frequency" not in category for category in truth["categories"]):
        raise ValueError(f"Categories in {annotations} lack 'frequency': it is no LVIS file, score it as COCO.")
    # A box without a mask, which no prediction could match, is left out as in CocoImages, which counts it.
    masks = [annotation for annotation in truth["annotations"] if not has_no_mask(annotation.get("segmentation"))]
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for annotation in masks:  # pycocotools would count masks of another size as missed, or read past their end
        if annotation["image_id"] in sizes:
            where = f"annotation {annotation['id']} in {annotations}"
            check_segmentation(annotation["segmentation"], *sizes[annotation["image_id"]], where=where)
    truth["annotations"] = [{"iscrowd": 0} | annotation for annotation in masks]  # LVIS states no iscrowd
    return truth


def _checked(truth: dict, results: list[dict], image_ids: list[int] | None) -> list[dict]:
    """Copies without boxes, of the images to score. Evaluators would read on with wrong numbers where this stops."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    wanted = None if image_ids is None else set(image_ids)
    kept = []
    for number, result in enumerate(results):
        problem = _problem(result, sizes, categories)
        if problem:
            raise ValueError(f"Result {number} of {len(results)} cannot be scored: {problem}.")
        if wanted is None or result["image_id"] in wanted:
            kept.append({key: result[key] for key in ("image_id", "category_id", "score", "segmentation")})
    return kept


def _problem(result: dict, sizes: dict[int, list[int]], categories: set[int]) -> str | None:
    try:
        if result["image_id"] not in sizes:
            return f"image {result['image_id']} is not in the annotation file"
        if result["category_id"] not in categories:
            return f"category {result['category_id']} is not in the annotation file"
        if not math.isfinite(result["score"]):
            return f"its score is {result['score']}"
        size = sizes[result["image_id"]]
        if list(result["segmentation"]["size"]) != size:
            return f"its mask has the size {result['segmentation']['size']}, image {result['image_id']} has {size}"
    except (KeyError, TypeError) as error:
        return f"it needs image_id, category_id, score and a segmentation of run lengths ({error!r})"
    return None


def _best(results: list[dict]) -> list[dict]:
    """The 300 of highest score of every image, the first of equals."""
    by_image: dict[int, list[dict]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    return [
        result
        for found in by_image.values()
        for result in sorted(found, key=lambda r: r["score"], reverse=True)[:LVIS_MAX_DETECTIONS]
    ]


def _looked_for(truth: dict, results: list[dict]) -> list[dict]:
    """Results in categories that their image is known to show or not to show; LVIS ignores all others.

    The evaluators leave them out themselves, but faster-coco-eval 1.8 fails on those of an image without annotations.
    """
    known = {image["id"]: set(image.get("neg_category_ids", ())) for image in truth["images"]}
    for annotation in truth["annotations"]:
        known[annotation["image_id"]].add(annotation["category_id"])
    return [result for result in results if result["category_id"] in known[result["image_id"]]]


def _evaluate(evaluator: str, truth: dict, results: list[dict], image_ids, *, lvis: bool = False) -> Any:
    """pycocotools or its faster twin, run on files held in memory; nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()):
        if evaluator == "pycocotools":
            coco, cocoeval = (importlib.import_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
            make, data = cocoeval.COCOeval, coco.COCO
        else:
            package = importlib.import_module("faster_coco_eval")
            make, data = package.COCOeval_faster, package.COCO
        gt = data()
        gt.dataset = truth
        gt.createIndex()
        dt = gt.loadRes(results) if results else data()
        if not results:  # pycocotools cannot load an empty list
            dt.dataset = truth | {"annotations": []}
            dt.createIndex()
        run = make(gt, dt, "segm", **({"lvis_style": True} if lvis else {}))
        run.params.imgIds = sorted(gt.imgs if image_ids is None else image_ids)
        if lvis:
            run.params.maxDets = [LVIS_MAX_DETECTIONS]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def _hotcoco(truth: dict, results: list[dict], image_ids: list[int] | None, *, lvis: bool) -> Any:
    package = importlib.import_module("hotcoco")
    with contextlib.redirect_stdout(io.StringIO()):
        gt = package.COCO(truth)
        run = package.COCOeval(gt, gt.load_res(results), "segm", lvis_style=lvis)
        if image_ids is not None:
            run.params.img_ids = sorted(image_ids)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def _percent(stats: dict[str, float]) -> dict[str, float | None]:
    """The evaluators write -1 where there is nothing to find."""
    return {name: None if np.isnan(value) or value < 0 else float(value) * 100 for name, value in stats.items()}
