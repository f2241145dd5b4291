"""Stage 3 of EfficientSAM3: concept segmentation end to end, on images with phrases, negatives included.

The detector itself is trained, by matching and losses of `losses`, no longer against a teacher's features. What learns
is a setting: the released models train trunk and neck and freeze text and heads, other choices are ablations. Several
phrases share an image's features, so the trunk runs once for all of them. Notebook 19.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from evsam_lib.data.saco import ConceptImage, ConceptPhrase
from evsam_lib.models.weights import load_strictly
from evsam_lib.prompts import mask_box
from evsam_lib.sam3.detect import detect, phrase_features
from evsam_lib.sam3.losses import Targets, Weights, centred, concept_losses
from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.stages import Stage, StageObjective, covered
from evsam_lib.sam3.training import adopt_heads
from evsam_lib.training.batches import Batches
from evsam_lib.training.loop import autocast, fit
from evsam_lib.training.settings import option

__all__ = [
    "TRAINED", "ConceptBatch", "ConceptObjective", "ConceptStage", "adopt_trunk", "concept_batches", "train_concepts",
]  # fmt: skip

TRUNK, NECK = "detector_model.vision_encoder.backbone.", "detector_model.vision_encoder.neck."
TRAINED = {
    "trunk+neck": (TRUNK, NECK),  # the released models'
    "trunk": (TRUNK,),
    "neck": (NECK,),
    "presence": ("detector_model.detr_decoder.presence_",),
    "detector": ("detector_model.",),
}


@dataclass(frozen=True, kw_only=True)
class ConceptStage(Stage):
    """Of stage 3. The weights of the losses are EfficientSAM3's, see `losses.Weights`."""

    weight_decay: float = option(0.01, "of weights")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    train: str = option("trunk+neck", "what learns", tuple(TRAINED))
    phrases: int = option(6, "phrases asked on an image, half of them negative as far as there are such")
    masked: int = option(2, "of an image's phrases that are also decoded to masks")
    box_weight: float = option(Weights.box, "L1 of boxes")
    giou_weight: float = option(Weights.giou, "generalised IoU of boxes")
    class_weight: float = option(Weights.klass, "whether a query is an instance")
    presence_weight: float = option(Weights.presence, "whether there is any")
    mask_weight: float = option(Weights.mask, "focal loss of masks")
    dice_weight: float = option(Weights.dice, "dice loss of masks")
    many_weight: float = option(Weights.many, "of one-to-many matching, at the layers before the last")

    def weights(self) -> Weights:
        """Of the parts of the loss."""
        names = ("box", "giou", "class", "presence", "mask", "dice", "many")
        return Weights(*(getattr(self, f"{name}_weight") for name in names))


@dataclass
class ConceptBatch:
    """B images and P phrases on them.

    Attributes:
        places: (B,) of the images in their set.
        frames: (B, 3, S, S) float.
        image_of: (P,) int64.
        phrases: P texts.
        targets: of the phrases.
        masked: (R,) int64, phrases to decode masks for.
    """

    places: Tensor
    frames: Tensor
    image_of: Tensor
    phrases: list[str]
    targets: Targets
    masked: Tensor


def adopt_trunk(student, teacher, state: dict[str, Tensor] | None = None) -> None:
    """Everything of the teacher but its trunk; the trunk from the weights of a student, its own where there are none.

    Args:
        student: of `load_sam3`, with SAM3's text.
        teacher: of `load_sam3`, of the same scale.
        state: of a file of the same image student, with whatever text.

    Raises:
        ValueError: the two models or the trunks differ.
    """
    adopt_heads(student, teacher)
    detector, theirs = student.detector_model, teacher.detector_model
    for part in ("text_encoder", "text_projection"):
        getattr(detector, part).load_state_dict(getattr(theirs, part).state_dict())
    if state is not None:
        trunk = {key.removeprefix(TRUNK): value for key, value in state.items() if key.startswith(TRUNK)}
        load_strictly(detector.vision_encoder.backbone, trunk, source="the student's file")


