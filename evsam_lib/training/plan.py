"""What a training will cost: steps, hours, memory of a GPU, storage of cached embeddings.

    python -m evsam_lib.training.plan --model efficientvit-sam-xl1 --gpus 32

The rate is measured by a few steps of the real loop on generated tensors, on this machine's device (or given, or read
from a run's folder); hours follow for so many of the same device, if they scale perfectly. Memory is counted, not
measured: weights, gradients and optimizer, and every tensor that a step of the real model keeps for its gradient, found
by running the model on tensors without content. Paper: Sec. 3.2; notebook 05.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from evsam_lib.models import zoo
from evsam_lib.models.sam import Sam
from evsam_lib.training import distill, end_to_end, losses
from evsam_lib.training.loop import autocast, read_log
from evsam_lib.training.ranks import Ranks
from evsam_lib.training.settings import AMP, Distillation, EndToEnd
from evsam_lib.training.teacher import bytes_per_image

__all__ = ["Plan", "kept_bytes", "main", "make_plan", "measured_rate", "rate_of_run"]

SA1B = 11_000_000  # images; Sec. 3.2 calls it 11 M
MASKS = 64  # per image, Sec. 3.2
WARM_UP = 1  # steps of a measurement that are not counted


@dataclass(frozen=True)
class Plan:
    """The cost of one phase.

    Attributes:
        phase: "distill" or "end-to-end".
        steps: optimizer steps.
        images_per_s: of one GPU.
        hours: on all GPUs together.
        gpu_hours: the same times the number of GPUs.
        memory_gb: of one GPU, at least.
    """

    phase: str
    steps: int
    images_per_s: float
    hours: float
    gpu_hours: float
    memory_gb: float


def make_plan(
    phase: str,
    model: str,
    *,
    gpus: int,
    images_per_s: float,
    images: int = SA1B,
    epochs: float = 2.0,
    steps: int | None = None,
    batch_size: int = 256,
    micro_batch: int = 4,
    amp: str = "bf16",
    decoder_chunk: int = 0,
    teacher: str | None = None,
) -> Plan:
    """Plans one phase.

    Args:
        phase: "distill" or "end-to-end".
        model: name in the zoo.
        gpus: processes that train together.
        images_per_s: rate of one.
        images: in the training set.
        epochs: times through them.
        steps: instead of epochs.
        batch_size: images per step, of all GPUs.
        micro_batch: images per forward pass of a GPU.
        amp: "none" or "bf16".
        decoder_chunk: see `EndToEnd`.
        teacher: phase 1's, if it runs in each step; None for cached embeddings.

    Raises:
        ValueError: a number that is not positive, or a batch that cannot be cut so.
    """
    if min(gpus, images_per_s, images) <= 0:
        raise ValueError(f"gpus, images_per_s and images must be above 0, got {gpus}, {images_per_s} and {images}")
    kind = Distillation if phase == "distill" else EndToEnd
    settings = kind(steps=steps, epochs=epochs, batch_size=batch_size, micro_batch=micro_batch)
    settings = settings.complete(model=model, images=images)
    settings.share(gpus)
    steps = settings.schedule.steps
    hours = steps * batch_size / (images_per_s * gpus) / 3600
    memory = _memory_gb(phase, model, gpus, micro_batch, amp, decoder_chunk, teacher)
    return Plan(phase, steps, images_per_s, hours, hours * gpus, memory)


def rate_of_run(out: str | Path, processes: int = 1) -> float:
    """Images per second and process of a run, its first step left out.

    Raises:
        ValueError: the run has fewer than two steps.
    """
    log = read_log(out).iloc[WARM_UP:]
    if log.empty:
        raise ValueError(f"the run in {out} has fewer than {WARM_UP + 1} steps: expected more to measure a rate on")
    images = (log["images_per_s"] * log["seconds"]).sum()
    return images / log["seconds"].sum() / processes


def measured_rate(
    phase: str,
    model: str,
    *,
    device: torch.device,
    steps: int = 3,
    micro_batch: int = 1,
    masks: int = MASKS,
    amp: str = "none",
    decoder_chunk: int = 0,
    teacher: str | None = None,
) -> float:
    """Images per second of the real loop on one device, with random weights; reading and preparing images left out.

    Args:
        phase: "distill" or "end-to-end".
        model: name in the zoo.
        device: where.
        steps: that count; one more warms up.
        micro_batch: images per step.
        masks: per image.
        amp: see `make_plan`.
        decoder_chunk: see `make_plan`.
        teacher: phase 1's; None takes the student's own embedding, which costs a forward pass, and leaves it out.
    """
    sam = zoo.load_model(model, device=device)
    data = _Generated(sam, masks)
    common = {"steps": steps + WARM_UP, "batch_size": micro_batch, "lr": 0.0, "hflip": 0.0, "amp": amp}
    with tempfile.TemporaryDirectory() as folder:
        if phase == "distill":
            other = zoo.load_model(teacher or model, device=device)
            log = distill.distill(sam, other, data, Distillation(**common), out=folder)
            unpaid = log["data_s"] if teacher else log["data_s"] + log["teacher_s"]
        else:
            options = {"masks_per_image": masks, "decoder_chunk": decoder_chunk}
            log = end_to_end.train(sam, data, EndToEnd(**common, **options), out=folder)
            unpaid = log["data_s"]
    seconds = (log["seconds"] - unpaid).iloc[WARM_UP:]
    return micro_batch * len(seconds) / seconds.sum()


def kept_bytes(step: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that a computation keeps for its gradient, each storage once, the model's parameters left out."""
    own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed could hand its address to another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = step()
    del result
    return sum(kept.values())


