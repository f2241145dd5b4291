"""Exported graphs held to PyTorch: generated scenes, every kind of prompt, one comparison a row.

PyTorch gets the complete prompts, the graphs get them without the padding point, which they have to add themselves.
Notebook 06 prints the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evsam_lib.data.generate import scene
from evsam_lib.deploy.card import Card, fingerprint
from evsam_lib.deploy.graphs import PARTS, build_graph
from evsam_lib.deploy.judge import Judge, calibration
from evsam_lib.deploy.runtime import Graph, fill_tokens, pixel_inputs
from evsam_lib.models.prompt_encoder import join_prompts
from evsam_lib.models.sam import Sam

TOLERANCE = 1e-4  # fp32
RELATIVE = 1e-5  # of the largest value, where that is more: PyTorch's own threads differ by 1e-6
# Resized masks: a float32 coordinate is good to 1e-4 of a pixel. On noise of up to 10, PyTorch and onnxruntime are each
# 2e-4 from the result in float64, and 3e-4 from each other.
RELATIVE_RESIZED = 1e-4
HELD_OUT = 2000  # seed of scenes that no precision was chosen on
TIE = 1e-3  # masks whose qualities are closer may be chosen either way
SIZES = ((150, 225), (201, 134))  # height and width of the scenes: landscape and portrait


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        part: of the model.
        case: what went in.
        output: what is compared.
        error: largest absolute difference.
        bound: what it may be.
    """

    part: str
    case: str
    output: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Within the bound; NaN never is."""
        return self.error <= self.bound


@torch.inference_mode()
def verify(folder: str | Path, *, weights: str | Path | None = None, model: Sam | None = None) -> list[Row]:
    """Compares every graph of a folder with PyTorch.

    Args:
        folder: that `export` wrote to.
        weights: the weight file, where the export was given a path.
        model: the model itself, instead of the zoo's with `weights`.

    Raises:
        FileNotFoundError: the folder has no graph, or the weights are not there.
        ValueError: these are not the weights that were exported.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    paths = [path for part in PARTS if (path := Path(folder) / f"{part}.onnx").is_file()]
    if not paths:
        raise FileNotFoundError(f"No {', '.join(f'{part}.onnx' for part in PARTS)} in {folder}; export them first.")
    rows = []
    for path in paths:
        graph = Graph(path)
        model = _model(graph.card, weights) if model is None else model
        if fingerprint(model) != graph.card.state_sha256:
            raise ValueError(f"{path} has other weights than the {model.name} it is compared with; export it again.")
        if graph.card.precision != "fp32":
            rows += _narrow_rows(path, graph.card, model)
            continue
        compare = {"encoder": _encoder_rows, "decoder": _decoder_rows, "pipeline": _pipeline_rows}[graph.card.part]
        rows += compare(graph, model)
    return rows


def _model(card: Card, weights: str | Path | None) -> Sam:
    from evsam_lib.deploy.onnx import load_weights

    source = weights or card.weights
    if source not in ("mini", "official", "random") and weights is None:
        raise ValueError(f"These graphs were made from {source or 'weights of no name'}; name the file by --weights.")
    return load_weights(card.model, source)[0]


def _narrow_rows(path: Path, card: Card, model: Sam) -> Iterator[Row]:
    """Lower precision on other scenes than it was made with; fp16 with every rounding written out."""
    from evsam_lib.deploy.narrow import BOUNDS, as_computed

    feeds = calibration(card, model, seed=HELD_OUT)
    options = (
        {name: getattr(card, name) for name in ("select", "mask_input", "upsample")} if card.part != "encoder" else {}
    )
    module = build_graph(card.part, model, uint8_input=card.uint8_input, **options)
    names = [port.name for port in card.inputs]
    found = [module(**{name: torch.from_numpy(feed[name]) for name in names}) for feed in feeds]
    expected = [(value if isinstance(value, Tensor) else value[0]).numpy() for value in found]
    deviation, bounds = Judge(card, model, feeds, expected)(as_computed(path, card)), BOUNDS[card.precision]
    case = f"{len(feeds)} scenes, {card.precision}"
    yield Row(card.part, case, f"{card.outputs[0].name}, relative", deviation.relative, bounds.relative)
    yield Row(card.part, case, "pixels of masks, share", deviation.masks, bounds.masks)


def _encoder_rows(graph: Graph, model: Sam) -> Iterator[Row]:
    inputs, pixels = _images(graph.card, model)
    expected = model.encode(pixels)
    yield _row("encoder", f"{len(pixels)} images", "embedding", graph(**inputs)["embedding"], expected)
    one = graph(**{name: value[:1] for name, value in inputs.items()})["embedding"]
    yield _row("encoder", "1 image", "embedding", one, expected[:1])


