"""The image encoder of EfficientViT-SAM: backbone, fusion of the last three stages, neck (Sec. 3.2, Figure 2).

Image in, SAM's image embedding out: whatever the variant and its input size, the neck resizes to one fixed grid (64 x
64 cells, 256 channels), so SAM's prompt encoder and mask decoder fit behind it unchanged. Notebook 01 walks through it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.models.efficientvit import (
    BACKBONES,
    ConvNorm,
    EfficientViT,
    FusedMBConv,
    Residual,
    Sequence,
    initialise,
    without_autocast,
)


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, h, w); in float32 for half inputs, whose squares would overflow fp16."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        with without_autocast(x):
            x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
            if torch.compiler.is_exporting():  # one operation of the graph, which knows it for the last axis only
                x = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
                return x.movedim(-1, 1).to(dtype)
            x = x - x.mean(dim=1, keepdim=True)
            x = x / torch.sqrt(x.square().mean(dim=1, keepdim=True) + self.eps)
            return (x * self.weight[:, None, None] + self.bias[:, None, None]).to(dtype)


class Neck(nn.Module):
    """Three stages -> one grid: 1x1 convolution each, bicubic to `grid`, sum, fused MBConv blocks, 1x1 convolution."""

    def __init__(self, widths: tuple[int, ...], *, width: int, depth: int, expand: int, grid: int, outputs: int):
        super().__init__()
        self.grid = grid
        self.input_ops = nn.ModuleList([Sequence([ConvNorm(inputs, width, 1)]) for inputs in widths])
        self.middle = Sequence([Residual(FusedMBConv(width, width, expand=expand)) for _ in range(depth)])
        self.output_ops = nn.ModuleList([Sequence([ConvNorm(width, outputs, 1, bias=True, norm=False)])])

    def forward(self, features: list[Tensor]) -> Tensor:
        """Args: features: deepest stage first, (B, C_i, h_i, w_i). Returns: (B, outputs, grid, grid)."""
        first, second, third = [self._resize(op(feature)) for op, feature in zip(self.input_ops, features, strict=True)]
        x = first + (second + third)  # official order of the sum: from the right
        return self.output_ops[0](self.middle(x))

    def _resize(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.grid, self.grid):  # the official code resizes here too; bit-identical in fp32
            return x
        with without_autocast(x):
            size = (self.grid, self.grid)
            return F.interpolate(x.float(), size, mode="bicubic", align_corners=False).to(x.dtype)


class EfficientViTImageEncoder(nn.Module):
    """image (B, 3, S, S) -> image embedding (B, C, grid, grid), layer-normalised over channels.

    Args:
        variant: a key of `BACKBONES`.
        neck_depth: fused MBConv blocks in the neck.
        neck_expand: their expansion.
        channels: C, and the neck's width: 256 for the official five.
        grid: side of the embedding in cells: 64 for the official five.
    """

    def __init__(self, variant: str, *, neck_depth: int, neck_expand: int, channels: int = 256, grid: int = 64):
        super().__init__()
        self.backbone = EfficientViT(BACKBONES[variant])
        deepest_first = self.backbone.spec.widths[:-4:-1]
        self.neck = Neck(
            deepest_first, width=channels, depth=neck_depth, expand=neck_expand, grid=grid, outputs=channels
        )
        self.norm = LayerNorm2d(channels)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.neck(self.backbone(images)[:-4:-1]))  # (B, C, grid, grid)
