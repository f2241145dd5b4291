"""How the mini teacher that ships with this library was made: SAM3 at scale "mini", trained on generated concepts.

    python -m evsam_lib.sam3.teach trunk --out OUT --steps 600
    python -m evsam_lib.sam3.teach detector --out OUT --steps 1500
    python -m evsam_lib.sam3.teach join --out OUT PART...

From nothing, and on one core, a detector of this kind would take days. Two aids that a pretrained SAM3 does not need:
the trunk first learns, cell by cell, what lies there (form, colour, texture, extent), which is cheap and dense; then,
beside stage 3's losses, the detector's encoder is asked for each cell how much of it a phrase covers, and its queries
start from a grid of places. The heads of both aids are thrown away. What was run is in weights/provenance.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.data.concepts import COLOURS, FORMS, TEXTURES, ConceptScene, Item, concept_scene
from evsam_lib.data.saco import GeneratedConcepts
from evsam_lib.models.weights import save_weights
from evsam_lib.sam3.detect import detect, phrase_features
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.losses import concept_losses
from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.stage3 import ConceptBatch, ConceptObjective, ConceptStage, concept_batches
from evsam_lib.sam3.training import Stage, warm_cosine
from evsam_lib.training.batches import Batches
from evsam_lib.training.loop import Objective, fit

__all__ = ["main", "spread_queries", "teach_detector", "teach_trunk"]

SEED = 2027
SCENES = 1_000_000  # scenes 0 to here are for training; nobody sees one twice
WORDS = (tuple(FORMS), tuple(COLOURS), TEXTURES)
FINE = 4  # parts of a cell's side in the extent that the trunk learns


def main() -> None:
    """Runs one phase; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("trunk", "detector"))
    parser.add_argument("--out", type=Path, required=True, help="folder of logs, checkpoints and NAME.safetensors")
    parser.add_argument("--start", type=Path, help="weights to start from; a random start without")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--phrases", type=int, default=8)
    parser.add_argument("--masked", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="first scene")
    parser.add_argument("--frozen-trunk", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    model = load_sam3("SAM3", options.start, scale="mini")
    if options.start is None:
        smooth_patches(model)
        spread_queries(model)
    shared = {"steps": options.steps, "batch_size": options.batch, "lr": options.lr, "seed": SEED, "keep": 1}
    shared |= {"warmup_steps": 30, "clip_norm": 1.0, "weight_decay": 0.02, "checkpoint_every": 100}
    out = options.out / options.phase
    if options.phase == "trunk":
        log = teach_trunk(model, Stage(**shared), out=out, first=options.first, resume=options.resume)
    else:
        settings = ConceptStage(**shared, train="detector", phrases=options.phrases, masked=options.masked)
        frozen = options.frozen_trunk
        log = teach_detector(model, settings, out=out, first=options.first, frozen=frozen, resume=options.resume)
    save_weights(model, options.out / f"{options.phase}.safetensors")
    last = {name: round(float(value), 4) for name, value in log.tail(20).mean().items()}
    print(json.dumps(last, indent=2))


@torch.no_grad()
def spread_queries(model) -> None:
    """Queries start from a grid of places, each a quarter of the image wide; transformers starts all in the middle."""
    points = model.detector_model.detr_decoder.reference_points.weight  # (Q, 4), before the sigmoid
    side = int(len(points) ** 0.5)
    places = (torch.arange(len(points)) % side + 0.5) / side, (torch.arange(len(points)) // side + 0.5) / side
    boxes = torch.stack([*places, *[torch.full((len(points),), 0.25)] * 2], 1).clamp(0.02, 0.98)
    points.copy_(boxes.logit())


@torch.no_grad()
def smooth_patches(model) -> None:
    """The patch embedding starts from slow cosines in brightness and two colour differences, instead of from noise."""
    kernel = (
        model.detector_model.vision_encoder.backbone.embeddings.patch_embeddings.projection.weight
    )  # (C, 3, 14, 14)
    side, colours = kernel.shape[-1], torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    place = (torch.arange(side) + 0.5) / side
    waves = sorted((u + v, u, v) for u in range(side) for v in range(side))
    for k in range(len(kernel)):
        _, u, v = waves[k // 3]
        wave = torch.cos(torch.pi * u * place)[:, None] * torch.cos(torch.pi * v * place)[None]
        filters = colours[k % 3][:, None, None] * wave
        kernel[k] = filters * ((1 + u + v) ** 0.5 / filters.norm() / side)


# ---- the trunk, cell by cell


@dataclass(frozen=True)
class _Scene:
    """A scene to be made, and its number."""

    image_id: int
    made: ConceptScene


class _Scenes:
    def __init__(self, side: int, first: int) -> None:
        self.side, self.first = side, first

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, index: int) -> _Scene:
        return _Scene(index, concept_scene(SEED, self.first + index, size=(self.side, self.side)))


def teach_trunk(model, settings: Stage, *, out: Path, first: int = 0, resume: bool = False):
    """Trains the trunk to tell, for each cell, form, colour, texture and extent of the thing in it; returns the log."""
    trunk, side = model.detector_model.vision_encoder.backbone, model.config.image_size
    objective = _CellObjective(trunk, settings)
    batches = Batches(_Scenes(side, first), lambda record, _: _cell_sample(record, side), _stacked)
    return fit(objective, batches, settings, out=out, record={"stage": "teach trunk"}, resume=resume)


def _cell_sample(record: _Scene, side: int) -> tuple[Tensor, ...]:
    """Number, frame, (T, 3) words (-1 where there is nothing), (T, 16) extent, (T, 4) box around the cell's centre."""
    cells, made = side // 14, record.made
    masks = torch.from_numpy(made.masks).float()
    part = F.interpolate(masks[:, None], (FINE * cells, FINE * cells), mode="bilinear", antialias=True)[:, 0]
    part = part.unflatten(1, (cells, FINE)).unflatten(3, (cells, FINE)).permute(1, 3, 0, 2, 4)  # (h, w, N, 4, 4)
    part = part.reshape(cells * cells, len(masks), FINE * FINE)
    share, owner = part.mean(2).max(1)
    looks = torch.tensor([_looks(instance.item) for instance in made.instances])
    words = torch.where(share[:, None] > 0.12, looks[owner], -1)
    extent = part[torch.arange(len(owner)), owner] * (share > 0.12)[:, None]
    middle = (torch.arange(cells) + 0.5) / cells
    centre = torch.stack([middle.repeat(cells), middle.repeat_interleave(cells)], 1).repeat(1, 2)
    boxes = torch.tensor([_corners(mask) for mask in made.masks])[owner] - centre
    return torch.tensor(record.image_id), pixels(made.image, side), words, extent, boxes


def _looks(item: Item) -> list[int]:
    return [names.index(name) for names, name in zip(WORDS, (item.form, item.colour, item.texture), strict=True)]


def _corners(mask: np.ndarray) -> list[float]:
    rows, columns, side = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0)), len(mask)
    return [columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side]


