"""Segmentation in the Wild: 25 small data sets, each in COCO's format.

Paper: Sec. 4.4, zero-shot instance segmentation with the boxes of Grounding DINO; the number is the mean AP over the
sets. Explained in notebook 03. The benchmark came with X-Decoder; its sets were made by users of Roboflow Universe, and
folders keep the names they have there, misspelt or not. Each holds train/, train_10shot/ and valid/; the zero-shot
number is taken on valid/.
"""

from dataclasses import dataclass
from pathlib import Path

from .coco import CocoImages

__all__ = ["SGINW", "SginwSet", "sginw_images"]

ANNOTATIONS = "_annotations_min1cat.coco.json"
SPLITS = ("train", "train_10shot", "valid")
_UNKNOWN = "unknown; the set's README.dataset.txt says"


@dataclass(frozen=True)
class SginwSet:
    """One of the sets.

    Attributes:
        name: as tables print it.
        categories: number of its categories.
        licence: of pictures and annotations, or that we do not know it.
        splits: folders that it has.
    """

    name: str
    categories: int
    licence: str = _UNKNOWN
    splits: tuple[str, ...] = SPLITS

    @property
    def folder(self) -> str:
        """Its folder under seginw/."""
        return self.name


_SETS = (
    SginwSet("Airplane-Parts", 5),
    SginwSet("Bottles", 3),
    SginwSet("Brain-Tumor", 1),
    SginwSet("Chicken", 1),
    SginwSet("Cows", 1),
    SginwSet("Electric-Shaver", 1),
    SginwSet("Elephants", 1),
    SginwSet("Fruits", 5),
    SginwSet("Garbage", 4, "CC BY 4.0"),
    SginwSet("Ginger-Garlic", 2),
    SginwSet("Hand", 2),
    SginwSet("Hand-Metal", 2),
    SginwSet("House-Parts", 12),
    SginwSet("HouseHold-Items", 4),
    SginwSet("Nutterfly-Squireel", 2),
    SginwSet("Phones", 1),
    SginwSet("Poles", 1),
    SginwSet("Puppies", 1),
    SginwSet("Rail", 1),
    SginwSet("Salmon-Fillet", 1),
    SginwSet("Strawberry", 2),
    SginwSet("Tablets", 1),
    SginwSet("Toolkits", 8, "CC BY 4.0"),
    SginwSet("Trash", 22),
    SginwSet("Watermelon", 1),
)
SGINW: dict[str, SginwSet] = {row.name: row for row in _SETS}


def sginw_images(root: str | Path, name: str, *, split: str = "valid") -> CocoImages:
    """Opens one of the sets.

    Args:
        root: folder of the sets, data_root/seginw where `evsam_lib.fetch` put it.
        name: of the set, a key of SGINW.
        split: "valid", which is evaluated, "train" or "train_10shot".

    Raises:
        FileNotFoundError: if its folder or annotation file is missing.
        ValueError: if there is no such set or split, or the annotations cannot be used.
    """
    if name not in SGINW:
        raise ValueError(f"Unknown set {name!r}, expected one of {', '.join(SGINW)}.")
    if split not in SGINW[name].splits:
        raise ValueError(f"Unknown split {split!r}, expected one of {', '.join(SGINW[name].splits)}.")
    folder = Path(root) / SGINW[name].folder / split
    return CocoImages(folder, folder / ANNOTATIONS)
