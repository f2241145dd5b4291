"""Phase 1: the student's image encoder learns the teacher's image embedding.

Paper: Sec. 3.2, "Training": an L2 loss between the embeddings of SAM-ViT-H and the student, then the teacher's prompt
encoder and mask decoder as the start of phase 2. The authors released neither code nor settings of this phase, so what
the text leaves open is chosen here and said: the loss is the mean of squared differences over all values, the cells of
the padding included, and optimiser and schedule are those of phase 2. Explained in notebook 04.

Teacher and student each preprocess the image for themselves, so their input sizes may differ (1024 and 512 in the
paper); the embeddings must have one shape, which is what the student's neck is for.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from evsam_lib.training import loop

__all__ = ["adopt_decoder", "cache_embeddings", "distill", "embedding_metrics", "phase1_loss"]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    log_csv: str | Path,
    cache: str | Path | None = None,
    hflip: float = 0.5,
    weight_decay: float = loop.WEIGHT_DECAY,
    amp: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    workers: int = 0,
    progress: Any = None,
) -> pd.DataFrame:
    """Train `student.image_encoder` in place; the student is left in eval mode, the teacher untouched.

    Args:
        student: a `Sam`, on the device to train on.
        teacher: a `Sam` with an embedding of the same shape.
        data: a `Sa1bFolder`; only its images are used.
        steps: optimiser steps; the learning rate falls to 0 over them.
        batch_size: images per step.
        lr: of the first step.
        seed: of order and flips.
        log_csv: step, loss, l2, cosine, lr, seconds, images_per_s.
        cache: file of the teacher's embeddings (fp16, see `cache_embeddings`), made if missing; None computes them
            anew at each step. Pays off from the second epoch on.
        hflip: probability of mirroring an image. Must be 0 with a cache: the embedding of a mirrored image is not the
            mirrored embedding.
        weight_decay: of all weights but norms and biases.
        amp: torch.bfloat16 for mixed precision of teacher and student; the loss is float32 always.
        checkpoint: folder of the checkpoint.
        checkpoint_every: steps between checkpoints.
        resume: go on from the checkpoint.
        workers: processes that read images.
        progress: wraps the step iterator, for example `tqdm`.

    Returns:
        The log.

    Raises:
        ValueError: hflip with a cache, embeddings of different shapes, empty data, or a checkpoint of other settings.
        FloatingPointError: the loss is not finite.
    """
    if cache is not None and hflip > 0:
        raise ValueError(
            f"hflip is {hflip} with a cache: expected hflip=0, since cached embeddings are of unmirrored images"
        )
    teacher.eval()
    stored = None if cache is None else cache_embeddings(teacher, data, cache, batch_size=batch_size, amp=amp)
    settings = {
        "phase": "distillation", "student": student.name, "teacher": teacher.name, "images": len(data),
        "batch_size": batch_size, "seed": seed, "hflip": hflip, "cached": cache is not None, "amp": str(amp),
    }  # fmt: skip
    batches = _Batches(student, teacher, data, stored, settings)

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        images, target = batch
        if stored is None:
            target = teacher_embedding(teacher, target, amp=amp)
        return phase1_loss(student, images.to(student.device), target.to(student.device), amp=amp)

    student.eval()
    student.image_encoder.train()
    try:
        return loop.fit(
            student, batches, loss_of=loss_of, steps=steps, lr=lr, images_per_step=batch_size, settings=settings,
            log_csv=log_csv, trained="image_encoder.", weight_decay=weight_decay, checkpoint=checkpoint,
            checkpoint_every=checkpoint_every, resume=resume, workers=workers, progress=progress,
        )  # fmt: skip
    finally:
        student.eval()


def phase1_loss(
    student: nn.Module, images: torch.Tensor, target: torch.Tensor, *, amp: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Loss of one step, from tensors on the student's device.

    Args:
        student: a `Sam`.
        images: (B, 3, S, S) float32, preprocessed for the student.
        target: (B, C, h, w) float, the teacher's embedding of the same images.
        amp: mixed precision of the forward pass.

    Returns:
        "loss" with a gradient, and for the log "l2" (the same) and "cosine" (mean over cells), () float32 each.

    Raises:
        ValueError: the embeddings differ in shape.
    """
    with loop.autocast(images.device, amp):
        embedding = student.encode(images)
    return _compare(embedding, target)


@torch.no_grad()
def teacher_embedding(teacher: nn.Module, images: torch.Tensor, *, amp: torch.dtype | None = None) -> torch.Tensor:
    """The teacher's embedding (B, C, h, w) float32 of images (B, 3, St, St) preprocessed for the teacher."""
    with loop.autocast(teacher.device, amp):
        return teacher.encode(images.to(teacher.device)).float()


