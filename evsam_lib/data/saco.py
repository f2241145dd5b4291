"""Images with noun phrases: SA-Co Gold's files, written for generated concepts, read for training and evaluation.

SA-Co's annotations look like COCO's, but an entry of "images" is a pair of an image and a phrase: `text_input` names
the concept, `file_name` the image, and a pair without annotations is a negative, the concept is not there. Boxes and
areas are parts of the image. Images of several pairs are read once and keep their phrases together, which is what
makes training on many phrases cheap. Notebook 19.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from .concepts import ConceptScene, concept_scene
from .rle import encode_masks

__all__ = ["ConceptImage", "ConceptPhrase", "GeneratedConcepts", "SacoImages", "as_concepts", "write_saco"]

FIRST_ID = 10_000_000  # SA-Co's ids are of this kind


@dataclass(frozen=True)
class ConceptPhrase:
    """A phrase asked on an image.

    Attributes:
        pair_id: of the pair of image and phrase.
        text: the noun phrase.
        masks: (M, H, W) bool, all instances; M is 0 for a negative.
        others: what further annotators took for all instances, likewise.
    """

    pair_id: int
    text: str
    masks: np.ndarray = field(repr=False)
    others: tuple[np.ndarray, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class ConceptImage:
    """An image (H, W, 3) uint8 RGB with all its phrases."""

    image_id: int
    image: np.ndarray = field(repr=False)
    phrases: tuple[ConceptPhrase, ...]


@dataclass(frozen=True)
class GeneratedConcepts:
    """Generated scenes `first` ... `first + count - 1` of a seed, made when asked for."""

    seed: int
    count: int
    side: int
    first: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ConceptImage:
        if not 0 <= index < self.count:
            raise IndexError(index)
        made = concept_scene(self.seed, self.first + index, size=(self.side, self.side))
        return as_concepts(made, index)

    def __iter__(self) -> Iterator[ConceptImage]:
        return map(self.__getitem__, range(self.count))


def as_concepts(made: ConceptScene, image_id: int) -> ConceptImage:
    """A generated scene as the files have it."""
    masks = made.masks
    phrases = (
        ConceptPhrase(16 * image_id + number, phrase.text, masks[list(phrase.instances)])
        for number, phrase in enumerate(made.phrases)
    )
    return ConceptImage(image_id, made.image, tuple(phrases))


def write_saco(images: Iterable[ConceptImage], folder: str | Path, *, name: str = "gold_generated") -> Path:
    """Writes images and an annotation file in SA-Co's layout.

    Args:
        images: what to write.
        folder: gets `images/*.png` and `NAME.json`.
        name: of the annotation file.

    Returns:
        The annotation file.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pairs: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in images:
        file_name = f"concept_{image.image_id:08d}.png"
        Image.fromarray(image.image).save(folder / "images" / file_name)
        height, width = image.image.shape[:2]
        for phrase in image.phrases:
            pair = {"id": FIRST_ID + phrase.pair_id, "file_name": file_name, "text_input": phrase.text}
            pairs.append(pair | {"width": width, "height": height, "is_instance_exhaustive": 1})
            for mask, rle in zip(phrase.masks, encode_masks(phrase.masks), strict=True):
                annotation = {"id": len(annotations) + 1, "image_id": pair["id"], "category_id": 1, "iscrowd": 0}
                annotations.append(annotation | {"segmentation": rle, **_parts(mask)})
    categories = [{"id": 1, "name": "object"}]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"images": pairs, "annotations": annotations, "categories": categories}))
    return path


