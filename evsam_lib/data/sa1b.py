"""SA-1B on disk: one JPEG and one JSON per image, masks as compressed run lengths.

Paper: Sec. 3.2, both training phases read SA-1B. Explained in notebook 03. Two layouts are read: the one of the
official training code (sa_images_ids.txt, images/sa_<id>.jpg, masks/sa_<id>.json) and that of SA-1B's own archives
(sa_<id>.jpg beside sa_<id>.json, in the folder itself or in sub-folders such as sa_000020). Masks stay encoded until
they are asked for: at full size the 64 masks of one photograph take 216 MB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import decode_segmentation, read_json, read_rgb

__all__ = ["Sa1bFolder", "Sa1bRecord"]

_TRAIN_SHARE = 0.99  # official loader: the first 99 % of the id list train, the rest validate


@dataclass(frozen=True)
class Sa1bRecord:
    """One image with its M encoded masks.

    Attributes:
        image_id: number in the file name.
        image: (H, W, 3) uint8 RGB.
        rles: M segmentations {"size": [H, W], "counts": str}.
        boxes_xywh: (M, 4) float64, tight boxes in pixels.
    """

    image_id: int
    image: np.ndarray
    rles: list[dict]
    boxes_xywh: np.ndarray


class Sa1bFolder:
    """Map-style access to a folder: `len(data)`, `data[i]`, iteration; `image_ids` lists what it holds, `files`
    the pairs (JPEG, JSON)."""

    def __init__(self, root: str | Path, *, split: str | None = None) -> None:
        """Lists the images; reads none.

        Args:
            root: folder in one of the two layouts.
            split: "train" (first 99 %), "val" (the rest, at least one image) or None for all.

        Raises:
            FileNotFoundError: if the folder is missing.
            ValueError: if it holds no images, the id list is malformed, or the split is unknown or empty.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"SA-1B folder {self.root} does not exist.")
        if split not in (None, "train", "val"):
            raise ValueError(f"split must be 'train', 'val' or None, got {split!r}.")
        listed = _list_images(self.root)
        if not listed:
            raise ValueError(f"{self.root} holds no SA-1B images: expected sa_images_ids.txt, or files sa_<id>.jpg.")
        cut = int(len(listed) * _TRAIN_SHARE)
        listed = {"train": listed[:cut], "val": listed[cut:], None: listed}[split]
        if not listed:
            raise ValueError(
                f"The train split of {self.root} is empty: its one image validates, expected at least two."
            )
        self.image_ids = [image_id for image_id, _, _ in listed]
        self.files = [(jpg, annotations) for _, jpg, annotations in listed]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sa1bRecord:
        """Reads an image and its annotations; masks stay encoded.

        Raises:
            IndexError: past the end.
            FileNotFoundError: if one of the two files is missing.
            ValueError: if one of them is corrupt or an annotation lacks its segmentation or box.
        """
        jpg, path = self.files[index]
        annotations = read_json(path, "annotations")["annotations"]
        try:
            rles = [annotation["segmentation"] for annotation in annotations]
            boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(len(rles), 4)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Every annotation in {path} needs 'segmentation' and a 'bbox' of four numbers."
            ) from error
        return Sa1bRecord(image_id=self.image_ids[index], image=read_rgb(jpg), rles=rles, boxes_xywh=boxes)

    def __iter__(self) -> Iterator[Sa1bRecord]:
        return (self[index] for index in range(len(self)))

    def masks(self, record: Sa1bRecord | int, indices: Sequence[int]) -> np.ndarray:
        """Decodes the chosen masks, one after another.

        Args:
            record: a record, or its index.
            indices: which of its M masks, in any order.

        Returns:
            (len(indices), H, W) uint8, 0 or 1.

        Raises:
            ValueError: if a mask is malformed or not of the image's size.
        """
        record = self[record] if isinstance(record, int) else record
        height, width = record.image.shape[:2]
        out = np.empty((len(indices), height, width), np.uint8)
        for mask, index in zip(out, indices, strict=True):
            where = f"annotation {index} of image {record.image_id} in {self.root}"
            mask[:] = decode_segmentation(record.rles[index], height, width, where=where)
        return out


def _list_images(root: Path) -> list[tuple[int, Path, Path]]:
    """(id, JPEG, JSON) of every image: in the order of the id list, else by id."""
    listing = root / "sa_images_ids.txt"
    if listing.is_file():
        lines = listing.read_text().split()
        for line in lines:
            if not line.isascii() or not line.isdigit():
                raise ValueError(f"{listing} must hold one image number a line, got {line!r}.")
        return [(int(n), root / f"images/sa_{int(n)}.jpg", root / f"masks/sa_{int(n)}.json") for n in lines]
    found = [path for pattern in ("sa_*.jpg", "sa_*/sa_*.jpg") for path in root.glob(pattern)]
    numbered = [(int(path.stem[3:]), path) for path in found if path.stem[3:].isdigit()]
    return [(number, path, path.with_suffix(".json")) for number, path in sorted(numbered)]
