"""Stage 2 of EfficientSAM3: a memory learns to carry masks through clips, from another memory and from the truth.

The official branch trains its perceiver on true masks alone. Here the full memory is a teacher too: on every frame both
memories are made of the same masks (those the student drew, or the true ones), and the student's features after the
attention to its memory should be the teacher's. With `features_weight=0` the loss is the official one; without a
teacher it is how the full memory itself is trained. Trunk and neck are frozen; for a small set of clips they run once,
before (`ClipSet`).

Through time, gradients go as `propagation` says: from a frame's loss to the memories of all earlier frames, and no
further. Dropout is off. Notebook 18 explains it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.evaluate.video import score_video
from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.propagation import MOST, Seen, Tracks, VideoMaps, first_masks, follow, video_maps
from evsam_lib.sam3.stages import Stage, StageObjective, even_loss
from evsam_lib.training.batches import Batches, generator_for
from evsam_lib.training.loop import fit
from evsam_lib.training.losses import iou_loss, mask_iou, mask_loss
from evsam_lib.training.settings import option

__all__ = [
    "MEMORY",
    "ClipSet",
    "MemoryStage",
    "adopt_memory",
    "conditioned_loss",
    "train_memory",
    "true_masks_loss",
    "video_scores",
]

# What stage 2 trains: names in `Sam3VideoModel`. The decoder and its prompts are stage 1's, but for the head that says
# whether an object is seen: behind a click there always is one.
MEMORY = tuple(
    f"tracker_model.{part}"
    for part in (
        "memory_attention.",
        "memory_encoder.",
        "perceiver.",
        "memory_temporal_positional_encoding",
        "no_object_pointer",
        "mask_downsample.",
        "object_pointer_proj.",
        "temporal_positional_encoding_projection_layer.",
        "occlusion_spatial_embedding_parameter",
        "mask_decoder.pred_obj_score_head.",
    )
)
DECODER = ("tracker_model.mask_decoder.",)
DRAW = 3  # of a generator's key: windows and true masks of stage 2


@dataclass(frozen=True, kw_only=True)
class MemoryStage(Stage):
    """Of a memory; `batch_size` counts clips. Weight decay is the official branch's, lr 1e-4 there."""

    weight_decay: float = option(0.1, "of weights")
    frames: int = option(5, "of a clip, the first one with its mask; 8 in the official code")
    objects: int = option(2, "of a clip, at most; 1 in the official code")
    features_weight: float = option(1.0, "of the distance to the teacher's features, see `conditioned_loss`")
    masks_weight: float = option(1.0, "of the true masks' loss: 20 focal + dice, quality, being seen")
    truth_share: float = option(0.5, "of remembered masks that are the true ones; 0 in the official code")
    decoder: int = option(0, "1: the mask decoder learns too")
    even: float = option(0.0, "share of the steps that lead over from an even cross entropy, see `true_masks_loss`")

    def __post_init__(self) -> None:
        """Checks every value, see `Settings`."""
        super().__post_init__()
        if self.frames < 2 or self.objects < 1 or not 0 <= self.truth_share <= 1:
            raise ValueError(
                "frames must be at least 2, objects at least 1, truth_share 0 to 1, got "
                f"{self.frames}, {self.objects} and {self.truth_share}"
            )


@dataclass(frozen=True)
class _Record:
    """Clip number `image_id`, numbers of its frames with masks and, if kept, what is needed of these.

    Attributes:
        levels: (T, C, h, w) float16 each.
        masks: (N, T, H, W) bool.
    """

    image_id: int
    clip: Any
    times: list[int]
    levels: list[Tensor] | None
    masks: np.ndarray | None


