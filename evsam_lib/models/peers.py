"""Image encoders that EfficientViT-SAM is taught by or compared with, on timm, under the official names.

SAM's ViT (Kirillov et al. 2023) is the teacher of the paper (Sec. 3.2) and its baseline in every table; `mini` is the
same architecture at a tenth of the size, the teacher of the mini profile. MobileSAM (Zhang et al. 2023), EdgeSAM (Zhou
et al. 2023) and EfficientSAM (Xiong et al. 2023) are the other rows of Table 1 and Table 4. Notebook 04 distils the
first, notebook 01 counts them all.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.compat import ensure_torchvision
from evsam_lib.models.efficientvit import Sequence, without_autocast
from evsam_lib.models.encoder import LayerNorm2d


class OfficialNames(nn.Module):
    """A module whose state dict carries the names of the released checkpoint, whatever its parts are called inside."""

    def use_official_names(self, *rules: tuple[str, str]) -> None:
        """Call it when all parts are there.

        Args:
            rules: (pattern, replacement) of `re.sub`, applied in turn to every name inside this module.
        """
        self.official_names: dict[str, str] = {}
        for ours in self.state_dict():
            official = ours
            for pattern, replacement in rules:
                official = re.sub(pattern, replacement, official)
            self.official_names[ours] = official
        self.register_state_dict_post_hook(_to_official_names)
        self.register_load_state_dict_pre_hook(_from_official_names)


def _to_official_names(module: OfficialNames, state: dict, prefix: str, local_metadata: dict) -> None:
    values = {official: state.pop(prefix + ours) for ours, official in module.official_names.items()}
    state.update({prefix + official: value for official, value in values.items()})


def _from_official_names(module: OfficialNames, state: dict, prefix: str, *unused) -> None:
    values = {
        ours: state.pop(prefix + official)
        for ours, official in module.official_names.items()
        if prefix + official in state
    }
    state.update({prefix + ours: value for ours, value in values.items()})


def sam_neck(inputs: int, outputs: int) -> nn.Sequential:
    """SAM's neck: 1x1 and 3x3 convolution, each followed by a layer norm over channels."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        LayerNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        LayerNorm2d(outputs),
    )


# ---------------------------------------------------------------- SAM


@dataclass(frozen=True)
class VitSpec:
    """One of SAM's ViTs: sizes, which blocks attend globally, window side, input side, embedding channels."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    image_size: int = 1024
    channels: int = 256
    mlp_ratio: float = 4.0


VITS = {
    "mini": VitSpec(192, 8, 6, (1, 3, 5, 7), window=8, image_size=512, channels=128),
    "b": VitSpec(768, 12, 12, (2, 5, 8, 11)),
    "l": VitSpec(1024, 24, 16, (5, 11, 17, 23)),
    "h": VitSpec(1280, 32, 16, (7, 15, 23, 31)),
}


class SamVit(OfficialNames):
    """SAM's image encoder: a plain ViT with windowed and global attention, then a two-convolution neck.

    Args:
        spec: a value of `VITS`.
    """

    def __init__(self, spec: VitSpec):
        super().__init__()
        ensure_torchvision()
        from timm.models.vision_transformer_sam import VisionTransformerSAM

        self.vit = VisionTransformerSAM(
            img_size=spec.image_size,
            patch_size=16,
            num_classes=0,
            embed_dim=spec.width,
            depth=spec.depth,
            num_heads=spec.heads,
            mlp_ratio=spec.mlp_ratio,
            # pyrefly: ignore[bad-argument-type]: timm's annotation has classes only, its own models pass partials too
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=spec.window,
            global_attn_indexes=spec.global_blocks,
            neck_chans=spec.channels,
        )
        # timm says fc1 and fc2 where SAM's checkpoints say lin1 and lin2, and our wrapper adds a level
        self.use_official_names((r"^vit\.", ""), (r"\.mlp\.fc(\d)\.", r".mlp.lin\1."))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, S / 16, S / 16)."""
        return self.vit.forward_features(images)


# ---------------------------------------------------------------- MobileSAM

TINY_WIDTHS, TINY_DEPTHS, TINY_HEADS, TINY_WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
IMAGENET_CLASSES = 1000


