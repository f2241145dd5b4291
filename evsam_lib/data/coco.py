"""COCO annotations and their images, indexed once.

Paper: Sec. 4.2 and 4.3 evaluate on COCO and LVIS; Tables 2-5. Explained in notebook 03. Official evaluation scans the
whole annotation list for every image; here one pass groups it by image. LVIS files name images by `coco_url` instead of
`file_name`: for those, `images_dir` is the folder that holds train2017 and val2017.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import decode_segmentation, read_json, read_rgb

__all__ = ["CocoImage", "CocoImages"]


@dataclass(frozen=True)
class CocoImage:
    """One image of an annotation file.

    Attributes:
        image_id: its number.
        path: of the picture.
        height: in pixels, as the annotation file states it.
        width: likewise.
        annotations: its annotations, in the order of the file.
    """

    image_id: int
    path: Path
    height: int
    width: int
    annotations: list[dict]


class CocoImages:
    """Images in the order of the annotation file: `len`, iteration, `[position]`, `by_id[image_id]`."""

    def __init__(self, images_dir: str | Path, annotations_json: str | Path) -> None:
        """Reads and indexes the annotation file; reads no picture.

        Args:
            images_dir: folder of the pictures (COCO), or of train2017 and val2017 (LVIS).
            annotations_json: such as instances_val2017.json or lvis_v1_val.json.

        Raises:
            FileNotFoundError: if the folder or the file is missing.
            ValueError: if the file lacks images or annotations, or an annotation is unusable or of an unknown image.
        """
        self.images_dir, self.annotations_json = Path(images_dir), Path(annotations_json)
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"Image folder {self.images_dir} does not exist.")
        content = read_json(self.annotations_json, "images", "annotations")
        self.categories: dict[int, str] = {c["id"]: c["name"] for c in content.get("categories", [])}
        self.by_id: dict[int, CocoImage] = {}
        for entry in content["images"]:
            image = self._image(entry)
            self.by_id[image.image_id] = image
        for annotation in content["annotations"]:
            self._add(annotation)
        self._images = list(self.by_id.values())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> CocoImage:
        return self._images[position]

    def __iter__(self) -> Iterator[CocoImage]:
        return iter(self._images)

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
            return CocoImage(entry["id"], self.images_dir / name, int(entry["height"]), int(entry["width"]), [])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Every image in {self.annotations_json} needs id, height, width and file_name or coco_url, "
                f"got {str(entry)[:80]}."
            ) from error

    def _add(self, annotation: dict) -> None:
        missing = [key for key in ("id", "image_id", "bbox", "area", "segmentation") if key not in annotation]
        if missing:
            raise ValueError(
                f"Annotation {str(annotation)[:60]} in {self.annotations_json} lacks {', '.join(missing)}."
            )
        image = self.by_id.get(annotation["image_id"])
        if image is None:
            raise ValueError(
                f"Annotation {annotation['id']} in {self.annotations_json} refers to image {annotation['image_id']}, "
                "which the file does not list."
            )
        image.annotations.append(annotation)
