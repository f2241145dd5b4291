"""Generated scenes as files, in the layouts of SA-1B and COCO.

Stand-ins for the data of paper Sec. 4.1 in the mini profile; explained in notebook 03. A folder is written under a
temporary name and moved into place whole. Its `generated.json` says that it is generated and from which parameters, so
that no number made on it can pass for one of the paper, and an equal folder is used again instead of written anew.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import contourpy
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from .generate import VERSION, Scene, scene

__all__ = ["write_coco", "write_sa1b"]

# id, name, super-category of COCO's 80 classes; the gaps in the numbers are COCO's
_CATEGORIES = """
1 person:person|2 bicycle,3 car,4 motorcycle,5 airplane,6 bus,7 train,8 truck,9 boat:vehicle
10 traffic light,11 fire hydrant,13 stop sign,14 parking meter,15 bench:outdoor
16 bird,17 cat,18 dog,19 horse,20 sheep,21 cow,22 elephant,23 bear,24 zebra,25 giraffe:animal
27 backpack,28 umbrella,31 handbag,32 tie,33 suitcase:accessory
34 frisbee,35 skis,36 snowboard,37 sports ball,38 kite,39 baseball bat,40 baseball glove,41 skateboard,42 surfboard,
43 tennis racket:sports|44 bottle,46 wine glass,47 cup,48 fork,49 knife,50 spoon,51 bowl:kitchen
52 banana,53 apple,54 sandwich,55 orange,56 broccoli,57 carrot,58 hot dog,59 pizza,60 donut,61 cake:food
62 chair,63 couch,64 potted plant,65 bed,67 dining table,70 toilet:furniture
72 tv,73 laptop,74 mouse,75 remote,76 keyboard,77 cell phone:electronic
78 microwave,79 oven,80 toaster,81 sink,82 refrigerator:appliance
84 book,85 clock,86 vase,87 scissors,88 teddy bear,89 hair drier,90 toothbrush:indoor
"""


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

    return _make(Path(root), write, layout="sa1b", count=count, seed=seed, size=size, start=start)


def write_coco(root: str | Path, count: int, *, seed: int, size: tuple[int, int], start: int = 0) -> tuple[Path, Path]:
    """Writes scenes start .. start + count - 1 as COCO: val2017/*.jpg and annotations/instances_val2017.json.

    Whole things only, as polygons; a crowd as uncompressed run lengths with `iscrowd`. The picture's shape varies with
    its index: every third is turned (height and width exchanged), and the height shrinks by up to an eighth.

    Args:
        root: folder to make; reused if it already holds exactly this data.
        count: number of images.
        seed: of the scenes.
        size: (height, width) in pixels, the largest used.
        start: index of the first scene.

    Returns:
        The folder of pictures and the annotation file.

    Raises:
        ValueError: if count is below 1 or the size too small.
        FileExistsError: if root holds files that were not generated.
    """

    def write(folder: Path) -> None:
        (folder / "val2017").mkdir()
        (folder / "annotations").mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(start, start + count):
            made = scene(seed, index, size=_coco_size(index, size))
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
            "categories": _categories(),
        }
        (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))

    root = _make(Path(root), write, layout="coco", count=count, seed=seed, size=size, start=start)
    return root / "val2017", root / "annotations/instances_val2017.json"


def _make(root: Path, write: Callable[[Path], None], *, layout: str, count: int, seed: int, size, start: int) -> Path:
    """Runs `write` in a temporary folder and moves it to root, unless root already is what would be written."""
    if count < 1 or start < 0:
        raise ValueError(f"count must be at least 1 and start at least 0, got {count} and {start}.")
    wanted = {"generated_by": "evsam_lib.data.generate", "layout": layout, "count": count, "seed": seed}
    wanted |= {"size": [int(side) for side in size], "start": start, "version": VERSION}
    mark = root / "generated.json"
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        return root
    if root.exists() and not mark.is_file() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} holds files that were not generated; expected an empty or a generated folder.")
    fresh, old = (root.with_name(f".{root.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    try:
        fresh.mkdir(parents=True)
        write(fresh)
        (fresh / "generated.json").write_text(json.dumps(wanted, indent=1) + "\n")
        if root.exists():
            root.rename(old)
        fresh.rename(root)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return root


def _save_jpg(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _sa1b_record(made: Scene, image_id: int, file_name: str) -> dict:
    height, width = made.image.shape[:2]
    annotations = []
    for number, mask in enumerate(made.masks):
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        rows, columns = np.nonzero(mask)
        middle = len(rows) // 2
        annotations.append(
            {
                "id": image_id * 1000 + number,
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
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
    found = []
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
                "segmentation": {"size": [height, width], "counts": _runs(made.crowd)},
                "area": len(rows),
                "iscrowd": 1,
                "bbox": [float(v) for v in box],
                "category_id": made.crowd_category_id,
            }
        )
    return found


def _runs(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths, columns first, starting with a run of zeros."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines, one polygon [x, y, x, y, ...] for each connected piece; pixel corners are at integers."""
    padded = np.pad(mask.astype(np.float64), 1)
    tracer = contourpy.contour_generator(z=padded, fill_type=contourpy.FillType.OuterOffset)
    pieces, offsets = tracer.filled(0.5, 2.0)
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


def _categories() -> list[dict]:
    groups = _CATEGORIES.replace(",\n", ",").replace("\n", "|").strip("|").split("|")
    found = []
    for group in groups:
        names, super_category = group.split(":")
        for entry in names.split(","):
            number, name = entry.split(" ", 1)
            found.append({"supercategory": super_category, "id": int(number), "name": name})
    return found