def train_concepts(
    model,
    images: Sequence[ConceptImage],
    settings: ConceptStage,
    *,
    out: str | Path,
    resume: bool = False,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> pd.DataFrame:
    """Trains a model's detector in place.

    Args:
        model: of `load_sam3`.
        images: with phrases, such as `GeneratedConcepts` or `SacoImages`.
        settings: how long, how fast, what learns, by which weights.
        out: folder of logs and checkpoints.
        resume: go on from the last checkpoint in `out`.
        progress: wraps the steps, for example `tqdm`.

    Returns:
        The log, see `training.loop.read_log`: step, loss, its parts, lr, seconds and more.

    Raises:
        ValueError: an empty or overlong phrase, or see `training.loop.fit`, as for other errors.
    """
    settings = settings.complete(model="", images=len(images))
    batches = concept_batches(images, settings, side=model.config.image_size)
    objective = ConceptObjective(model, settings)
    record = {"stage": "ConceptStage", "images": len(images)}
    return fit(objective, batches, settings, out=out, record=record, resume=resume, progress=progress)


def concept_batches(images: Sequence[ConceptImage], settings: ConceptStage, *, side: int) -> Batches:
    """Batches of images with some of their phrases.

    Args:
        images: where they come from.
        settings: how many phrases, how many of those with masks.
        side: of the model's input, pixels.
    """

    def make(record: ConceptImage, generator: torch.Generator) -> tuple:
        chosen = _chosen(record.phrases, settings.phrases, generator)
        targets = [_target(phrase, side) for phrase in chosen]
        return record.image_id, pixels(record.image, side), chosen, targets

    def collate(samples: list[tuple]) -> ConceptBatch:
        return _collated(samples, settings.masked)

    return Batches(images, make, collate)


class ConceptObjective(StageObjective):
    """A detector, its matching and its losses."""

    columns = ("loss", "box", "giou", "klass", "presence", "mask", "dice")

    def __init__(self, model, settings: ConceptStage) -> None:
        super().__init__(model, settings)
        self.trained = TRAINED[settings.train]

    def train_mode(self) -> None:
        """Dropout stays off; batch norms of the trunk are as `settings.batchnorm` has it."""
        self.model.eval()
        if TRUNK in self.trained or "detector_model." in self.trained:
            self.model.detector_model.vision_encoder.backbone.train()

    def image_ids(self, batch: ConceptBatch) -> list[int]:
        return batch.places.tolist()

    def prepare(self, batch: ConceptBatch) -> ConceptBatch:
        device, targets = self.clock.device, batch.targets
        moved = Targets(*(x.to(device) for x in (targets.boxes, targets.masks, targets.exists)))
        image_of, masked = batch.image_of.to(device), batch.masked.to(device)
        return ConceptBatch(batch.places, batch.frames.to(device), image_of, batch.phrases, moved, masked)

    def forward(self, batch: ConceptBatch, step: int, part: int) -> dict[str, Tensor]:
        with autocast(self.clock.device, self.settings.amp):
            vision = self.model.detector_model.vision_encoder(batch.frames)
            text, mask = phrase_features(self.model, batch.phrases)
            found = detect(self.model, vision, batch.image_of, text, mask, masked=batch.masked)
        self.clock.mark("student")
        losses = concept_losses(found, batch.targets, self.settings.weights())
        return losses | {"weight": torch.tensor(float(len(batch.phrases)), device=text.device)}


def _chosen(phrases: Sequence[ConceptPhrase], count: int, generator: torch.Generator) -> list[ConceptPhrase]:
    """Half positive, half negative; where one kind is short, more of the other. Positive ones first."""
    order = torch.randperm(len(phrases), generator=generator).tolist()
    kinds = [[phrases[i] for i in order if bool(len(phrases[i].masks)) == kind] for kind in (True, False)]
    positive = min(len(kinds[0]), max((count + 1) // 2, count - len(kinds[1])))
    return kinds[0][:positive] + kinds[1][: count - positive]


def _target(phrase: ConceptPhrase, side: int) -> tuple[Tensor, Tensor]:
    """(M, 4) centre, width and height, and (M, 4h, 4w) coverage, of one phrase's instances."""
    cells, (count, height, width) = 4 * (side // 14), phrase.masks.shape
    if not count:
        return torch.zeros(0, 4), torch.zeros(0, cells, cells)
    corners = torch.from_numpy(np.stack([mask_box(mask) for mask in phrase.masks])) / torch.tensor([width, height] * 2)
    return centred(corners), covered(torch.from_numpy(phrase.masks), cells)


def _collated(samples: list[tuple], masked: int) -> ConceptBatch:
    places, frames, chosen, targets = zip(*samples, strict=True)
    phrases = [phrase.text for several in chosen for phrase in several]
    image_of = torch.tensor([i for i, several in enumerate(chosen) for _ in several])
    found = [target for several in targets for target in several]
    most, side = max(1, *(len(boxes) for boxes, _ in found)), found[0][1].shape[-1]
    boxes, masks = torch.zeros(len(found), most, 4), torch.zeros(len(found), most, side, side)
    exists = torch.zeros(len(found), most, dtype=torch.bool)
    for row, (b, m) in enumerate(found):
        boxes[row, : len(b)], masks[row, : len(b)], exists[row, : len(b)] = b, m, True
    starts = np.cumsum([0, *(len(several) for several in chosen[:-1])])
    rows = [start + k for start, several in zip(starts, chosen, strict=True) for k in range(min(masked, len(several)))]
    rows = torch.tensor([row for row in rows if exists[row].any()], dtype=torch.long)
    return ConceptBatch(
        torch.tensor(places), torch.stack(frames), image_of, phrases, Targets(boxes, masks, exists), rows
    )