class ClipSet:
    """Clips to learn from, and what trunk and neck make of them, computed once and kept in half precision.

    At SAM3's scale a frame takes 10.6 MB, so a large set is not kept: trunk and neck then run in every step.

    Args:
        model: what `load_sam3` returns.
        clips: with `frames` (T, H, W, 3) uint8 and `masks` (N, T, H, W) bool each, and `annotated` if only some
            frames have masks.
        kept: keep the maps.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, model, clips: Sequence, *, kept: bool = True):
        self.records, self.side, self.nbytes = [], model.config.image_size, 0
        for number, clip in enumerate(clips):
            times = list(getattr(clip, "annotated", range(len(clip.frames))))
            levels, masks = (self._maps(model, clip, times), clip.masks[:, times]) if kept else (None, None)
            self.records.append(_Record(number, clip, times, levels, masks))
            self.nbytes += sum(level.nbytes for level in levels or ())

    @torch.no_grad()
    def _maps(self, model, clip, times: list[int]) -> list[Tensor]:
        frames = torch.stack([pixels(clip.frames[t], self.side) for t in times])
        return [level[0].half().cpu() for level in video_maps(model, frames[None].to(model.device)).levels]


@torch.no_grad()
def adopt_memory(student, teacher) -> list[str]:
    """Copies all of the teacher that the student has in the same shape; returns what stays the student's own.

    With EfficientSAM3's memory these are the perceiver and, at full scale, the narrower feed-forward layers. The
    perceiver starts as a mean: what a latent reads is passed on as it is, and all that is added to it begins at 0.
    (transformers draws its weights so small that for long every memory would look the same.)

    Raises:
        ValueError: the two differ in more than the memory.
    """
    own, theirs = student.state_dict(), teacher.state_dict()
    alike = {key: value for key, value in theirs.items() if key in own and own[key].shape == value.shape}
    rest = [key for key in own if key not in alike]
    odd = [key for key in rest if not key.startswith(MEMORY)]
    if odd:
        raise ValueError(f"Student and teacher differ beyond the memory, in {len(odd)} tensors, first {odd[0]}.")
    student.load_state_dict(alike, strict=False)
    perceiver = getattr(student.tracker_model, "perceiver", None)
    for name, parameter in perceiver.named_parameters() if perceiver else ():
        if name.startswith("latents"):
            parameter.mul_(0.1)
        elif name.endswith(("cross_attention.v_proj.weight", "cross_attention.o_proj.weight")):
            nn.init.eye_(parameter)
        elif name.endswith(("self_attention.o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    return rest


def memory_weights(model) -> dict[str, Tensor]:
    """What stage 2 trains, by the model's names."""
    return {name: value.contiguous() for name, value in model.state_dict().items() if name.startswith(MEMORY)}


def conditioned_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """How far features after the attention to memories are from the teacher's.

    Args:
        student: (N, C, h, w).
        teacher: (N, C, h, w).

    Returns:
        () squared error in units of the teacher's mean square, and () mean cosine over channels.
    """
    error = F.mse_loss(student, teacher) / teacher.square().mean()
    return error, F.cosine_similarity(student, teacher, dim=1).mean()


def true_masks_loss(seen: Seen, masks: Tensor, *, even: float = 0.0) -> Tensor:
    """Loss of a frame's answer: masks and their predicted quality where the object is seen, and whether it is seen.

    Args:
        seen: of `Tracks.see`.
        masks: (N, S, S), 0 or 1.
        even: weight of `even_loss`, 0 to 1; 20 focal + dice of the best mask have the rest.

    Returns:
        ().
    """
    there = masks.flatten(1).any(1)
    score = F.binary_cross_entropy_with_logits(seen.score.flatten(), there.float())
    if not there.any():
        return score
    logits = seen.logits[there]  # (n, K, h, w)
    targets = F.interpolate(masks[there][:, None], logits.shape[-2:], mode="area")[:, 0]
    loss = (1 - even) * mask_loss(logits, targets, recipe="paper").total
    if even:
        loss = loss + even * even_loss(logits, targets)
    return loss + iou_loss(seen.ious[there], mask_iou(logits.detach(), targets)) + score


