"""SAM's prompt encoder: points, boxes and masks become tokens and a dense map (Sec. 3.2; Kirillov et al. 2023).

One path for every sparse prompt: a box is two points with labels 2 and 3, and "no point here" is a point with label -1.
Labels: 1 positive, 0 negative, 2 and 3 the box's top-left and bottom-right corner, -1 SAM's padding point.
"""

import math

import torch
from torch import Tensor, nn

from evsam_lib.models.efficientvit import without_autocast
from evsam_lib.models.encoder import LayerNorm2d

BOX_LABELS = (2, 3)
PADDING_LABEL = -1


def prompt_tokens(
    points: Tensor | None = None, labels: Tensor | None = None, boxes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Puts points and boxes into the one form the prompt encoder reads.

    SAM adds a padding point, (0, 0) with label -1, only where there is no box; exports that forget it give other masks.

    Args:
        points: (..., N, P, 2) float, XY pixels of the prompt frame.
        labels: (..., N, P) int, 1 positive, 0 negative.
        boxes: (..., N, 4) float, XYXY pixels of the prompt frame.

    Returns:
        coords (..., N, T, 2) and labels (..., N, T): points first, then the box's corners or the padding point.

    Raises:
        ValueError: neither points nor boxes, or points without labels.
    """
    coords, codes = join_prompts(points, labels, boxes)
    if boxes is None:
        coords = torch.cat([coords, torch.zeros_like(coords[..., :1, :])], dim=-2)
        codes = torch.cat([codes, torch.full_like(codes[..., :1], PADDING_LABEL)], dim=-1)
    return coords, codes


def join_prompts(points: Tensor | None, labels: Tensor | None, boxes: Tensor | None) -> tuple[Tensor, Tensor]:
    """`prompt_tokens` before SAM's padding point is added, for models that know none."""
    if points is None and boxes is None:
        raise ValueError("A prompt needs points or boxes, neither was given.")
    if points is not None and labels is None:
        raise ValueError("Points were given without labels (1 positive, 0 negative).")
    parts, codes = [], []
    if points is not None and labels is not None:
        parts.append(points.float())
        codes.append(labels.long())
    if boxes is not None:
        parts.append(boxes.float().unflatten(-1, (2, 2)))
        codes.append(torch.tensor(BOX_LABELS, device=boxes.device).expand(*boxes.shape[:-1], 2))
    return torch.cat(parts, dim=-2), torch.cat(codes, dim=-1)


class PositionEncoding(nn.Module):
    """Random Fourier features of a position in [0, 1]^2. Always float32: half precision cannot tell pixels apart."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def _apply(self, fn, recurse=True):
        exact = self.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)
        moved = self.positional_encoding_gaussian_matrix
        if moved.dtype != torch.float32:  # model.to(float16) moves the buffer, but must not round it
            self.positional_encoding_gaussian_matrix = exact.to(moved.device)
        return self

    def forward(self, positions: Tensor) -> Tensor:
        """Args: positions: (..., 2) float in [0, 1], XY. Returns: (..., 2 * features) float32."""
        with without_autocast(positions):
            angles = 2 * math.pi * ((2 * positions.float() - 1) @ self.positional_encoding_gaussian_matrix)
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def cells(self, grid: int) -> Tensor:
        """Codes of the centres of `grid` x `grid` cells: (2 * features, grid, grid) float32."""
        device = self.positional_encoding_gaussian_matrix.device
        centres = (torch.arange(grid, device=device, dtype=torch.float32) + 0.5) / grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self(torch.stack([x, y], dim=-1)).permute(2, 0, 1)


class BasePromptEncoder(nn.Module):
    """What the prompt encoders of all models have in common: `tokens`, and where the cells of the embedding lie.

    Called, one turns coords, labels and mask prompt into sparse and dense embeddings, see `PromptEncoder.forward`.

    Args:
        embed_dim: C.
        grid: side of the image embedding in cells.
        frame_size: side of the prompt frame in pixels.
    """

    def __init__(self, embed_dim: int, grid: int, frame_size: int):
        super().__init__()
        self.grid = grid
        self.frame_size = frame_size
        self.pe_layer = PositionEncoding(embed_dim // 2)

    @staticmethod
    def tokens(
        points: Tensor | None = None, labels: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `prompt_tokens`."""
        return prompt_tokens(points, labels, boxes)

    def dense_position(self) -> Tensor:
        """Position encoding of every cell of the image embedding: (C, h, w)."""
        return self.pe_layer.cells(self.grid).to(next(self.parameters()).dtype)


class PromptEncoder(BasePromptEncoder):
    """Sparse and dense prompt embeddings.

    Args:
        embed_dim: C.
        grid: side of the image embedding in cells.
        frame_size: side of the prompt frame in pixels: 1024 for SAM and all five EfficientViT-SAM, whatever their
            input.
        mask_channels: hidden channels of the mask path.
    """

    def __init__(self, embed_dim: int, grid: int, frame_size: int, *, mask_channels: int = 16):
        super().__init__(embed_dim, grid, frame_size)
        self.point_embeddings = nn.ModuleList([nn.Embedding(1, embed_dim) for _ in range(4)])
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, stride=2),
            LayerNorm2d(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, stride=2),
            LayerNorm2d(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, embed_dim, 1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def forward(self, coords: Tensor, labels: Tensor, mask_input: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeds prompts.

        Args:
            coords: (B, N, T, 2) float, XY pixels of the prompt frame.
            labels: (B, N, T) int, see the module's docstring.
            mask_input: (B, N, 1, 4h, 4w) float, low-res logits of an earlier prediction.

        Returns:
            sparse (B, N, T, C), and dense (B, N, C, h, w), or (1, 1, C, 1, 1) when there is no mask prompt.
        """
        dtype = self.no_mask_embed.weight.dtype
        table = torch.cat([self.not_a_point_embed.weight, *self.point_embeddings.parameters()])  # (5, C)
        position = self.pe_layer((coords.float() + 0.5) / self.frame_size)  # + 0.5: centre of the pixel
        position = position * (labels != PADDING_LABEL)[..., None]  # the padding point has no place
        sparse = position.to(dtype) + table[labels.long() + 1]  # (B, N, T, C)
        if mask_input is None:
            return sparse, self.no_mask_embed.weight.reshape(1, 1, -1, 1, 1)
        dense = self.mask_downscaling(mask_input.flatten(0, 1).to(dtype))
        return sparse, dense.unflatten(0, mask_input.shape[:2])  # (B, N, C, h, w)
