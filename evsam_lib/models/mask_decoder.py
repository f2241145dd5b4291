"""SAM's mask decoder, batched over images and prompts (Sec. 3.2: kept unchanged; Kirillov et al. 2023).

Same parameters and same function as SAM's, arranged for speed. The image has thousands of tokens, a prompt has about
seven, so no projection is ever applied to the image: in q k^T the key's projection moves to the query, in the weighted
sum the value's projection moves behind the sum, and where the image asks, its query's projection moves to the keys.
That is exact algebra and halves the work. Images are not repeated per prompt until a prompt changes them, only tokens
that a head will read take the last look, and upscaling runs on tokens, a transposed 2x2 convolution of stride 2 being a
linear layer and a reshape. `tests/plain_decoder.py` is the textbook arrangement, for comparison. Notebook 01 shows the
decoder's place and cost.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP = 1024  # tokens upscaled at a time on a CPU: 1 MB of float32 in, 8 MB at the widest


class Attention(nn.Module):
    """Multi-head attention at possibly reduced width, with SAM's four projections.

    Called, it is plain attention among tokens. `tokens_to_image` and `image_to_tokens` are the same function for the
    case that one side is an image, whose tokens are many: the image's own projections are absorbed by the other side.
    There the image's prompt axis may be 1, an image that is the same for all prompts.
    """

    def __init__(self, width: int, heads: int, *, downsample: int = 1):
        super().__init__()
        inner = width // downsample
        self.heads = heads
        self.head_dim = inner // heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Args: q, k, v (B, N, T, C); mask (B, N, T) bool, True where a key exists. Returns: (B, N, T, C)."""
        q, k, v = self._split(self.q_proj(q)), self._split(self.k_proj(k)), self._split(self.v_proj(v))
        bias = None if mask is None else mask[:, :, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, N, heads, T, d)
        return self.out_proj(out.transpose(2, 3).flatten(-2))

    def tokens_to_image(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Tokens ask the image. Args: q (B, N, T, C); k, v (B, N or 1, h w, C). Returns: (B, N, T, C).

        Scores q (k W_k + b_k)^T = (q W_k^T) k^T + a constant that softmax ignores; and as the weights sum to 1,
        (weights (v W_v + b_v)) = (weights v) W_v + b_v.
        """
        batch, prompts, tokens, width = q.shape
        q = self._split(self.q_proj(q)) @ self._per_head(self.k_proj)  # (B, N, heads, T, C)
        images = k.shape[1]  # 1: a shared image, asked by the rows of all its prompts
        rows = q.reshape(batch * images, 1, prompts // max(images, 1) * self.heads * tokens, width)
        k, v = k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None]  # (B or B N, 1, h w, C)
        seen = F.scaled_dot_product_attention(rows, k, v, scale=self.head_dim**-0.5)
        seen = seen.reshape(batch, prompts, self.heads, tokens, width) @ self._per_head(self.v_proj).mT
        return self.out_proj(seen.transpose(2, 3).flatten(-2) + self.v_proj.bias)

    def image_to_tokens(self, image: Tensor, coded: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The image asks the tokens, and what it hears is added to it.

        Args:
            image: (B, N or 1, h w, C).
            coded: the same with its position encoding, the query.
            k: (B, N, T, C).
            v: (B, N, T, C).
            mask: (B, N, T) bool, True where a token exists.

        Returns:
            (B, N, h w, C).
        """
        batch, prompts, tokens, width = k.shape
        k, v = self.head_dim**-0.5 * self._split(self.k_proj(k)), self._split(self.v_proj(v))  # (B, N, heads, T, d)
        offset = k @ self.q_proj.bias.view(self.heads, self.head_dim, 1)  # (B, N, heads, T, 1)
        if mask is not None:
            offset = offset.masked_fill(~mask[:, :, None, :, None], float("-inf"))
        keys = (k @ self._per_head(self.q_proj)).flatten(2, 3)  # (B, N, heads T, C)
        scores = keys @ coded.mT + offset.flatten(2, 3)  # (B, N, heads T, h w): the long axis last, for the softmax
        weights = scores.unflatten(2, (self.heads, tokens)).softmax(3).flatten(2, 3)
        values = v @ self.out_proj.weight.view(width, self.heads, -1).permute(1, 2, 0)  # (B, N, heads, T, C)
        values = (values + self.out_proj.bias / self.heads).flatten(2, 3)  # each head's weights sum to 1
        image = image.expand(-1, prompts, -1, -1).flatten(0, 1)
        return torch.baddbmm(image, weights.flatten(0, 1).mT, values.flatten(0, 1)).unflatten(0, (batch, prompts))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(2, 3)  # (B, N, heads, T, d)

    def _per_head(self, layer: nn.Linear) -> Tensor:
        return layer.weight.view(self.heads, self.head_dim, -1)  # (heads, d, C)


class MLP(nn.Module):
    """Linear layers with ReLU between, under SAM's name `layers`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int):
        super().__init__()
        widths = [inputs] + [hidden] * (depth - 1) + [outputs]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The block's two-layer MLP, under SAM's names `lin1` and `lin2`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image; an MLP; then the image attends to the tokens."""

    mlp: nn.Module

    def __init__(self, width: int, heads: int, hidden: int, *, eps: float, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.cross_attn_token_to_image = Attention(width, heads, downsample=2)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, hidden)
        self.norm3 = nn.LayerNorm(width, eps=eps)
        self.norm4 = nn.LayerNorm(width, eps=eps)
        self.cross_attn_image_to_token = Attention(width, heads, downsample=2)

    def forward(
        self, tokens: Tensor, image: Tensor, token_code: Tensor, image_code: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.first:  # SAM: the first block's self-attention replaces the tokens and adds no position code
            tokens = self.self_attn(tokens, tokens, tokens, mask)
        else:
            coded = tokens + token_code
            tokens = tokens + self.self_attn(coded, coded, tokens, mask)
        tokens = self.norm1(tokens)
        coded = image + image_code
        asked = self.cross_attn_token_to_image.tokens_to_image(tokens + token_code, coded, image)
        tokens = self.norm2(tokens + asked)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.cross_attn_image_to_token.image_to_tokens(image, coded, tokens + token_code, tokens, mask)
        return tokens, self.norm4(image)


class TwoWayTransformer(nn.Module):
    """Two blocks, then a last look of the tokens at the image."""

    def __init__(self, width: int, heads: int, hidden: int, *, eps: float):
        super().__init__()
        self.layers = nn.ModuleList([TwoWayBlock(width, heads, hidden, eps=eps, first=i == 0) for i in range(2)])
        self.final_attn_token_to_image = Attention(width, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(width, eps=eps)

    def forward(
        self, tokens: Tensor, image: Tensor, image_code: Tensor, mask: Tensor | None, read: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Args: tokens (B, N, T, C); image (B, 1 or N, h w, C); image_code (h w, C); mask (B, N, T) bool; read: tokens
        that the heads will read, so the others need no last look.

        Returns: tokens (B, N, len(read), C) and image (B, N, h w, C).
        """
        token_code = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_code, image_code, mask)
        tokens, token_code = tokens[:, :, read], token_code[:, :, read]
        attended = self.final_attn_token_to_image.tokens_to_image(tokens + token_code, image + image_code, image)
        return self.norm_final_attn(tokens + attended), image


class MaskDecoder(nn.Module):
    """Prompt tokens and image embedding -> low-res mask logits and predicted IoUs.

    Args:
        width: C: 256 for SAM and the official five.
        norm_eps: eps of the transformer's layer norms: 1e-5 in SAM, 1e-6 in EfficientViT-SAM, whose model zoo sets the
            eps of every norm of the whole model (efficientvit/sam_model_zoo.py).
        mlp_hidden: hidden width of the transformer's MLPs: 2048 for the official five.
        heads: of every attention: 8 for the official five.
        iou_hidden: hidden width of the IoU head.
    """

    mask_tokens_count = 4  # one for single-mask output, three for multimask output
    iou_prediction_head: nn.Module

    def __init__(self, width: int, *, norm_eps: float, mlp_hidden: int = 2048, heads: int = 8, iou_hidden: int = 256):
        super().__init__()
        self.transformer = TwoWayTransformer(width, heads, mlp_hidden, eps=norm_eps)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(self.mask_tokens_count, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, stride=2),
            nn.LayerNorm(width // 4, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            [MLP(width, width, width // 8, 3) for _ in range(self.mask_tokens_count)]
        )
        self.iou_prediction_head = MLP(width, iou_hidden, self.mask_tokens_count, 3)

    def forward(
        self,
        embedding: Tensor,
        image_code: Tensor,
        sparse: Tensor,
        dense: Tensor,
        *,
        multimask_output: bool | None = True,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts masks for N prompts on each of B images.

        Args:
            embedding: (B, C, h, w) float, image embeddings.
            image_code: (C, h, w) float, position encoding of the cells.
            sparse: (B, N, T, C) float, prompt tokens.
            dense: (B, N, C, h, w) or (1, 1, C, 1, 1) float, mask prompts.
            multimask_output: three masks for an ambiguous prompt, or the single one; None for all four, the single
                one first.
            valid: (B, N, T) bool, False where a prompt token is padding of a ragged batch and must not be seen.

        Returns:
            low-res logits (B, N, K, 4h, 4w) and predicted IoU (B, N, K), K = 3, 1 or 4.
        """
        height, width = embedding.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(*sparse.shape[:2], -1, -1)
        tokens = torch.cat([own, sparse], dim=2)  # (B, N, 5 + T, C)
        mask = None if valid is None else F.pad(valid, (own.shape[2], 0), value=True)
        image = (embedding[:, None] + dense).flatten(-2).mT.contiguous()  # (B, 1 or N, h w, C)
        first = 1 if multimask_output else 0
        chosen = range(first, 1 if multimask_output is False else self.mask_tokens_count)
        read = [0, *(1 + i for i in chosen)]  # the IoU token and the chosen masks' tokens
        tokens, image = self.transformer(tokens, image, image_code.flatten(-2).mT.contiguous(), mask, read)
        heads = [self.output_hypernetworks_mlps[i] for i in chosen]
        kernels = torch.stack([head(tokens[:, :, 1 + i]) for i, head in enumerate(heads)], dim=2)
        iou = self.iou_prediction_head(tokens[:, :, 0])[..., chosen.start : chosen.stop]
        return self._masks(image, kernels, (height, width)), iou

    def _masks(self, image: Tensor, kernels: Tensor, grid: tuple[int, int]) -> Tensor:
        """image (B, N, h w, C), kernels (B, N, K, C / 8) -> logits (B, N, K, 4h, 4w)."""
        height, width = grid
        # A CPU works in strips that stay in its caches; a graph that is compiled, or kept for gradients, is whole.
        whole = image.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
        strips = image.split(height * width if whole else STRIP, dim=2)
        logits = torch.cat([self._upscaled(strip, kernels) for strip in strips], dim=2)
        cells = logits.flatten(0, 1).unflatten(1, (height, width, 2, 2, 2, 2))  # 8 axes: TensorRT has no more
        return cells.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(*kernels.shape[:3], 4 * height, 4 * width)

    def _upscaled(self, image: Tensor, kernels: Tensor) -> Tensor:
        """Some of the image's tokens (B, N, T, C) -> logits (B, N, 16 T, K)."""
        first, norm, act, second, _ = self.output_upscaling
        x = act(norm(_upscale_tokens(image, first)))  # (B, N, 4 T, C / 4)
        x = act(_upscale_tokens(x, second))  # (B, N, 16 T, C / 8)
        return x @ kernels.transpose(-1, -2)


def _upscale_tokens(x: Tensor, layer: nn.Module) -> Tensor:
    """A transposed 2x2 convolution of stride 2 on channels-last tokens: (..., T, C) -> (..., 4 T, C')."""
    assert isinstance(layer, nn.ConvTranspose2d) and layer.bias is not None
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * C', C)
    return F.linear(x, weight, layer.bias.repeat(4)).unflatten(-1, (4, layer.out_channels)).flatten(-3, -2)
