"""Sam: image encoder, prompt encoder and mask decoder, and the way from an image's pixels and back (Sec. 3.2).

The image encoder is the only part that the models of this study differ in. `encode` once per image, `decode` once per
batch of prompts; notebook 01 draws the whole.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.data import transforms
from evsam_lib.models.mask_decoder import MaskDecoder
from evsam_lib.models.prompt_encoder import PromptEncoder


class Sam(nn.Module):
    """A promptable segmentation model.

    Args:
        image_encoder: (B, 3, S, S) -> (B, C, grid, grid).
        name: the zoo's name of the model.
        image_size: S, side of the encoder's input in pixels.
        frame_size: side of the prompt frame in pixels.
        embed_dim: C.
        grid: side of the embedding in cells; low-res logits have 4 * grid pixels.
        norm_eps: eps of the mask decoder's layer norms.
        mlp_hidden, heads, iou_hidden, mask_channels: sizes inside the mask decoder and the prompt encoder, SAM's by
            default.
    """

    mask_threshold = 0.0

    def __init__(
        self,
        image_encoder: nn.Module,
        *,
        name: str,
        image_size: int,
        frame_size: int = 1024,
        embed_dim: int = 256,
        grid: int = 64,
        norm_eps: float = 1e-6,
        mlp_hidden: int = 2048,
        heads: int = 8,
        iou_hidden: int = 256,
        mask_channels: int = 16,
    ):
        super().__init__()
        self.name = name
        self.image_size = image_size
        self.frame_size = frame_size
        self.embed_dim = embed_dim
        self.grid = grid
        self.image_encoder = image_encoder
        self.prompt_encoder = PromptEncoder(embed_dim, grid, frame_size, mask_channels=mask_channels)
        self.mask_decoder = MaskDecoder(
            embed_dim, norm_eps=norm_eps, mlp_hidden=mlp_hidden, heads=heads, iou_hidden=iou_hidden
        )

    @property
    def device(self) -> torch.device:
        return self.prompt_encoder.no_mask_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prompt_encoder.no_mask_embed.weight.dtype

    def preprocess(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, S, S) float32 on the CPU, resized, normalised and padded.

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        transforms.check_image(image)
        return transforms.normalize_and_pad(transforms.resize_longest(image, self.image_size), self.image_size)

    def to_frame(self, coords: Tensor | np.ndarray, original_hw: tuple[int, int]) -> Tensor:
        """(..., 2) points or (..., 4) boxes in XY pixels of the original image -> the prompt frame, float32."""
        return transforms.to_frame(torch.as_tensor(coords), original_hw, self.frame_size)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised and padded -> image embedding (B, C, grid, grid)."""
        return self.image_encoder(images)

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
        """
        sparse, dense = self.prompt_encoder(coords, labels, mask_input)
        image_code = self.prompt_encoder.dense_position() if image_code is None else image_code
        return self.mask_decoder(embedding, image_code, sparse, dense, multimask_output=multimask_output, valid=valid)

    def forward(self, images: Tensor, coords: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
        """`decode(encode(images), coords, labels, ...)`, see there."""
        return self.decode(self.encode(images), coords, labels, **options)

    def upscale(self, low_res: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Low-res logits (N, K, h, w) -> logits (N, K, H, W): up to the frame, crop the padding, down to the original.

        Both steps bilinear, as in SAM; in float32 also for half inputs. Pixels above `mask_threshold` are the mask.
        """
        height, width = transforms.resized_hw(*original_hw, self.frame_size)
        size = (self.frame_size, self.frame_size)
        logits = F.interpolate(low_res.float(), size, mode="bilinear", align_corners=False)
        logits = logits[..., : max(height, 1), : max(width, 1)]
        return F.interpolate(logits, original_hw, mode="bilinear", align_corners=False)
