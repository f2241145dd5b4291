"""What `Segmenter` remembers: answers of the model, objects, and the state they make up. All immutable.

Explained in notebook 14.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from evsam_lib.figures import PALETTE
from evsam_lib.models.sam import Promptable

__all__ = ["Answer", "Item", "State"]


@dataclass(frozen=True, eq=False)
class Answer:
    """The model's answer to one prompt. Masks are made when asked for, and kept as bits.

    Attributes:
        model: that gave it.
        low_res: (3, 4h, 4w) float32 tensor, logits.
        iou: (3,) float32, predicted.
        best: index of the mask that the model itself holds for best (`Sam.quality`).
        ms: milliseconds from the prompt to the best mask at the size shown.
    """

    model: Promptable
    low_res: torch.Tensor
    iou: np.ndarray
    best: int
    ms: float = math.nan
    _bits: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)

    def mask(self, choice: int, hw: tuple[int, int]) -> np.ndarray:
        """One of the three masks at a size: (H, W) bool."""
        if (choice, hw) not in self._bits:
            with torch.inference_mode():
                logits = self.model.upscale(self.low_res[None, choice : choice + 1], hw)[0, 0]
                self._bits[choice, hw] = np.packbits((logits > self.model.mask_threshold).cpu().numpy())
        return np.unpackbits(self._bits[choice, hw], count=hw[0] * hw[1]).reshape(hw).astype(bool)


@dataclass(frozen=True)
class Item:
    """One object: what was said about it, and the answer.

    Attributes:
        number: 1, 2, ...; stays when others are removed. Decides the color, and is the value in a label picture.
        points: (x, y, label) each, XY pixels of the picture, label 1 positive or 0 negative.
        box: XYXY pixels of the picture, or None.
        choice: which of the three masks, or None for the model's own best.
        answer: None as long as nothing was said.
    """

    number: int
    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None
    choice: int | None = None
    answer: Answer | None = None

    @property
    def color(self) -> str:
        """As #RRGGBB; colors repeat after the last one."""
        return PALETTE[(self.number - 1) % len(PALETTE)]

    @property
    def shown(self) -> int:
        """Index of the mask that counts."""
        return self._given.best if self.choice is None else self.choice

    @property
    def iou(self) -> float:
        """Predicted IoU of the mask that counts."""
        return float(self._given.iou[self.shown])

    def mask(self, hw: tuple[int, int]) -> np.ndarray:
        """The mask that counts, (H, W) bool.

        Raises:
            ValueError: nothing was said about the object yet.
        """
        return self._given.mask(self.shown, hw)

    @property
    def _given(self) -> Answer:
        if self.answer is None:
            raise ValueError(f"Object {self.number} has no mask yet: it needs a click or a box first.")
        return self.answer


@dataclass(frozen=True)
class State:
    """All objects, and which of them the next click is about."""

    items: tuple[Item, ...] = (Item(1),)
    current: int = 0  # index into items

    @property
    def item(self) -> Item:
        return self.items[self.current]

    def with_item(self, item: Item) -> "State":
        """The same with the current object replaced."""
        return replace(self, items=(*self.items[: self.current], item, *self.items[self.current + 1 :]))