def train_memory(
    model, clips: ClipSet, settings: MemoryStage, *, out: str | Path, teacher=None, resume: bool = False, measure=None
) -> pd.DataFrame:
    """Trains the memory of a model in place; everything else stays.

    Args:
        model: of `load_sam3`, with any memory.
        clips: made with this model.
        settings: how long, how fast, by which loss.
        out: folder of logs and checkpoints.
        teacher: of `load_sam3`, with the full memory and the same trunk and neck; None for the true masks alone.
        resume: go on from the last checkpoint in `out`.
        measure: model -> {"jf": number}, called every `held_out_every` steps.

    Returns:
        The log, see `training.loop.read_log`: step, loss, features (squared error), cosine, masks, lr and more.

    Raises:
        ValueError: no clip is long enough, nothing to learn from, or see `training.loop.fit`, as for other errors.
    """
    if teacher is None and not settings.masks_weight:
        raise ValueError("Without a teacher the true masks are all there is to learn from; masks_weight must not be 0.")
    records = [record for record in clips.records if len(record.times) >= settings.frames]
    if not records:
        raise ValueError(f"No clip has the {settings.frames} frames that `frames` asks for.")
    settings = settings.complete(model="", images=len(records))
    record = {"stage": type(settings).__name__, "images": len(records), "teacher": teacher is not None}
    objective = _MemoryObjective(model, teacher, settings)
    batches = Batches(records, lambda one, generator: _window(one, settings, clips.side, generator), _together)
    measured = ("jf",) if measure else ()
    return fit(objective, batches, settings, out=out, record=record, resume=resume, measure=measure, measured=measured)


def video_scores(model, videos: Sequence, *, remembers: int = MOST) -> pd.DataFrame:
    """J and F of videos whose objects are followed from the frame in which each is first seen.

    Args:
        model: what `load_sam3` returns.
        videos: with `frames` and `masks`, and `annotated` if not all frames are (`clip`'s, `read_videos`').
        remembers: as in `follow`.

    Returns:
        Rows of `score_video`, with the number of the video in a column `video`.
    """
    rows = []
    for number, one in enumerate(videos):
        seen, found = one.masks.any((2, 3)), np.zeros_like(one.masks)
        first = np.where(seen.any(1), seen.argmax(1), -1)
        for start in sorted(set(first.tolist()) - {-1}):
            here = np.flatnonzero(first == start)
            found[here, start:] = follow(model, one.frames[start:], one.masks[here, start], remembers=remembers)
        annotated = np.isin(np.arange(len(one.frames)), getattr(one, "annotated", np.arange(len(one.frames))))
        rows.append(score_video(found, one.masks, annotated=annotated).assign(video=number))
    return pd.concat(rows, ignore_index=True)


def _window(record: _Record, settings: MemoryStage, side: int, generator: torch.Generator) -> tuple:
    """Some frames of a clip, forwards or backwards, and some of the objects seen in the first of them.

    Returns the clip's number, its maps or, where they are not kept, its frames (T, 3, S, S), and masks (N, T, S, S).
    """
    count, masks = len(record.times), record.masks
    if masks is None:
        masks = record.clip.masks[:, record.times]
    draws = torch.rand(2 + len(masks), generator=generator)
    order = torch.arange(count) if draws[0] < 0.5 else torch.arange(count).flip(0)
    starts = count - settings.frames + 1
    for shift in range(starts):
        first = (int(draws[1] * starts) + shift) % starts
        times = order[first : first + settings.frames]
        seen = torch.from_numpy(masks[:, times[0]].any((1, 2))).nonzero()[:, 0]
        if len(seen):
            break
    chosen = seen[draws[2 : 2 + len(seen)].argsort()[: settings.objects]]
    wanted = torch.stack([first_masks(masks[n, times], side) for n in chosen.tolist()])
    if record.levels is None:
        frames = [pixels(record.clip.frames[record.times[t]], side) for t in times.tolist()]
        return torch.tensor(record.image_id), [torch.stack(frames)], wanted
    return torch.tensor(record.image_id), [level[times].float() for level in record.levels], wanted


