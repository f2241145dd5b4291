"""A compact memory for SAM3's tracker: a perceiver sums up every remembered frame in a few tokens.

SAM3's tracker keeps the whole map of each of 7 earlier frames (72 x 72 = 5,184 tokens, of 64 numbers) and attends to
all of them on every frame and for every object. EfficientSAM3's stage 2 (its branch `stage2`) puts a perceiver between
memory encoder and memory attention: 64 learned latents read the map, twice, and stand for it from then on. EdgeTAM
(arXiv 2501.07256) adds latents that each read one window and so keep their place. The perceiver is transformers',
written for EdgeTAM; everything else is SAM3's tracker, so its video session runs unchanged. Importing this module
registers the tracker. Notebook 18 explains it.
"""

from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, Sam3TrackerVideoConfig, Sam3TrackerVideoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.edgetam_video.modeling_edgetam_video import (
    EdgeTamVideoPerceiverAttention,
    EdgeTamVideoPerceiverResampler,
    window_partition,
)
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    Sam3TrackerVideoMemoryAttention,
    Sam3TrackerVideoRoPEAttention,
    Sam3TrackerVideoVisionRotaryEmbedding,
    apply_rotary_pos_emb_2d,
    eager_attention_forward,
)

if TYPE_CHECKING:
    from evsam_lib.sam3.zoo import Scale

__all__ = ["MEMORIES", "MemoryRow", "PerceiverTracker", "PerceiverTrackerConfig", "memory_options"]


@dataclass(frozen=True)
class MemoryRow:
    """A compact memory.

    Attributes:
        tokens: latents that read the whole map.
        windows: latents that read one window each, a square number; they keep their place.
        depth: layers of the perceiver.
        heads: of its attention.
        layers: of the attention to memories, at most; SAM3 has 4.
        mlp: feed-forward width of these, at most; SAM3 has 2048.
    """

    tokens: int
    windows: int
    depth: int
    heads: int
    layers: int
    mlp: int


MEMORIES: dict[str, MemoryRow | None] = {
    "full": None,
    "perceiver": MemoryRow(64, 0, 2, 8, 2, 1024),  # EfficientSAM3, branch stage2
    "edgetam": MemoryRow(256, 256, 2, 1, 2, 2048),  # transformers' defaults for EdgeTAM, whose grid is 64 x 64
}


@strict
class PerceiverTrackerConfig(Sam3TrackerVideoConfig):
    """SAM3's tracker and a perceiver; the names of the latter are those of `EdgeTamVideoConfig`."""

    model_type = "efficientsam3_tracker"

    perceiver_resampler_num_latents: int = 64
    perceiver_resampler_num_latents_2d: int = 0
    perceiver_resampler_hidden_size: int = 64
    perceiver_resampler_mlp_intermediate_size: int = 256
    perceiver_resampler_num_attention_heads: int = 8
    perceiver_resampler_attention_head_dim: int = 8
    perceiver_resampler_num_layers: int = 2
    perceiver_resampler_hidden_dropout: float | int = 0.0
    perceiver_resampler_attention_dropout: float | int = 0.0


def memory_options(
    row: MemoryRow, tokens: int | None, windows: int | None, scale: "Scale", grid: int
) -> dict[str, Any]:
    """What a compact memory changes in the tracker's configuration.

    Args:
        row: of `MEMORIES`.
        tokens: latents that read the whole map; None is the row's number.
        windows: latents that read a window each; None is the row's number.
        scale: of the model: it has no more layers and no wider ones than SAM3's own.
        grid: side of the map, cells.

    Returns:
        Arguments of `PerceiverTrackerConfig`.

    Raises:
        ValueError: no token at all, or windows that do not tile the map.
    """
    row = replace(
        row, tokens=row.tokens if tokens is None else tokens, windows=row.windows if windows is None else windows
    )
    side = isqrt(max(row.windows, 0))
    if min(row.tokens, row.windows) < 0 or row.tokens + row.windows < 1:
        raise ValueError(f"A memory keeps at least one token a frame, got tokens={row.tokens}, windows={row.windows}.")
    if side * side != row.windows or (side and grid % side):
        fit = ", ".join(str(n * n) for n in range(1, grid + 1) if grid % n == 0)
        raise ValueError(
            f"{row.windows} windows do not tile a map of {grid} x {grid} cells; there can be {fit}, or 0 for none."
        )
    return {
        "perceiver_resampler_num_latents": row.tokens,
        "perceiver_resampler_num_latents_2d": row.windows,
        "perceiver_resampler_num_attention_heads": row.heads,
        "perceiver_resampler_attention_head_dim": 64 // row.heads,
        "perceiver_resampler_num_layers": row.depth,
        "memory_attention_num_layers": min(row.layers, scale.memory),
        "memory_attention_feed_forward_hidden_size": min(row.mlp, scale.mlp),
        "memory_attention_rope_feat_sizes": [grid, grid],
    }


