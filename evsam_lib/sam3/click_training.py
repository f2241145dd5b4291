"""The mini teacher's tracker half learns clicks and boxes: neck, prompt encoder and mask decoder behind a frozen trunk.

SAM3 comes with these trained; the mini teacher that ships with this library was trained here, on generated concepts
whose names play no part in it. As SAM was: a box or some points, three masks of which the best learns (focal and dice,
20 to 1), the IoU of all predicted. From a random start that first learns that most pixels are background; a cross
entropy in which object and background weigh the same leads past it and hands over within the first half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.sam3.clicks import Asked, ask, click_maps, decode
from evsam_lib.sam3.training import Record, Stage, Stage1, fit_stage, training_frame
from evsam_lib.training import losses
from evsam_lib.training.batches import STEP, generator_for
from evsam_lib.training.settings import option

__all__ = [
    "PARTS", "ClickStage", "align_positions", "click_loss", "click_weights", "train_clicks",
]  # fmt: skip

PARTS = ("tracker_neck.", "tracker_model.prompt_encoder.", "tracker_model.mask_decoder.")
CODE = "tracker_model.shared_image_embedding."  # the same numbers as the prompt encoder's, under a second name


@dataclass(frozen=True, kw_only=True)
class ClickStage(Stage):
    """Of the tracker's half; the defaults are those of the shipped teacher."""

    weight_decay: float = option(0.05, "of weights")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    prompts: int = option(6, "objects asked for in an image")
    max_points: int = option(3, "points on an object are 1 to so many; half of the images get boxes instead")
    box_jitter: float = option(0.05, "spread of a box's corners, as a part of its sides")
    multimask: float = option(0.6, "share of the steps that train the three masks; the others train the single one")


def train_clicks(
    model, scenes: Sequence, settings: ClickStage, *, out: str | Path, resume: bool = False
) -> pd.DataFrame:
    """Trains the tracker's neck, prompt encoder and mask decoder in place; trunk, detector and memory stay.

    Args:
        model: of `load_sam3`.
        scenes: with `image` (H, W, 3) uint8 and `masks` (N, H, W) bool; they may be made when asked for.
        settings: how long, how fast, with how many prompts.
        out: folder of logs and checkpoints.
        resume: go on from the last checkpoint in `out`.

    Returns:
        The log, see `training.loop.read_log`: step, loss, mask, iou (of the best mask), iou_error, lr and more.

    Raises:
        ValueError: a scene without a mask, or see `training.loop.fit`, as for other errors.
    """
    side = model.config.image_size
    how = {"prompts": settings.prompts, "max_points": settings.max_points, "box_jitter": settings.box_jitter}

    def make(record: Record, generator: torch.Generator) -> tuple[Tensor, ...]:
        frame, _ = training_frame(record.value.image, side)
        return torch.tensor(record.image_id), frame, *ask(record.value.masks, side, generator=generator, **how)

    return fit_stage(_ClickObjective(model, settings), scenes, make, settings, out=out, resume=resume)


def click_weights(model) -> dict[str, Tensor]:
    """What `train_clicks` trains, by the model's names, with the code of positions that it was trained with."""
    return {key: value for key, value in model.state_dict().items() if key.startswith((*PARTS, CODE))}


@torch.no_grad()
def align_positions(model) -> None:
    """A kinder random start: cross attentions compare positions from the first step on, instead of learning to.

    Queries and keys carry the same position code; with equal projections their product is large where places agree.
    """
    for name, attention in model.tracker_model.mask_decoder.transformer.named_modules():
        if "token_to_image" in name.rpartition(".")[2] or "image_to_token" in name.rpartition(".")[2]:
            attention.q_proj.weight.mul_(2)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def click_loss(logits: Tensor, iou: Tensor, present: Tensor, targets: Tensor, *, done: float) -> dict[str, Tensor]:
    """Mask, IoU and presence of prompts that all have an object.

    Args:
        logits: (N, K, h, w).
        iou: (N, K), predicted.
        present: (N, 1) logits.
        targets: (N, h, w) in [0, 1].
        done: share of the training that is over, 0 to 1.

    Returns:
        () tensors: "loss", "mask", "iou" (actual, of the best mask), "iou_error".
    """
    found = losses.mask_loss(logits, targets, recipe="paper")
    actual, mask = losses.mask_iou(logits.detach(), targets), found.total
    if done < 0.5:
        truth = targets[:, None].expand_as(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        sides = [(entropy * part).sum((-1, -2)) / part.sum((-1, -2)).clamp(min=1) for part in (truth, 1 - truth)]
        even = (sides[0] + sides[1] + losses.dice_loss(logits.flatten(2), truth.flatten(2))).mean()
        mask = 2 * done * mask + (1 - 2 * done) * even
    error = losses.iou_loss(iou, actual)
    there = F.binary_cross_entropy_with_logits(present, torch.ones_like(present))
    best = actual.gather(1, found.best[:, None]).mean()
    return {"loss": mask + error + 0.1 * there, "mask": mask.detach(), "iou": best, "iou_error": error.detach()}


class _ClickObjective(Stage1):
    columns = ("loss", "mask", "iou", "iou_error")
    trained = PARTS
    last_part = "decoder"

    def __init__(self, model: nn.Module, settings: ClickStage) -> None:
        super().__init__(model, model, settings)

    def train_mode(self) -> None:
        self.model.eval()
        self.model.tracker_model.mask_decoder.train()  # the single mask is then its own, whatever its stability

    def with_target(self, frames: Tensor, *asked: Tensor) -> tuple:
        return self.model.detector_model.vision_encoder.backbone(frames).last_hidden_state, Asked(*asked)

    def forward(self, batch: tuple, step: int, part: int) -> dict[str, Tensor]:
        _, tokens, asked = batch
        draw = torch.rand((), generator=generator_for(self.settings.seed, STEP, step, part))
        maps = click_maps(self.model, tokens)
        several = bool(draw < self.settings.multimask)
        answer = decode(self.model, maps, asked.coords, asked.labels, multimask=several)
        flat = (x.flatten(0, 1).float() for x in (*answer, asked.targets))
        found = click_loss(*flat, done=step / self.settings.steps)
        return found | {"weight": torch.tensor(float(len(tokens)), device=tokens.device)}
