"""The geometry fine-tune of EfficientSAM3 ("stage 1+"): a distilled student learns what its maps are for.

Student's and teacher's tokens go through the same frozen neck and mask decoder with the same boxes and points; the
student's masks are held to the teacher's best, and its tokens still to the teacher's tokens. Only the student's trunk
and head learn. The prompts go through the tracker, which answers clicks; the official code sends them through the
detector. It makes the neck's four maps and attends to the last of them, of 28 pixels a cell, where SAM3 itself attends
to that of 14: `official="level"` does so here, and notebook 17 shows what that costs.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from evsam_lib.sam3.clicks import Asked, ask, click_maps, decode
from evsam_lib.sam3.stages import Record, Samples, Stage, Stage1, fit_stage
from evsam_lib.sam3.training import image_loss, training_frame
from evsam_lib.training.losses import dice_loss, mask_iou
from evsam_lib.training.settings import option

__all__ = ["GeometryStage", "fine_tune_geometry", "geometry_loss"]


@dataclass(frozen=True, kw_only=True)
class GeometryStage(Stage):
    """Of the fine-tune; weights, prompts, jitter and norm are the official code's, which trains 30 epochs at 5e-5."""

    weight_decay: float = option(0.01, "of weights")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    mse_weight: float = option(0.0015, "of the squared error of tokens, summed over channels; see `geometry_loss`")
    prompts: int = option(16, "objects asked for in an image")
    max_points: int = option(3, "points on an object are 1 to so many; half of the images get boxes instead")
    box_jitter: float = option(0.1, "spread of a box's corners, as a part of its sides")
    official: str = option("", "of the official code's ways: see the module's text", ("", "level"))


def geometry_loss(
    student: Tensor, teacher: Tensor, masks: Tensor, wanted: Tensor, best: Tensor, *, mse_weight: float = 0.0015
) -> dict[str, Tensor]:
    """Cross entropy and dice of masks, and squared error of tokens.

    Args:
        student: (B, T, C) tokens.
        teacher: (B, T, C) tokens.
        masks: (B, N, K, h, w) the student's logits.
        wanted: (B, N, K, h, w) the teacher's logits; its probabilities are the target.
        best: (B, N) which of the K masks counts: the teacher's of highest predicted IoU.
        mse_weight: of the squared error, summed over channels and averaged over cells; 0.0015 in the official code.

    Returns:
        () tensors: "loss", "bce", "dice", "l2" (as it stands in the loss), "iou" (of the two masks).
    """
    own, theirs = (x.take_along_dim(best[..., None, None, None], 2)[:, :, 0].float() for x in (masks, wanted))
    target = theirs.sigmoid()
    bce = F.binary_cross_entropy_with_logits(own, target)
    dice = dice_loss(own.flatten(2), target.flatten(2)).mean()
    everywhere = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)  # frames are stretched
    l2 = mse_weight * image_loss(student, teacher, everywhere, cosine_weight=0.0, official=True)["loss"]
    iou = mask_iou(own.flatten(0, 1)[:, None], target.flatten(0, 1)).mean()
    return {"loss": bce + dice + l2, "bce": bce.detach(), "dice": dice.detach(), "l2": l2.detach(), "iou": iou}


def fine_tune_geometry(
    student, teacher, scenes: Samples, settings: GeometryStage, *, out: str | Path, resume: bool = False
) -> pd.DataFrame:
    """Trains the student's trunk and head in place; neck and mask decoder are the teacher's and stay.

    Args:
        student: of `load_sam3`, an image student after stage 1.
        teacher: of `load_sam3`, of the same scale and image size.
        scenes: with `image` (H, W, 3) uint8 and `masks` (N, H, W) bool, of any sizes; the masks say where to ask.
        settings: how long, how fast, with how many prompts.
        out: folder of logs and checkpoints.
        resume: go on from the last checkpoint in `out`.

    Returns:
        The log, see `training.loop.read_log`: step, loss, bce, dice, l2, iou, lr, seconds and more.

    Raises:
        ValueError: a scene without a mask, or see `training.loop.fit`, as for other errors.
    """
    side = student.config.image_size
    trunk = student.detector_model.vision_encoder.backbone

    def make(record: Record, generator: torch.Generator) -> tuple[Tensor, ...]:
        frame, _ = training_frame(record.value.image, side)
        asked = ask(
            record.value.masks, side, prompts=settings.prompts, generator=generator,
            max_points=settings.max_points, box_jitter=settings.box_jitter,
        )  # fmt: skip
        return torch.tensor(record.image_id), frame, *asked

    heads = [p for p in teacher.parameters() if p.requires_grad]
    try:
        for parameter in heads:
            parameter.requires_grad_(False)
        return fit_stage(_GeometryObjective(trunk, teacher, settings), scenes, make, settings, out=out, resume=resume)
    finally:
        for parameter in heads:
            parameter.requires_grad_(True)


class _GeometryObjective(Stage1):
    columns = ("loss", "bce", "dice", "l2", "iou")
    last_part = "decoder"

    def with_target(self, frames: Tensor, *asked: Tensor) -> tuple:
        teacher, asked = self._teacher[0], Asked(*asked)
        tokens = teacher.detector_model.vision_encoder.backbone(frames).last_hidden_state
        wanted, iou = self._masks(tokens, asked)
        return frames, asked, tokens, wanted, iou.argmax(2)

    def forward(self, batch: tuple, step: int, part: int) -> dict[str, Tensor]:
        _, frames, asked, wanted_tokens, wanted, best = batch
        tokens = self.model(frames).last_hidden_state
        self.clock.mark("student")
        masks, _ = self._masks(tokens, asked)
        found = geometry_loss(tokens, wanted_tokens, masks, wanted, best, mse_weight=self.settings.mse_weight)
        return found | {"weight": torch.tensor(float(len(frames)), device=frames.device)}

    def _masks(self, tokens: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        maps = click_maps(self._teacher[0], tokens, level=int("level" in self.settings.official))
        return decode(self._teacher[0], maps, asked.coords, asked.labels)[:2]
