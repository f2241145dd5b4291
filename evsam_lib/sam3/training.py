"""Stage 1 of EfficientSAM3: the image student learns the teacher's trunk, the text student its features of phrases.

What the official code does, and what its documents do not say, are arguments: the squared error summed over channels (a
thousand times the mean, beside which the cosine term is lost), the consistency of phrases counted twice, images padded
and normalised as ImageNet's while the finished model gets them stretched. Defaults are what one would want; `official`
turns each back. Teacher and student see the same pixels. What comes after stage 1, with prompts in the loop, is
`evsam_lib.sam3.geometry`. Notebook 17 shows both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.stages import Record, Stage, Stage1, fit_stage
from evsam_lib.sam3.tokens import tokenize
from evsam_lib.sam3.zoo import TEACHER
from evsam_lib.training.settings import option

__all__ = [
    "ImageStage", "TextStage", "adopt_heads", "distil_image", "distil_text", "image_loss", "teacher_maps",
    "text_cosine", "text_loss", "training_frame", "trunk_cosine",
]  # fmt: skip

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # mean, spread
IMAGE_WAYS = ("", "loss", "frame", "loss,frame")
OWN = ("vision_encoder.backbone.", "text_encoder.", "text_projection.")  # what students do not share with the teacher


@dataclass(frozen=True, kw_only=True)
class ImageStage(Stage):
    """Of the image student; weight decay and norm are the official code's."""

    weight_decay: float = option(0.01, "of weights")
    cosine_weight: float = option(1.0, "see `image_loss`")
    official: str = option("", "of the official code's ways: see `image_loss`, `training_frame`", IMAGE_WAYS)


@dataclass(frozen=True, kw_only=True)
class TextStage(Stage):
    """Of the text student; weight decay and norm are the official code's."""

    weight_decay: float = option(0.05, "of weights")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    consistency_weight: float = option(0.1, "see `text_loss`")
    layer_decay: float = option(1.0, "learning rate of a layer, as a part of the next one's; 0.9 in the official code")
    official: str = option("", "of the official code's ways: see `text_loss`", ("", "consistency"))


def adopt_heads(student, teacher) -> int:
    """Copies everything of the teacher but its trunk and its text encoder; returns how many tensors.

    Args:
        student: of `load_sam3`.
        teacher: of `load_sam3`, of the same scale and image size.

    Raises:
        ValueError: the two differ in more than trunk and text.
    """
    own, theirs = (
        {k: v for k, v in model.state_dict().items() if not k.removeprefix("detector_model.").startswith(OWN)}
        for model in (student, teacher)
    )
    odd = sorted(set(own) ^ set(theirs)) or [key for key in own if own[key].shape != theirs[key].shape]
    if odd:
        raise ValueError(f"Student and teacher differ beyond trunk and text, in {len(odd)} tensors, first {odd[0]}.")
    student.load_state_dict(theirs, strict=False)
    return len(theirs)


def training_frame(image: np.ndarray, side: int, *, official: bool = False) -> tuple[Tensor, Tensor]:
    """One image as the trunk gets it in training.

    Args:
        image: (H, W, 3) uint8 RGB.
        side: of the frame, pixels, a multiple of 14.
        official: longest side to `side`, zeros below and right, ImageNet's mean and spread; else as at inference.

    Returns:
        (3, side, side) float32 pixels, and (side/14, side/14) bool: which cells show the image.
    """
    cells = side // 14
    if not official:
        return pixels(image, side), torch.ones(cells, cells, dtype=torch.bool)
    height, width = (round(n * side / max(image.shape[:2])) for n in image.shape[:2])
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    resized = F.interpolate(tensor, (height, width), mode="bilinear", align_corners=False, antialias=True)
    normal = ((resized - IMAGENET[0]) / IMAGENET[1])[0]
    centres = torch.arange(cells) * 14 + 7
    return F.pad(normal, (0, side - width, 0, side - height)), (centres < height)[:, None] & (centres < width)


def image_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, *, cosine_weight: float = 1.0, official: bool = False
) -> dict[str, Tensor]:
    """Squared error and direction of trunk maps.

    Args:
        student: (B, T, C) tokens.
        teacher: (B, T, C) tokens.
        valid: (B, T) bool, cells that show the image.
        cosine_weight: of one minus the cosine over channels; 1 in the official code.
        official: divide the squared error by cells alone, not by cells and channels.

    Returns:
        () tensors: "loss", "l2" (as it stands in the loss), "cosine" (mean over valid cells).

    Raises:
        ValueError: no cell is valid.
    """
    if not valid.any():
        raise ValueError("No cell of the batch shows an image; a loss needs at least one.")
    s, t = student[valid].float(), teacher[valid].float()  # (cells, C)
    squared = (s - t).square().sum(1).mean()
    l2 = squared if official else squared / s.shape[1]
    along = F.cosine_similarity(s, t, dim=1).mean()
    return {"loss": l2 + cosine_weight * (1 - along), "l2": l2.detach(), "cosine": along.detach()}


