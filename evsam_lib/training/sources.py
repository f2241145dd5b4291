"""What a training reads: SA-1B as folders, tars or litdata chunks, or your own images in COCO's form.

All of them look alike: `len(data)`, `data[i]` with image, image_id, rles and boxes_xywh, and `data.runs` for the masks.
Paper: Sec. 3.2 trains on SA-1B; notebook 03 shows the forms, notebook 05 trains on a COCO folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.files import has_no_mask
from evsam_lib.data.runs import Runs, read_runs
from evsam_lib.data.sa1b import Sa1bFolder, Sa1bRecord
from evsam_lib.data.skip import guarded

__all__ = ["CocoRecords", "open_data"]

SPLITS = ("train", "val", "all")


def open_data(
    path: str | Path,
    *,
    annotations: str | Path | None = None,
    split: str = "all",
    images: int = 0,
    on_error: str = "skip",
    log: str | Path | None = None,
) -> Any:
    """Opens whatever lies at a path.

    Args:
        path: SA-1B folder, tar or folder of tars; folder (or address, s3://...) of litdata chunks; with `annotations`,
            the folder of pictures.
        annotations: JSON in COCO's form.
        split: of SA-1B folders and tars: "train", the first 99 %, "val", the rest, or "all".
        images: only the first so many; 0 for all.
        on_error: "skip" puts the next readable image in the place of one that cannot be read, "raise" stops at it.
            Chunks were checked when they were written.
        log: file that lists what was skipped.

    Returns:
        The data set.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or a split or number that it cannot be cut to.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if annotations:
        data = CocoRecords(CocoImages(path, annotations))
    elif "://" in str(path) or (Path(path) / "index.json").is_file():
        from evsam_lib.data.stream import Sa1bStream

        if images:
            raise ValueError(
                f"images={images} with chunks: expected 0; write fewer, `stream optimise --limit {images}`"
            )
        return Sa1bStream(path)
    else:
        data = Sa1bFolder(path, split=None if split == "all" else split)
    return guarded(_First(data, images) if 0 < images < len(data) else data, on_error=on_error, log=log)


class CocoRecords:
    """Images in COCO's form as training records: those that have objects, crowds and boxes without mask left out."""

    def __init__(self, images: CocoImages) -> None:
        """Indexes the objects; reads no picture.

        Raises:
            ValueError: no image has an object with a mask.
        """
        self.images = images
        usable = [(image, [a for a in image.annotations if _has_object(a)]) for image in images]
        self._usable = [(image, objects) for image, objects in usable if objects]
        if not self._usable:
            raise ValueError(f"{images.annotations_json} has no object with a mask: expected polygons or run lengths")

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Sa1bRecord:
        """Reads a picture.

        Raises:
            FileNotFoundError, ValueError: it is missing, unreadable, or not of the size that the file states.
        """
        image, objects = self._usable[index]
        pixels = self.images.read(image)
        if pixels.shape[:2] != (image.height, image.width):
            raise ValueError(
                f"{image.path} has {pixels.shape[0]} x {pixels.shape[1]} pixels (H x W), "
                f"{self.images.annotations_json} states {image.height} x {image.width}"
            )
        return Sa1bRecord(
            image_id=image.image_id,
            image=pixels,
            rles=[annotation["segmentation"] for annotation in objects],
            boxes_xywh=np.array([annotation["bbox"] for annotation in objects], dtype=np.float64),
        )

    def runs(self, record: Sa1bRecord, indices: Sequence[int]) -> Runs:
        """The chosen masks as run lengths; a malformed one raises ValueError."""
        where = f"image {record.image_id} in {self.images.annotations_json}"
        return read_runs([record.rles[index] for index in indices], *record.image.shape[:2], where=where)


class _First:
    """The first images of a data set."""

    def __init__(self, data: Any, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} of {self.count} images")
        return self.data[index]

    def __getattr__(self, name: str) -> Any:
        if name in ("data", "__setstate__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.data, name)


def _has_object(annotation: dict) -> bool:
    return not annotation.get("iscrowd") and not has_no_mask(annotation.get("segmentation"))