def _stacked(samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))


class _CellObjective(Objective):
    columns = ("loss", "form", "colour", "texture", "extent", "box")  # the words' columns: share of cells told right

    def __init__(self, trunk: nn.Module, settings: Stage) -> None:
        width = trunk.config.hidden_size
        head = nn.Linear(width, sum(map(len, WORDS)) + FINE * FINE + 4)
        super().__init__(nn.ModuleDict({"trunk": trunk, "head": nn.Sequential(nn.LayerNorm(width), head)}))
        self.settings, self.clip_norm = settings, settings.clip_norm

    def rate(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, warmup=self.settings.warmup_steps, floor=self.settings.lr_floor)

    def image_ids(self, batch: tuple[Tensor, ...]) -> list[int]:
        return batch[0].tolist()

    def forward(self, batch: tuple[Tensor, ...], step: int, part: int) -> dict[str, Tensor]:
        _, frames, words, extent, boxes = batch
        said = self.model["head"](self.model["trunk"](frames).last_hidden_state)  # (B, T, 35)
        *kinds, fine, box = said.split([*map(len, WORDS), FINE * FINE, 4], -1)
        self.clock.mark("student")
        there = words[..., 0] >= 0
        loss, told = 0.0, {}
        for name, k, logits in zip(("form", "colour", "texture"), range(3), kinds, strict=True):
            loss = loss + F.cross_entropy(logits[there], words[there][:, k])
            told[name] = (logits[there].argmax(-1) == words[there][:, k]).float().mean()
        told["extent"] = F.binary_cross_entropy_with_logits(fine, extent)
        told["box"] = (box - boxes)[there].abs().mean()
        loss = loss + 4 * told["extent"] + 4 * told["box"]
        return {"loss": loss, **told, "weight": torch.tensor(float(len(frames)))}


# ---- the detector


def teach_detector(
    model, settings: ConceptStage, *, out: Path, first: int = 0, frozen: bool = False, resume: bool = False
):
    """Trains everything but the tracker by stage 3's losses and the cells' aid; returns the log."""
    side = model.config.image_size
    batches = concept_batches(GeneratedConcepts(SEED, SCENES, side, first), settings, side=side)
    record = {"stage": "teach detector", "frozen": frozen}
    if frozen:
        model.detector_model.vision_encoder.backbone.requires_grad_(False)
    return fit(_TeacherObjective(model, settings), batches, settings, out=out, record=record, resume=resume)


class _TeacherObjective(ConceptObjective):
    columns = (*ConceptObjective.columns, "cells", "right")

    def __init__(self, model, settings: ConceptStage) -> None:
        super().__init__(model, settings)
        self.sam3 = (model,)
        head = nn.Linear(model.config.detector_config.detr_encoder_config.hidden_size, 1)
        self.model = nn.ModuleDict({"sam3": model, "cells": head})
        self.trained = ("sam3.detector_model.", "cells.")

    def train_mode(self) -> None:
        self.model.eval()

    def forward(self, batch: ConceptBatch, step: int, part: int) -> dict[str, Tensor]:
        model = self.model["sam3"]
        vision = model.detector_model.vision_encoder(batch.frames)
        text, mask = phrase_features(model, batch.phrases)
        found = detect(model, vision, batch.image_of, text, mask, masked=batch.masked)
        self.clock.mark("student")
        losses = concept_losses(found, batch.targets, self.settings.weights())
        covered = F.avg_pool2d(batch.targets.masks.amax(1, keepdim=True), 4).flatten(1)  # (P, T)
        said = self.model["cells"](found.cells).squeeze(-1)
        cells = F.binary_cross_entropy_with_logits(said, covered)
        there = batch.targets.exists.any(1)
        right = ((found.presence[-1] > 0) == there).float().mean()
        losses |= {"loss": losses["loss"] + 40 * cells, "cells": cells.detach(), "right": right}
        return losses | {"weight": torch.tensor(float(len(batch.phrases)))}


if __name__ == "__main__":
    main()
