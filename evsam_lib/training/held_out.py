"""Measurements while a training runs, on a few images it does not learn from.

Phase 1: how near the student's embedding is to the teacher's (L2, cosine, linear CKA), and what the teacher's decoder
makes of it. Phase 2: what the decoder makes of it. Shown in notebooks 04 and 05.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from evsam_lib.models.prompt_encoder import prompt_tokens
from evsam_lib.models.sam import Sam
from evsam_lib.prompts import next_clicks
from evsam_lib.training import losses
from evsam_lib.training.samples import boxes_to_frame, soft_masks
from evsam_lib.training.teacher import teacher_embedding

__all__ = ["HeldOut", "Likeness", "embedding_metrics"]

PROMPTS = 8  # boxes per image, the largest masks
METRICS = ("l2", "cosine", "cka")


class HeldOut:
    """A few images with boxes and the masks they ask for; called with a model in eval mode, it returns numbers.

    `held_out_iou` is the mean IoU over all objects, prompted by their boxes, of the mask that the model itself would
    choose, at the decoder's own resolution; `held_out_click_iou` the same for a click at the place deepest inside. A
    box alone tells much of a mask, a click hardly anything: the second needs a good embedding. With a teacher there
    are also `held_out_l2`, `held_out_cosine` and `held_out_cka`.
    """

    def __init__(self, model: Sam, data: Any, *, images: int, teacher: Sam | None = None) -> None:
        """Prepares the images, the first ones of `data`.

        Args:
            model: of the kind that will be measured.
            data: `data[i]` with `image` and `boxes_xywh`, and `runs` or `masks`.
            images: how many, at most.
            teacher: in eval mode, whose embeddings are computed once.

        Raises:
            ValueError: no images.
        """
        if min(images, len(data)) < 1:
            raise ValueError("no held-out images: expected at least one")
        self.items = [_item(model, data, data[i], teacher) for i in range(min(images, len(data)))]

    @property
    def names(self) -> list[str]:
        """Of the numbers it returns."""
        more = METRICS if self.items[0].target is not None else ()
        return ["held_out_iou", "held_out_click_iou", *(f"held_out_{name}" for name in more)]

    def __call__(self, model: Sam) -> dict[str, float]:
        """Measures a model in eval mode."""
        boxes, clicks, likeness = [], [], Likeness()
        with torch.no_grad():
            for item in self.items:
                embedding = model.encode(item.image[None].to(model.device))
                if item.target is not None:
                    likeness.add(embedding, item.target[None].to(model.device))
                if len(item.boxes):
                    boxes.append(_ious(model, embedding, item.masks, prompt_tokens(boxes=item.boxes[None].float())))
                    points = item.clicks[None, :, None].float()  # (1, N, 1, 2)
                    clicked = prompt_tokens(points, torch.ones(points.shape[:3], dtype=torch.int64))
                    clicks.append(_ious(model, embedding, item.masks, clicked))
        found = {"held_out_iou": _mean(boxes), "held_out_click_iou": _mean(clicks)}
        return found | {f"held_out_{name}": value for name, value in likeness.result().items()}


class Likeness:
    """Compares embeddings, image after image.

    L2 is the mean squared difference, cosine the mean over cells. Linear CKA (Kornblith et al. 2019) compares which
    cells are alike: 1 if the two are equal up to rotation and scale of their channels, near 0 if unrelated.
    """

    def __init__(self) -> None:
        self._each: list[tuple[float, float]] = []
        self._sums: list[torch.Tensor] | None = None

    def add(self, embedding: torch.Tensor, target: torch.Tensor) -> None:
        """Adds (B, C, h, w) and (B, C, h, w).

        Raises:
            ValueError: their shapes differ.
        """
        if embedding.shape != target.shape:
            raise ValueError(different(embedding, target))
        embedding, target = embedding.float(), target.float()
        for one, other in zip(embedding, target, strict=True):
            cosine = F.cosine_similarity(one, other, dim=0).mean().item()
            self._each.append((F.mse_loss(one, other).item(), cosine))
        x, y = (maps.movedim(1, -1).flatten(0, -2).double() for maps in (embedding, target))  # (cells, C)
        parts = [torch.tensor(float(len(x))), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
        parts = [part.cpu() for part in parts]
        self._sums = parts if self._sums is None else [a + b for a, b in zip(self._sums, parts, strict=True)]

    def result(self) -> dict[str, float]:
        """l2, cosine, cka; empty if nothing was added."""
        if self._sums is None:
            return {}
        n, x, y, xx, yy, xy = self._sums
        xx, yy, xy = (both - torch.outer(a, b) / n for both, a, b in ((xx, x, x), (yy, y, y), (xy, x, y)))
        alike = xy.square().sum() / (xx.norm() * yy.norm()).clamp(min=1e-30)
        l2, cosine = np.mean(self._each, axis=0).tolist()
        return {"l2": l2, "cosine": cosine, "cka": alike.item()}


def embedding_metrics(student: Sam, teacher: Sam, images: Iterable[np.ndarray]) -> dict[str, float]:
    """How near the student's embeddings are to the teacher's, on images it need not have seen.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        images: uint8 (H, W, 3) RGB each.

    Returns:
        l2, cosine and cka, see `Likeness`.

    Raises:
        ValueError: no images, or embeddings of different shapes.
    """
    likeness = Likeness()
    with torch.no_grad():
        for image in images:
            target = teacher_embedding(teacher, teacher.preprocess(image)[None])
            likeness.add(student.embed(image), target.to(student.device))
    if not (found := likeness.result()):
        raise ValueError("no images to compare embeddings on: expected at least one")
    return found


def different(embedding: torch.Tensor, target: torch.Tensor) -> str:
    """One sentence about embeddings that cannot be compared."""
    shapes = f"{tuple(embedding.shape)} and {tuple(target.shape)}"
    return f"student and teacher must embed alike, got {shapes} (B, C, h, w)"


@dataclass(frozen=True)
class _Item:
    """image (3, S, S); boxes (N, 4), clicks (N, 2) in frame pixels; masks (N, T, T) soft; target (C, h, w) or None."""

    image: torch.Tensor
    boxes: torch.Tensor
    clicks: torch.Tensor
    masks: torch.Tensor
    target: torch.Tensor | None


def _item(model: Sam, data: Any, record: Any, teacher: Sam | None) -> _Item:
    boxes = torch.as_tensor(np.asarray(record.boxes_xywh, dtype=np.float32).reshape(-1, 4))
    chosen = (boxes[:, 2] * boxes[:, 3]).argsort(descending=True, stable=True)[:PROMPTS]
    height, width = record.image.shape[:2]
    options = {"image_size": model.image_size, "frame_size": model.frame_size}
    target = None
    if teacher is not None:
        target = teacher_embedding(teacher, teacher.preprocess(record.image)[None])[0].cpu()
    masks = soft_masks(data, record, chosen, 4 * model.grid)
    hard = (masks > 0.5).numpy()
    clicks, _ = next_clicks(hard, np.zeros_like(hard))
    return _Item(
        image=model.preprocess(record.image),
        boxes=boxes_to_frame(boxes[chosen], (height, width), **options),
        clicks=(torch.from_numpy(clicks) + 0.5) * (model.frame_size / masks.shape[-1]) - 0.5,
        masks=masks,
        target=target,
    )


def _ious(
    model: Sam, embedding: torch.Tensor, masks: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """IoU (N,) of the masks chosen for the tokens of N prompts, (1, N, T, 2) and (1, N, T), on one embedding."""
    where = model.device
    coords, labels = (part.to(where) for part in tokens)
    low_res, predicted = model.decode(embedding, coords, labels)
    best = model.quality(low_res, predicted)[0].argmax(-1)  # (N,)
    chosen = low_res[0].take_along_dim(best[:, None, None, None], 1)
    return losses.mask_iou(chosen, masks.to(where))[:, 0].cpu()


def _mean(ious: list[torch.Tensor]) -> float:
    return torch.cat(ious).mean().item() if ious else float("nan")
