"""SAM3's tracker behind the interface of `models.sam.Sam`: points, boxes and masks on images, many at once.

So `Predictor`, `segment_everything` and `evsam_lib.evaluate` take SAM3, LiteText and the nine students as they take
EfficientViT-SAM, and both families stand in one table. The detector's neck is left out: clicks do not need it.

    python -m evsam_lib.evaluate --model ES-EV-S --weights FILE --prompt gt-box --choose single --exclude-crowds ...
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evsam_lib.models.prompt_encoder import join_prompts
from evsam_lib.sam3.clicks import decode
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.processor import enlarged, pixels, rgb

__all__ = ["ClickModel", "Maps", "load_clicks"]


@dataclass(frozen=True)
class Maps:
    """The tracker's view of B images, indexed like one tensor.

    Attributes:
        levels: (B, 32, 4h, 4w), (B, 64, 2h, 2w), (B, 256, h, w) float; narrower at the small scale.
    """

    levels: tuple[Tensor, ...]

    def __getitem__(self, index) -> "Maps":
        return Maps(tuple(level[index] for level in self.levels))

    def __len__(self) -> int:
        return len(self.levels[0])

    @property
    def device(self) -> torch.device:
        return self.levels[0].device

    def repeated(self, times: int) -> "Maps":
        """Each image so many times in a row."""
        return Maps(tuple(level.repeat_interleave(times, dim=0) for level in self.levels))


def load_clicks(name: str, weights: str | Path | None = None, **options) -> "ClickModel":
    """`ClickModel(load_sam3(...))`, whose arguments these are; a file may lack the encoder of example boxes."""
    return ClickModel(load_sam3(name, weights, without=("geometry",), **options))


class ClickModel(nn.Module):
    """A model of `load_sam3`, as far as clicks and boxes go.

    Args:
        model: what `load_sam3` returns.

    Attributes:
        name: of the table `evsam_lib.sam3.zoo.MODELS`.
        image_size: side of the input, pixels; the image is stretched to a square.
        frame_size: side of the prompt frame, the same.
        grid: side of the coarsest map in cells; low-res logits have 4 * grid pixels.
        variant: text encoder, scale and size, for records.

    Raises:
        ValueError: the model's file held no tracker.
    """

    mask_threshold = 0.0
    video: Any

    def __init__(self, model: Any):
        super().__init__()
        if "tracker" in model.report.absent:
            raise ValueError(f"{model.report.source} held no tracker, so this model takes no points and boxes.")
        self.video = model
        self.training = model.training  # `evaluate` puts back what it finds
        self.name = model.config.study["name"]
        self.image_size = self.frame_size = model.config.image_size
        self.variant = {key: model.config.study[key] for key in ("text", "scale")} | {"image_size": self.image_size}
        self.grid = model.tracker_model.prompt_encoder.image_embedding_size[0]

    @property
    def weights(self) -> Path | None:
        """The file that the weights are from; None for a random start, and for a repository."""
        return path if (path := Path(self.video.report.source)).is_file() else None

    @property
    def device(self) -> torch.device:
        return self.video.device

    @property
    def dtype(self) -> torch.dtype:
        return self.video.dtype

    @property
    def prompt_encoder(self) -> "ClickModel":
        """Itself: `tokens` and `dense_position` are what predictors ask of a prompt encoder."""
        return self

    tokens = staticmethod(join_prompts)  # SAM3's own prompt encoder adds the padding point

    def dense_position(self) -> Tensor:
        """Position code of every cell: (1, C, h, w)."""
        return self.video.tracker_model.get_image_wide_positional_embeddings()

    def preprocess(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, S, S) float32 on the CPU.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        return pixels(rgb(image), self.image_size)

    def to_frame(self, coords: Tensor | np.ndarray, original_hw: tuple[int, int]) -> Tensor:
        """(..., 2) points or (..., 4) boxes in XY pixels of the original image -> the square frame, float32."""
        coords = torch.as_tensor(coords, dtype=torch.float32)
        height, width = original_hw
        scale = torch.tensor([self.image_size / width, self.image_size / height])
        return coords * scale.repeat(coords.shape[-1] // 2)

    def encode(self, images: Tensor) -> Maps:
        """(B, 3, S, S) as `preprocess` makes them -> the tracker's maps."""
        tokens = self.video.detector_model.vision_encoder.backbone(images)
        flat, _ = self.video.get_vision_features_for_tracker(tokens)  # (cells, B, C) each
        flat[-1] = flat[-1] + self.video.tracker_model.no_memory_embedding
        sides = [n * self.grid for n in (4, 2, 1)]
        return Maps(tuple(x.permute(1, 2, 0).unflatten(2, (n, n)) for x, n in zip(flat, sides, strict=True)))

    def embed(self, image: np.ndarray) -> Maps:
        """(H, W, 3) uint8 RGB -> its maps on the model's device.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        return self.encode(self.preprocess(image)[None].to(self.device, self.dtype))

    def decode(
        self,
        maps: Maps,
        coords: Tensor,
        labels: Tensor,
        *,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        image_code: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masks for N prompts on each of B images, as `Sam.decode`.

        Args:
            maps: of B images, as `encode` makes them.
            coords: (B, N, T, 2) float, XY pixels of the prompt frame.
            labels: (B, N, T) int: 1 positive, 0 negative, 2 and 3 a box's corners.
            mask_input: (B, N, 1, 4h, 4w) float, low-res logits of an earlier prediction.
            multimask_output: three masks per prompt, or one; where the one is unstable, SAM3 takes the best of three.
            image_code: `dense_position()` if the caller has it already.

        Returns:
            low-res logits (B, N, K, 4h, 4w) and predicted IoU (B, N, K), K = 3 or 1.
        """
        shape = coords.shape[:2]
        if mask_input is not None:  # SAM3's decoder takes one mask an image: each prompt gets an image of its own
            maps, mask_input = maps.repeated(shape[1]), mask_input.flatten(0, 1).to(self.dtype)
            coords, labels = (x.flatten(0, 1)[:, None] for x in (coords, labels))
        how = {"multimask": multimask_output, "mask_input": mask_input, "code": image_code}
        low_res, iou, _ = decode(self.video, maps.levels, coords.to(self.dtype), labels, **how)
        return low_res.flatten(0, 1).unflatten(0, shape), iou.flatten(0, 1).unflatten(0, shape)

    def forward(self, images: Tensor, coords: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
        """`decode(encode(images), coords, labels, ...)`, see there."""
        return self.decode(self.encode(images), coords, labels, **options)

    def quality(self, low_res: Tensor, iou: Tensor) -> Tensor:
        """What chooses among several masks of one prompt: predicted IoU (..., K)."""
        return iou

    def upscale(self, low_res: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Low-res logits (N, K, h, w) -> float32 logits (N, K, H, W)."""
        return enlarged(low_res.flatten(0, 1).float(), original_hw).unflatten(0, low_res.shape[:2])
