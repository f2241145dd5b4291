"""COCO annotations and their images, indexed once.

Paper: Sec. 4.2 and 4.3 evaluate on COCO and LVIS; Tables 2-5. Explained in notebook 03. Official evaluation scans the
whole annotation list for every image; here one pass groups it by image. LVIS files name images by `coco_url` instead of
`file_name`: for those, `images_dir` is the folder that holds train2017 and val2017.

What a file holds beside usable annotations is counted, never silently dropped: `skipped` has what is left out because
no number could change or no object be scored, `noted` what is used but odd. What would make a number wrong stops with
an error that names it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import decode_segmentation, excerpt, has_no_mask, image_hw, is_finite, read_json, read_rgb, why_absent

__all__ = ["CocoImage", "CocoImages"]


@dataclass(frozen=True)
class CocoImage:
    """One image of an annotation file.

    Attributes:
        image_id: its number.
        path: of the picture.
        height: in pixels, as the annotation file states it.
        width: likewise.
        annotations: its usable annotations, in the order of the file.
        neg_category_ids: LVIS: categories of which the image certainly holds nothing.
        not_exhaustive_category_ids: LVIS: categories of which not everything is annotated.
    """

    image_id: int
    path: Path
    height: int
    width: int
    annotations: list[dict]
    neg_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()


class CocoImages:
    """Images in the order of the annotation file: `len`, iteration, `[position]`, `by_id[image_id]`.

    Attributes:
        images_dir, annotations_json: as given.
        categories: {category id: name}.
        frequency: LVIS: {category id: "r", "c" or "f"}, rare, common, frequent in its training set; else empty.
        by_id: {image id: image}.
        skipped: {reason: count} of annotations that are left out.
        noted: {reason: count} of images and annotations that are odd, but used as the official evaluation uses them.
    """

    def __init__(self, images_dir: str | Path, annotations_json: str | Path) -> None:
        """Reads and indexes the annotation file; reads no picture.

        Args:
            images_dir: folder of the pictures (COCO), or of train2017 and val2017 (LVIS).
            annotations_json: such as instances_val2017.json or lvis_v1_val.json.

        Raises:
            FileNotFoundError: if the folder or the file is missing.
            ValueError: if the file lacks images or annotations, lists an image or annotation twice, has an image that
                lacks a key or is of a size that no picture has, an annotation that lacks a key or whose box or area is
                no finite number, or none that belongs to its images.
        """
        self.images_dir, self.annotations_json = Path(images_dir), Path(annotations_json)
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"Image folder {self.images_dir} {why_absent(self.images_dir)}.")
        content = read_json(self.annotations_json, "images", "annotations")
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.setdefault(key, []), list):
                raise ValueError(f"{key!r} in {self.annotations_json} must be a list, got {excerpt(content[key], 40)}.")
        entries, categories = content["images"], content["categories"]
        for entry in categories:
            if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
                raise ValueError(
                    f"Every category in {self.annotations_json} needs id and name, got {excerpt(entry, 60)}."
                )
        self.categories: dict[int, str] = {c["id"]: c["name"] for c in categories}
        self.frequency: dict[int, str] = {c["id"]: c["frequency"] for c in categories if "frequency" in c}
        self.by_id: dict[int, CocoImage] = {}
        for entry in entries:
            image = self._image(entry)
            if image.image_id in self.by_id:
                raise ValueError(f"{self.annotations_json} lists image {image.image_id} twice.")
            self.by_id[image.image_id] = image
        skipped, noted = Counter(), Counter()
        self._add_all(content["annotations"], skipped, noted)
        self._images = list(self.by_id.values())
        noted["image without annotations"] = sum(not image.annotations for image in self._images)
        self.skipped: dict[str, int] = dict(+skipped)
        self.noted: dict[str, int] = dict(+noted)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> CocoImage:
        return self._images[position]

    def __iter__(self) -> Iterator[CocoImage]:
        return iter(self._images)

    @property
    def generated(self) -> bool:
        """Whether `evsam_lib.data.write` made this folder: no number measured on it is comparable with the paper's."""
        near = (self.images_dir, *self.images_dir.parents[:2])  # LVIS, COCO, SGinW
        return any((folder / "generated.json").is_file() for folder in near)

    def read(self, image: CocoImage) -> np.ndarray:
        """Reads a picture as (H, W, 3) uint8 RGB.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: if it is corrupt.
        """
        return read_rgb(image.path)

    def mask(self, annotation: dict) -> np.ndarray:
        """Decodes polygons, compressed or uncompressed run lengths.

        Args:
            annotation: one of this file's annotations.

        Returns:
            (H, W) bool, at the size that the file states for the image.

        Raises:
            ValueError: if the segmentation is malformed.
        """
        image = self.by_id[annotation["image_id"]]
        where = f"annotation {annotation['id']} in {self.annotations_json}"
        return decode_segmentation(annotation["segmentation"], image.height, image.width, where=where).astype(bool)

    def _image(self, entry: dict) -> CocoImage:
        try:
            # LVIS: http://images.cocodataset.org/val2017/000000397133.jpg -> val2017/000000397133.jpg
            name = entry["file_name"] if "file_name" in entry else "/".join(entry["coco_url"].split("/")[-2:])
            federated = (tuple(entry.get(f"{kind}_category_ids", ())) for kind in ("neg", "not_exhaustive"))
            if not _is_id(entry["id"]):
                raise TypeError("an id is a number or a name")
            size = image_hw(entry["height"], entry["width"])
            return CocoImage(entry["id"], self.images_dir / name, *size, [], *federated)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"Every image in {self.annotations_json} needs id, height, width and file_name or coco_url, "
                f"as pictures have them, got {excerpt(entry, 120)}."
            ) from error

    def _add_all(self, annotations: list[dict], skipped: Counter, noted: Counter) -> None:
        """Gives every image its annotations; counts those that are left out, and oddities of the others."""
        stray, ids = None, set()
        for annotation in annotations:
            self._check(annotation)
            if annotation["id"] in ids:
                raise ValueError(f"{self.annotations_json} lists annotation {annotation['id']} twice.")
            ids.add(annotation["id"])
            image = self.by_id.get(annotation["image_id"])
            if image is None:  # pycocotools and the official evaluation never look at it either
                skipped["annotation of an image that the file does not list"] += 1
                stray = stray or annotation
            elif has_no_mask(annotation["segmentation"]):
                skipped["annotation without a mask"] += 1
            else:
                image.annotations.append(annotation)
                noted.update(self._oddities(annotation, image))
        if stray and skipped["annotation of an image that the file does not list"] == len(annotations):
            raise ValueError(
                f"Annotation {stray['id']} in {self.annotations_json} refers to image {stray['image_id']}, "
                "which the file does not list; nor does any other annotation belong to a listed image."
            )

    def _check(self, annotation: dict) -> None:
        keys = ("id", "image_id", "bbox", "area", "segmentation")
        missing = [key for key in keys if not isinstance(annotation, dict) or key not in annotation]
        if missing:
            raise ValueError(
                f"Annotation {excerpt(annotation, 60)} in {self.annotations_json} lacks {', '.join(missing)}."
            )
        if not _is_id(annotation["id"]) or not _is_id(annotation["image_id"]):
            told = f"id {excerpt(annotation['id'], 40)} and image_id {excerpt(annotation['image_id'], 40)}"
            raise ValueError(f"An annotation in {self.annotations_json} has {told}, expected numbers.")
        box, area = annotation["bbox"], annotation["area"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, (*box, area))):
            raise ValueError(
                f"Annotation {annotation['id']} in {self.annotations_json} has bbox {excerpt(box, 60)} and area "
                f"{excerpt(area, 40)}, expected four finite numbers and one."
            )

    def _oddities(self, annotation: dict, image: CocoImage) -> Iterator[str]:
        x, y, w, h = annotation["bbox"]
        if w <= 0 or h <= 0:
            yield "annotation whose box has no area"
        elif x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
            yield "annotation whose box lies outside its image"
        category = annotation.get("category_id", next(iter(self.categories), 0))
        if self.categories and not (_is_id(category) and category in self.categories):
            yield "annotation of a category that the file does not list"
        if annotation["id"] == 0:
            yield "annotation with id 0, which pycocotools takes for no match"


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
