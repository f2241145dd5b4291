"""Generated scenes as files, in the layouts of SA-1B, COCO, LVIS and SGinW.

Stand-ins for the data of paper Sec. 4 in the mini profile; explained in notebook 03. A folder is written under a
temporary name and moved into place whole. Its `generated.json` says that it is generated and from which parameters, so
that no number made on it can pass for one of the paper, and an equal folder is used again instead of written anew.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from .categories import coco_categories
from .cells import CATEGORIES as CELL_CATEGORIES
from .cells import cells
from .detector import write_detections
from .generate import VERSION, Scene, scene
from .rle import encode_masks, run_lengths
from .sginw import ANNOTATIONS
from .shapes import Draw

__all__ = ["make_folder", "write_coco", "write_detections", "write_lvis", "write_sa1b", "write_sginw"]

_LVIS_STREAM = 2_000_000_011  # added to the seed: other draws than the scene's
# Which of the things that occur in scenes are rare and common in LVIS's sense; the others are frequent.
_RARE, _COMMON = {3, 34, 39}, {18, 47, 52, 60, 67, 72}  # ids of COCO
_IMAGE_COUNTS = {"r": 5, "c": 50, "f": 500}  # LVIS: r up to 10 training images, c up to 100, f more
# Sets of SGinW that are generated: ids of COCO that become their categories, and the image's sides as shares of `size`.
_SGINW_SETS: dict[str, tuple[tuple[int, ...], float, float]] = {
    "Fruits": ((52, 53), 1.0, 1.0),
    "HouseHold-Items": ((47, 84, 86), 0.75, 0.75),
    "Phones": ((77,), 1.0, 0.6),
    "Puppies": ((18,), 0.7, 1.0),
}

_LOOKS = {"scenes": scene, "cells": cells}


def write_sa1b(root: str | Path, count: int, *, seed: int, size: tuple[int, int], start: int = 0) -> Path:
    """Writes scenes start .. start + count - 1 in the flat layout of the official training code.

    Args:
        root: folder to make; reused if it already holds exactly this data.
        count: number of images.
        seed: of the scenes.
        size: (height, width) in pixels.
        start: index of the first scene.

    Returns:
        root.

    Raises:
        ValueError: if count is below 1 or the size too small.
        FileExistsError: if root holds files that were not generated.
    """

    def write(folder: Path) -> None:
        (folder / "images").mkdir()
        (folder / "masks").mkdir()
        for image_id in range(start + 1, start + count + 1):
            made = scene(seed, image_id - 1, size=size)
            name = f"sa_{image_id}"
            _save_jpg(made.image, folder / f"images/{name}.jpg")
            (folder / f"masks/{name}.json").write_text(json.dumps(_sa1b_record(made, image_id, f"{name}.jpg")))
        ids = "".join(f"{image_id}\n" for image_id in range(start + 1, start + count + 1))
        (folder / "sa_images_ids.txt").write_text(ids)

    return make_folder(Path(root), write, layout="sa1b", count=count, seed=seed, size=size, start=start)


def write_coco(
    root: str | Path, count: int, *, seed: int, size: tuple[int, int], start: int = 0, look: str = "scenes"
) -> tuple[Path, Path]:
    """Writes scenes start .. start + count - 1 as COCO: val2017/*.jpg and annotations/instances_val2017.json.

    Whole things only, as polygons; a crowd as uncompressed run lengths with `iscrowd`. The picture's shape varies with
    its index: every third is turned (height and width exchanged), and the height shrinks by up to an eighth.

    Args:
        root: folder to make; reused if it already holds exactly this data.
        count: number of images.
        seed: of the scenes.
        size: (height, width) in pixels, the largest used.
        start: index of the first scene.
        look: "scenes", or "cells" for pictures unlike them (see `data.cells`).

    Returns:
        The folder of pictures and the annotation file.

    Raises:
        ValueError: if count is below 1, the size too small or the look unknown.
        FileExistsError: if root holds files that were not generated.
    """

    if look not in _LOOKS:
        raise ValueError(f"look must be one of {', '.join(_LOOKS)}, got {look!r}.")

    def write(folder: Path) -> None:
        (folder / "val2017").mkdir()
        (folder / "annotations").mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(start, start + count):
            made = _LOOKS[look](seed, index, size=_coco_size(index, size))
            height, width = made.image.shape[:2]
            name = f"{index + 1:012d}.jpg"
            _save_jpg(made.image, folder / "val2017" / name)
            images.append({"license": 1, "file_name": name, "height": height, "width": width, "id": index + 1})
            for annotation in _coco_annotations(made):
                annotations.append(annotation | {"image_id": index + 1, "id": len(annotations) + 1})
        content = {
            "info": {
                "description": "Generated scenes in COCO's layout, not COCO",
                "version": str(VERSION),
                "year": 2024,
            },
            "licenses": [{"id": 1, "name": "generated, no rights reserved", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": coco_categories() if look == "scenes" else CELL_CATEGORIES,
        }
        (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))

    root = make_folder(
        Path(root),
        write,
        layout="coco" if look == "scenes" else f"coco, {look}",
        count=count,
        seed=seed,
        size=size,
        start=start,
    )
    return root / "val2017", root / "annotations/instances_val2017.json"


def write_lvis(root: str | Path, count: int, *, seed: int, size: tuple[int, int], start: int = 0) -> tuple[Path, Path]:
    """Writes scenes start .. start + count - 1 as LVIS v1: annotations/lvis_v1_val.json, images in two folders.

    As in LVIS, images have no `file_name`, but a `coco_url` in train2017 or val2017 (here every fourth); categories
    have a frequency group; and annotation is federated. In each image some categories are left out whole, so that
    nothing is known about them; some lose one object and are listed in `not_exhaustive_category_ids`; some of the
    absent ones are listed in `neg_category_ids`; the rest of the absent ones are unknown too. Crowds are not
    annotated. Shapes of pictures vary as in `write_coco`.

    Args:
        root: folder to make; reused if it already holds exactly this data.
        count: number of images.
        seed: of the scenes.
        size: (height, width) in pixels, the largest used.
        start: index of the first scene.

    Returns:
        The folder that holds train2017 and val2017, and the annotation file.

    Raises:
        ValueError: if count is below 1 or the size too small.
        FileExistsError: if root holds files that were not generated.
    """

    def write(folder: Path) -> None:
        for name in ("train2017", "val2017", "annotations"):
            (folder / name).mkdir()
        categories, number_of = _lvis_categories()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(start, start + count):
            made = scene(seed, index, size=_coco_size(index, size))
            height, width = made.image.shape[:2]
            name = f"{'val2017' if index % 4 == 3 else 'train2017'}/{index + 1:012d}.jpg"
            _save_jpg(made.image, folder / name)
            kept, federated = _lvis_annotations(made, Draw(seed + _LVIS_STREAM, index), number_of)
            url = f"http://images.cocodataset.org/{name}"  # the form of LVIS; nothing is fetched from there
            images.append({"id": index + 1, "height": height, "width": width, "coco_url": url, **federated})
            for annotation in kept:
                annotations.append(annotation | {"image_id": index + 1, "id": len(annotations) + 1})
        content = {
            "info": {"description": "Generated scenes in LVIS's layout, not LVIS", "version": str(VERSION)},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (folder / "annotations/lvis_v1_val.json").write_text(json.dumps(content))

    root = make_folder(Path(root), write, layout="lvis", count=count, seed=seed, size=size, start=start)
    return root, root / "annotations/lvis_v1_val.json"


def write_sginw(root: str | Path, count: int, *, seed: int, size: tuple[int, int], start: int = 0) -> Path:
    """Writes four small data sets in SGinW's layout: <set>/valid/*.jpg and _annotations_min1cat.coco.json.

    They bear names of the real ones, each with its own picture size and one to three categories; things of other
    categories are not annotated. An image holds at least one object of its set. Image numbers start at 0.

    Args:
        root: folder of the sets to make; reused if it already holds exactly this data.
        count: number of images of each set.
        seed: of the scenes.
        size: (height, width) in pixels, the largest used.
        start: index of the first scene that is tried.

    Returns:
        root, as `sginw.sginw_images` takes it.

    Raises:
        ValueError: if count is below 1 or the size too small.
        FileExistsError: if root holds files that were not generated.
    """

    def write(folder: Path) -> None:
        for number, name in enumerate(_SGINW_SETS):
            (folder / name / "valid").mkdir(parents=True)
            # Set n takes from scenes start + n, start + n + 4, ...: no scene occurs in two sets.
            candidates = itertools.count(start + number, len(_SGINW_SETS))
            content = _sginw_set(folder / name / "valid", name, candidates, count=count, seed=seed, size=size)
            (folder / name / "valid" / ANNOTATIONS).write_text(json.dumps(content))

    return make_folder(Path(root), write, layout="sginw", count=count, seed=seed, size=size, start=start)


def make_folder(
    root: Path,
    write: Callable[[Path], None],
    *,
    layout: str,
    count: int,
    seed: int,
    size,
    start: int,
    also: dict | None = None,
) -> Path:
    """Runs `write` in a temporary folder and moves it to root, unless root already is what would be written.

    Args:
        root: the folder.
        write: fills a folder.
        layout: what it is called in `generated.json`.
        count: of images or clips.
        seed: of all.
        size: (height, width), pixels.
        start: index of the first.
        also: what else the content depends on, plain values.

    Raises:
        ValueError: count below 1 or start below 0.
        FileExistsError: root holds files that were not generated.
    """
    if count < 1 or start < 0:
        raise ValueError(f"count must be at least 1 and start at least 0, got {count} and {start}.")
    wanted = {"generated_by": "evsam_lib.data.generate", "layout": layout, "count": count, "seed": seed}
    wanted |= {"size": [int(side) for side in size], "start": start, "version": VERSION} | (also or {})
    mark = root / "generated.json"
    if _holds(mark, wanted):
        return root
    if root.exists() and not mark.is_file() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} holds files that were not generated; expected an empty or a generated folder.")
    fresh, old = (root.with_name(f".{root.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    try:
        fresh.mkdir(parents=True)
        write(fresh)
        (fresh / "generated.json").write_text(json.dumps(wanted, indent=1) + "\n")
        if not _holds(mark, wanted):  # two processes may have begun; the first to end has it
            if root.exists():
                root.rename(old)
            fresh.rename(root)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return root


def _holds(mark: Path, wanted: dict) -> bool:
    return mark.is_file() and json.loads(mark.read_text()) == wanted


def _save_jpg(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _sa1b_record(made: Scene, image_id: int, file_name: str) -> dict:
    height, width = made.image.shape[:2]
    annotations = []
    for number, (mask, rle) in enumerate(zip(made.masks, encode_masks(made.masks), strict=True)):
        rows, columns = np.nonzero(mask)
        middle = len(rows) // 2
        annotations.append(
            {
                "id": image_id * 1000 + number,
                "segmentation": rle,
                "bbox": [float(v) for v in coco_mask.toBbox(rle)],
                "area": len(rows),
                "predicted_iou": 1.0,  # SA-1B holds a model's estimates here; these masks are exact
                "stability_score": 1.0,
                "point_coords": [[float(columns[middle]), float(rows[middle])]],
                "crop_box": [0.0, 0.0, float(width), float(height)],
            }
        )
    image = {"image_id": image_id, "width": width, "height": height, "file_name": file_name}
    return {"image": image, "annotations": annotations}


def _coco_size(index: int, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    height = max(32, height - height * (index % 4) // 24)
    return (width, height) if index % 3 == 2 else (height, width)


def _coco_annotations(made: Scene) -> list[dict]:
    """Whole things as polygons, then the crowd; objects whose polygons cover no pixel are left out."""
    height, width = made.image.shape[:2]
    found: list[dict[str, Any]] = []
    for mask, category, parent in zip(made.masks, made.category_ids, made.parents, strict=True):
        if parent >= 0:
            continue
        polygons = _polygons(mask)
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        area = int(coco_mask.area(rle))
        if area > 0:
            box = [float(v) for v in coco_mask.toBbox(rle)]
            found.append(
                {"segmentation": polygons, "area": area, "iscrowd": 0, "bbox": box, "category_id": int(category)}
            )
    if made.crowd is not None:
        rows, columns = np.nonzero(made.crowd)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        found.append(
            {
                "segmentation": {"size": [height, width], "counts": run_lengths(made.crowd)},
                "area": len(rows),
                "iscrowd": 1,
                "bbox": [float(v) for v in box],
                "category_id": made.crowd_category_id,
            }
        )
    return found


def _lvis_categories() -> tuple[list[dict], dict[int, int]]:
    """LVIS's records, numbered from 1 by name, and {COCO id: LVIS id}."""
    records, number_of = [], {}
    for number, category in enumerate(sorted(coco_categories(), key=lambda c: c["name"]), 1):
        group = "r" if category["id"] in _RARE else "c" if category["id"] in _COMMON else "f"
        name = category["name"].replace(" ", "_")
        record = {"id": number, "name": name, "synset": f"{name}.n.01", "synonyms": [name], "frequency": group}
        records.append(record | {"image_count": _IMAGE_COUNTS[group], "instance_count": 3 * _IMAGE_COUNTS[group]})
        number_of[category["id"]] = number
    return records, number_of


def _lvis_annotations(made: Scene, draw: Draw, number_of: dict[int, int]) -> tuple[list[dict], dict]:
    """Annotations in LVIS's form, and what the image record says about its categories."""
    things = [annotation for annotation in _coco_annotations(made) if not annotation.pop("iscrowd")]
    present = {int(category) for category in made.category_ids} | {made.crowd_category_id} - {0}
    kept, partial = [], []
    for category in sorted(present):
        own = [thing for thing in things if thing["category_id"] == category]
        if draw.chance(0.15) and len(own) < len(things):
            continue  # nobody looked for it
        if own and (category == made.crowd_category_id or (len(own) > 2 and draw.chance(0.5))):
            partial.append(number_of[category])
            own = own[:-1] if len(own) > 1 else own
        kept += [thing | {"category_id": number_of[category]} for thing in own]
    absent = sorted(number for category, number in number_of.items() if category not in present)
    negative = [number for number in absent if draw.chance(0.15)]
    return kept, {"neg_category_ids": negative, "not_exhaustive_category_ids": sorted(partial)}


def _sginw_set(
    folder: Path, name: str, candidates: Iterator[int], *, count: int, seed: int, size: tuple[int, int]
) -> dict:
    """Writes the pictures of one set; returns its annotations."""
    ids, tall, wide = _SGINW_SETS[name]
    number_of = {category: number for number, category in enumerate(ids, 1)}
    names = {category["id"]: category["name"] for category in coco_categories()}
    size = max(32, int(size[0] * tall)), max(32, int(size[1] * wide))
    images: list[dict] = []
    annotations: list[dict] = []
    for index in candidates:
        made = scene(seed, index, size=size)
        own = [a for a in _coco_annotations(made) if a["category_id"] in number_of and not a["iscrowd"]]
        if not own:
            continue
        file_name = f"scene_{index:06d}_jpg.rf.generated.jpg"
        _save_jpg(made.image, folder / file_name)
        images.append({"id": len(images), "file_name": file_name, "height": size[0], "width": size[1]})
        for annotation in own:
            where = {"id": len(annotations) + 1, "image_id": images[-1]["id"]}
            annotations.append(annotation | where | {"category_id": number_of[annotation["category_id"]]})
        if len(images) == count:
            break
    categories = [{"id": number_of[category], "name": names[category], "supercategory": name} for category in ids]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines, one polygon [x, y, x, y, ...] for each connected piece; pixel corners are at integers."""
    padded = np.pad(mask.astype(np.float64), 1)
    tracer = contourpy.contour_generator(z=padded, fill_type=contourpy.FillType.OuterOffset)
    filled: Any = tracer.filled(0.5, 2.0)  # its form is that of the fill type
    pieces, offsets = filled
    polygons = []
    for points, ends in zip(pieces, offsets, strict=True):
        rings = [points[a : b - 1] for a, b in itertools.pairwise(ends)]  # the last repeats the first
        outline = _thin(rings[0])
        for hole in rings[1:]:
            outline = _bridge(outline, _thin(hole))
        polygons.append((outline - 0.5).reshape(-1).tolist())  # centre of padded pixel 1 is x = 0.5
    return polygons


def _thin(ring: np.ndarray) -> np.ndarray:
    """Drops points on straight lines."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _bridge(outline: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """One ring out of two: COCO's polygons have no holes, so a cut of no width leads into the hole and back."""
    gaps = np.abs(outline[:, None] - hole[None]).sum(axis=2)
    i, j = np.unravel_index(gaps.argmin(), gaps.shape)
    around = np.concatenate([hole[j:], hole[: j + 1]])
    return np.concatenate([outline[: i + 1], around, outline[i:]])
