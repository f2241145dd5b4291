"""SA-1B on disk: one JPEG and one JSON per image, masks as compressed run lengths.

Paper: Sec. 3.2, both training phases read SA-1B. Explained in notebook 03. Three layouts are read: the one of the
official training code (sa_images_ids.txt, images/sa_<id>.jpg, masks/sa_<id>.json), that of SA-1B's unpacked archives
(sa_<id>.jpg beside sa_<id>.json, in the folder itself or in sub-folders such as sa_000020), and the archives themselves
(a tar, or a folder of tars). Masks stay encoded until they are asked for: at full size the 64 masks of one photograph
take 216 MB.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from .files import decode_rgb, decode_segmentation, excerpt, parse_json
from .runs import Runs, read_runs
from .tars import Tars

__all__ = ["Sa1bFolder", "Sa1bRecord"]

_NUMBER = re.compile(r"[0-9]{1,18}")
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
    """Map-style access to a folder or tars: `len(data)`, `data[i]`, iteration; `image_ids` lists what it holds."""

    def __init__(self, root: str | Path, *, split: str | None = None, cache: str | Path | None = None) -> None:
        """Lists the images; reads none.

        Args:
            root: folder in one of the layouts, or a tar. Tars are looked for where a folder has no loose images.
            split: "train" (first 99 %), "val" (the rest, at least one image) or None for all.
            cache: folder for the tars' index files; None keeps them beside the tars.

        Raises:
            FileNotFoundError: if the folder is missing.
            ValueError: if it holds no images, the id list or a tar is malformed, or the split is unknown or empty.
        """
        self.root = Path(root)
        if not self.root.exists():
            raise FileNotFoundError(f"SA-1B folder {self.root} does not exist.")
        if split not in (None, "train", "val"):
            raise ValueError(f"split must be 'train', 'val' or None, got {split!r}.")
        source = _source(self.root, None if cache is None else Path(cache))
        cut = int(len(source.image_ids) * _TRAIN_SHARE)
        self._source = source.keep({"train": slice(cut), "val": slice(cut, None), None: slice(None)}[split])
        self.image_ids = self._source.image_ids  # a list, of tars an int64 array
        if not len(self.image_ids):
            raise ValueError(
                f"The train split of {self.root} is empty: its one image validates, expected at least two."
            )

    @property
    def files(self) -> list[tuple[Path, Path]]:
        """The pairs (JPEG, JSON) of a folder, there or not; none of tars, whose index lists only what they hold."""
        return getattr(self._source, "files", [])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sa1bRecord:
        """Reads an image and its annotations; masks stay encoded.

        Raises:
            IndexError: past the end.
            FileNotFoundError: if one of the two files is missing.
            ValueError: if one of them is corrupt or an annotation lacks its segmentation or box.
        """
        image_id = int(self.image_ids[index])
        picture, name = self._source.names(index)
        jpg, content = self._source.read(index)
        annotations = parse_json(content, "annotations", name=name)["annotations"]
        try:
            rles = [annotation["segmentation"] for annotation in annotations]
            boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(len(rles), 4)
            if not np.isfinite(boxes).all():
                raise ValueError("infinite or no number")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"Every annotation in {name} needs 'segmentation' and a 'bbox' of four numbers."
            ) from error
        image = decode_rgb(BytesIO(jpg), name=picture)
        return Sa1bRecord(image_id=image_id, image=image, rles=rles, boxes_xywh=boxes)

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

    def runs(self, record: Sa1bRecord, indices: Sequence[int]) -> Runs:
        """The chosen masks as run lengths, not decoded; a malformed one raises ValueError."""
        where = f"image {record.image_id} in {self.root}"
        return read_runs([record.rles[index] for index in indices], *record.image.shape[:2], where=where)


class _Loose:
    """Image and annotation files of their own."""

    def __init__(self, image_ids: list[int], files: list[tuple[Path, Path]]) -> None:
        self.image_ids, self.files = image_ids, files

    def keep(self, part: slice) -> "_Loose":
        return _Loose(self.image_ids[part], self.files[part])

    def names(self, index: int) -> tuple[Path, Path]:
        return self.files[index]

    def read(self, index: int) -> tuple[bytes, bytes]:
        picture, annotations = self.names(index)
        if not picture.is_file():
            raise FileNotFoundError(f"Image {picture} does not exist.")
        if not annotations.is_file():
            raise FileNotFoundError(f"Annotation file {annotations} does not exist.")
        return picture.read_bytes(), annotations.read_bytes()


def _source(root: Path, cache: Path | None) -> _Loose | Tars:
    if root.is_file():
        return Tars([root], cache=cache)
    image_ids, files = _list_images(root)
    tars = sorted(root.glob("*.tar"))
    if not image_ids and tars:
        return Tars(tars, cache=cache)
    if not image_ids:
        raise ValueError(
            f"{root} holds no SA-1B images: expected sa_images_ids.txt, or files sa_<id>.jpg, or sa_*.tar."
        )
    return _Loose(image_ids, files)


def _list_images(root: Path) -> tuple[list[int], list[tuple[Path, Path]]]:
    """Ids, and JPEG and JSON, of all images: in the order of the id list, else by id."""
    listing = root / "sa_images_ids.txt"
    if listing.is_file():
        lines = listing.read_text(encoding="utf-8-sig", errors="backslashreplace").split()
        for line in lines:
            if not _NUMBER.fullmatch(line):
                raise ValueError(f"{listing} must hold one image number a line, got {excerpt(line, 40)!r}.")
        ids = [int(line) for line in lines]
        return ids, [(root / f"images/sa_{n}.jpg", root / f"masks/sa_{n}.json") for n in ids]
    found = [path for pattern in ("sa_*.jpg", "sa_*/sa_*.jpg") for path in root.glob(pattern)]
    numbered = sorted((int(path.stem[3:]), path) for path in found if _NUMBER.fullmatch(path.stem[3:]))
    return [number for number, _ in numbered], [(path, path.with_suffix(".json")) for _, path in numbered]
