"""Zero-shot segmentation, measured: mIoU by object size for ground-truth boxes and for simulated clicks.

The protocols of Table 2 (1, 3, 5 clicks; notebook 08) and Table 3 (ground-truth boxes; notebook 09), with the rules of
the authors' script as defaults: of three masks the one of highest predicted IoU is scored, whatever the prompt; crowd
annotations count; an object whose area is exactly 32^2 or 96^2 counts in both of its size classes; all clicks so far
are given together and no mask is fed back. Each rule that one may question is an argument with a name.

    python -m evsam_lib.evaluate --model efficientvit-sam-l0 --weights l0.safetensors --images val2017 \
        --annotations instances_val2017.json --prompt gt-box --out l0_boxes.json
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evsam_lib import __version__
from evsam_lib.data.coco import CocoImages
from evsam_lib.models.sam import Sam
from evsam_lib.models.weights import sha256
from evsam_lib.models.zoo import load_model, weights_path
from evsam_lib.predict import Predictor
from evsam_lib.prompts import next_clicks, xywh_to_xyxy

__all__ = ["evaluate", "evaluate_image", "mask_iou", "mean_iou", "write_result"]

PROMPTS = ("gt-box", "points")
SIZES = {"all": (0, math.inf), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # COCO's


def evaluate(
    model: Sam,
    images: CocoImages,
    *,
    prompt: str = "gt-box",
    clicks: int = 1,
    limit: int | None = None,
    keep_crowds: bool = True,
    inclusive_sizes: bool = True,
    min_area: float = 1,
    corner_clicks: bool = True,
    weights: str | Path | None = None,
    progress: bool = False,
) -> dict:
    """Measures a model on images with annotations.

    Args:
        model: the model, on whatever device and in whatever dtype it is. Evaluation mode is set and put back.
        images: images with annotations in COCO's form.
        prompt: "gt-box", the annotation's own box, or "points", clicks simulated against the annotation's mask.
        clicks: number of clicks; "points" only.
        limit: stop after this many images that have objects, in the order of the annotation file.
        keep_crowds: annotations with `iscrowd` count too.
        inclusive_sizes: both bounds belong to a size class, so that an area on a bound counts twice.
        min_area: annotations whose `area` is smaller are left out.
        corner_clicks: a mask without a wrong pixel gets its next click all the same, a negative one at (0, 0), and may
            be lost by it; if False, the object is done.
        weights: file the model was read from, for the summary.
        progress: show a progress bar.

    Returns:
        {"summary": ..., "objects": ...}, ready for JSON. The summary has `mIoU` in percent and `counts`, each by size:
        "all", "small", "medium", "large" (the mIoU of an empty class is None); for points `mIoU_after_click`, the same
        under "1", "2", ...; and what the numbers depend on. Objects have `image_id, ann_id, area, iou` (percent) and
        for points `clicks`, a list of [x, y, label], and `iou_after_click`.

    Raises:
        ValueError: an unknown prompt, clicks or limit below 1, or an image or annotation that cannot be used.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"Unknown prompt {prompt!r}, expected one of {', '.join(PROMPTS)}.")
    if clicks < 1 or (limit is not None and limit < 1):
        raise ValueError(f"clicks and limit must be at least 1, got clicks={clicks} and limit={limit}.")
    clicks = clicks if prompt == "points" else 0
    start, seen, objects = time.perf_counter(), Counter(), []
    was_training = model.training
    predictor = Predictor(model.eval())
    for record in tqdm(images, desc=prompt, unit="image", disable=not progress):
        if seen["images"] == limit:
            break
        kept = _kept(record.annotations, seen, keep_crowds=keep_crowds, min_area=min_area)
        seen["images" if kept else "images_without_objects"] += 1
        if kept:
            masks = np.stack([images.mask(annotation) for annotation in kept])  # (N, H, W)
            objects += evaluate_image(
                predictor,
                images.read(record),
                annotations=kept,
                masks=masks,
                clicks=clicks,
                corner_clicks=corner_clicks,
            )
    model.train(was_training)
    rules = {"keep_crowds": keep_crowds, "inclusive_sizes": inclusive_sizes, "min_area": min_area, "limit": limit}
    summary = _scores(objects, clicks, inclusive_sizes=inclusive_sizes)
    summary |= {"prompt": prompt, "clicks": clicks or None}
    summary |= {key: seen[key] for key in ("images", "images_without_objects", "crowds_left_out", "tiny_left_out")}
    summary |= {"rules": rules | {"corner_clicks": corner_clicks}, **_provenance(model, images, weights)}
    return {"summary": summary | {"seconds": round(time.perf_counter() - start, 3)}, "objects": objects}


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


