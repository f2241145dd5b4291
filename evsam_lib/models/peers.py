"""Image encoders that EfficientViT-SAM is taught by or compared with, on timm, under the official names.

SAM's ViT (Kirillov et al. 2023) is the teacher of the paper (Sec. 3.2) and its baseline in every table; `mini` is the
same architecture at a tenth of the size, the teacher of the mini profile. Notebook 04 distils it.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from evsam_lib.compat import ensure_torchvision


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


class SamVit(nn.Module):
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
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=spec.window,
            global_attn_indexes=spec.global_blocks,
            neck_chans=spec.channels,
        )
        self.register_state_dict_post_hook(_to_official_names)
        self.register_load_state_dict_pre_hook(_from_official_names)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, S / 16, S / 16)."""
        return self.vit.forward_features(images)


# timm says fc1 and fc2 where SAM's checkpoints say lin1 and lin2, and our wrapper adds a level.
_NAMES = ((".mlp.fc1.", ".mlp.lin1."), (".mlp.fc2.", ".mlp.lin2."))


def _to_official_names(module: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
    inside = prefix + "vit."
    for key in [key for key in state if key.startswith(inside)]:
        name = prefix + key.removeprefix(inside)
        for ours, official in _NAMES:
            name = name.replace(ours, official)
        state[name] = state.pop(key)


def _from_official_names(module: nn.Module, state: dict, prefix: str, *unused) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        name = prefix + "vit." + key.removeprefix(prefix)
        for ours, official in _NAMES:
            name = name.replace(official, ours)
        state[name] = state.pop(key)
