"""What a training is made of: flat, typed parameters, as a command line, a notebook or an ablation gives them.

A set of parameters is a dict; `Distillation(**dict)` and `EndToEnd(**dict)` are its checked form, and what they hold is
what a checkpoint remembers. Explained in notebooks 04 and 05.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["AMP", "BATCHNORM", "Distillation", "EndToEnd", "Settings", "checked", "option", "unknown"]

AMP = ("none", "bf16")
BATCHNORM = ("train", "frozen", "sync")
CACHES = ("none", "fp16", "int8")
PARTS = ("all", "encoder", "decoder")
RECIPES = ("paper", "official")
TARGETS = ("sampled", "official")
EPOCHS = 2.0  # Sec. 3.2, and 80 sub-epochs of 1/40 in official configs/default.yaml
PAPER_BATCH = 256  # Sec. 3.2
OFFICIAL_BATCH = 128  # the authors' own launch: 4 nodes of 8 GPUs with 4 images each (first training commit)
OFFICIAL_SHARE = 4  # images a GPU, official configs/default.yaml; the learning rate there is base x GPUs
# Of L and XL: Sec. 3.2 at batch 256; official configs/*.yaml per GPU.
RATES = {"paper": {"l": 2e-6, "xl": 1e-6}, "official": {"l": 8e-7, "xl": 4e-7}}


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a dataclass that can also be a flag of a command.

    Args:
        default: its default; `dataclasses.MISSING` if it has none.
        text: what it means.
        choices: what it may be, None for anything of its type.
    """
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Schedule:
    """What `Settings.complete` has filled in: steps, images per step, and the first step's learning rate."""

    steps: int
    batch_size: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both phases share. `None` stands for a value that `complete` fills in."""

    seed: int = option(0, "of everything random")
    steps: int | None = option(None, "optimizer steps; left out, as many as --epochs are")
    epochs: float = option(EPOCHS, "times through the images, where --steps is left out")
    batch_size: int | None = option(None, "images per optimizer step, over all processes")
    micro_batch: int = option(0, "images per forward pass of a process; 0: its whole share of the batch")
    lr: float | None = option(None, "learning rate of the first step; it falls to 0 by a cosine")
    weight_decay: float = option(0.1, "of all weights but norms and biases")  # official configs/default.yaml
    hflip: float = option(0.5, "probability of mirroring an image")
    amp: str = option("none", "mixed precision of the forward pass; losses are float32 always", AMP)
    batchnorm: str = option("train", "BatchNorm: statistics of each process, kept as they are, or of all", BATCHNORM)
    ema: float = option(0.0, "decay of a running average of the weights, 0 for none")
    held_out_every: int = option(0, "steps between measurements on held-out images, 0 for none")
    checkpoint_every: int = option(500, "steps between checkpoints; the last step is always saved")
    keep: int = option(2, "checkpoints kept, the last ones")
    workers: int = option(0, "processes that prepare samples, for each training process")

    # What may change when a run is resumed without changing its numbers.
    FREE = ("checkpoint_every", "keep", "workers", "epochs")

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ValueError: a value that cannot be; the message says what was expected.
        """
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("steps", "batch_size", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("hflip", "ema"):
            if not 0 <= getattr(self, name) <= 1 or (name == "ema" and self.ema == 1):
                raise ValueError(f"{name} must be at least 0 and at most 1 (ema less), got {getattr(self, name)}")
        if self.micro_batch < 0 or self.workers < 0 or self.epochs <= 0:
            raise ValueError(
                "micro_batch and workers must be at least 0 and epochs above 0, got "
                f"{self.micro_batch}, {self.workers} and {self.epochs}"
            )

    @property
    def schedule(self) -> Schedule:
        """Steps, batch and learning rate.

        Raises:
            ValueError: one of them is still None.
        """
        if self.steps is None or self.batch_size is None or self.lr is None:
            raise ValueError(
                f"steps, batch_size and lr are {self.steps}, {self.batch_size} and {self.lr}: expected no None, as in "
                "what complete() returns"
            )
        return Schedule(self.steps, self.batch_size, self.lr)

    def complete(self, *, model: str, images: int) -> Self:
        """The same with every `None` filled in, for a model of that name and so many images."""
        batch = self.batch_size or self._usual_batch()
        lr = self._usual_lr(model, batch) if self.lr is None else self.lr
        steps = self.steps or max(1, round(self.epochs * images / batch))
        return dataclasses.replace(self, batch_size=batch, lr=lr, steps=steps)

    def _usual_batch(self) -> int:
        return PAPER_BATCH

    def _usual_lr(self, model: str, batch: int) -> float:
        return 1e-3  # phase 1: ours, nobody printed one

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self.FREE}

    def share(self, world: int) -> tuple[int, int]:
        """Images per forward pass, and forward passes per step and process.

        Raises:
            ValueError: the batch cannot be cut like that, or is still None.
        """
        if self.batch_size is None:
            raise ValueError("batch_size is None: expected a number, as in what complete() returns")
        micro = self.micro_batch or max(self.batch_size // world, 1)
        passes, rest = divmod(self.batch_size, micro * world)
        if rest or not passes:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into forward passes of {micro} images on {world} "
                f"processes: expected a multiple of {micro * world}"
            )
        return micro, passes