def _decoder_rows(graph: Graph, model: Sam) -> Iterator[Row]:
    shape = (2, model.embed_dim, model.grid, model.grid)
    embedding = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    yield from _mask_rows(graph, model, {"embedding": embedding}, embedding, list(_prompts(model, 2)))


def _pipeline_rows(graph: Graph, model: Sam) -> Iterator[Row]:
    inputs, pixels = _images(graph.card, model)
    prompts = list(_prompts(model, len(pixels)))
    yield from _mask_rows(graph, model, inputs, model.encode(pixels), prompts[:1] + prompts[-1:])


def _mask_rows(graph: Graph, model: Sam, inputs: dict, embedding: Tensor, prompts: list) -> Iterator[Row]:
    """A row for every output and kind of prompt; with and without a mask where the graph takes one."""
    card = graph.card
    for case, (points, labels, boxes) in prompts:
        tokens = model.prompt_encoder.tokens(points, labels, boxes)
        coords, codes = fill_tokens(*join_prompts(points, labels, boxes), card)
        masks = torch.randn(*codes.shape[:2], 1, 4 * model.grid, 4 * model.grid, generator=_seed(1))
        for with_mask in (False, True) if card.mask_input else (False,):
            more = {"mask_input": masks, "has_mask": torch.full(codes.shape[:2], with_mask)} if card.mask_input else {}
            if card.upsample:
                more["original_size"] = torch.tensor(SIZES[0])
            found = graph(**inputs, coords=coords, labels=codes, **more)
            expected = _expected(model, card, embedding, tokens, masks if with_mask else None, found)
            for output, value in expected.items():
                yield _row(card.part, case + (", mask" if with_mask else ""), output, found[output], value)


def _expected(model: Sam, card: Card, embedding: Tensor, tokens, masks: Tensor | None, found) -> dict[str, Tensor]:
    """What PyTorch gives; of masks equally good, the one that the graph is nearest to."""
    low_res, iou = model.decode(embedding, *tokens, mask_input=masks)
    if card.select == "best":
        quality = model.quality(low_res, iou)
        good = quality >= quality.amax(dim=2, keepdim=True) - TIE
        distance = (low_res - found["low_res"]).abs().amax(dim=(-2, -1)).masked_fill(~good, float("inf"))
        best = distance.argmin(dim=2, keepdim=True)
        low_res, iou = low_res.take_along_dim(best[..., None, None], dim=2), iou.take_along_dim(best, dim=2)
    else:
        single, score = model.decode(embedding, *tokens, mask_input=masks, multimask_output=False)
        low_res, iou = torch.cat([single, low_res], dim=2), torch.cat([score, iou], dim=2)
    expected = {"low_res": low_res, "iou": iou}
    if card.upsample:
        expected["masks"] = torch.stack([model.upscale(logits, SIZES[0]) for logits in low_res])
    return expected


def _images(card: Card, model: Sam) -> tuple[dict[str, Tensor], Tensor]:
    """Two scenes as the graph takes them, and as PyTorch does."""
    stretched = card.uint8_input and "sizes" not in {port.name for port in card.inputs}
    sizes = (SIZES[0],) * 2 if stretched else SIZES  # images at their own size have to be alike in a batch
    images = [scene(0, i, size=size).image for i, size in enumerate(sizes)]
    pixels = torch.stack([model.preprocess(image) for image in images])
    if not card.uint8_input:
        return {"images": pixels}, pixels
    parts = [pixel_inputs(image, model.frame) for image in images]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, pixels


def _prompts(model: Sam, images: int) -> Iterator[tuple[str, tuple]]:
    """Name, and points, labels and boxes in the prompt frame."""

    def places(*shape: int) -> Tensor:
        return model.frame_size * torch.rand(images, *shape, generator=_seed(sum(shape)))

    corners = places(3, 2, 2)
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1)  # (B, 3, 4)
    labels = torch.tensor([1, 0, 1, 1]).expand(images, 3, 4)
    yield "3 x 4 points", (places(3, 4, 2), labels, None)
    yield "1 x 1 point", (places(1, 1, 2), labels[:, :1, :1], None)
    yield "3 x box", (None, None, boxes)
    yield "3 x box and 2 points", (places(3, 2, 2), labels[:, :, :2], boxes)


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _row(part: str, case: str, output: str, found: Tensor, expected: Tensor) -> Row:
    error = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    relative = RELATIVE_RESIZED if output == "masks" else RELATIVE
    return Row(part, case, output, error, max(TOLERANCE, relative * expected.abs().max().item()))
