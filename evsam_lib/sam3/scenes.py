"""Images with masks of objects, whatever they are called: what clicks and boxes are trained and measured on.

Generated concepts in mini, SA-1B's images in the paper profile of notebook 17; either is read when it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evsam_lib.data.concepts import concept_scene
from evsam_lib.data.sa1b import Sa1bFolder

__all__ = ["GeneratedScenes", "Pictures", "Sa1bScenes", "Scene"]


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3) uint8 RGB and masks (N, H, W) bool of objects in it."""

    image: np.ndarray = field(repr=False)
    masks: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class GeneratedScenes:
    """Concept scenes, made when they are asked for.

    Attributes:
        seed: of the data set.
        count: how many.
        size: (height, width) of an image, pixels.
        first: number of the first one.
    """

    seed: int
    count: int
    size: tuple[int, int]
    first: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        made = concept_scene(self.seed, self.first + _place(index, self.count), size=self.size)
        return Scene(made.image, made.masks)


@dataclass(frozen=True)
class Sa1bScenes:
    """Images of SA-1B with some of their masks, the largest and every few down to the smallest.

    Attributes:
        folder: where they are.
        first: number of the first one.
        count: how many.
        most: masks of an image, at most; SA-1B has about a hundred.
    """

    folder: Sa1bFolder
    first: int
    count: int
    most: int = 16

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        record = self.folder[self.first + _place(index, self.count)]
        order = np.argsort(-record.boxes_xywh[:, 2:].prod(1), kind="stable")
        chosen = order[np.linspace(0, len(order) - 1, min(self.most, len(order))).round().astype(int)].tolist()
        return Scene(record.image, self.folder.masks(record, chosen).astype(bool))


@dataclass(frozen=True)
class Pictures:
    """The images of scenes alone, as the distillation of trunks takes them."""

    scenes: Sequence[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.scenes[index].image


def _place(index: int, count: int) -> int:
    """An index within a sequence; past its end iteration stops."""
    if not 0 <= index < count:
        raise IndexError(f"Scene {index} of {count}.")
    return index