class TinyViT(OfficialNames):
    """MobileSAM's image encoder: TinyViT-5M whose last stage keeps the resolution of the one before, then SAM's neck.

    The released file also holds the classifier of TinyViT's pre-training, which nothing reads. It is carried as
    buffers: the file loads strictly and is saved whole, while Table 1's 9.8 M parameters, counted without it, stay 9.8.
    """

    def __init__(self):
        super().__init__()
        ensure_torchvision()
        from timm.models.tiny_vit import TinyVit

        net: Any = TinyVit(
            num_classes=0,
            embed_dims=TINY_WIDTHS,
            depths=TINY_DEPTHS,
            num_heads=TINY_HEADS,
            window_sizes=TINY_WINDOWS,
            drop_path_rate=0.0,
        )
        self.patch_embed, self.stages = net.patch_embed, net.stages
        self.stages[3].downsample.conv2.conv.stride = (1, 1)  # MobileSAM: 64 x 64 cells, as SAM's decoder expects
        for stage, width, heads, window in zip(
            self.stages[1:], TINY_WIDTHS[1:], TINY_HEADS[1:], TINY_WINDOWS[1:], strict=True
        ):
            for block in stage.blocks:
                block.attn = WindowAttention(width, heads, window)
        self.neck = sam_neck(TINY_WIDTHS[-1], 256)
        for name, shape in {
            "norm_head_weight": TINY_WIDTHS[-1:],
            "norm_head_bias": TINY_WIDTHS[-1:],
            "head_weight": (IMAGENET_CLASSES, TINY_WIDTHS[-1]),
            "head_bias": (IMAGENET_CLASSES,),
        }.items():
            self.register_buffer(name, torch.zeros(shape))
        self.use_official_names(
            (r"head_(weight|bias)$", r"head.\1"),
            (r"^patch_embed\.conv1\.", "patch_embed.seq.0."),
            (r"^patch_embed\.conv2\.", "patch_embed.seq.2."),
            # timm opens a stage with the down-sampling that the official code closes the previous one with
            *((rf"^stages\.{i}\.downsample\.", f"layers.{i - 1}.downsample.") for i in (1, 2, 3)),
            (r"^stages\.", "layers."),
            (r"\.conv\.", ".c."),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 256, S / 16, S / 16)."""
        return self.neck(self.stages(self.patch_embed(images)))


class WindowAttention(nn.Module):
    """TinyViT's attention within one window, with a learned bias for every offset between two of its cells.

    The official code and timm's keep a gathered copy of the biases in evaluation mode, which goes stale when weights
    are loaded afterwards: the embedding is then off by 1e-2. Here the biases are gathered at every call.
    """

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def forward(self, x: Tensor) -> Tensor:
        """(windows, n, C) -> (windows, n, C), n = window * window."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # each head's q, k, v side by side
        q, k, v = qkv.chunk(3, dim=-1)  # (windows, heads, n, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias().to(q.dtype))
        return self.proj(out.transpose(1, 2).flatten(-2))

    def _bias(self) -> Tensor:
        cells = torch.arange(self.window, device=self.attention_biases.device)
        offset = (cells[:, None] - cells).abs()  # (w, w), the same for rows and columns
        table = self.attention_biases.unflatten(1, (self.window, self.window))  # (heads, |dy|, |dx|)
        bias = table[:, offset][..., offset]  # (heads, y of query, y of key, x of query, x of key)
        return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (heads, n, n)


# ---------------------------------------------------------------- EdgeSAM

REPVIT_WIDTHS, REPVIT_DEPTHS = (48, 96, 192, 384), (2, 2, 14, 2)


class RepViT(OfficialNames):
    """EdgeSAM's image encoder: RepViT-M1, its last two scales fused, then SAM's neck."""

    def __init__(self):
        super().__init__()
        ensure_torchvision()
        from timm.models.repvit import RepVit

        net: Any = RepVit(
            num_classes=0, embed_dim=REPVIT_WIDTHS, depth=REPVIT_DEPTHS, mlp_ratio=2, distillation=False, legacy=True
        )
        self.stem, self.stages = net.stem, net.stages
        self.fuse_stage2 = nn.Conv2d(REPVIT_WIDTHS[2], 256, 1, bias=False)
        self.fuse_stage3 = Sequence([nn.Conv2d(REPVIT_WIDTHS[3], 256, 1, bias=False)])
        self.neck = sam_neck(256, 256)
        self.use_official_names(*_repvit_rules())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 256, S / 16, S / 16)."""
        x = self.stages[:3](self.stem(images))
        down = self.stages[3].downsample
        x = down.pre_block(x)  # the official code counts this block to the stage before: its output is the 1/16 map
        fine = self.fuse_stage2(x)  # (B, 256, S / 16, S / 16)
        x = down.channel_downsample(down.spatial_downsample(x))
        coarse = self.fuse_stage3(self.stages[3].blocks(x + down.ffn(x)))  # (B, 256, S / 32, S / 32)
        with without_autocast(coarse):
            coarse = F.interpolate(coarse.float(), fine.shape[-2:], mode="bicubic", align_corners=False).to(fine.dtype)
        return self.neck(fine + coarse)


def _repvit_rules() -> list[tuple[str, str]]:
    """timm's stages to the official flat list `features`: 0 is the stem, every down-sampling one entry of its own."""
    rules = [(r"^stem\.conv1\.", "features.0.0."), (r"^stem\.conv2\.", "features.0.2.")]
    entry = 1
    for i, depth in enumerate(REPVIT_DEPTHS):
        if i:
            down = rf"^stages\.{i}\.downsample\."
            rules += [
                (down + r"pre_block\.", f"features.{entry}."),
                (down + r"spatial_downsample\.", f"features.{entry + 1}.token_mixer.0."),
                (down + r"channel_downsample\.", f"features.{entry + 1}.token_mixer.2."),
                (down + r"ffn\.", f"features.{entry + 1}.channel_mixer."),
            ]
            entry += 2
        rules += [(rf"^stages\.{i}\.blocks\.{j}\.", f"features.{entry + j}.") for j in range(depth)]
        entry += depth
    return [
        *rules,
        (r"\.se\.", ".token_mixer.1."),
        (r"\.token_mixer\.(conv1?)\.", r".token_mixer.0.\1."),
        (r"\.channel_mixer\.conv1\.", ".channel_mixer.m.0."),
        (r"\.channel_mixer\.conv2\.", ".channel_mixer.m.2."),
    ]
