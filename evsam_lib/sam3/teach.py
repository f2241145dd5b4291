"""How the mini teacher that ships with this library was made: SAM3 at scale "mini", trained on generated concepts.

    python -m evsam_lib.sam3.teach trunk --out OUT --steps 7300
    python -m evsam_lib.sam3.teach words --out OUT --start OUT/trunk.safetensors --steps 350 ...
    python -m evsam_lib.sam3.teach detector --out OUT --start OUT/words.safetensors --steps 1000 ...
    python -m evsam_lib.sam3.teach measure --out OUT --start OUT/detector.safetensors --scenes 100

From nothing, and on one core, a detector of this kind would take days: it learns from few, late signals. So each part
is first told, cell by cell, what it will need. The trunk learns what lies in a cell (form, colour, texture, extent),
which is cheap and dense; then text, neck and encoder learn how much of a cell a phrase covers, and where the sides of
that thing are; then, with that aid beside them, stage 3's losses train the whole. And each part starts from something
kinder than noise: slow cosines, attention to neighbours, queries on a grid that look around them. The heads of the
aids are thrown away. What was run is in weights/provenance.json.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.data.concepts import COLOURS, FORMS, TEXTURES, ConceptScene, Item, concept_scene
from evsam_lib.data.saco import ConceptImage, GeneratedConcepts, as_concepts
from evsam_lib.models.weights import read_state_dict, save_weights
from evsam_lib.prompts import mask_box
from evsam_lib.sam3.answers import AS_TRAINED, WITHOUT, answers, score
from evsam_lib.sam3.detect import detect, encode_coarsely, mixed, phrase_features
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.losses import concept_losses
from evsam_lib.sam3.stage3 import ConceptBatch, ConceptObjective, ConceptStage, concept_batches
from evsam_lib.sam3.stages import Stage, StageObjective, covered, stacked
from evsam_lib.training.batches import Batches
from evsam_lib.training.loop import autocast, fit
from evsam_lib.training.losses import dice_loss

__all__ = ["main", "spread_queries", "teach_detector", "teach_trunk"]

SEED = 2027
SCENES = 1_000_000  # scenes before this one are for training, later ones are held out
WORDS = (tuple(FORMS), tuple(COLOURS), TEXTURES)
FINE = 4  # parts of a cell's side in the extent that the trunk learns


def main() -> None:
    """Runs one phase; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("trunk", "words", "detector", "masks", "measure"))
    parser.add_argument("--out", type=Path, required=True, help="folder of logs, checkpoints and NAME.safetensors")
    parser.add_argument("--start", type=Path, help="weights to start from; a random start without")
    parser.add_argument("--head", type=Path, help="the head that the phase before wrote beside its weights")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--phrases", type=int, default=8)
    parser.add_argument("--masked", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=6000, help="for the trunk; the detector sees none twice")
    parser.add_argument("--first", type=int, default=0, help="first scene")
    parser.add_argument("--frozen-trunk", action="store_true")
    parser.add_argument("--from-whole", action="store_true", help="a query's mask starts as that of all together")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    model = load_sam3("SAM3", options.start, scale="mini")
    if options.phase == "measure":
        print(json.dumps(measure(model, options.scenes), indent=2))
        return
    if options.start is None:
        smooth_patches(model)
        local_heads(model)
        widen(model)
        spread_queries(model)
    if options.from_whole:
        masks_from_whole(model)
    head = cell_head(model)
    if options.head:
        head.load_state_dict(read_state_dict(options.head))
    shared: dict[str, Any] = {
        "steps": options.steps,
        "batch_size": options.batch,
        "lr": options.lr,
        "seed": SEED,
        "keep": 1,
    }
    shared |= {"warmup_steps": 30, "clip_norm": 1.0, "weight_decay": 0.02, "checkpoint_every": 100}
    out = options.out / options.phase
    if options.phase == "trunk":
        scenes = {"scenes": options.scenes, "first": options.first}
        log = teach_trunk(model, head, Stage(**shared), out=out, **scenes, resume=options.resume)
    else:
        settings = ConceptStage(**shared, train="detector", phrases=options.phrases, masked=options.masked)
        frozen = options.frozen_trunk
        how = {"first": options.first, "frozen": frozen, "phase": options.phase, "resume": options.resume}
        log = teach_detector(model, head, settings, out=out, **how)
    save_weights(model, options.out / f"{options.phase}.safetensors")
    save_weights(head, options.out / f"{options.phase}_head.safetensors")
    last = {name: round(float(value), 4) for name, value in log.tail(20).mean().items()}
    print(json.dumps(last, indent=2))


