"""Masks carried through a clip by the tracker's memory: many objects at once, and with gradients where one wants them.

transformers' session follows one object after another, without gradients. Here the tracker's own memory and attention
see N objects of several clips as one batch; what a session stores per object is stored per batch, and the decoder is
called directly, since what the session does with its answer takes one object. A test holds the masks equal to the
session's. Notebook 18 explains it.

The first frame's mask is given (semi-supervised video object segmentation, as DAVIS and SA-V have it). Gradients reach,
from the loss of a frame, the memories of all earlier frames, but not the masks and pointers that these were made of:
back-propagation through time is cut there, and a clip of T frames costs T times one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import NO_OBJ_SCORE

from evsam_lib.sam3.processor import enlarged, pixels

__all__ = [
    "FrameMasks", "LazyMaps", "Seen", "Tracks", "VideoMaps", "checked_frames", "first_masks", "follow", "video_maps",
]  # fmt: skip

MOST = 6  # frames in SAM3's memory besides those whose masks were given


@dataclass
class VideoMaps:
    """What the tracker's neck makes of the frames of B clips.

    Attributes:
        levels: (B, T, C, h, w) each, finest first; the decoder takes the first two, the memory the last.
        position: (h * w, 1, C) code of the last level's cells.
    """

    levels: list[Tensor]
    position: Tensor

    def __len__(self) -> int:
        """T."""
        return self.levels[0].shape[1]

    def at(self, t: int, owners: Tensor) -> list[Tensor]:
        """The levels at a frame for objects of the clips `owners` (N,): (N, C, h, w) each."""
        return [level[owners, t] for level in self.levels]


class LazyMaps:
    """The same for one video of any length: a frame's maps are made when it is looked at, and the last are kept.

    Args:
        model: what `load_sam3` returns.
        frames: (H, W, 3) uint8 RGB each.
    """

    def __init__(self, model, frames: Sequence[np.ndarray]):
        self.model, self.frames = model, frames
        self._kept: dict[int, VideoMaps] = {}  # of one frame at most

    def __len__(self) -> int:
        return len(self.frames)

    def at(self, t: int, owners: Tensor) -> list[Tensor]:
        """As of `VideoMaps`; all objects belong to this video."""
        if t not in self._kept:
            frame = pixels(self.frames[t], self.model.config.image_size).to(self.model.device, self.model.dtype)
            self._kept = {t: video_maps(self.model, frame[None, None])}
        return self._kept[t].at(0, owners)

    @property
    def position(self) -> Tensor:
        """As of `VideoMaps`, once a frame was looked at."""
        (kept,) = self._kept.values()
        return kept.position


@dataclass
class FrameMasks:
    """Masks of N objects in a frame, given or found: what the tracker remembers.

    Attributes:
        low_res: (N, 1, h, w) logits of the mask chosen, far below 0 where the object counts as hidden.
        high_res: (N, 1, S, S) the same at the size of the input.
        score: (N, 1, 1) logit of being seen.
        pointer: (N, 1, C) token that stands for the object.
    """

    low_res: Tensor
    high_res: Tensor
    score: Tensor
    pointer: Tensor


@dataclass
class Seen(FrameMasks):
    """Masks that the tracker found, and what it chose them from.

    Attributes:
        conditioned: (N, C, h, w) the frame's features after the attention to memories.
        logits: (N, K, h, w) low-resolution masks of the decoder, as they come.
        ious: (N, K) their quality as predicted.
    """

    conditioned: Tensor
    logits: Tensor
    ious: Tensor


def video_maps(model, frames: Tensor) -> VideoMaps:
    """Runs trunk and tracker neck.

    Args:
        model: what `load_sam3` returns.
        frames: (B, T, 3, S, S), as `pixels` makes them.
    """
    flat = frames.flatten(0, 1)
    tokens = model.detector_model.vision_encoder.backbone(flat).last_hidden_state
    levels, positions = model.get_vision_features_for_tracker(SimpleNamespace(last_hidden_state=tokens))
    sizes = model.tracker_model.backbone_feature_sizes
    shaped = [x.permute(1, 2, 0).unflatten(2, size) for x, size in zip(levels, sizes, strict=True)]
    return VideoMaps([x.unflatten(0, frames.shape[:2]) for x in shaped], positions[-1][:, :1])


class Tracks:
    """N objects on their way through clips of one length.

    Args:
        tracker: `tracker_model` of what `load_sam3` returns.
        maps: of all clips.
        owners: (N,) int64, which clip an object belongs to.
        remembers: frames in memory besides the first, at most 6 (and then pointers of 15); 0 leaves the first alone.
    """

    def __init__(self, tracker, maps: "VideoMaps | LazyMaps", owners: Tensor, *, remembers: int = MOST):
        self.tracker, self.maps, self.owners, self.remembers = tracker, maps, owners, remembers
        self.length = len(maps)
        self.given, self.tracked = {}, {}
        outputs = {0: {"cond_frame_outputs": self.given, "non_cond_frame_outputs": self.tracked}}
        # What the tracker reads of a session; the batch is its object number 0.
        self.session = SimpleNamespace(output_dict_per_obj=outputs)

    def start(self, masks: Tensor) -> FrameMasks:
        """Takes the masks (N, S, S) of the first frame, 0 or 1, and remembers them."""
        tracker, (*fine, last) = self.tracker, self.maps.at(0, self.owners)
        masks = masks[:, None].to(last.dtype)
        high = masks * 20 - 10  # logits, as SAM 2 has them
        low = _resized(high, tracker.prompt_encoder.mask_input_size)
        pointer = self._decoded(last, fine, prompt=tracker.mask_downsample(masks)).pointer
        there = masks.flatten(1).any(1)[:, None, None].to(last.dtype)  # (N, 1, 1)
        pointer = there * pointer + (1 - there) * tracker.no_object_pointer
        given = FrameMasks(low, high, 20 * there - 10, pointer)
        self.remember(0, given)
        return given

    def see(self, t: int) -> Seen:
        """Frame t from the memory of earlier ones."""
        *fine, last = self.maps.at(t, self.owners)
        memory, places, pointers = self._memory(t)
        conditioned = self.tracker.memory_attention(
            current_vision_features=last.flatten(2).permute(2, 0, 1),  # (h * w, N, C)
            current_vision_position_embeddings=self.maps.position,
            memory=memory,
            memory_posision_embeddings=places,  # transformers' own spelling
            num_object_pointer_tokens=pointers,
        )  # (1, N, h * w, C)
        return self._decoded(conditioned[0].transpose(1, 2).unflatten(2, last.shape[2:]), fine)

    def _memory(self, t: int) -> tuple[Tensor, Tensor, int]:
        """What is remembered at frame t: (tokens, N, 64), their places, and how many pointers stand at the end."""
        tracker, count, where = self.tracker, len(self.owners), self.owners.device
        frames = tracker._gather_memory_frame_outputs(self.session, 0, t)
        memories, places = tracker._build_memory_attention_inputs(frames, where)
        ages, found, most = tracker._get_object_pointers(self.session, 0, t, self.length, where)
        pointers, ages = tracker._process_object_pointers(ages, found, most, count, tracker.hidden_dim, where)
        memory = torch.cat([*memories, pointers]).to(tracker.dtype)
        return memory, torch.cat([*places, ages]), len(pointers)

    def _decoded(self, features: Tensor, fine: list[Tensor], prompt: Tensor | None = None) -> Seen:
        """The decoder's answer for N objects, prompted by a mask (N, 1, h, w) or by nothing but what it remembers."""
        tracker, count = self.tracker, len(features)
        if prompt is not None:
            prompt = _resized(prompt, tracker.prompt_encoder.mask_input_size)
        nowhere = (
            features.new_zeros(count, 1, 1, 2),
            -torch.ones(count, 1, 1, dtype=torch.int32, device=features.device),
        )
        sparse, dense = tracker.prompt_encoder(*nowhere, None, prompt)
        masks, ious, tokens, score = tracker.mask_decoder(
            image_embeddings=features,
            image_positional_embeddings=tracker.get_image_wide_positional_embeddings().repeat(count, 1, 1, 1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=prompt is not None or tracker._use_multimask(False, None),
            high_resolution_features=fine,
        )  # (N, 1, K, h, w), (N, 1, K), (N, 1, K, C), (N, 1, 1)
        every, best = torch.arange(count, device=features.device), ious[:, 0].argmax(1)
        there = (score > 0).to(features.dtype)
        chosen = torch.where(score[..., None] > 0, masks[every, :, best], NO_OBJ_SCORE)  # (N, 1, h, w)
        pointer = tracker.object_pointer_proj(tokens[every, :, best])
        pointer = there * pointer + (1 - there) * tracker.no_object_pointer
        high = enlarged(chosen[:, 0], (tracker.image_size,) * 2)[:, None]
        return Seen(chosen, high, score, pointer, conditioned=features, logits=masks[:, 0], ious=ious[:, 0])

    def remember(self, t: int, seen: FrameMasks) -> None:
        """Keeps what was seen of frame t."""
        last = self.maps.at(t, self.owners)[-1].flatten(2).permute(2, 0, 1)
        memory, places = self.tracker._encode_new_memory(last, seen.high_res.detach(), seen.score.detach(), t == 0)
        kept = {"maskmem_features": memory, "maskmem_pos_enc": places, "object_pointer": seen.pointer.detach()[:, 0]}
        (self.given if t == 0 else self.tracked)[t] = kept
        for old in [n for n in self.tracked if n <= t - self.remembers]:
            if self.remembers < MOST or old <= t - self.tracker.config.max_object_pointers_in_encoder:
                self.tracked.pop(old)
            else:
                self.tracked[old] = {"object_pointer": self.tracked[old]["object_pointer"]}


def checked_frames(frames: Sequence[np.ndarray]) -> tuple[int, int]:
    """The size (height, width) that all frames of a video have.

    Raises:
        ValueError: there is no frame, or sizes differ.
    """
    if not len(frames):
        raise ValueError("A video needs at least one frame, none was given.")
    size = tuple(frames[0].shape[:2])
    for i, frame in enumerate(frames):
        if frame.shape[:2] != size:
            raise ValueError(
                f"Frame {i} is {frame.shape[1]} x {frame.shape[0]} pixels, the first is {size[1]} x {size[0]}; "
                "all frames of a video must have one size."
            )
    return size


@torch.no_grad()
def follow(model, frames: Sequence[np.ndarray], masks: np.ndarray, *, remembers: int = MOST) -> np.ndarray:
    """Masks of objects through a whole video, from those of the first frame.

    Args:
        model: what `load_sam3` returns, in evaluation mode.
        frames: T times (H, W, 3) uint8 RGB, all of one size.
        masks: (N, H, W) bool, the objects in the first frame.
        remembers: frames in memory besides the first, at most 6; 0 leaves the first alone.

    Returns:
        (N, T, H, W) bool; the first frame's are those given. Objects may overlap.

    Raises:
        ValueError: frames of different sizes, no frame, no object, or masks of another size.
    """
    size = checked_frames(frames)
    if masks.ndim != 3 or not len(masks) or masks.shape[1:] != size:
        raise ValueError(f"Masks of the first frame must be (N, {size[0]}, {size[1]}), N > 0; got {masks.shape}.")
    owners = torch.zeros(len(masks), dtype=torch.long, device=model.device)
    tracks = Tracks(model.tracker_model, LazyMaps(model, frames), owners, remembers=remembers)
    tracks.start(first_masks(masks, model.config.image_size).to(model.device))
    found = [torch.from_numpy(masks)]
    for t in range(1, len(frames)):
        seen = tracks.see(t)
        tracks.remember(t, seen)
        found.append((enlarged(seen.low_res[:, 0].float(), size) > 0).cpu())
    return torch.stack(found, 1).numpy()


def first_masks(masks: np.ndarray, side: int) -> Tensor:
    """(N, H, W) bool -> (N, side, side) float32 in {0, 1}, stretched as frames are."""
    return (_resized(torch.from_numpy(masks)[:, None].float(), (side, side))[:, 0] > 0.5).float()


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)
