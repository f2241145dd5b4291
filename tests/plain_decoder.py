"""SAM's mask decoder in its textbook arrangement, over the modules of ours: the yardstick of what ours rearranges.

The image embedding is repeated for every prompt, each attention projects all tokens of both its sides, and masks are
upscaled by transposed convolutions. Tests hold the two arrangements equal, benchmarks compare their speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evsam_lib.models.mask_decoder import Attention, MaskDecoder
from evsam_lib.models.sam import Sam


def plain_decode(model: Sam, embedding: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Three masks for N prompts on one image.

    Args:
        model: of SAM's family.
        embedding: (1, C, h, w) float.
        coords: (N, T, 2) float, XY pixels of the prompt frame.
        labels: (N, T) int.

    Returns:
        low-res logits (N, 3, 4h, 4w) and predicted IoU (N, 3).
    """
    decoder: MaskDecoder = model.mask_decoder
    sparse, dense = model.prompt_encoder(coords[None], labels[None])
    count, (height, width) = len(coords), embedding.shape[-2:]
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own.expand(count, -1, -1), sparse[0]], dim=1)
    image = (embedding.repeat(count, 1, 1, 1) + dense[0]).flatten(2).transpose(1, 2)
    code = model.prompt_encoder.dense_position().repeat(count, 1, 1, 1).flatten(2).transpose(1, 2)
    tokens, image = _two_way(decoder.transformer, tokens, image, code)
    upscaling = decoder.output_upscaling
    x = upscaling[0](image.transpose(1, 2).reshape(count, -1, height, width))
    x = upscaling[2](upscaling[1](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    x = upscaling[4](upscaling[3](x))
    kernels = torch.stack([decoder.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in range(4)], dim=1)
    logits = (kernels @ x.flatten(2)).reshape(count, 4, *x.shape[-2:])
    return logits[:, 1:], decoder.iou_prediction_head(tokens[:, 0])[:, 1:]


def _two_way(transformer, tokens: Tensor, image: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    token_code = tokens
    for block in transformer.layers:
        if block.first:
            tokens = _attend(block.self_attn, tokens, tokens, tokens)
        else:
            asked = tokens + token_code
            tokens = tokens + _attend(block.self_attn, asked, asked, tokens)
        tokens = block.norm1(tokens)
        seen = _attend(block.cross_attn_token_to_image, tokens + token_code, image + code, image)
        tokens = block.norm2(tokens + seen)
        tokens = block.norm3(tokens + block.mlp(tokens))
        told = _attend(block.cross_attn_image_to_token, image + code, tokens + token_code, tokens)
        image = block.norm4(image + told)
    seen = _attend(transformer.final_attn_token_to_image, tokens + token_code, image + code, image)
    return transformer.norm_final_attn(tokens + seen), image


def _attend(layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (
        proj(x).unflatten(-1, (layer.heads, layer.head_dim)).transpose(1, 2)
        for proj, x in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v))
    )
    weights = F.softmax(q @ k.transpose(-1, -2) / layer.head_dim**0.5, dim=-1)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
