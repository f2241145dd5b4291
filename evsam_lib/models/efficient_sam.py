"""EfficientSAM (Xiong et al. 2023): the one peer whose prompt encoder and mask decoder are not SAM's.

Table 1 and Table 4 compare with it. As many parameters as SAM's decoder, seven differences:

1. GELU wherever SAM has ReLU.
2. Between the transposed convolutions one norm over all of the map instead of one per pixel.
3. Self-attention among tokens is residual in both blocks, and in the second the prompt code is added into the tokens
   themselves, not to queries and keys only.
4. No mask prompts.
5. A negative point has its position only, no learned vector.
6. Every prompt has six slots.
7. Empty slots keep a position, that of (-1, -1); SAM's padding point has none.

The image encoder is a plain ViT with global attention in every block. Every name is that of the released checkpoint.
Notebook 01 counts the models.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.compat import ensure_torchvision
from evsam_lib.data.transforms import Frame
from evsam_lib.models.efficientvit import without_autocast
from evsam_lib.models.mask_decoder import Attention, MaskDecoder, TwoWayBlock, TwoWayTransformer
from evsam_lib.models.peers import sam_neck
from evsam_lib.models.prompt_encoder import PADDING_LABEL, BasePromptEncoder, join_prompts
from evsam_lib.models.sam import Sam

WIDTH, HEADS, HIDDEN, GRID = 256, 8, 2048, 64  # of the decoder, as in SAM
SLOTS = 6  # decoder_max_num_input_points in the official build
PRETRAINED_GRID = 14  # the position table is that of ViT pre-training at 224 px, with its class entry in front


def build_efficient_sam(width: int, heads: int, *, name: str, frame: Frame) -> Sam:
    """EfficientSAM with a random start.

    Args:
        width: of the image encoder: 192 (Ti) or 384 (S).
        heads: of its attention: 3 or 6.
        name: the zoo's name of the model.
        frame: the way between an image's pixels and the model.
    """
    prompt_encoder = EfficientSamPromptEncoder(WIDTH, GRID, frame.frame_size)
    return EfficientSam(PlainVit(width, heads), prompt_encoder, EfficientSamDecoder(), name=name, frame=frame)


class EfficientSam(Sam):
    """Sam whose hidden tokens are empty slots: the model has seen nothing but six of them."""

    def decode(
        self, embedding: Tensor, coords: Tensor, labels: Tensor, *, valid: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        """See `Sam.decode`."""
        labels = labels if valid is None else labels.masked_fill(~valid, PADDING_LABEL)
        return super().decode(embedding, coords, labels, **options)


class PlainVit(nn.Module):
    """EfficientSAM's image encoder: ViT-Ti or ViT-S, no windows, no relative positions, then SAM's neck.

    Args:
        width: of the tokens: 192 (Ti) or 384 (S).
        heads: of every attention: 3 or 6.
    """

    def __init__(self, width: int, heads: int, *, depth: int = 12):
        super().__init__()
        ensure_torchvision()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PRETRAINED_GRID**2, width))
        self.patch_embed = PatchEmbed(None, 16, 3, width, flatten=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        # pyrefly: ignore[bad-argument-type]: timm's annotation has classes only, its own models pass partials too
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.neck = sam_neck(width, WIDTH)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 256, S / 16, S / 16)."""
        x = self.patch_embed(images)  # (B, C, h, w)
        grid = x.shape[-2:]
        x = x + self._positions(grid).to(x.dtype)
        x = self.blocks(x.flatten(2).mT)  # (B, h w, C)
        return self.neck(x.mT.unflatten(2, grid))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, C, h, w): the table without its class entry, enlarged by plain bicubic, not antialiased as timm does."""
        with without_autocast(self.pos_embed):
            table = self.pos_embed[:, 1:].float().mT.unflatten(2, (PRETRAINED_GRID, PRETRAINED_GRID))
            return F.interpolate(table, grid, mode="bicubic", align_corners=False)


class EfficientSamPromptEncoder(BasePromptEncoder):
    """Points and boxes as six slots.

    Args:
        embed_dim: C.
        grid: side of the image embedding in cells.
        frame_size: side of the prompt frame in pixels.
    """

    def __init__(self, embed_dim: int, grid: int, frame_size: int):
        super().__init__(embed_dim, grid, frame_size)
        self.invalid_points = nn.Embedding(1, embed_dim)
        self.point_embeddings = nn.Embedding(1, embed_dim)
        self.bbox_top_left_embeddings = nn.Embedding(1, embed_dim)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, embed_dim)

    @staticmethod
    def tokens(
        points: Tensor | None = None, labels: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `prompt_tokens`, without SAM's padding point, which would take a slot."""
        return join_prompts(points, labels, boxes)

    def forward(self, coords: Tensor, labels: Tensor, mask_input: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeds prompts.

        Args:
            coords: (B, N, T, 2) float, XY pixels of the prompt frame, T at most 6.
            labels: (B, N, T) int: 1 positive, 0 negative, 2 and 3 a box's corners, -1 an empty slot.
            mask_input: must be None.

        Returns:
            sparse (B, N, 6, C), and dense, a zero that broadcasts.

        Raises:
            ValueError: more than six tokens, or a mask prompt.
        """
        if mask_input is not None:
            raise ValueError("EfficientSAM has no mask prompts; give points or a box.")
        empty = SLOTS - labels.shape[-1]
        if empty < 0:
            raise ValueError(
                f"EfficientSAM has {SLOTS} slots for a prompt (a point takes one, a box two), got {labels.shape[-1]}."
            )
        coords = F.pad(coords.float(), (0, 0, 0, empty))
        labels = F.pad(labels.long(), (0, empty), value=PADDING_LABEL)
        # official: empty slots lie at (-1, -1), and so does each coordinate that is left or above of the image
        coords = torch.where((labels == PADDING_LABEL)[..., None] | (coords < 0), -1.0, coords)
        position = self.pe_layer((coords + 0.5) / self.frame_size)  # + 0.5: centre of the pixel
        rows = [self.invalid_points, None, self.point_embeddings]
        rows += [self.bbox_top_left_embeddings, self.bbox_bottom_right_embeddings]
        learned = self.point_embeddings.weight
        table = torch.cat([torch.zeros_like(learned) if row is None else row.weight for row in rows])  # (5, C)
        return position.to(learned.dtype) + table[labels + 1], learned.new_zeros(1, 1, 1, 1, 1)


class GeluMLP(nn.Module):
    """Linear layers with GELU between, under the names `layers` and `fc`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, depth: int):
        super().__init__()
        widths = [inputs] + [hidden] * (depth - 1)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, hidden), nn.GELU()) for width in widths])
        self.fc = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)


