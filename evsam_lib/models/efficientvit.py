"""EfficientViT-L and -XL backbones: convolutions first, ReLU linear attention last (Sec. 3.1, 3.2, Figure 2).

Every parameter carries the name it has in the authors' released checkpoints, so those load strictly. Three details
decide parity and are easy to miss: GELU is the tanh approximation, BatchNorm's eps is 1e-6, and the division in the
linear attention has eps 1e-15. Notebooks 01 and 02 explain the blocks.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # official: set on every BatchNorm after construction (sam_model_zoo.py)
ATTENTION_EPS = 1e-15  # official: LiteMLA (nn/ops.py)
HEAD_DIM = 32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which operations run in their inputs' own precision; devices without autocast (meta) need none."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class ConvNorm(nn.Module):
    """Convolution with "same" padding, then BatchNorm and GELU where asked for."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, stride=1, groups=1, bias=False, norm=True, act=False
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(outputs, eps=NORM_EPS) if norm else nn.Identity()
        self.act = nn.GELU(approximate="tanh") if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResBlock(nn.Module):
    """Two 3x3 convolutions, as in ResNet-34; GELU after the first only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = ConvNorm(width, width, act=True)
        self.conv2 = ConvNorm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class FusedMBConv(nn.Module):
    """3x3 convolution to the hidden width, 1x1 back."""

    def __init__(self, inputs: int, outputs: int, *, expand: float, stride: int = 1):
        super().__init__()
        hidden = round(inputs * expand)
        self.spatial_conv = ConvNorm(inputs, hidden, stride=stride, act=True)
        self.point_conv = ConvNorm(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.spatial_conv(x))


class MBConv(nn.Module):
    """1x1 to the hidden width, 3x3 depthwise, 1x1 back; only the closing convolution is normalised ("fewer norm")."""

    def __init__(self, inputs: int, outputs: int, *, expand: float, stride: int = 1):
        super().__init__()
        hidden = round(inputs * expand)
        self.inverted_conv = ConvNorm(inputs, hidden, 1, bias=True, norm=False, act=True)
        self.depth_conv = ConvNorm(hidden, hidden, stride=stride, groups=hidden, bias=True, norm=False, act=True)
        self.point_conv = ConvNorm(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = ATTENTION_EPS) -> Tensor:
    """ReLU linear attention over n tokens in O(n): (v k^T) q, divided by (sum of k) q.

    Args:
        q: (..., d, n) float, queries, channels before tokens; ReLU is applied here, as to k.
        k: (..., d, n) float, keys.
        v: (..., d, n) float, values.
        eps: added to the divisor.

    Returns:
        (..., d, n), computed in float32 when the inputs are half precision: the sums over tokens leave fp16's range.
    """
    dtype = q.dtype
    with without_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        q, k = F.relu(q), F.relu(k)
        v = torch.cat([v, torch.ones_like(v[..., :1, :])], dim=-2)  # (..., d + 1, n): the last row sums the weights
        out = (v @ k.transpose(-1, -2)) @ q  # (..., d + 1, n)
        out, total = out[..., :-1, :], out[..., -1:, :]
        if torch.compiler.is_exporting():  # its optimiser drops a summand below 1e-8; this is the same sum, exactly
            return (out / ((total * 2.0**50 + eps * 2.0**50) / 2.0**50)).to(dtype)
        return (out / (total + eps)).to(dtype)


class LiteMLA(nn.Module):
    """Multi-scale linear attention: the heads of qkv itself, and as many of qkv aggregated by a depthwise kernel."""

    def __init__(self, width: int, *, kernel: int):
        super().__init__()
        heads = width // HEAD_DIM
        self.qkv = ConvNorm(width, 3 * width, 1, norm=False)
        self.aggreg = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3 * width, 3 * width, kernel, padding=kernel // 2, groups=3 * width, bias=False),
                    nn.Conv2d(3 * width, 3 * width, 1, groups=3 * heads, bias=False),
                )
            ]
        )
        self.proj = ConvNorm(2 * width, width, 1)
        self.attention = relu_linear_attention  # of q, k, v; notebook 15 tries another

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.aggreg[0](qkv)], dim=1)  # (B, 6 C, H, W), each head's q, k, v side by side
        heads = qkv.reshape(qkv.shape[0], -1, 3 * HEAD_DIM, height * width)  # (B, 2 heads, 96, H W)
        out = self.attention(*heads.split(HEAD_DIM, dim=2))  # (B, 2 heads, 32, H W)
        return self.proj(out.reshape(qkv.shape[0], -1, height, width))


class Residual(nn.Module):
    """x + main(x), or main(x) alone where the shape changes. No activation follows the sum anywhere in this family."""

    def __init__(self, main: nn.Module, *, shortcut: bool = True):
        super().__init__()
        self.main = main
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + x if self.shortcut else self.main(x)


class EfficientViTModule(nn.Module):
    """The building block of the last stages: global context by attention, then local mixing by an MBConv."""

    def __init__(self, width: int, *, kernel: int, expand: float):
        super().__init__()
        self.context_module = Residual(LiteMLA(width, kernel=kernel))
        self.local_module = Residual(MBConv(width, width, expand=expand))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class Sequence(nn.Module):
    """nn.Sequential under the name `op_list`, as the released checkpoints have it."""

    def __init__(self, ops: Iterable[nn.Module]):
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone: per stage its width, and number, kind and expansion of the repeated blocks."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    blocks: tuple[str, ...]  # "res", "fmb", "mb", "att3", "att5"
    expands: tuple[int, ...]


_L_BLOCKS = ("res", "fmb", "fmb", "mb", "att5")
_XL_BLOCKS = ("res", "fmb", "fmb", "fmb", "att3", "att3")
_L_WIDTHS, _XL_WIDTHS = (32, 64, 128, 256, 512), (32, 64, 128, 256, 512, 1024)
_L_EXPANDS, _XL_EXPANDS = (1, 4, 4, 4, 6), (1, 4, 4, 4, 4, 6)

BACKBONES = {
    "mini": BackboneSpec((16, 24, 48, 96, 160), (1, 1, 1, 1, 2), _L_BLOCKS, (1, 2, 3, 4, 4)),
    "l0": BackboneSpec(_L_WIDTHS, (1, 1, 1, 4, 4), _L_BLOCKS, _L_EXPANDS),
    "l1": BackboneSpec(_L_WIDTHS, (1, 1, 1, 6, 6), _L_BLOCKS, _L_EXPANDS),
    "l2": BackboneSpec(_L_WIDTHS, (1, 2, 2, 8, 8), _L_BLOCKS, _L_EXPANDS),
    "xl0": BackboneSpec(_XL_WIDTHS, (0, 1, 1, 2, 3, 3), _XL_BLOCKS, _XL_EXPANDS),
    "xl1": BackboneSpec(_XL_WIDTHS, (1, 2, 2, 4, 6, 6), _XL_BLOCKS, _XL_EXPANDS),
}


class EfficientViT(nn.Module):
    """The backbone: stage 0 halves the resolution, every later stage halves it again.

    Each later stage opens with a block without shortcut whose expansion is four times the stage's own.
    """

    def __init__(self, spec: BackboneSpec):
        super().__init__()
        self.spec = spec
        stem = [ConvNorm(3, spec.widths[0], stride=2, act=True)]
        stem += [Residual(ResBlock(spec.widths[0])) for _ in range(spec.depths[0])]
        self.stages = nn.ModuleList([Sequence(stem)])
        for inputs, width, depth, kind, expand in zip(
            spec.widths, spec.widths[1:], spec.depths[1:], spec.blocks[1:], spec.expands[1:], strict=False
        ):
            opening = FusedMBConv if kind == "fmb" else MBConv
            blocks: list[nn.Module] = [Residual(opening(inputs, width, expand=4 * expand, stride=2), shortcut=False)]
            blocks += [_repeated_block(kind, width, expand) for _ in range(depth)]
            self.stages.append(Sequence(blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Args: x: (B, 3, S, S) float, normalised. Returns: one (B, C_i, S / 2^(i+1), S / 2^(i+1)) per stage."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _repeated_block(kind: str, width: int, expand: int) -> nn.Module:
    if kind.startswith("att"):
        return EfficientViTModule(width, kernel=int(kind[3:]), expand=expand)
    block = FusedMBConv if kind == "fmb" else MBConv
    return Residual(block(width, width, expand=expand))


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """The official random start: weights truncated normal 0.02, biases 0, the last norm of every residual branch 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                child.bias.zero_()
    for child in module.modules():
        if isinstance(child, Residual) and child.shortcut:
            last = [norm for norm in child.main.modules() if isinstance(norm, nn.BatchNorm2d)][-1]
            last.weight.zero_()
