"""What is exported: the model's parts with plain tensors in and out, and everything callers get wrong done inside.

The encoder can take bytes and normalise them; the decoder adds SAM's padding point by itself, can choose the best mask
and bring masks to the image's size. The modules run in PyTorch too, which is what exported graphs are held to.
Notebook 06 exports them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.data.transforms import IMAGENET_MEAN, IMAGENET_STD, PIXEL_MEAN, PIXEL_STD, Frame, LongestSide, Stretch
from evsam_lib.deploy.card import Port
from evsam_lib.models.efficient_sam import SLOTS, EfficientSam
from evsam_lib.models.prompt_encoder import PADDING_LABEL, PromptEncoder
from evsam_lib.models.sam import Sam

PARTS = ("encoder", "decoder", "pipeline")
SELECT = ("all", "best")
HIDDEN_LABEL = -2  # of a token that is not there, in a batch whose prompts have different lengths


class EncoderGraph(nn.Module):
    """Images -> embeddings.

    Args:
        model: whose image encoder.
        uint8_input: images come as bytes and are normalised, and their padding blanked, inside.
    """

    slots = 0
    pixels: "PaddedPixels | StretchedPixels | None"
    inputs: tuple[Port, ...]

    def __init__(self, model: Sam, *, uint8_input: bool = False):
        super().__init__()
        self.image_encoder = model.image_encoder
        frame, self.pixels = model.frame, None
        if uint8_input:
            self.pixels = PaddedPixels(frame) if isinstance(frame, LongestSide) else StretchedPixels(frame)
        self.inputs = (image_port(model),) if self.pixels is None else self.pixels.inputs
        self.outputs = (embedding_port(model),)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Args: images and sizes as `inputs` says. Returns: (B, C, grid, grid) float32."""
        if self.pixels is not None:
            images = self.pixels(images) if sizes is None else self.pixels(images, sizes)
        return self.image_encoder(images)