def evaluate_image(
    predictor: Predictor,
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
    if masks.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"Image {annotations[0]['image_id']} has {image.shape[0]} x {image.shape[1]} pixels (H x W), its "
            f"annotations are made for {masks.shape[1]} x {masks.shape[2]}."
        )
    predictor.set_image(image)
    records = [{"image_id": a["image_id"], "ann_id": a["id"], "area": a["area"]} for a in annotations]
    if clicks:
        return [r | more for r, more in zip(records, _click(predictor, masks, clicks, corner_clicks), strict=True)]
    boxes = xywh_to_xyxy(np.array([a["bbox"] for a in annotations], dtype=np.float64))  # (N, 4)
    ious = mask_iou(predictor.predict_batch(boxes=boxes, select="best")[0], masks)
    return [r | {"iou": iou} for r, iou in zip(records, ious.tolist(), strict=True)]


def _click(predictor: Predictor, masks: np.ndarray, clicks: int, corner_clicks: bool) -> list[dict]:
    """Clicks on all objects (N, H, W) side by side: click k of every object is decoded in one batch."""
    pred = np.zeros_like(masks)
    points, labels = np.empty((len(masks), 0, 2), dtype=np.int64), np.empty((len(masks), 0), dtype=np.int64)
    objects = [{"iou": 0.0, "clicks": [], "iou_after_click": []} for _ in masks]
    active = np.arange(len(masks))
    for _ in range(clicks):
        if not corner_clicks:
            active = np.flatnonzero((pred != masks).any(axis=(1, 2)))
        new_points, new_labels = next_clicks(masks, pred, points)
        points = np.concatenate([points, new_points[:, None]], axis=1)  # (N, k, 2)
        labels = np.concatenate([labels, new_labels[:, None]], axis=1)  # (N, k)
        if len(active):
            pred[active] = predictor.predict_batch(points=points[active], labels=labels[active], select="best")[0]
        for i in active:
            objects[i]["clicks"].append([*points[i, -1].tolist(), int(labels[i, -1])])
        for record, iou in zip(objects, mask_iou(pred, masks).tolist(), strict=True):
            record["iou"] = iou
            record["iou_after_click"].append(iou)
    return objects