def _together(samples: list[tuple]) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Clip numbers (B,), maps or frames (B, T, ...) each, owners (N,), masks (N, T, S, S) of all clips' N objects."""
    numbers, levels, masks = zip(*samples, strict=True)
    owners = torch.cat([torch.full((len(m),), i) for i, m in enumerate(masks)])
    return torch.stack(numbers), [torch.stack(level) for level in zip(*levels, strict=True)], owners, torch.cat(masks)


class _MemoryObjective(StageObjective):
    columns = ("loss", "features", "cosine", "masks")

    def __init__(self, model: nn.Module, teacher: nn.Module | None, settings: MemoryStage) -> None:
        super().__init__(model, settings)
        self.trained = MEMORY + (DECODER if settings.decoder else ())
        self._teacher = (teacher,)  # in a tuple it is no part of this module

    def train_mode(self) -> None:
        self.model.eval()

    def prepare(self, batch: tuple) -> tuple:
        numbers, levels, owners, masks = batch
        where = self.clock.device
        levels = [level.to(where) for level in levels]
        with torch.no_grad():
            maps = VideoMaps(levels, self._position(levels)) if len(levels) > 1 else video_maps(self.model, levels[0])
        self.clock.mark("teacher")
        return numbers, maps, owners.to(where), masks.to(where)

    def _position(self, levels: list[Tensor]) -> Tensor:
        """Code of the last level's cells (h * w, 1, C), as the neck makes it."""
        last = levels[-1][:1, 0]
        code = self.model.tracker_neck.position_encoding(last.shape, last.device, last.dtype)
        return code.flatten(2).permute(2, 0, 1)

    def image_ids(self, batch: tuple) -> list[int]:
        return batch[0].tolist()

    def forward(self, batch: tuple, step: int, part: int) -> dict[str, Tensor]:
        _, maps, owners, masks = batch
        draws = generator_for(self.settings.seed, DRAW, step, part)
        student = Tracks(self.model.tracker_model, maps, owners)
        teacher = None if self._teacher[0] is None else Tracks(self._teacher[0].tracker_model, maps, owners)
        student.start(masks[:, 0])
        leading = self.settings.even * self.settings.schedule.steps
        even = max(0.0, 1 - step / leading) if leading else 0.0
        sums = masks.new_zeros(4)
        with torch.no_grad():
            if teacher:
                teacher.start(masks[:, 0])
        for t in range(1, masks.shape[1]):
            seen, wanted = student.see(t), None
            kept = _some_true(seen, masks[:, t], self.settings.truth_share, draws)
            if teacher:
                with torch.no_grad():
                    wanted = teacher.see(t)
                    teacher.remember(t, replace(wanted, high_res=kept.high_res, score=kept.score))
            sums = sums + self._losses(seen, wanted, masks[:, t], even)
            student.remember(t, kept)
        self.clock.mark("student")
        loss, features, along, drawn = sums / (masks.shape[1] - 1)
        logged = {"features": features.detach(), "cosine": along.detach(), "masks": drawn.detach()}
        return {"loss": loss, "weight": masks.new_tensor(float(len(masks))), **logged}

    def _losses(self, seen: Seen, wanted: Seen | None, masks: Tensor, even: float) -> Tensor:
        """(4,): the sum, then its parts, for one frame."""
        error = along = drawn = masks.new_zeros(())
        if wanted is not None:
            error, along = conditioned_loss(seen.conditioned, wanted.conditioned)
        if self.settings.masks_weight:
            drawn = true_masks_loss(seen, masks, even=even)
        distance = (error + 1 - along) if wanted is not None else error
        total = self.settings.features_weight * distance + self.settings.masks_weight * drawn
        return torch.stack([total, error, along, drawn])


def _some_true(seen: Seen, masks: Tensor, share: float, generator: torch.Generator) -> Seen:
    """What is remembered: what was seen, or, for a share of the objects, the truth."""
    true = torch.rand(len(masks), generator=generator).to(masks.device)[:, None, None, None] < share
    there = masks.flatten(1).any(1)[:, None, None]
    high = torch.where(true, masks[:, None] * 20 - 10, seen.high_res)
    return replace(seen, high_res=high, score=torch.where(true[..., 0], there * 20.0 - 10, seen.score))
