"""Reads a whole folder once and says, a sentence each, what is wrong with it: run it on your own data before training.

Not part of the paper; shown in notebook 03.
"""

from itertools import islice

from .coco import CocoImages
from .sa1b import Sa1bFolder

__all__ = ["problems"]


def problems(data: Sa1bFolder | CocoImages, *, limit: int | None = None) -> list[str]:
    """Reads every picture and decodes every mask.

    Args:
        data: the folder, opened. Opening fails by itself where the folder or its list of images is unusable.
        limit: look at this many images only, the first ones.

    Returns:
        One sentence per unusable image; empty if all is well. An image's first problem hides its others.
    """
    found = []
    for index in islice(range(len(data)), limit):
        try:
            _read(data, index)
        except (FileNotFoundError, ValueError) as error:
            found.append(str(error))
    return found


def _read(data: Sa1bFolder | CocoImages, index: int) -> None:
    if isinstance(data, Sa1bFolder):
        record = data[index]
        data.masks(record, range(len(record.rles)))
        return
    image = data[index]
    shape = data.read(image).shape[:2]
    if shape != (image.height, image.width):
        raise ValueError(f"Image {image.path} is {shape}, {data.annotations_json} says {(image.height, image.width)}.")
    for annotation in image.annotations:
        data.mask(annotation)