class PerceiverTracker(Sam3TrackerVideoModel):
    """SAM3's tracker that remembers a frame as a few tokens. What it has beyond SAM3's is called `perceiver`."""

    config: PerceiverTrackerConfig  # pyrefly: ignore[bad-override-mutable-attribute]: as transformers' own models do

    def __init__(self, config: PerceiverTrackerConfig, remove_vision_encoder: bool = False):
        super().__init__(config, remove_vision_encoder=remove_vision_encoder)
        self.memory_attention = LatentMemoryAttention(config)
        self.perceiver = Perceiver(config)
        self.post_init()

    # pyrefly: ignore[bad-override]: transformers' own returns two tensors, its annotation is wrong
    def _encode_new_memory(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """SAM3's memory of a frame, (h * w, B, 64) with its positions, summed up: (tokens, B, 64), twice."""
        found: Any = super()._encode_new_memory(*args, **kwargs)
        memory, positions = found
        side = self.backbone_feature_sizes[-1]
        maps = (x.permute(1, 2, 0).unflatten(2, side).to(self.dtype) for x in (memory, positions))  # (B, 64, h, w)
        latents, places = self.perceiver(*maps)  # (B, tokens, 64)
        return latents.transpose(0, 1).to(memory.dtype), places.transpose(0, 1).to(positions.dtype)


class PerceiverAttention(EdgeTamVideoPerceiverAttention):
    """transformers' own mixes up heads and tokens where there is more than one head (5.23); EdgeTAM has one."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, positional_encoding: Tensor | None = None, **unused
    ) -> Tensor:
        """(B, queries, 64) from keys and values (B, cells, 64); places (B, cells, 64) are added to both, projected."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if positional_encoding is not None:
            k, v = k + positional_encoding, v + positional_encoding
        q, k, v = (x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)  # (B, heads, queries, 64 / heads)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Perceiver(EdgeTamVideoPerceiverResampler):
    """transformers' perceiver for many heads and many objects; its own windows take one object (5.23)."""

    def __init__(self, config: Any):  # a `PerceiverTrackerConfig`: it has what is read of an `EdgeTamVideoConfig`
        super().__init__(config)
        for layer in self.layers:
            layer.cross_attention, layer.self_attention = PerceiverAttention(config), PerceiverAttention(config)

    def _forward_2d(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 64, h, w) -> latents of windows (B, windows, 64), row by row, and their positions, likewise."""
        side = isqrt(self.num_latents_2d)
        cells, _ = window_partition(hidden_states.permute(0, 2, 3, 1), hidden_states.shape[2] // side)
        latents = self.latents_2d.repeat(len(hidden_states), 1)[:, None]  # (B * windows, 1, 64)
        for layer in self.layers:
            latents = layer(latents, cells.flatten(1, 2))
        latents = self.layer_norm(latents).view(len(hidden_states), -1, self.hidden_size)
        shape = (len(hidden_states), self.hidden_size, side, side)
        places = self.positional_encoding(shape, latents.device, latents.dtype)  # (B, 64, side, side)
        return latents, places.flatten(2).transpose(1, 2)


class LatentMemoryAttention(Sam3TrackerVideoMemoryAttention):
    """SAM3's attention to memories, its cross attention knowing where a window's latent belongs."""

    def __init__(self, config: PerceiverTrackerConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.cross_attn_image = LatentCrossAttention(config)


class LatentCrossAttention(Sam3TrackerVideoRoPEAttention):
    """From the frame's cells to latents: a window's latent is turned as a cell in its middle would be, others are not.

    EdgeTAM counts windows 0, 1, 2, ... instead, on another scale than the cells.
    """

    def __init__(self, config: PerceiverTrackerConfig):
        super().__init__(config, kv_in_dim=config.memory_encoder_output_channels)
        self.rotary_emb = Sam3TrackerVideoVisionRotaryEmbedding(config)
        self.tokens, windows = config.perceiver_resampler_num_latents, config.perceiver_resampler_num_latents_2d
        sizes: Any = config.memory_attention_rope_feat_sizes  # None no longer, once the configuration is made
        self.side, self.grid = isqrt(windows), sizes[0]

    # pyrefly: ignore[bad-override]: transformers' own returns a pair too, its annotation is wrong
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        num_k_exclude_rope: int = 0,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As the class before it; `num_k_exclude_rope` tokens at the end belong to no place (pointers to objects)."""
        shape = (query.shape[0] * query.shape[1], -1, self.num_attention_heads, self.head_dim)
        pairs = ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        q, k, v = (project(x).view(shape).transpose(1, 2) for project, x in pairs)  # (B, heads, tokens, head_dim)
        q, k = _turned(q, position_embeddings), _turned(k, self._angles(k, num_k_exclude_rope))
        # pyrefly: ignore[bad-argument-type]: it takes None as well
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout_p if self.training else 0.0
        out, weights = attend(
            self, q, k, v, attention_mask=None, dropout=dropout, scaling=self.scaling, is_causal=False, **kwargs
        )
        return self.o_proj(out.reshape(*query.shape[:-1], -1)), weights

    def _angles(self, key: Tensor, pointers: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for all keys, (keys, head_dim): frame after frame latents, windows; then pointers."""
        cells = self.grid // self.side if self.side else 0
        middle = torch.arange(self.side, device=key.device) * cells + (cells - 1) / 2
        rows, columns = torch.meshgrid(middle, middle, indexing="ij")
        cos, sin = self.rotary_emb(key, torch.stack([columns.flatten(), rows.flatten()], -1))  # (1, windows, head_dim)
        frames = (key.shape[-2] - pointers) // (self.tokens + self.side**2)

        def laid_out(angles: Tensor, still: float) -> Tensor:
            frame = torch.cat([angles.new_full((self.tokens, self.head_dim), still), angles[0]])
            return torch.cat([frame.repeat(frames, 1), angles.new_full((pointers, self.head_dim), still)])

        return laid_out(cos, 1.0), laid_out(sin, 0.0)


def _turned(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    return apply_rotary_pos_emb_2d(x, x[..., :0, :], *angles)[0]


AutoConfig.register(PerceiverTrackerConfig.model_type, PerceiverTrackerConfig)
AutoModel.register(PerceiverTrackerConfig, PerceiverTracker)