def cache_embeddings(
    teacher: nn.Module, data: Any, path: str | Path, *, batch_size: int = 8, amp: torch.dtype | None = None
) -> np.memmap:
    """The teacher's embeddings of all images in one .npy file, computed once.

    Size: 2 bytes x C x h x w per image, 2.1 MB for the official 256 x 64 x 64 (so 23 TB for SA-1B: for samples only).
    A .json beside it says which teacher and images it belongs to; a file of others is refused.

    Args:
        teacher: a `Sam` in eval mode.
        data: a `Sa1bFolder`.
        path: of the .npy file.
        batch_size: images at a time.
        amp: mixed precision of the teacher.

    Returns:
        (images, C, h, w) float16, memory-mapped, in the order of `data`.

    Raises:
        ValueError: the file belongs to another teacher or other images.
    """
    path = Path(path)
    note = path.with_suffix(".json")
    made_of = {"teacher": teacher.name, "weights": _fingerprint(teacher), "images": len(data), "amp": str(amp)}
    if path.is_file() and note.is_file():
        found = json.loads(note.read_text())
        if found != made_of:
            raise ValueError(
                f"the cache {path} holds embeddings of {found}, expected {made_of}: remove it or name another"
            )
        return np.load(path, mmap_mode="r")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    file = None
    for first in range(0, len(data), batch_size):
        indices = range(first, min(first + batch_size, len(data)))
        images = torch.stack([teacher.preprocess(data[i].image) for i in indices])
        embedding = teacher_embedding(teacher, images, amp=amp).cpu().numpy()
        if file is None:
            shape = (len(data), *embedding.shape[1:])
            file = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        file[first : indices.stop] = embedding
    if file is None:
        raise ValueError("no images to cache embeddings of: expected at least one")
    file.flush()
    temporary.replace(path)
    note.write_text(json.dumps(made_of))
    return np.load(path, mmap_mode="r")


def embedding_metrics(student: nn.Module, teacher: nn.Module, images: Iterable[np.ndarray]) -> dict[str, float]:
    """How near the student's embeddings are to the teacher's, on images it need not have seen.

    Args:
        student: a `Sam` in eval mode.
        teacher: a `Sam` in eval mode.
        images: uint8 (H, W, 3) RGB each.

    Returns:
        "l2": mean squared difference; "cosine": mean over cells; both averaged over the images.

    Raises:
        ValueError: no images, or embeddings of different shapes.
    """
    found = []
    with torch.no_grad():
        for image in images:
            embedding = student.encode(student.preprocess(image)[None].to(student.device))
            target = teacher_embedding(teacher, teacher.preprocess(image)[None]).to(student.device)
            parts = _compare(embedding, target)
            found.append((parts["l2"].item(), parts["cosine"].item()))
    if not found:
        raise ValueError("no images to compare embeddings on: expected at least one")
    l2, cosine = np.mean(found, axis=0).tolist()
    return {"l2": l2, "cosine": cosine}


def adopt_decoder(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the teacher's prompt encoder and mask decoder into the student, the start of phase 2.

    Raises:
        ValueError: the two have different names or shapes.
    """
    for part in ("prompt_encoder", "mask_decoder"):
        try:
            getattr(student, part).load_state_dict(getattr(teacher, part).state_dict(), strict=True)
        except RuntimeError as error:
            raise ValueError(f"the {part} of {teacher.name} does not fit {student.name}: {error}") from error


class _Batches:
    """step -> images for the student, and images for the teacher or its stored embedding; all on the CPU."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, data: Any, stored: np.memmap | None, settings: dict[str, Any]
    ):
        self.student, self.teacher, self.data, self.stored, self.settings = student, teacher, data, stored, settings

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.settings
        inputs, targets = [], []
        for epoch, index in loop.epoch_positions(s["seed"], step, batch_size=s["batch_size"], count=s["images"]):
            coin = torch.rand((), generator=loop.generator_for(s["seed"], loop.SAMPLE, epoch, index)).item()
            image = self.data[index].image
            if coin < s["hflip"]:
                image = np.ascontiguousarray(image[:, ::-1])
            inputs.append(self.student.preprocess(image))
            if self.stored is None:
                targets.append(self.teacher.preprocess(image))
            else:
                targets.append(torch.from_numpy(np.array(self.stored[index], dtype=np.float32)))
        return torch.stack(inputs), torch.stack(targets)


def _compare(embedding: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    if embedding.shape != target.shape:
        raise ValueError(
            f"student and teacher must embed alike, got {tuple(embedding.shape)} and {tuple(target.shape)} (B, C, h, w)"
        )
    embedding, target = embedding.float(), target.float()
    l2 = F.mse_loss(embedding, target)
    cosine = F.cosine_similarity(embedding.detach(), target, dim=1).mean()
    return {"loss": l2, "l2": l2.detach(), "cosine": cosine}


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
