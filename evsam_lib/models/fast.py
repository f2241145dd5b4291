"""The same model, faster in PyTorch: batch norms folded away, channels last, bf16, compiled (Table 1 is about speed).

Only the image encoder changes, where nearly all of the work of an image is. The decoder already does what can be done
without changing a number: no projection of the image is ever computed, and what all prompts share is computed once
(`mask_decoder.py`); the best mask is chosen before it is enlarged (`predict.py`). Notebook 07 measures all of it.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evsam_lib.models.peers import OfficialNames
from evsam_lib.models.sam import Sam

__all__ = ["FastEncoder", "compiled", "fold", "fused", "with_encoder"]


class FastEncoder(nn.Module):
    """An image encoder in a precision and memory format of its own; images and embeddings keep theirs.

    Args:
        encoder: (B, 3, S, S) -> (B, C, grid, grid), in evaluation mode.
        dtype: it works in.
    """

    def __init__(self, encoder: nn.Module, *, dtype: torch.dtype):
        super().__init__()
        # pyrefly: ignore[no-matching-overload]: torch's overloads of Module.to leave memory_format out
        self.encoder = encoder.to(dtype=dtype, memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, grid, grid), both in the type of `images`."""
        pixels = images.to(self.dtype, memory_format=torch.channels_last)
        return self.encoder(pixels).to(images.dtype, memory_format=torch.contiguous_format)


def fused(model: Sam, *, dtype: torch.dtype = torch.float32) -> Sam:
    """An equal model whose image encoder has its batch norms folded into the convolutions, in channels-last memory.

    The given model is left as it is; prompt encoder and mask decoder are shared with it. The new one cannot be trained,
    and the names in its state dict are no longer the official ones: save the old one.

    Args:
        model: in evaluation mode.
        dtype: of the encoder: float32 (relative error below 1e-5), bfloat16 (about 5e-3) or float16. The decoder keeps
            its own, because a prompt's coordinates need float32.

    Returns:
        The model, on the same device.

    Raises:
        ValueError: the model is in training mode, whose batch norms are no fixed function.
    """
    if model.training:
        raise ValueError(f"{model.name} is in training mode; folding needs model.eval().")
    encoder = fold(copy.deepcopy(model.image_encoder))
    if isinstance(encoder, OfficialNames):
        encoder.official_names = {}  # what folding leaves has none
    return with_encoder(model, FastEncoder(encoder, dtype=dtype).requires_grad_(False))


def compiled(model: Sam) -> Sam:
    """An equal model whose image encoder runs through `torch.compile`; each batch size compiles at its first call.

    On a CPU the weights are frozen into the code. On a GPU kernels are chosen by measurement and run as one CUDA graph.

    Args:
        model: such as `fused` makes it.
    """
    if model.device.type == "cpu":
        encoder = torch.compile(model.image_encoder, dynamic=False, fullgraph=True, options={"freezing": True})
    else:  # brings CUDA graphs with it
        encoder = torch.compile(model.image_encoder, dynamic=False, fullgraph=True, mode="max-autotune")
    return with_encoder(model, _OwnOutput(encoder))


def with_encoder(model: Sam, encoder: nn.Module) -> Sam:
    """The model with another image encoder, its other parts shared with the given one, which is left as it is."""
    other = copy.copy(model)
    other._modules = {**model._modules, "image_encoder": encoder}
    return other


def fold(module: nn.Module) -> nn.Module:
    """Folds every batch norm that follows a convolution into it, in place; in evaluation mode the function is the same.

    Knows a convolution and its norm as neighbours in a module's list of children, which is how EfficientViT, TinyViT
    and RepViT have them, and timm's re-parametrisable blocks, which fold themselves.
    """
    own_way = getattr(module, "fuse", None)
    if own_way is not None and any(isinstance(child, nn.BatchNorm2d) for child in module.modules()):
        return own_way()
    before = None  # name of the convolution that comes right before
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None:
            setattr(module, before, fuse_conv_bn_eval(getattr(module, before), child))
            setattr(module, name, nn.Identity())
        elif not isinstance(child, nn.Conv2d):
            setattr(module, name, fold(child))
        before = name if isinstance(child, nn.Conv2d) else None
    return module


class _OwnOutput(nn.Module):
    """Copies what a CUDA graph returns: its next run writes to the same memory."""

    def __init__(self, encoder: Callable[[Tensor], Tensor]):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        embedding = self.encoder(images)
        return embedding.clone() if embedding.is_cuda else embedding