@dataclass(frozen=True, kw_only=True)
class Distillation(Settings):
    """Phase 1. The loss is the paper's (L2); everything else nobody printed, so it is chosen here."""

    cache: str = option("none", "teacher: run anew in each step, or once, kept as fp16 or int8 per channel", CACHES)

    def __post_init__(self) -> None:
        """Checks every value, see `Settings`."""
        super().__post_init__()
        if self.cache != "none" and self.hflip > 0:
            raise ValueError(
                f"hflip is {self.hflip} with a cache: expected hflip=0, since cached embeddings are of unmirrored "
                "images"
            )


@dataclass(frozen=True, kw_only=True)
class EndToEnd(Settings):
    """Phase 2; `recipe` sets what the paper's text and the official trainer disagree on.

    Batch and learning rate, where none is given, are the recipe's. Paper: 256 and 2e-6 (L) or 1e-6 (XL). Official: 128,
    and a rate that grows with the number of GPUs at four images each, so with the batch. A model that is neither L nor
    XL counts as L.
    """

    recipe: str = option("paper", "the paper's text or the official trainer, where they disagree", RECIPES)
    train: str = option("all", "what learns: everything, or the image encoder or the rest alone", PARTS)
    masks_per_image: int = option(64, "masks drawn per image; 'official' repeats where there are fewer")
    box_probability: float = option(0.5, "share of images prompted by boxes; the others get points")
    max_points: int = option(10, "points per mask are 1 to so many")
    target_px: int = option(0, "side of the mask targets; 0: the recipe's")
    targets: str = option("sampled", "targets from run lengths, or decoded and resized: equal to 2e-5", TARGETS)
    iou_weight: float = option(0.0, "weight of the predicted IoU's squared error; 0 in both recipes, 1 in SAM")
    decoder_chunk: int = option(0, "masks decoded at a time and decoded again for their gradient; 0: all, kept")

    def __post_init__(self) -> None:
        """Checks every value, see `Settings`."""
        super().__post_init__()
        if self.masks_per_image < 1 or self.max_points < 1 or self.target_px < 0 or self.decoder_chunk < 0:
            raise ValueError(
                "masks_per_image and max_points must be at least 1, target_px and decoder_chunk at least 0, got "
                f"{self.masks_per_image}, {self.max_points}, {self.target_px} and {self.decoder_chunk}"
            )

    def _usual_batch(self) -> int:
        return OFFICIAL_BATCH if self.recipe == "official" else PAPER_BATCH

    def _usual_lr(self, model: str, batch: int) -> float:
        rate = RATES[self.recipe]["xl" if "-xl" in model else "l"]
        return rate * (batch / OFFICIAL_SHARE) if self.recipe == "official" else rate


def checked(kind: type, parameters: Mapping[str, Any]) -> Any:
    """A dataclass from a dict of its fields.

    Raises:
        ValueError: a name that it does not have (the nearest one is named), a missing one, or a value that cannot be.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    for name in parameters:
        if name not in names:
            raise ValueError(unknown(name, names))
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in parameters
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: expected a value, there is no default")
    return kind(**parameters)


def unknown(name: str, names: Iterable[str]) -> str:
    """One sentence about a parameter that does not exist."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(names)}"
    return f"unknown parameter {name!r}{hint}"
