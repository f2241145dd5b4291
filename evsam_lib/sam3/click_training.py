"""The mini teacher's tracker half learns clicks and boxes: neck, prompt encoder and mask decoder behind a frozen trunk.

    python -m evsam_lib.sam3.click_training --start TEACHER --out OUT --steps 1000

SAM3 comes with these trained; the mini teacher that ships with this library was trained here, on generated concepts
whose names play no part in it. As SAM was: a box or some points, three masks of which the best learns (focal and dice,
20 to 1), the IoU of all predicted. From a random start that first learns that most pixels are background, then what an
object is, and long disregards which one was asked for. A cross entropy in which the object, the rest and the image's
other objects weigh the same leads past both, and hands over.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from evsam_lib.sam3.clicks import Asked, ask, click_maps, decode
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.scenes import GeneratedScenes
from evsam_lib.sam3.stages import Record, Samples, Stage, Stage1, even_loss, fit_stage
from evsam_lib.sam3.training import training_frame
from evsam_lib.training import losses
from evsam_lib.training.batches import STEP, generator_for
from evsam_lib.training.settings import option

__all__ = [
    "PARTS", "ClickStage", "click_loss", "click_weights", "fresh_start", "main", "train_clicks",
]  # fmt: skip

PARTS = ("tracker_neck.", "tracker_model.prompt_encoder.", "tracker_model.mask_decoder.")
SEED, FIRST, SCENES = 2028, 5_000_000, 1_000_000  # of the shipped teacher's training; nobody sees a scene twice
EVEN = 0.5  # share of the training within which the even cross entropy hands over
SLOWER = 0.3  # frequencies of positions, of SAM's
CODE = "tracker_model.shared_image_embedding."  # the same numbers as the prompt encoder's, under a second name


@dataclass(frozen=True, kw_only=True)
class ClickStage(Stage):
    """Of the tracker's half; the defaults are those of the shipped teacher."""

    weight_decay: float = option(0.05, "of weights")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    prompts: int = option(8, "objects asked for in an image")
    max_points: int = option(3, "points on an object are 1 to so many; half of the images get boxes instead")
    box_jitter: float = option(0.05, "spread of a box's corners, as a part of its sides")
    multimask: float = option(0.6, "share of the steps that train the three masks; the others train the single one")


def main() -> None:
    """Trains the tracker of a teacher and writes OUT/tracker.safetensors, a part for `evsam_lib.sam3.ship`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="a SAM3 of scale mini, whose trunk stays")
    parser.add_argument("--out", type=Path, required=True, help="folder of log, checkpoints and tracker.safetensors")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    model = load_sam3("SAM3", options.start, scale="mini")
    fresh_start(model)
    how = {"steps": options.steps, "batch_size": options.batch, "lr": options.lr, "warmup_steps": 30}
    settings = ClickStage(**how, seed=SEED, checkpoint_every=100, keep=1)
    scenes = GeneratedScenes(SEED, SCENES, (model.config.image_size,) * 2, first=FIRST)
    log = train_clicks(model, scenes, settings, out=options.out, resume=options.resume)
    part = {key: value.contiguous().clone() for key, value in click_weights(model).items()}
    save_file(part, options.out / "tracker.safetensors")
    print(json.dumps({name: round(float(log[name].tail(20).mean()), 4) for name in _ClickObjective.columns}, indent=2))


def train_clicks(
    model, scenes: Samples, settings: ClickStage, *, out: str | Path, resume: bool = False
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
def fresh_start(model) -> None:
    """A kinder random start of what `train_clicks` trains, drawn from torch's global generator.

    transformers draws every weight with a spread of 0.02, for models 1024 wide that are then given trained weights. In
    the decoder torch's own spread, which grows as layers get narrower, lets signals through, and embeddings are as
    large as the code of positions that they are added to. The neck keeps the small spread: it has no norm, and maps
    much larger than that code would drown it, so that one mask answers every prompt. And cross attentions compare
    positions from the first step on: queries and keys carry the same code; with equal projections their product is
    large where places agree. The code itself is slowed: SAM's frequencies are made for 64 cells a side, and with 12
    each cell would be a stranger to the next.
    """
    tracker = model.tracker_model
    for code in (tracker.shared_image_embedding, tracker.prompt_encoder.shared_embedding):
        code.positional_embedding.mul_(SLOWER)
    for part in (tracker.prompt_encoder, tracker.mask_decoder):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                module.reset_parameters()
    for name, attention in tracker.mask_decoder.transformer.named_modules():
        if name.endswith(("token_to_image", "image_to_token")):
            attention.q_proj.weight.mul_(2)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def click_loss(
    logits: Tensor, iou: Tensor, present: Tensor, targets: Tensor, others: Tensor, *, done: float
) -> dict[str, Tensor]:
    """Mask, IoU and presence of prompts that all have an object.

    Args:
        logits: (N, K, h, w).
        iou: (N, K), predicted.
        present: (N, 1) logits.
        targets: (N, h, w) in [0, 1].
        others: (N, h, w) in [0, 1], objects of the same image that were not asked for.
        done: share of the training that is over, 0 to 1.

    Returns:
        () tensors: "loss", "mask", "iou" (actual, of the best mask), "iou_error".
    """
    found = losses.mask_loss(logits, targets, recipe="paper")
    actual, mask = losses.mask_iou(logits.detach(), targets), found.total
    if done < EVEN:
        mask = (done * mask + (EVEN - done) * even_loss(logits, targets, others)) / EVEN
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
        others = asked.targets.amax(1, keepdim=True) - asked.targets
        flat = (x.flatten(0, 1).float() for x in (*answer, asked.targets, others))
        found = click_loss(*flat, done=step / self.settings.steps)
        return found | {"weight": torch.tensor(float(len(tokens)), device=tokens.device)}


if __name__ == "__main__":
    main()