class PaddedPixels(nn.Module):
    """Bytes, resized and padded, -> the encoder's input. Padding has to be zero after normalisation, hence `sizes`."""

    mean: Tensor
    std: Tensor

    def __init__(self, frame: LongestSide):
        super().__init__()
        mean, std = (torch.tensor([v / frame.pixel_scale for v in values]) for values in (PIXEL_MEAN, PIXEL_STD))
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])
        self.scale = frame.pixel_scale
        side = frame.image_size
        self.inputs = (
            Port("images", ("batch", side, side, 3), "uint8", f"RGB, longest side resized to {side}, padded anyhow"),
            Port("sizes", ("batch", 2), "int64", "height and width of each resized image; the rest is padding"),
        )

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 and (B, 2) int64 -> (B, 3, S, S) float32."""
        pixels = (images.float().permute(0, 3, 1, 2) / self.scale - self.mean) / self.std
        place = torch.arange(images.shape[1], device=images.device)
        rows, columns = place < sizes[:, :1], place < sizes[:, 1:]  # (B, S) each
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], pixels, 0.0)


class StretchedPixels(nn.Module):
    """Bytes at their own size -> EfficientSAM's input, whose resize works on floats and so belongs inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, frame: Stretch):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        self.size = (frame.image_size, frame.image_size)
        self.inputs = (Port("images", ("batch", "height", "width", 3), "uint8", "RGB at its own size"),)

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, S, S) float32."""
        pixels = images.float().permute(0, 3, 1, 2) / 255  # TensorRT moves no bytes
        return (F.interpolate(pixels, self.size, mode="bilinear", align_corners=False) - self.mean) / self.std


class DecoderGraph(nn.Module):
    """Embeddings and prompts -> masks.

    Args:
        model: whose prompt encoder and mask decoder.
        select: "all" four masks of a prompt, the one for single-mask output first; or the "best" of the last three.
        mask_input: prompts may hold a mask, which makes every prompt's image its own from the start, hence slower.
        upsample: masks come out at the original size too.

    Raises:
        ValueError: the model has no mask prompts.
    """

    image_code: Tensor
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __init__(self, model: Sam, *, select: str = "all", mask_input: bool = False, upsample: bool = False):
        super().__init__()
        self.slots = SLOTS if isinstance(model, EfficientSam) else 0
        if mask_input and self.slots:
            raise ValueError(f"{model.name} has no mask prompts; export it without a mask input.")
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self.frame, self.quality, self.best = model.frame, model.quality, select == "best"
        self.register_buffer("image_code", model.prompt_encoder.dense_position().detach())
        self.inputs = (embedding_port(model), *prompt_ports(model, self.slots))
        self.inputs += mask_ports(model) if mask_input else ()
        self.inputs += (_SIZE,) if upsample else ()
        masks, side = 1 if self.best else 4, 4 * model.grid
        which = "the best mask" if self.best else "the mask for single-mask output, then three for multimask output"
        self.outputs = (
            Port("low_res", ("batch", "prompts", masks, side, side), "float32", f"logits of {which}"),
            Port("iou", ("batch", "prompts", masks), "float32", "predicted IoU of these"),
        )
        if upsample:
            meaning = "logits at the original size; above 0 is the mask"
            self.outputs += (Port("masks", ("batch", "prompts", masks, "height", "width"), "float32", meaning),)

    def forward(
        self,
        embedding: Tensor,
        coords: Tensor,
        labels: Tensor,
        mask_input: Tensor | None = None,
        has_mask: Tensor | None = None,
        original_size: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Args: as `inputs` says. Returns: as `outputs` says."""
        valid = None
        if not self.slots:  # an EfficientSAM prompt has empty slots instead
            coords, labels = with_padding_point(coords, labels)
            valid = labels != HIDDEN_LABEL
        sparse, dense = self.prompt_encoder(coords, labels.clamp(min=PADDING_LABEL), mask_input)
        if has_mask is not None:
            assert isinstance(self.prompt_encoder, PromptEncoder)  # the others take no mask
            no_mask = self.prompt_encoder.no_mask_embed.weight[0, :, None, None]
            dense = torch.where(has_mask[..., None, None, None], dense, no_mask)
        multimask = True if self.best else None
        low_res, iou = self.mask_decoder(
            embedding, self.image_code, sparse, dense, multimask_output=multimask, valid=valid
        )
        if self.best:
            low_res, iou = _take(self.quality(low_res, iou).argmax(dim=2), low_res, iou)
        return (low_res, iou) if original_size is None else (low_res, iou, upscale(self.frame, low_res, original_size))