class SacoImages(Sequence):
    """Images of an annotation file in SA-Co's layout, with their phrases; item i is a `ConceptImage`.

    Args:
        annotations: the json file.
        images: folder that its file names are relative to.
        limit: first so many images only; None for all.
        also: files of further annotators of the same pairs: SA-Co Gold has three of each. A pair counts if its
            instances are all annotated in every file.

    Raises:
        FileNotFoundError: the file or the folder is not there.
        ValueError: the file is of another layout; the message says what is missing.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        limit: int | None = None,
        also: Sequence[str | Path] = (),
    ) -> None:
        self.path, self.folder = Path(annotations), Path(images)
        if not self.path.is_file():
            raise FileNotFoundError(f"No annotations at {self.path}; SA-Co Gold's are on Hugging Face, SACo-Gold.")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"No folder of images at {self.folder}.")
        pairs, self._found = _read(self.path)
        further = [_read(Path(path)) for path in also]
        self._others = [found for _, found in further]
        partly = {pair["id"] for own, _ in further for pair in own if not pair.get("is_instance_exhaustive", True)}
        grouped: dict[str, list[dict]] = {}
        for pair in pairs:
            if pair.get("is_instance_exhaustive", True) and pair["id"] not in partly:  # as in the official evaluation
                grouped.setdefault(pair["file_name"], []).append(pair)
        if not grouped:
            raise ValueError(f"{self.path} holds no pair of image and phrase whose instances are all annotated.")
        self._images = list(grouped.items())[:limit]

    def __len__(self) -> int:
        return len(self._images)

    # pyrefly: ignore[bad-override]: by place alone, nobody takes slices
    def __getitem__(self, index: int) -> ConceptImage:
        file_name, pairs = self._images[index]
        path = self.folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{self.path.name} names {file_name}, which is not in {self.folder}.")
        image = np.asarray(Image.open(path).convert("RGB"))
        return ConceptImage(index, image, tuple(self._phrase(pair, image.shape[:2]) for pair in pairs))

    def _phrase(self, pair: dict, size: tuple[int, int]) -> ConceptPhrase:
        masks, *others = (self._masks(found, pair, size) for found in (self._found, *self._others))
        return ConceptPhrase(pair["id"], pair["text_input"], masks, tuple(others))

    def _masks(self, found: dict[int, list[dict]], pair: dict, size: tuple[int, int]) -> np.ndarray:
        masks = np.zeros((len(found.get(pair["id"], [])), *size), bool)
        for mask, annotation in zip(masks, found.get(pair["id"], []), strict=True):
            rle = annotation["segmentation"]
            if tuple(rle["size"]) != size:
                raise ValueError(
                    f"{self.path.name}: the mask of annotation {annotation['id']} is {rle['size'][0]} x "
                    f"{rle['size'][1]} pixels, its image {pair['file_name']} {size[0]} x {size[1]}."
                )
            mask[:] = coco_mask.decode(rle)
        return masks


def _read(path: Path) -> tuple[list[dict], dict[int, list[dict]]]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(f"{path} has no lists 'images' and 'annotations', as SA-Co's and COCO's files have.")
    for pair in content["images"]:
        lacking = [key for key in ("id", "file_name", "text_input") if key not in pair]
        if lacking:
            hint = " COCO's own files name no phrases." if lacking == ["text_input"] else ""
            raise ValueError(f"{path}: image {pair.get('id', '?')} has no {', '.join(lacking)}.{hint}")
        if not str(pair["text_input"]).strip():
            raise ValueError(f"{path}: the phrase of image {pair['id']} is empty.")
    known = {pair["id"] for pair in content["images"]}
    found: dict[int, list[dict]] = {}
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in known:
            raise ValueError(f"{path}: annotation {annotation.get('id')} belongs to no pair of image and phrase.")
        rle = annotation.get("segmentation")
        if not isinstance(rle, dict) or not {"size", "counts"} <= set(rle):
            raise ValueError(f"{path}: annotation {annotation.get('id')} has no mask of run lengths.")
        found.setdefault(annotation["image_id"], []).append(annotation)
    return content["images"], found


def _parts(mask: np.ndarray) -> dict[str, Any]:
    """Box (left, top, width, height) and area as parts of the image."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    box = [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]
    return {"bbox": [float(v) for v in box], "area": float(mask.mean())}