def text_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    shuffled: Tensor,
    *,
    cosine_weight: float = 2.0,
    consistency_weight: float = 0.1,
    official: bool = False,
) -> dict[str, Tensor]:
    """Squared error and direction of token features, and their steadiness under another order of words.

    Args:
        student: (B, L, C) features.
        teacher: (B, L, C) features.
        mask: (B, L) bool, tokens.
        shuffled: (B, L, C) the student's features of the same words in another order.
        cosine_weight: of one minus the cosine; 2 in the official code.
        consistency_weight: of the squared change of the mean feature; 0.05 to 0.1 there.
        official: count the last term twice, as the official code does.

    Returns:
        () tensors: "loss", "l2", "cosine", "consistency".
    """
    s, t = student[mask].float(), teacher[mask].float()
    l2, along = F.mse_loss(s, t), F.cosine_similarity(s, t, dim=1).mean()
    own, other = ((x.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for x in (student, shuffled))
    consistency = F.mse_loss(own, other)
    weight = consistency_weight * (2 if official else 1)
    loss = l2 + cosine_weight * (1 - along) + weight * consistency
    return {"loss": loss, "l2": l2.detach(), "cosine": along.detach(), "consistency": consistency.detach()}


@torch.inference_mode()
def teacher_maps(teacher, images: Sequence[np.ndarray], *, official: bool = False) -> Tensor:
    """The teacher's trunk maps, computed once: (N, T, C) float16. At SAM3's scale an image takes 10.6 MB (`nbytes`)."""
    trunk, side = teacher.detector_model.vision_encoder.backbone, teacher.config.image_size
    frames = (training_frame(image, side, official=official)[0][None].to(teacher.device) for image in images)
    return torch.cat([trunk(frame).last_hidden_state.half().cpu() for frame in frames])


def distil_image(
    student,
    teacher,
    images: Sequence[np.ndarray],
    settings: ImageStage,
    *,
    out: str | Path,
    targets: Tensor | None = None,
    resume: bool = False,
) -> pd.DataFrame:
    """Trains the student's trunk and head in place, from the teacher's maps; everything else stays.

    Args:
        student: of `load_sam3`, an image student.
        teacher: of `load_sam3`, of the same scale and image size.
        images: (H, W, 3) uint8 RGB each, of any sizes.
        settings: how long, how fast, by which loss.
        out: folder of logs and checkpoints.
        targets: of `teacher_maps`, made with the same frames; None asks the teacher at every step.
        resume: go on from the last checkpoint in `out`.

    Returns:
        The log, see `training.loop.read_log`: step, loss, l2, cosine, lr, seconds and more.

    Raises:
        ValueError: targets for other images, or see `training.loop.fit`, as for other errors.
    """
    if targets is not None and len(targets) != len(images):
        raise ValueError(
            f"{len(targets)} targets for {len(images)} images; make them by teacher_maps(teacher, images)."
        )
    side, padded = student.config.image_size, "frame" in settings.official
    trunk, theirs = (model.detector_model.vision_encoder.backbone for model in (student, teacher))

    def make(record: Record, generator: torch.Generator) -> tuple[Tensor, ...]:
        known = () if targets is None else (targets[record.image_id],)
        return torch.tensor(record.image_id), *training_frame(record.value, side, official=padded), *known

    return fit_stage(_ImageObjective(trunk, theirs, settings), images, make, settings, out=out, resume=resume)


@torch.inference_mode()
def trunk_cosine(student, teacher, images: Sequence[np.ndarray]) -> float:
    """Mean cosine of student's and teacher's maps on images as the finished model gets them."""
    trunks = [model.detector_model.vision_encoder.backbone for model in (student, teacher)]
    frames = [pixels(image, student.config.image_size)[None].to(student.device) for image in images]
    maps = [[trunk(frame).last_hidden_state for trunk in trunks] for frame in frames]
    return float(np.mean([F.cosine_similarity(s, t, dim=-1).mean().item() for s, t in maps]))


@torch.inference_mode()
def text_cosine(student, teacher, phrases: Sequence[str]) -> float:
    """Mean cosine of student's and teacher's features over the tokens of phrases; the protocol that is reported.

    Raises:
        ValueError: a phrase that is empty or too long for one of the two.
    """
    found = []
    for model in (student, teacher):
        detector = model.detector_model
        context = detector.config.text_config.max_position_embeddings
        ids, mask = (x.to(model.device) for x in tokenize(list(phrases), context))
        attended = mask if model.config.study["text"] == TEACHER else None  # students see the filling
        found.append(detector.get_text_features(ids, attention_mask=attended).pooler_output)
    length = min(x.shape[1] for x in found)
    along = F.cosine_similarity(*(x[:, :length] for x in found), dim=-1)
    return along[tokenize(list(phrases), length)[1].bool().to(along.device)].mean().item()


def distil_text(
    student, teacher, phrases: Sequence[str], settings: TextStage, *, out: str | Path, resume: bool = False
) -> pd.DataFrame:
    """Trains the student's text encoder and its projection in place, from the teacher's features of phrases.

    Args:
        student: of `load_sam3`, with a text student.
        teacher: of `load_sam3`, with SAM3's text and features of the same width.
        phrases: noun phrases, which must fit both contexts.
        settings: how long, how fast, by which loss.
        out: folder of logs and checkpoints.
        resume: go on from the last checkpoint in `out`.

    Returns:
        The log, see `training.loop.read_log`: step, loss, l2, cosine, consistency, lr, seconds and more.

    Raises:
        ValueError: a phrase that is empty or too long, or see `training.loop.fit`, as for other errors.
    """
    detector = student.detector_model
    context = detector.config.text_config.max_position_embeddings
    wide = teacher.detector_model.config.text_config.max_position_embeddings
    length = min(context, wide)
    tokenize(list(phrases), length)  # every phrase, before the first step

    def make(record: Record, generator: torch.Generator) -> tuple[Tensor, ...]:
        words = record.value.split()
        mixed = " ".join(words[i] for i in torch.randperm(len(words), generator=generator))
        ids = (tokenize([text], context)[0][0] for text in (record.value, mixed))
        return torch.tensor(record.image_id), *(x[0] for x in tokenize([record.value], wide)), *ids

    objective = _TextObjective(detector, teacher.detector_model, length, settings)
    return fit_stage(objective, phrases, make, settings, out=out, resume=resume)


class _ImageObjective(Stage1):
    columns = ("loss", "l2", "cosine")

    def with_target(self, frames: Tensor, valid: Tensor, known: Tensor | None = None) -> tuple[Tensor, ...]:
        wanted = self._teacher[0](frames).last_hidden_state if known is None else known
        return frames, valid.flatten(1), wanted

    def forward(self, batch: tuple[Tensor, ...], step: int, part: int) -> dict[str, Tensor]:
        _, frames, valid, wanted = batch
        seen = self.model(frames).last_hidden_state
        self.clock.mark("student")
        ways = {"cosine_weight": self.settings.cosine_weight, "official": "loss" in self.settings.official}
        return image_loss(seen, wanted, valid, **ways) | {"weight": valid.sum().float()}


class _TextObjective(Stage1):
    columns = ("loss", "l2", "cosine", "consistency")
    trained = ("text_",)

    def __init__(self, detector: nn.Module, teacher: nn.Module, length: int, settings: TextStage) -> None:
        super().__init__(detector, teacher, settings)
        self.length = length

    def share(self, name: str) -> float:
        """The embeddings learn slowest, the last norm and the projection at the full rate."""
        layer = re.match(r"text_encoder\.layers\.(\d+)\.", name)
        above = len(self.model.text_encoder.layers)
        if layer:
            above -= int(layer[1]) + 1
        elif not name.startswith("text_encoder.embeddings."):
            return 1.0
        return self.settings.layer_decay ** (above + 1)

    def train_mode(self) -> None:
        self.model.eval()
        self.model.text_encoder.train()
        self.model.text_projection.train()

    def with_target(self, ids: Tensor, mask: Tensor, own: Tensor, mixed: Tensor) -> tuple[Tensor, ...]:
        wanted = self._teacher[0].get_text_features(ids, attention_mask=mask).pooler_output[:, : self.length]
        return own, mixed, mask[:, : self.length].bool(), wanted

    def forward(self, batch: tuple[Tensor, ...], step: int, part: int) -> dict[str, Tensor]:
        _, own, mixed, mask, wanted = batch
        seen, other = (self.model.get_text_features(x).pooler_output[:, : self.length] for x in (own, mixed))
        self.clock.mark("student")
        weight = torch.tensor(float(len(own)), device=seen.device)
        ways = {"consistency_weight": self.settings.consistency_weight, "official": bool(self.settings.official)}
        return text_loss(seen, wanted, mask, other, **ways) | {"weight": weight}