def _memory_gb(
    phase: str, model: str, gpus: int, images: int, amp: str, decoder_chunk: int, teacher: str | None
) -> float:
    """Weights, gradients, two moments, buffers for the others' gradients, the teacher, and what a step keeps."""
    with torch.device("meta"):
        sam = zoo.ZOO[model].build().train()
        learned_from = 0 if teacher is None else sum(p.numel() for p in zoo.ZOO[teacher].build().parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        sam = sam.to_empty(device="cpu")
        part = sam.image_encoder if phase == "distill" else sam
        learns = sum(p.numel() for p in part.parameters())
        all_of_it = sum(p.numel() for p in sam.parameters())
        fixed = 4 * (all_of_it + learned_from) + 4 * learns * (4 if gpus > 1 else 3)
        pixels = torch.zeros(images, 3, sam.image_size, sam.image_size)
        if phase == "distill":
            target = torch.zeros(images, sam.embed_dim, sam.grid, sam.grid)
            kept = kept_bytes(lambda: distill.phase1_loss(sam, pixels, target, amp=amp), sam)
        else:
            kept = kept_bytes(lambda: _phase2(sam, pixels, amp, decoder_chunk), sam)
    return (fixed + kept) / 1e9


def _phase2(sam: Sam, pixels: torch.Tensor, amp: str, decoder_chunk: int) -> torch.Tensor:
    """What `phase2_loss` computes where all prompts exist; tensors without content cannot be chosen by it."""
    images, side = len(pixels), end_to_end.low_res_px(sam)
    shape = (images, MASKS, 11)  # ten points and SAM's padding point
    prompts = end_to_end.Prompts(
        coords=torch.zeros(*shape, 2),
        labels=torch.ones(shape, dtype=torch.int64),
        valid=torch.ones(shape, dtype=torch.bool),
    )
    with autocast(pixels.device, amp):
        logits, _ = end_to_end.decoded(sam, sam.encode(pixels), prompts, True, decoder_chunk)
    return losses.mask_loss(logits.flatten(0, 1), torch.zeros(images * MASKS, side, side), recipe="paper").total


class _Generated:
    """Eight pictures of noise with rectangles, at the model's own size."""

    def __init__(self, sam: Sam, masks: int) -> None:
        rng = np.random.default_rng(0)
        side = sam.image_size
        self.image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        corner = rng.integers(0, side // 2, (masks, 2))
        self.boxes = np.concatenate([corner, rng.integers(side // 8, side // 2, (masks, 2))], axis=1)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(image_id=index, image=self.image, boxes_xywh=self.boxes)

    def masks(self, record: SimpleNamespace, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), *self.image.shape[:2]), np.uint8)
        for mask, (x, y, w, h) in zip(out, self.boxes[list(indices)], strict=True):
            mask[y : y + h, x : x + w] = 1
        return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.model not in zoo.ZOO:
            raise ValueError(f"unknown model {options.model!r}: expected one of {', '.join(zoo.ZOO)}")
        phases = ["distill", "end-to-end"] if options.phase == "both" else [options.phase]
        plans = [_planned(phase, options) for phase in phases]
    except (ValueError, OSError) as error:
        print(f"evsam_lib.training.plan: {error}", file=sys.stderr)
        return 1
    names = [field.name for field in dataclasses.fields(Plan)]
    print("".join(f"{name:>14}" for name in names))
    for plan in plans:
        cells = [
            f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in vars(plan).values()
        ]
        print("".join(f"{cell:>14}" for cell in cells))
    with torch.device("meta"):
        sam = zoo.ZOO[options.model].build()
    sizes = {kind: options.images * bytes_per_image(sam.embed_dim, sam.grid, kind) / 1e12 for kind in ("fp16", "int8")}
    print("cached embeddings: " + ", ".join(f"{size:.2f} TB in {kind}" for kind, size in sizes.items()))
    return 0


def _planned(phase: str, options: argparse.Namespace) -> Plan:
    teacher = options.teacher if phase == "distill" else None
    rate, how = options.images_per_s, "given"
    if options.run is not None:
        rate, how = rate_of_run(options.run, options.run_processes), f"read from {options.run}"
    elif rate is None:
        device = Ranks().device(options.device)
        more = {"amp": options.amp, "decoder_chunk": options.decoder_chunk, "teacher": teacher}
        own = {"steps": options.measured_steps, "micro_batch": options.measured_images, "masks": MASKS}
        rate, how = measured_rate(phase, options.model, device=device, **own, **more), f"measured on {device}"
    cached = "" if phase != "distill" or teacher else ", embeddings cached"
    print(f"{phase}: {rate:.3g} images/s a GPU, {how}{cached}")
    shape = {"batch_size": options.batch_size, "micro_batch": options.micro_batch, "images": options.images}
    return make_plan(
        phase, options.model, gpus=options.gpus, images_per_s=rate, epochs=options.epochs, steps=options.steps,
        amp=options.amp, decoder_chunk=options.decoder_chunk, teacher=teacher, **shape,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.training.plan", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="name in the zoo of the model that learns")
    add("--gpus", type=int, required=True, help="GPUs that train together")
    add("--phase", choices=("distill", "end-to-end", "both"), default="both")
    add("--teacher", help="phase 1's teacher, such as sam-vit-h, run in each step; left out, embeddings are cached")
    add("--images", type=int, default=SA1B, help="in the training set; SA-1B's number by default")
    add("--epochs", type=float, default=2.0)
    add("--steps", type=int, help="instead of epochs")
    add("--batch-size", type=int, default=256, help="images per step, of all GPUs")
    add("--micro-batch", type=int, default=4, help="images per forward pass of a GPU")
    add("--amp", choices=AMP, default="bf16")
    add("--decoder-chunk", type=int, default=0, help="masks decoded at a time and again for their gradient; 0: all")
    add("--images-per-s", type=float, help="of one GPU; left out, it is measured here")
    add("--run", type=Path, help="folder of a run to read the rate from")
    add("--run-processes", type=int, default=1, help="processes of that run")
    add("--device", default="auto", help="cpu, cuda or auto, for the measurement")
    add("--measured-steps", type=int, default=3)
    add("--measured-images", type=int, default=1, help="images per step of the measurement; 4 or more on a GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
