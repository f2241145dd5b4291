"""Concepts followed through a video: every instance of a phrase, with an identity that stays from frame to frame.

`VideoPredictor` drives transformers' `Sam3VideoModel`, which detects on every frame, tracks what it found by a memory
of earlier frames, and joins the two. Answers come late by `hotstart_delay` frames (15), while doubtful objects are
weeded out. Where the package `kernels` is absent, transformers skips the removal of duplicate detections.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evsam_lib.prompts import mask_box
from evsam_lib.sam3.processor import Sam3Processor, enlarged, pixels, rgb
from evsam_lib.sam3.propagation import checked_frames

__all__ = ["FrameObjects", "VideoPredictor"]


@dataclass
class FrameObjects:
    """What is known of one frame.

    Attributes:
        frame: its number, from 0.
        ids: (N,) int, the objects' identities.
        masks: (N, H, W) bool at the video's size.
        boxes: (N, 4) float32, XYXY pixels around the masks.
        scores: (N,) float32, of the detection that started each object.
        phrases: (N,) the phrase that found it.
    """

    frame: int
    ids: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    phrases: list[str]


class VideoPredictor:
    """Phrases on a video, for any model of `load_sam3`.

    Args:
        model: what `load_sam3` returns.
    """

    def __init__(self, model):
        self.model = model
        self._processor = Sam3Processor(model)
        self._processor.require("tracker", "video")
        self._session = None

    def set_video(self, frames: Sequence[np.ndarray]) -> None:
        """Takes the frames of a video; phrases of an earlier one are forgotten.

        Args:
            frames: (H, W, 3) uint8 RGB each, all of one size.

        Raises:
            ValueError: there is no frame, one is no image, or sizes differ.
        """
        from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

        images = [rgb(frame) for frame in frames]
        size = checked_frames(images)
        video = torch.stack([pixels(image, self._processor.image_size) for image in images])
        options = {"inference_device": self.model.device, "inference_state_device": self.model.device}
        self._session = Sam3VideoInferenceSession(
            video, *size, video_storage_device="cpu", dtype=self.model.dtype, **options
        )

    @torch.inference_mode()
    def add_phrase(self, phrase: str) -> None:
        """One more concept to look for; at least one is needed.

        Raises:
            RuntimeError: no video was set.
            ValueError: the phrase is empty or has too many tokens.
        """
        session = self._require_video()
        features, mask = self._processor.text(phrase)
        number = session.add_prompt(phrase)
        session.prompt_embeddings[number], session.prompt_attention_masks[number] = features, mask

    @torch.inference_mode()
    def propagate(self) -> Iterator[FrameObjects]:
        """Goes through the video and yields every frame's objects, in order.

        Raises:
            RuntimeError: no video was set, or no phrase given.
        """
        session = self._require_video()
        if not session.prompts:
            raise RuntimeError("No phrase was given; call add_phrase first.")
        for out in self.model.propagate_in_video_iterator(session, start_frame_idx=0):
            yield self._objects(out, session)

    def _objects(self, out, session) -> FrameObjects:
        hidden = set(out.suppressed_obj_ids or ()) | set(session.hotstart_removed_obj_ids)
        size = (session.video_height, session.video_width)
        ids = [i for i in sorted(out.obj_id_to_mask) if i not in hidden]
        if ids:
            masks = (enlarged(torch.cat([out.obj_id_to_mask[i] for i in ids]).float(), size) > 0).cpu().numpy()
        else:
            masks = np.zeros((0, *size), bool)
        kept = [(i, mask) for i, mask in zip(ids, masks, strict=True) if mask.any()]
        return FrameObjects(
            frame=out.frame_idx,
            ids=np.array([i for i, _ in kept], int),
            masks=np.array([mask for _, mask in kept], bool).reshape(-1, *size),
            boxes=np.array([mask_box(mask) for _, mask in kept], np.float32).reshape(-1, 4),
            scores=np.array([float(out.obj_id_to_score[i]) for i, _ in kept], np.float32),
            phrases=[session.prompts[session.obj_id_to_prompt_id[i]] for i, _ in kept],
        )

    def _require_video(self):
        if self._session is None:
            raise RuntimeError("No video was set; call set_video first.")
        return self._session