@torch.no_grad()
def spread_queries(model) -> None:
    """Queries start on a grid, each looking at the cells around its place; transformers starts all in the middle.

    What a query sees of a cell is weighed by a small network of the cell's distances to the sides of the query's box.
    It starts as minus the distance to the box's middle, steeper from head to head.
    """
    decoder = model.detector_model.detr_decoder
    points = decoder.reference_points.weight  # (Q, 4), before the sigmoid
    side = int(len(points) ** 0.5)
    places = (torch.arange(len(points)) % side + 0.5) / side, (torch.arange(len(points)) // side + 0.5) / side
    boxes = torch.stack([*places, *[torch.full((len(points),), 0.2)] * 2], 1).clamp(0.02, 0.98)
    points.copy_(boxes.logit())
    for part in (decoder.box_rpb_embed_x, decoder.box_rpb_embed_y):
        part.layer1.weight[:2] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # left of the middle, right of it
        part.layer2.weight[:, :2] = -(2.0 ** torch.arange(len(part.layer2.weight)))[:, None]


@torch.no_grad()
def masks_from_whole(model) -> None:
    """Every query's mask starts as the mask of all instances together, which is learnt first, and learns to choose."""
    decoder = model.detector_model.mask_decoder
    last, pixel, whole = decoder.mask_embedder.layers[-1], decoder.instance_projection, decoder.semantic_projection
    last.weight.mul_(0.1)
    last.bias.mul_(0.1)
    last.weight[0], last.bias[0] = 0.0, 1.0
    pixel.weight[0], pixel.bias[0] = whole.weight[0], whole.bias[0]


@torch.no_grad()
def widen(model) -> None:
    """Everything between trunk and answers starts by Xavier's rule, as DETR does; transformers' start is smaller."""
    for name, weight in model.detector_model.named_parameters():
        inside = not name.startswith(("vision_encoder.backbone.", "text_encoder.")) and "embed." not in name
        if inside and weight.ndim > 1 and not name.endswith(("reference_points.weight", "presence_token.weight")):
            nn.init.xavier_uniform_(weight)
    last = model.detector_model.detr_decoder.box_head.layer3
    last.weight.mul_(0.1)  # boxes start at their references


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


@torch.no_grad()
def local_heads(model, *, focus: float = 0.7) -> None:
    """The trunk's attention starts out looking at neighbours, each head to another side, as a convolution does.

    A start from small noise attends to everything alike and takes long to leave that. With rotary positions, biases of
    query and key whose angles differ by as much as a step turns them favour the key at that step (the idea is ConViT's,
    d'Ascoli et al. 2021).
    """
    trunk, sides = model.detector_model.vision_encoder.backbone, ((1, 0), (-1, 0), (0, 1), (0, -1))
    for layer, reach in zip(trunk.layers, (1, 1, 2, 3), strict=True):
        attention, places = layer.attention, layer.position_ids.float()
        unit = (places[1] - places[0]).abs().max()  # angle of one cell at the fastest of the frequencies
        gain = (2 * focus * attention.head_dim**0.5) ** 0.5 / unit
        for head in range(attention.num_attention_heads):
            for axis, half in enumerate((0, attention.head_dim // 2)):  # x turns the first half, y the second
                place = head * attention.head_dim + half
                angle = -unit * reach * sides[head % 4][axis]
                attention.q_proj.bias[place : place + 2] = torch.tensor([gain, 0.0])
                attention.k_proj.bias[place : place + 2] = gain * torch.stack([angle.cos(), angle.sin()])


def measure(model, scenes: int) -> dict[str, dict[str, float]]:
    """cgF1 and its parts on held-out scenes, as trained and by the match alone."""
    found = answers(model, GeneratedConcepts(SEED, scenes, model.config.image_size, first=SCENES))
    ways = {"as trained": AS_TRAINED, "without presence": WITHOUT}
    return {way: {k: round(v, 3) for k, v in vars(score(found, calibration=c)).items()} for way, c in ways.items()}


# ---- the trunk, cell by cell


@dataclass(frozen=True)
class _Scene:
    """A scene as its cells are told: (T, 3) words (-1 where there is nothing), (T, 16) extent, (T, 4) box of the thing
    around the cell's centre."""

    image_id: int
    image: Tensor
    words: Tensor
    extent: Tensor
    boxes: Tensor

    def sample(self) -> tuple[Tensor, ...]:
        frame = self.image.permute(2, 0, 1) / 127.5 - 1  # as `processor.pixels`, the side is the model's already
        return torch.tensor(self.image_id), frame, self.words, self.extent.float(), self.boxes


class _Scenes:
    """`count` scenes, each made once: making one takes as long as a quarter of the step it serves."""

    def __init__(self, side: int, first: int, count: int) -> None:
        self.side, self.first, self.count, self.made = side, first, count, {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> _Scene:
        if index not in self.made:
            made = concept_scene(SEED, self.first + index, size=(self.side, self.side))
            self.made[index] = _Scene(index, torch.from_numpy(made.image), *_cells(made, self.side // 14))
        return self.made[index]


def teach_trunk(
    model, head: nn.Module, settings: Stage, *, out: Path, scenes: int, first: int = 0, resume: bool = False
):
    """Trains the trunk to tell, for each cell, form, colour, texture and extent of the thing in it; returns the log."""
    side, objective = model.config.image_size, _CellObjective(model, head, settings)
    batches = Batches(_Scenes(side, first, scenes), lambda record, _: record.sample(), stacked)
    return fit(objective, batches, settings, out=out, record={"stage": "teach trunk"}, resume=resume)


def _cells(made: ConceptScene, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, extent and boxes, see `_Scene`."""
    masks = torch.from_numpy(made.masks)
    part = covered(masks, FINE * cells)
    part = part.unflatten(1, (cells, FINE)).unflatten(3, (cells, FINE)).permute(1, 3, 0, 2, 4)  # (h, w, N, 4, 4)
    part = part.reshape(cells * cells, len(masks), FINE * FINE)
    share, owner = part.mean(2).max(1)
    looks = torch.tensor([_looks(instance.item) for instance in made.instances])
    words = torch.where(share[:, None] > 0.12, looks[owner], -1)
    extent = part[torch.arange(len(owner)), owner] * (share > 0.12)[:, None]
    middle = (torch.arange(cells) + 0.5) / cells
    centre = torch.stack([middle.repeat(cells), middle.repeat_interleave(cells)], 1).repeat(1, 2)
    boxes = torch.from_numpy(np.stack([mask_box(mask) for mask in made.masks]))[owner] / len(made.image) - centre
    return words, extent.half(), boxes


def _looks(item: Item) -> list[int]:
    return [names.index(name) for names, name in zip(WORDS, (item.form, item.colour, item.texture), strict=True)]


def cell_head(model) -> nn.Sequential:
    """From the trunk's tokens to words, extent and box of each cell."""
    width = model.config.detector_config.vision_config.backbone_config.hidden_size
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(map(len, WORDS)) + FINE * FINE + 4))


def cell_losses(said: Tensor, words: Tensor, extent: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The loss, and of the words the share of cells told right, of extent and box their own losses."""
    *kinds, fine, box = said.split([*map(len, WORDS), FINE * FINE, 4], -1)
    there = words[..., 0] >= 0
    loss, told = 0.0, {}
    for name, k, logits in zip(("form", "colour", "texture"), range(3), kinds, strict=True):
        loss = loss + F.cross_entropy(logits[there], words[there][:, k])
        told[name] = (logits[there].argmax(-1) == words[there][:, k]).float().mean()
    told["extent"] = F.binary_cross_entropy_with_logits(fine, extent)
    told["box"] = (box - boxes)[there].abs().mean()
    return {"loss": loss + 4 * told["extent"] + 4 * told["box"]} | told


class _CellObjective(StageObjective):
    columns = ("loss", "form", "colour", "texture", "extent", "box")

    def __init__(self, model, head: nn.Module, settings: Stage) -> None:
        parts = {"trunk": model.detector_model.vision_encoder.backbone, "head": head}
        super().__init__(nn.ModuleDict(parts), settings)

    def image_ids(self, batch: tuple[Tensor, ...]) -> list[int]:
        return batch[0].tolist()

    def forward(self, batch: tuple[Tensor, ...], step: int, part: int) -> dict[str, Tensor]:
        _, frames, *cells = batch
        said = self.model["head"](self.model["trunk"](frames).last_hidden_state)  # (B, T, 35)
        self.clock.mark("student")
        return cell_losses(said, *cells) | {"weight": torch.tensor(float(len(frames)))}


# ---- the detector


class _Taught:
    """Scenes with their phrases and their cells, made when asked for: none comes twice."""

    def __init__(self, side: int, first: int) -> None:
        self.side, self.first = side, first

    def __len__(self) -> int:
        return SCENES - self.first

    def __getitem__(self, index: int) -> tuple[ConceptImage, tuple[Tensor, ...]]:
        made = concept_scene(SEED, self.first + index, size=(self.side, self.side))
        return as_concepts(made, index), _cells(made, self.side // 14)


def teach_detector(
    model, head: nn.Module, settings: ConceptStage, *, out: Path, first: int = 0, frozen: bool = False,
    phase: str = "detector", resume: bool = False,
):  # fmt: skip
    """Trains everything but the tracker by stage 3's losses and both aids; returns the log.

    Args:
        model: of `load_sam3`.
        head: of the trunk's phase, see `cell_head`.
        settings: how long, how fast; `masked=0` leaves masks, and what is needed for them alone, untrained.
        out: folder of logs and checkpoints.
        first: scene.
        frozen: the trunk stays as it is.
        phase: "words": neck, text and encoder learn, by the cells' aid alone; "masks": the neck's finer levels and
            the mask decoder, on positive phrases; "detector": everything.
        resume: go on from the last checkpoint in `out`.
    """
    side = model.config.image_size
    plain = concept_batches([], settings, side=side)

    def make(record: tuple, generator: torch.Generator) -> tuple:
        image, cells = record
        if phase == "masks":
            positive = tuple(phrase for phrase in image.phrases if len(phrase.masks))
            image = dataclasses.replace(image, phrases=positive)
        return plain.make(image, generator), cells

    def collate(samples: list[tuple]) -> tuple:
        asked, cells = zip(*samples, strict=True)
        return plain.collate(list(asked)), stacked(list(cells))

    if frozen:
        model.detector_model.vision_encoder.backbone.requires_grad_(False)
    record = {"stage": "teach detector", "frozen": frozen}
    batches = Batches(_Taught(side, first), make, collate)
    objective = {"words": _WordsObjective, "masks": _MasksObjective}.get(phase, _TeacherObjective)
    return fit(objective(model, head, settings), batches, settings, out=out, record=record, resume=resume)


class _TeacherObjective(ConceptObjective):
    columns = (*ConceptObjective.columns, "covered", "form", "right")

    def __init__(self, model, head: nn.Module, settings: ConceptStage) -> None:
        super().__init__(model, settings)
        covered = nn.Linear(model.config.detector_config.detr_encoder_config.hidden_size, 5)
        nn.init.zeros_(covered.weight)
        self.model = nn.ModuleDict({"sam3": model, "head": head, "covered": covered})
        self.trained = ("sam3.detector_model.", "head.", "covered.")

    def train_mode(self) -> None:
        self.model.eval()  # no dropout

    # pyrefly: ignore[bad-override]: a batch here is one of the parent, and what its cells hold; so below
    def image_ids(self, batch: tuple) -> list[int]:
        return super().image_ids(batch[0])

    def prepare(self, batch: tuple) -> tuple:  # pyrefly: ignore[bad-override]
        return super().prepare(batch[0]), batch[1]

    def covered(self, mix: Tensor, asked: ConceptBatch, cells: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """How much of each cell a phrase covers, and where the sides of the thing in it are, told by the encoder.

        Args:
            mix: (P, T, C), the encoder's output.
            asked: phrases and their instances.
            cells: words, extent and boxes of the images' cells.

        Returns:
            () tensors: "loss", "covered", mean answers in covered cells ("there") and in others ("elsewhere"), and
            the boxes' mean error ("around").
        """
        said, sides = self.model["covered"](mix).split([1, 4], -1)
        wanted = F.avg_pool2d(asked.targets.masks.amax(1, keepdim=True), 4).flatten(1)  # (P, T)
        entropy = F.binary_cross_entropy_with_logits(said[..., 0], wanted, reduction="none")
        inside, share = wanted > 0.3, said[..., 0].sigmoid().detach()
        around = (sides - cells[2][asked.image_of])[inside].abs().mean() if inside.any() else sides.sum() * 0
        loss = (entropy * (1 + 4 * wanted)).mean() + 2 * around  # few cells are covered
        told = {"covered": entropy.mean(), "there": share[inside].mean(), "elsewhere": share[~inside].mean()}
        return {"loss": loss, "around": around} | told

    # pyrefly: ignore[bad-override]
    def forward(self, batch: tuple, step: int, part: int) -> dict[str, Tensor]:
        (asked, cells), model = batch, self.model["sam3"]
        fine = len(asked.masked) > 0
        encode = model.detector_model.vision_encoder if fine else partial(encode_coarsely, model)
        with autocast(self.clock.device, self.settings.amp):
            vision: Any = encode(asked.frames)
            text, mask = phrase_features(model, asked.phrases)
            found = detect(model, vision, asked.image_of, text, mask, masked=asked.masked)
        self.clock.mark("student")
        losses = concept_losses(found, asked.targets, self.settings.weights())
        told = cell_losses(self.model["head"](vision.last_hidden_state.float()), *cells)
        covered = self.covered(found.cells.float(), asked, cells)
        there = asked.targets.exists.any(1)
        right = ((found.presence[-1] > 0) == there).float().mean()
        losses |= {"loss": losses["loss"] + 4 * told["loss"] + 20 * covered["loss"]}
        losses |= {"covered": covered["covered"].detach(), "form": told["form"], "right": right}
        return losses | {"weight": torch.tensor(float(len(asked.phrases)))}


class _WordsObjective(_TeacherObjective):
    """Text and image meet: the aid alone, behind neck, text and the detector's encoder."""

    columns = ("loss", "covered", "there", "elsewhere", "around")

    def forward(self, batch: tuple, step: int, part: int) -> dict[str, Tensor]:
        (asked, cells), model = batch, self.model["sam3"]
        vision = encode_coarsely(model, asked.frames)
        text, mask = phrase_features(model, asked.phrases)
        mix = mixed(model, vision, asked.image_of, text, mask)[0].last_hidden_state
        self.clock.mark("student")
        return self.covered(mix, asked, cells) | {"weight": torch.tensor(float(len(asked.phrases)))}


class _MasksObjective(_TeacherObjective):
    """Masks alone, behind a detector that stays as it is; beside each query's mask the mask of all together."""

    columns = ("loss", "mask", "dice", "together")

    def __init__(self, model, head: nn.Module, settings: ConceptStage) -> None:
        super().__init__(model, head, settings)
        neck = "sam3.detector_model.vision_encoder.neck.fpn_layers."
        self.trained = ("sam3.detector_model.mask_decoder.", f"{neck}0.", f"{neck}1.")

    def forward(self, batch: tuple, step: int, part: int) -> dict[str, Tensor]:
        asked, model = batch[0], self.model["sam3"]
        vision = model.detector_model.vision_encoder(asked.frames)
        with torch.no_grad():
            text, mask = phrase_features(model, asked.phrases)
        found = detect(model, vision, asked.image_of, text, mask, masked=asked.masked)
        self.clock.mark("student")
        losses, weights = concept_losses(found, asked.targets, self.settings.weights()), self.settings.weights()
        wanted, said = asked.targets.masks[asked.masked].amax(1).flatten(1), found.together.flatten(1)
        together = F.binary_cross_entropy_with_logits(said, wanted) + dice_loss(said, wanted).mean()
        loss = weights.mask * losses["mask"] + weights.dice * (losses["dice"] + together)
        told = {"mask": losses["mask"], "dice": losses["dice"], "together": together.detach()}
        return {"loss": loss, **told, "weight": torch.tensor(float(len(asked.phrases)))}


if __name__ == "__main__":
    main()