def mask_iou(pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """Intersection over union of masks, in percent.

    Args:
        pred: (N, H, W) bool.
        gt: (N, H, W) bool.

    Returns:
        (N,) float64. Two empty masks have 0, as in the official script.
    """
    intersection = np.count_nonzero(pred & gt, axis=(1, 2))
    union = np.count_nonzero(pred | gt, axis=(1, 2))
    return intersection / (union + 1e-7) * 100


def mean_iou(
    areas: list[float], ious: list[float], *, inclusive_sizes: bool = True
) -> tuple[dict[str, float | None], dict[str, int]]:
    """Mean over objects, by size.

    Args:
        areas: N areas in pixels, as the annotations state them.
        ious: N IoUs.
        inclusive_sizes: both bounds belong to a size class (official); otherwise the lower one only.

    Returns:
        means and counts for "all", "small", "medium", "large"; the mean of an empty class is None.
    """
    areas, ious = np.asarray(areas, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    means, counts = {}, {}
    for name, (low, high) in SIZES.items():
        inside = (areas >= low) & ((areas <= high) if inclusive_sizes else (areas < high))
        counts[name] = int(inside.sum())
        means[name] = float(ious[inside].mean()) if inside.any() else None
    return means, counts


def _scores(objects: list[dict], clicks: int, *, inclusive_sizes: bool) -> dict:
    areas = [record["area"] for record in objects]
    means, counts = mean_iou(areas, [record["iou"] for record in objects], inclusive_sizes=inclusive_sizes)
    scores = {"mIoU": means, "counts": counts}
    if clicks:
        scores["mIoU_after_click"] = {
            str(k + 1): mean_iou(areas, [r["iou_after_click"][k] for r in objects], inclusive_sizes=inclusive_sizes)[0]
            for k in range(clicks)
        }
    return scores


def _provenance(model: Sam, images: CocoImages, weights: str | Path | None) -> dict:
    return {
        "model": model.name,
        "weights": None if weights is None else str(weights),
        "weights_sha256": None if weights is None else sha256(weights),
        "images_dir": str(images.images_dir),
        "annotations": str(images.annotations_json),
        "annotations_sha256": sha256(images.annotations_json),
        "generated": (Path(images.images_dir).parent / "generated.json").is_file(),
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


def write_result(result: dict, path: str | Path) -> Path:
    """Writes a result of `evaluate` as JSON, an object a line; until it is whole, an earlier file stays."""
    path = Path(path)
    summary = json.dumps(result["summary"], indent=2, allow_nan=False)
    objects = ",\n".join(json.dumps(record, allow_nan=False) for record in result["objects"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(f'{{"summary": {summary},\n"objects": [\n{objects}\n]}}\n')
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def format_table(summary: dict) -> str:
    """The scores of a summary as plain text."""
    rows = [("", *SIZES)]
    for k, means in summary.get("mIoU_after_click", {"": summary["mIoU"]}).items():
        cells = ["-" if means[size] is None else f"{means[size]:.2f}" for size in SIZES]
        rows.append((f"mIoU, {k} click{'s' * (k != '1')}" if k else "mIoU, box", *cells))
    rows.append(("objects", *(str(summary["counts"][size]) for size in SIZES)))
    return "\n".join(f"{label:<16}" + "".join(f"{cell:>9}" for cell in cells) for label, *cells in rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status: 0, or 2 for input that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError, ImportError) as error:  # OSError: missing and unreadable files
        print(f"evsam_lib.evaluate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder, expected the name of a JSON file.")
    images = CocoImages(options.images, options.annotations)
    weights = None if options.weights == "none" else options.weights
    if weights is None:
        torch.manual_seed(0)
        print("NO WEIGHTS: the model starts at random (seed 0), its scores say nothing about it.", file=sys.stderr)
    model = load_model(options.model, weights, _device(options.device), getattr(torch, options.dtype))
    result = evaluate(
        model,
        images,
        prompt=options.prompt,
        clicks=options.clicks,
        limit=options.limit,
        keep_crowds=not options.exclude_crowds,
        inclusive_sizes=not options.exclusive_sizes,
        weights=weights_path(options.model, weights),
        progress=sys.stderr.isatty(),
    )
    write_result(result, options.out)
    summary = result["summary"]
    print(f"{summary['model']}, weights {options.weights}, {summary['images']} images, {summary['seconds']} s")
    print(format_table(summary))
    print(f"wrote {options.out}")
    return 0


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"Device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"evsam_lib.evaluate: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m evsam_lib.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name of the zoo, such as efficientvit-sam-l0")
    parser.add_argument("--weights", required=True, help="a file, 'mini', 'official', or 'none' for a random start")
    parser.add_argument("--images", required=True, type=Path, help="folder of images")
    parser.add_argument("--annotations", required=True, type=Path, help="JSON in COCO's form")
    parser.add_argument("--prompt", required=True, choices=PROMPTS)
    parser.add_argument("--clicks", type=_positive, default=1, help="for --prompt points; the paper has 1, 3 and 5")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write: summary and objects")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--limit", type=_positive, help="number of images that have objects; all without it")
    parser.add_argument("--exclude-crowds", action="store_true", help="leave iscrowd annotations out; official: kept")
    parser.add_argument(
        "--exclusive-sizes", action="store_true", help="count areas on a size bound once; official: twice"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
