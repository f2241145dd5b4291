"""Sam: image encoder, prompt encoder and mask decoder, and the way from an image's pixels and back (Sec. 3.2).

The image encoder is what the models of this study differ in; EfficientSAM alone also has its own decoder
(`efficient_sam.py`). `encode` once per image, `decode` once per batch of prompts; notebook 01 draws the whole.
"""

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from evsam_lib.data.transforms import Frame, LongestSide
from evsam_lib.models.mask_decoder import MaskDecoder
from evsam_lib.models.prompt_encoder import BasePromptEncoder, PromptEncoder

BestBy = Literal["predicted_iou", "stability"]


class PromptTokens(Protocol):
    """Makes a prompt's tokens and knows where the cells of the embedding lie: a prompt encoder, or an engine."""

    def tokens(
        self, points: Tensor | None = None, labels: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `prompt_encoder.prompt_tokens`."""
        ...

    def dense_position(self) -> Tensor | None:
        """Position encoding of every cell (C, h, w); None where the decoder has it inside."""
        ...


class Promptable(Protocol):
    """What `Predictor` asks of a model: a `Sam`, or exported graphs behind an engine; see `Sam` for its members."""

    name: str
    image_size: int
    grid: int
    mask_threshold: float

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def prompt_encoder(self) -> PromptTokens: ...

    def preprocess(self, image: np.ndarray) -> Tensor: ...

    def to_frame(self, coords: Tensor | np.ndarray, original_hw: tuple[int, int]) -> Tensor: ...

    def embed(self, image: np.ndarray) -> Tensor: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(
        self,
        embedding: Tensor,
        coords: Tensor,
        labels: Tensor,
        *,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        valid: Tensor | None = None,
        image_code: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def quality(self, low_res: Tensor, iou: Tensor) -> Tensor: ...

    def upscale(self, low_res: Tensor, original_hw: tuple[int, int]) -> Tensor: ...


class Framed:
    """The way from an image's pixels to a model and back, for whatever has a frame.

    Attributes:
        frame: see `evsam_lib.data.transforms`.
        best_by: what chooses among several masks of one prompt, see `quality`.
        mask_threshold: of the logits; above it is the mask.
    """

    frame: Frame
    best_by: BestBy
    mask_threshold: float = 0.0

    def preprocess(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, S, S) float32 on the CPU, resized and normalised.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        return self.frame.preprocess(image)

    def to_frame(self, coords: Tensor | np.ndarray, original_hw: tuple[int, int]) -> Tensor:
        """(..., 2) points or (..., 4) boxes in XY pixels of the original image -> the prompt frame, float32."""
        return self.frame.to_frame(coords, original_hw)

    def quality(self, low_res: Tensor, iou: Tensor) -> Tensor:
        """What chooses among several masks of one prompt: the highest is the best.

        Predicted IoU, except for EdgeSAM. Its distillation left the IoU token out, and its authors choose by stability
        score instead (EdgeSAM's README, "CoreML export").

        Args:
            low_res: (..., K, h, w) float, low-res logits.
            iou: (..., K) float, predicted IoU.

        Returns:
            (..., K) float.
        """
        return iou if self.best_by == "predicted_iou" else stability_score(low_res, threshold=self.mask_threshold)

    def upscale(self, low_res: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Low-res logits (N, K, h, w) -> float32 logits (N, K, H, W). Pixels above `mask_threshold` are the mask."""
        return self.frame.upscale(low_res, original_hw)


class Sam(Framed, nn.Module):
    """A promptable segmentation model, made of its parts; `build_sam` makes SAM's own two around an image encoder.

    Args:
        image_encoder: (B, 3, S, S) -> (B, C, grid, grid).
        prompt_encoder: coords, labels and mask prompt -> sparse and dense embeddings.
        mask_decoder: image embedding and prompts -> low-res logits and predicted IoUs.
        name: the zoo's name of the model.
        frame: the way between an image's pixels and the model, see `evsam_lib.data.transforms`.
        best_by: what chooses among several masks of one prompt, see `quality`.

    Attributes:
        image_size: S, side of the encoder's input in pixels.
        frame_size: side of the prompt frame in pixels.
        embed_dim: C.
        grid: side of the embedding in cells; low-res logits have 4 * grid pixels.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        prompt_encoder: BasePromptEncoder,
        mask_decoder: MaskDecoder,
        *,
        name: str,
        frame: Frame,
        best_by: BestBy = "predicted_iou",
    ):
        super().__init__()
        self.name = name
        self.frame = frame
        self.best_by = best_by
        self.image_size = frame.image_size
        self.frame_size = frame.frame_size
        self.embed_dim = mask_decoder.iou_token.embedding_dim
        self.grid = prompt_encoder.grid
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    @property
    def device(self) -> torch.device:
        return self.mask_decoder.iou_token.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mask_decoder.iou_token.weight.dtype

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) as `preprocess` makes them -> image embedding (B, C, grid, grid)."""
        return self.image_encoder(images)

    def embed(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> its embedding (1, C, grid, grid) on the model's device.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        return self.encode(self.preprocess(image)[None].to(self.device, self.dtype))

    def decode(
        self,
        embedding: Tensor,
        coords: Tensor,
        labels: Tensor,
        *,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        valid: Tensor | None = None,
        image_code: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masks for N prompts on each of B images, without a loop over either.

        Args:
            embedding: (B, C, grid, grid) float.
            coords: (B, N, T, 2) float, XY pixels of the prompt frame.
            labels: (B, N, T) int: 1 positive, 0 negative, 2 and 3 a box's corners, -1 padding point; see
                `prompt_tokens`.
            mask_input: (B, N, 1, 4 grid, 4 grid) float, low-res logits of an earlier prediction.
            multimask_output: three masks per prompt, or one.
            valid: (B, N, T) bool; False hides a token, for batches whose prompts have different lengths.
            image_code: (C, grid, grid) float, `prompt_encoder.dense_position()` if the caller has it already.

        Returns:
            low-res logits (B, N, K, 4 grid, 4 grid) and predicted IoU (B, N, K), K = 3 or 1.

        Raises:
            ValueError: the model has no such prompt (EfficientSAM: masks, more than six points).
        """
        sparse, dense = self.prompt_encoder(coords, labels, mask_input)
        image_code = self.prompt_encoder.dense_position() if image_code is None else image_code
        return self.mask_decoder(embedding, image_code, sparse, dense, multimask_output=multimask_output, valid=valid)

    def forward(self, images: Tensor, coords: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
        """`decode(encode(images), coords, labels, ...)`, see there."""
        return self.decode(self.encode(images), coords, labels, **options)


def build_sam(
    image_encoder: nn.Module,
    *,
    name: str,
    frame: Frame | None = None,
    best_by: BestBy = "predicted_iou",
    embed_dim: int = 256,
    grid: int = 64,
    norm_eps: float = 1e-6,
    mlp_hidden: int = 2048,
    heads: int = 8,
    iou_hidden: int = 256,
    mask_channels: int = 16,
) -> Sam:
    """SAM's prompt encoder and mask decoder behind an image encoder.

    Args:
        image_encoder: (B, 3, S, S) -> (B, C, grid, grid).
        name: the zoo's name of the model.
        frame: the way between an image's pixels and the model; None is `LongestSide()`, 1024 pixels.
        best_by: what chooses among several masks of one prompt.
        embed_dim: C.
        grid: side of the embedding in cells.
        norm_eps: eps of the mask decoder's layer norms.
        mlp_hidden: hidden width of the transformer's MLPs.
        heads: of every attention in the mask decoder.
        iou_hidden: hidden width of the IoU head.
        mask_channels: hidden channels of the mask path.
    """
    frame = LongestSide() if frame is None else frame
    prompt_encoder = PromptEncoder(embed_dim, grid, frame.frame_size, mask_channels=mask_channels)
    mask_decoder = MaskDecoder(embed_dim, norm_eps=norm_eps, mlp_hidden=mlp_hidden, heads=heads, iou_hidden=iou_hidden)
    return Sam(image_encoder, prompt_encoder, mask_decoder, name=name, frame=frame, best_by=best_by)


def stability_score(logits: Tensor, *, threshold: float = 0.0, offset: float = 1.0) -> Tensor:
    """How little a mask changes with its threshold: the IoU of the masks at `threshold` + and - `offset`.

    SAM's definition (Kirillov et al. 2023, appendix B) and its offset of 1.

    Args:
        logits: (..., h, w) float.
        threshold: of the mask.
        offset: in logits.

    Returns:
        (...) float32 in [0, 1]; 0 where even the larger mask is empty (SAM's code divides 0 by 0 there).
    """
    inner = (logits > threshold + offset).sum(dim=(-2, -1))  # one mask always lies inside the other
    outer = (logits > threshold - offset).sum(dim=(-2, -1))
    return inner / outer.clamp(min=1)
