"""Parameters and multiply-accumulates of SAM3, LiteText and the students, module by module, on the meta device.

Counted by the ledger of `evsam_lib.models.count`, `macs` as there: convolutions, linear layers and all matrix products,
the attention's among them. One pass is one image and one phrase, without example boxes; points and boxes are counted
apart. What is paid once an image (`vision`) is kept from what every phrase costs again (`phrase`).
Notebook 16 draws it.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from evsam_lib.models.count import PRODUCTS, Ledger
from evsam_lib.sam3.zoo import configuration

__all__ = ["CLICK", "IMAGE", "MEMORY", "PARTS", "PHRASE", "count_memory", "count_sam3"]

# Parts by the names of modules, in the order of the forward pass; the first that fits counts.
PARTS = {
    "backbone": r"detector_model\.vision_encoder\.backbone(?!\.(head|lateral))",
    "head": r"detector_model\.vision_encoder\.backbone\.(head|lateral)",
    "neck": r"detector_model\.vision_encoder\.neck",
    "text": r"detector_model\.text_(encoder|projection)",
    "geometry": r"detector_model\.geometry_encoder",
    "detr encoder": r"detector_model\.detr_encoder",
    "detr decoder": r"detector_model\.detr_decoder",
    "scoring": r"detector_model\.dot_product_scoring",
    "mask decoder": r"detector_model\.mask_decoder",
    "tracker neck": r"tracker_neck",
    "click decoder": r"tracker_model\.(prompt_encoder|mask_decoder|shared_image_embedding)",
    "memory": r"tracker_model",
}
IMAGE = ("backbone", "head", "neck")  # once an image
PHRASE = ("text", "geometry", "detr encoder", "detr decoder", "scoring", "mask decoder")  # once a phrase
CLICK = ("tracker neck", "click decoder")  # the neck once an image, the decoder once a click

# What remembering costs in a frame, for every object: to make a memory of it, and to look at those of earlier ones.
MEMORY = {
    "memory encoder": r"memory_encoder",
    "perceiver": r"perceiver",
    "cross attention": r"memory_attention\.layers\.\d+\.cross_attn_image",
    "self attention and the rest": r"memory_attention",
}


def count_sam3(
    name: str,
    text: str | None = None,
    *,
    context: int | None = None,
    scale: str = "full",
    image_size: int | None = None,
    taps: Sequence[int] = (32,),
    head_width: int | None = None,
) -> pd.DataFrame:
    """Costs of one model.

    Args:
        name: one of `evsam_lib.sam3.zoo.MODELS`.
        text: its text encoder, as in `load_sam3`.
        context: tokens of the phrase, as in `load_sam3`.
        scale: "full" or "mini".
        image_size: side of the input, pixels; None is the scale's (1008, mini 168).
        taps: stages of the image student, as in `load_sam3`.
        head_width: channels within its head, as in `load_sam3`.

    Returns:
        Indexed by part: `PARTS`, then the sums `trunk` (backbone and head), `vision` (`IMAGE`), `phrase` (`PHRASE`) and
        `detector` (both: one image, one phrase). Columns: `parameters` and `macs`, then what these are made of:
        `convolution`, `linear`, `matmul`, `einsum`. `memory` holds parameters only: its work depends on the video.

    Raises:
        ValueError: no such model, or it cannot take this size.
    """
    from transformers import Sam3VideoModel

    config = configuration(
        name, text, context=context, scale=scale, image_size=image_size, taps=taps, head_width=head_width
    )
    with torch.device("meta"):
        model = Sam3VideoModel(config).eval()
    ledger = Ledger()
    with torch.no_grad(), ledger.watching(model, part_of):
        _one_image_one_phrase(model, config)
    table = ledger.table().reindex(list(PARTS)).fillna(0).astype("int64")
    table.insert(0, "macs", table[list(PRODUCTS)].sum(axis=1))
    table.insert(0, "parameters", _parameters(model))
    sums = {"trunk": ("backbone", "head"), "vision": IMAGE, "phrase": PHRASE, "detector": (*IMAGE, *PHRASE)}
    for whole, parts in sums.items():
        table.loc[whole] = table.loc[list(parts)].sum()
    return table.astype("int64")[["parameters", "macs", *PRODUCTS]].rename_axis(index="part")


def count_memory(
    memory: str = "full",
    *,
    tokens: int | None = None,
    windows: int | None = None,
    remembered: int = 7,
    scale: str = "full",
    image_size: int | None = None,
) -> pd.DataFrame:
    """Costs of the tracker's memory for one object in one frame.

    Args:
        memory: as in `load_sam3`.
        tokens: as in `load_sam3`.
        windows: as in `load_sam3`.
        remembered: frames in memory, the first among them; 7 once a video runs. As many pointers are read.
        scale: as in `load_sam3`.
        image_size: as in `load_sam3`.

    Returns:
        Indexed by part: `MEMORY`, then `whole`. Columns: `parameters`, `macs`, and `tokens`, that the cross attention
        reads.

    Raises:
        ValueError: no such memory, or it cannot have these tokens.
    """
    from transformers import AutoModel

    ways = {"memory": memory, "tokens": tokens, "windows": windows, "scale": scale, "image_size": image_size}
    with torch.device("meta"):
        config = configuration("SAM3", **ways).tracker_config
        tracker = AutoModel.from_config(config, remove_vision_encoder=True).eval()
        ledger = Ledger()
        with torch.no_grad(), ledger.watching(tracker, partial(_first, MEMORY)):
            read = _one_object_one_frame(tracker, remembered)
    table = ledger.table().reindex(list(MEMORY)).fillna(0).astype("int64")
    found = dict.fromkeys(MEMORY, 0)
    for name, parameter in tracker.named_parameters():
        if part := _first(MEMORY, name):
            found[part] += parameter.numel()
    table = pd.DataFrame({"parameters": found, "macs": table[list(PRODUCTS)].sum(axis=1), "tokens": 0})
    table.loc["whole"] = table.sum()
    table.loc[["cross attention", "whole"], "tokens"] = read
    return table.rename_axis(index="part")


def _one_object_one_frame(tracker: Any, remembered: int) -> int:
    """Runs what `MEMORY` counts; returns how many tokens were read."""
    side, width = tracker.image_size, tracker.hidden_dim
    cells = tracker.backbone_feature_sizes[-1][0] ** 2
    features = torch.zeros(cells, 1, width)
    memory, _ = tracker._encode_new_memory(features, torch.zeros(1, 1, side, side), torch.zeros(1, 1, 1), False)
    pointers = remembered * (width // tracker.mem_dim)
    keys = torch.zeros(remembered * len(memory) + pointers, 1, tracker.mem_dim)
    tracker.memory_attention(features, keys, features, keys, pointers)
    return len(keys)


def _first(parts: dict[str, str], name: str) -> str | None:
    return next((part for part, pattern in parts.items() if re.match(pattern + r"(\.|$)", name)), None)


def _one_image_one_phrase(model: Any, config) -> None:
    side, tokens = config.image_size, config.detector_config.text_config.max_position_embeddings
    features = model.detector_model.get_vision_features(torch.zeros(1, 3, side, side, device="meta"))
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    text = model.detector_model.get_text_features(ids)
    grid = tuple(features.fpn_hidden_states[2].shape[-2:])
    decoder = model.detector_model.detr_decoder
    handle = decoder.register_forward_pre_hook(partial(_known_grid, grid=grid), with_kwargs=True)
    model.detector_model(vision_embeds=features, text_embeds=text)
    handle.remove()
    maps, _ = model.get_vision_features_for_tracker(features)
    tracker = model.tracker_model
    maps = [x.permute(1, 2, 0).view(1, -1, n * grid[0], n * grid[1]) for x, n in zip(maps, (4, 2, 1), strict=True)]
    corners, labels = torch.zeros(1, 1, 2, 2, device="meta"), torch.zeros(1, 1, 2, dtype=torch.long, device="meta")
    sparse, dense = tracker.prompt_encoder(corners, labels, None, None)  # a box, as two corners
    tracker.mask_decoder(
        image_embeddings=maps[-1],
        image_positional_embeddings=tracker.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        high_resolution_features=maps[:-1],
    )


def _known_grid(module, args, kwargs, *, grid: tuple[int, int]):
    """The decoder reads the grid out of a tensor, which the meta device cannot give."""
    return args, kwargs | {"spatial_shapes": torch.tensor([grid])}


def part_of(name: str) -> str | None:
    """The part of `PARTS` that a module belongs to, by its name in `Sam3VideoModel`; None for none."""
    order = sorted(PARTS, key=lambda part: part != "head")  # within the trunk
    return next((part for part in order if re.match(PARTS[part] + r"(\.|$)", name)), None)


def _parameters(model: nn.Module) -> pd.Series:
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        found[part_of(name) or name] += parameter.numel()
    return pd.Series(found)
