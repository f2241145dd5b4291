"""The image student as a trunk that transformers' SAM3 classes build by themselves.

A backbone of timm, of which EfficientSAM3 uses the last stage alone, then the official projection head: 1x1 convolution
to the teacher's width, batch norm, GELU, 3x3 convolution; the map, 32 pixels a cell, is enlarged to the teacher's grid
of 14 pixels a cell. `taps` takes an earlier stage as well or instead, which the official code does not offer. Importing
this module registers the trunk, so `Sam3VisionConfig(backbone_config=...)` accepts it, and with it the detector, the
tracker and the video model. Notebook 16 counts it, notebook 17 asks what the taps are worth.
"""

from typing import Any

import timm
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

__all__ = ["TAPS", "StudentTrunk", "StudentTrunkConfig"]

STRIDES = (4, 8, 16, 32)  # of the stages of all nine backbones, pixels a cell
TAPS = ((32,), (16,), (16, 32))  # the official one first


@strict
class StudentTrunkConfig(PreTrainedConfig):
    """Which backbone, and the shape of SAM3's trunk that it stands in for.

    Attributes:
        backbone: name of a model of timm that gives features.
        hidden_size: channels of the trunk that is replaced.
        image_size: side of the input, pixels.
        patch_size: side of a cell of the output, pixels.
        taps: which stages are used, by pixels a cell, finest first: one of `TAPS`.
        head_width: channels within the head; None is `hidden_size`, the official one.
    """

    model_type = "efficientsam3_student"
    base_config_key = "backbone_config"

    backbone: str = "efficientvit_b0"
    hidden_size: int = 1024
    image_size: int = 1008
    patch_size: int = 14
    taps: list[int] | tuple[int, ...] = (32,)
    head_width: int | None = None


class StudentTrunk(PreTrainedModel):
    """Image to the tokens of SAM3's trunk, by a small network. Random start; no weights are fetched."""

    config: StudentTrunkConfig  # pyrefly: ignore[bad-override-mutable-attribute]: as transformers' own models do
    main_input_name = "pixel_values"

    def __init__(self, config: StudentTrunkConfig):
        super().__init__(config)
        stages = [STRIDES.index(tap) for tap in config.taps]
        net: Any = timm.create_model(config.backbone, pretrained=False, features_only=True, out_indices=stages)
        self.net = net
        *finer, coarsest = net.feature_info.channels()
        width = config.head_width or config.hidden_size
        self.head = nn.Sequential(
            nn.Conv2d(coarsest, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, config.hidden_size, 3, padding=1),
        )
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1, bias=False) for channels in finer)
        self.post_init()

    def forward(self, pixel_values: Tensor, **unused) -> BaseModelOutput:
        """(B, 3, H, W) -> `last_hidden_state` (B, H/14 * W/14, hidden_size), row by row."""
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        *finer, coarsest = self.net(pixel_values)
        fused = self.head[0](coarsest)  # (B, width, H/32, W/32), rounded up
        # A 1x1 convolution over all taps, enlarged and laid together, is the sum of one over each.
        for conv, tap in zip(self.lateral, finer, strict=True):
            fused = _resized(fused, tap.shape[-2:]) + conv(tap)
        tokens = _resized(self.head[1:](fused), grid)  # (B, hidden_size, H/14, W/14)
        return BaseModelOutput(last_hidden_state=tokens.flatten(2).transpose(1, 2))

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps timm's start. A model made from files comes from the meta device, where TinyViT's table of offsets,
        which no file holds, is lost: it is computed again."""
        computed = getattr(module, "init_non_persistent_buffers", None)
        if computed is not None:
            computed()


def _resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


AutoConfig.register(StudentTrunkConfig.model_type, StudentTrunkConfig)
AutoModel.register(StudentTrunkConfig, StudentTrunk)