class ResidualAttention(Attention):
    """Attention among tokens, added to them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return q + super().forward(q, k, v, mask)


class EfficientSamBlock(TwoWayBlock):
    """SAM's first block with residual self-attention; `adds_code` puts the prompt code into the tokens before it."""

    def __init__(self, *, adds_code: bool):
        super().__init__(WIDTH, HEADS, HIDDEN, eps=1e-5, first=True)
        self.adds_code = adds_code
        self.self_attn = ResidualAttention(WIDTH, HEADS)
        self.mlp = GeluMLP(WIDTH, HIDDEN, WIDTH, depth=1)

    def forward(
        self, tokens: Tensor, image: Tensor, token_code: Tensor, image_code: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens = tokens + token_code if self.adds_code else tokens
        return super().forward(tokens, image, token_code, image_code, mask)


class EfficientSamDecoder(MaskDecoder):
    """SAM's decoder with the differences 1 to 3; its `forward` is SAM's."""

    def __init__(self):
        nn.Module.__init__(self)  # none of SAM's parts is kept
        self.transformer = TwoWayTransformer(WIDTH, HEADS, HIDDEN, eps=1e-5)
        self.transformer.layers = nn.ModuleList([EfficientSamBlock(adds_code=i > 0) for i in range(2)])
        self.iou_token = nn.Embedding(1, WIDTH)
        self.mask_tokens = nn.Embedding(self.mask_tokens_count, WIDTH)
        self.final_output_upscaling_layers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(WIDTH, WIDTH // 4, 2, stride=2), nn.GroupNorm(1, WIDTH // 4), nn.GELU()
                ),
                nn.Sequential(nn.ConvTranspose2d(WIDTH // 4, WIDTH // 8, 2, stride=2), nn.Identity(), nn.GELU()),
            ]
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            [GeluMLP(WIDTH, WIDTH, WIDTH // 8, depth=2) for _ in range(self.mask_tokens_count)]
        )
        self.iou_prediction_head = GeluMLP(WIDTH, 256, self.mask_tokens_count, depth=2)

    def _masks(self, image: Tensor, kernels: Tensor, grid: tuple[int, int]) -> Tensor:
        """image (B, N, h w, C), kernels (B, N, K, C / 8) -> logits (B, N, K, 4h, 4w).

        SAM's way over tokens would need statistics of the whole map half-way, so this goes over the map.
        """
        x = image.flatten(0, 1).mT.unflatten(2, grid)  # (B N, C, h, w)
        for layer in self.final_output_upscaling_layers:
            x = layer(x)  # (B N, C / 4, 2h, 2w), then (B N, C / 8, 4h, 4w)
        logits = kernels.flatten(0, 1) @ x.flatten(2)  # (B N, K, 16 h w)
        return logits.reshape(*kernels.shape[:3], 4 * grid[0], 4 * grid[1])