class PipelineGraph(nn.Module):
    """Images and prompts -> masks: encoder and decoder in one."""

    def __init__(self, encoder: EncoderGraph, decoder: DecoderGraph):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.inputs = encoder.inputs + decoder.inputs[1:]
        self.outputs = decoder.outputs
        self.slots = decoder.slots

    def forward(
        self,
        images: Tensor,
        coords: Tensor,
        labels: Tensor,
        sizes: Tensor | None = None,
        mask_input: Tensor | None = None,
        has_mask: Tensor | None = None,
        original_size: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Args: as `inputs` says. Returns: as `outputs` says."""
        return self.decoder(self.encoder(images, sizes), coords, labels, mask_input, has_mask, original_size)


AnyGraph = EncoderGraph | DecoderGraph | PipelineGraph


def build_graph(part: str, model: Sam, *, uint8_input: bool = False, **decoding) -> AnyGraph:
    """The module of one part; the arguments are those of `EncoderGraph` and `DecoderGraph`."""
    if part == "encoder":
        return EncoderGraph(model, uint8_input=uint8_input).eval()
    decoder = DecoderGraph(model, **decoding).eval()
    return decoder if part == "decoder" else PipelineGraph(EncoderGraph(model, uint8_input=uint8_input), decoder).eval()


def with_padding_point(coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the padding point that SAM gives every prompt of points without a box, and that demos of others forget.

    Every prompt grows by one token, hidden where it holds a box, a padding point already, or no point at all.

    Args:
        coords: (B, N, T, 2) float.
        labels: (B, N, T) int, as `prompt_ports` says.

    Returns:
        (B, N, T + 1, 2) and (B, N, T + 1).
    """
    highest = labels.amax(dim=-1, keepdim=True)
    needed = (highest >= 0) & (highest <= 1) & (labels != PADDING_LABEL).all(dim=-1, keepdim=True)
    added = torch.where(needed, PADDING_LABEL, HIDDEN_LABEL)
    return torch.cat([coords, torch.zeros_like(coords[..., :1, :])], dim=-2), torch.cat([labels, added], dim=-1)


def upscale(frame: Frame, low_res: Tensor, original_size: Tensor) -> Tensor:
    """`frame.upscale` with the size in a tensor, as a graph needs it.

    Args:
        frame: of the model.
        low_res: (B, N, K, h, w) float.
        original_size: (2,) int64, height and width.

    Returns:
        (B, N, K, H, W) float32.
    """
    height: Any = original_size[0].item()  # an int, and while a graph is traced the symbol of one
    width: Any = original_size[1].item()
    longest = torch.sym_max(height, width)
    for length in (height, width):
        torch._check(length > 1)  # for the exporter only, which must not take 1 for a special case
    logits = low_res.flatten(0, 1).float()
    if isinstance(frame, LongestSide):
        side = frame.frame_size
        rows, columns = ((2 * length * side + longest) // (2 * longest) for length in (height, width))  # rounded
        for length in (rows, columns):
            torch._check(length > 1)
            torch._check(length <= side)
        logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
        logits = F.interpolate(logits[..., :rows, :columns], (height, width), mode="bilinear", align_corners=False)
    else:
        logits = F.interpolate(logits, (height, width), mode="bicubic", align_corners=False)
    return logits.unflatten(0, low_res.shape[:2])


def _take(best: Tensor, low_res: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """best (B, N) -> low_res (B, N, 1, h, w) and iou (B, N, 1): rows of a flat list, which is one Gather each."""
    masks = iou.shape[2]
    rows = torch.arange(best.shape[0] * best.shape[1], device=best.device) * masks + best.flatten()
    chosen = low_res.flatten(0, 2).index_select(0, rows).unflatten(0, best.shape)
    return chosen[:, :, None], iou.flatten().index_select(0, rows).unflatten(0, best.shape)[:, :, None]


# ---------------------------------------------------------------- what goes in and out

_SIZE = Port("original_size", (2,), "int64", "height and width of the image, each at least 2")


def image_port(model: Sam) -> Port:
    """Images as `Sam.preprocess` makes them."""
    side = model.image_size
    return Port("images", ("batch", 3, side, side), "float32", "RGB, resized, normalised, then padded with zeros")


def embedding_port(model: Sam) -> Port:
    """The image embedding."""
    return Port("embedding", ("batch", model.embed_dim, model.grid, model.grid), "float32", "image embedding")


def prompt_ports(model: Sam, slots: int) -> tuple[Port, Port]:
    """Points and boxes as tokens."""
    frame = f"XY pixels of the prompt frame ({model.frame_size} on its longest side)"
    if slots:
        frame, rest = f"XY pixels of the {model.frame_size} x {model.frame_size} prompt frame", "-1 an empty slot"
    else:
        rest = "-1 SAM's padding point (added if it is not given), -2 a token that is not there"
    meaning = f"1 object, 0 not the object, 2 and 3 a box's top left and bottom right corner, {rest}"
    points = slots or "points"
    return (
        Port("coords", ("batch", "prompts", points, 2), "float32", frame),
        Port("labels", ("batch", "prompts", points), "int64", meaning),
    )


def mask_ports(model: Sam) -> tuple[Port, Port]:
    """The mask of an earlier prediction, and which prompts have one."""
    side = 4 * model.grid
    return (
        Port("mask_input", ("batch", "prompts", 1, side, side), "float32", "low-res logits of an earlier prediction"),
        Port("has_mask", ("batch", "prompts"), "bool", "where false, mask_input is not looked at"),
    )
