"""Exported models behind the interface of `Sam`, so that `Predictor(load_engine(folder))` works like any model.

An engine has what `Predictor` asks of a model and nothing else: `embed`, `decode`, `quality`, `upscale`, `to_frame` and
the prompt encoder's `tokens`. What runs the two graphs is a parameter: onnxruntime here, others in `engines.py`.
Notebook 06 uses it.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evsam_lib.data.transforms import LongestSide, check_image, resize_longest
from evsam_lib.deploy.card import Card, given_inputs, need
from evsam_lib.deploy.graphs import HIDDEN_LABEL
from evsam_lib.models.prompt_encoder import PADDING_LABEL, join_prompts, prompt_tokens
from evsam_lib.models.sam import Framed

__all__ = ["Graph", "OnnxSam", "load_engine"]


class Graph:
    """One exported file in onnxruntime.

    Args:
        path: of the file.
        threads: of one operation; None is torch's number.
        providers: of onnxruntime, in order of preference.

    Attributes:
        card: what the file says of itself.

    Raises:
        ValueError: the file is damaged, from elsewhere, or from another version of the study.
        ModuleNotFoundError: onnxruntime is not installed.
    """

    device = torch.device("cpu")

    def __init__(
        self, path: str | Path, *, threads: int | None = None, providers: tuple[str, ...] = ("CPUExecutionProvider",)
    ):
        need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads free the cores
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime has a dozen kinds of its own
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} does not load in onnxruntime {onnxruntime.__version__}: {reason}") from error
        self.card = Card.from_properties(self.session.get_modelmeta().custom_metadata_map, source=str(path))

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Runs the graph.

        Args:
            inputs: by name, as the card says; those of two floating-point types are converted.

        Raises:
            ValueError: inputs are missing or unknown.
        """
        arrays = given_inputs(self.card, inputs)
        names = [port.name for port in self.card.outputs]
        return dict(zip(names, map(torch.from_numpy, self.session.run(names, arrays)), strict=True))


class OnnxSam(Framed):
    """An encoder and a decoder graph with the methods of `Sam` that `Predictor` uses.

    Args:
        encoder: the graph, a `Graph` or whatever else has a `card`, a `device` and takes and returns tensors by name.
        decoder: the graph, of the same model and weights.

    Raises:
        ValueError: the two are of different models or weights.
    """

    dtype = torch.float32

    def __init__(self, encoder: Graph, decoder: Graph):
        card = decoder.card
        if card.state_sha256 != encoder.card.state_sha256:
            raise ValueError(
                f"Encoder ({encoder.card.model}) and decoder ({card.model}) are of different weights; export both anew."
            )
        self.encoder, self.decoder, self.device = encoder, decoder, encoder.device
        self.name, self.frame, self.best_by = card.model, card.frame, card.best_by
        self.image_size, self.frame_size = self.frame.image_size, self.frame.frame_size
        self.embed_dim, self.grid = card.embed_dim, card.grid

    @property
    def prompt_encoder(self) -> "OnnxSam":
        """Where `Predictor` looks for `tokens` and `dense_position`."""
        return self

    def tokens(self, points=None, labels=None, boxes=None) -> tuple[Tensor, Tensor]:
        """As `prompt_tokens`, or without a padding point where the model knows none."""
        return (prompt_tokens if self.decoder.card.padding_point else join_prompts)(points, labels, boxes)

    def dense_position(self) -> None:
        """Nothing: the graph has it inside."""

    def embed(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> its embedding (1, C, grid, grid).

        Raises:
            ValueError: the image is not uint8 RGB.
        """
        if self.encoder.card.uint8_input:
            return self.encoder(**pixel_inputs(image, self.frame))["embedding"]
        return self.encode(self.preprocess(image)[None])

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) as `preprocess` makes them -> image embedding (B, C, grid, grid).

        Raises:
            ValueError: the graph takes bytes; use `embed`.
        """
        return self.encoder(images=images)["embedding"]

    def decode(
        self,
        embedding: Tensor,
        coords: Tensor,
        labels: Tensor,
        *,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        valid: Tensor | None = None,
        image_code: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Sam.decode`; a graph exported with `select="best"` gives the best mask alone, K = 1.

        Raises:
            ValueError: the graph was exported without what is asked for.
        """
        card, count = self.decoder.card, coords.shape[1]
        if mask_input is not None and not card.mask_input:
            raise ValueError(f"The decoder of {self.name} was exported without mask prompts; export with --mask-input.")
        if card.select == "best" and not multimask_output:
            raise ValueError(f"The decoder of {self.name} gives the best of three; export with --select all for one.")
        labels = labels if valid is None else labels.masked_fill(~valid, HIDDEN_LABEL)
        if count == 0:
            side, masks = 4 * self.grid, 1 if card.select == "best" or not multimask_output else 3
            return coords.new_zeros(len(coords), 0, masks, side, side), coords.new_zeros(len(coords), 0, masks)
        coords, labels = fill_tokens(coords, labels, card)
        inputs = {"embedding": embedding, "coords": coords, "labels": labels}
        if card.mask_input:
            inputs["has_mask"] = torch.full((len(coords), count), mask_input is not None, device=coords.device)
            empty = coords.new_zeros(len(coords), count, 1, 4 * self.grid, 4 * self.grid)
            inputs["mask_input"] = empty if mask_input is None else mask_input
        if card.upsample:  # that is the caller's affair here, as small as can be
            inputs["original_size"] = torch.tensor([2, 2])
        outputs = self.decoder(**inputs)
        kept = slice(None) if card.select == "best" else slice(1, None) if multimask_output else slice(1)
        return outputs["low_res"][:, :, kept], outputs["iou"][:, :, kept]


def load_engine(folder: str | Path, *, threads: int | None = None) -> OnnxSam:
    """The encoder and decoder that `evsam_lib.deploy.onnx export` wrote, ready for `Predictor`.

    Args:
        folder: of the files.
        threads: of one operation; None is torch's number.

    Raises:
        FileNotFoundError: a graph is missing.
        ValueError: a file is damaged, from elsewhere, from another version, or the two do not belong together.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    paths = [Path(folder) / f"{part}.onnx" for part in ("encoder", "decoder")]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"No {' and no '.join(missing)} in {folder}; write both by `python -m evsam_lib.deploy.onnx export MODEL "
            f"--weights WEIGHTS --out {folder}`."
        )
    return OnnxSam(*(Graph(path, threads=threads) for path in paths))


def pixel_inputs(image: np.ndarray, frame) -> dict[str, Tensor]:
    """(H, W, 3) uint8 RGB -> what a graph with `uint8_input` takes, a batch of one.

    Raises:
        ValueError: the image is not uint8 RGB.
    """
    check_image(image)
    if not isinstance(frame, LongestSide):
        return {"images": torch.from_numpy(np.array(image))[None]}
    small = torch.from_numpy(np.array(resize_longest(image, frame.image_size)))  # (h, w, 3)
    height, width = small.shape[:2]
    padded = torch.zeros(1, frame.image_size, frame.image_size, 3, dtype=torch.uint8)
    padded[0, :height, :width] = small
    return {"images": padded, "sizes": torch.tensor([[height, width]])}


def fill_tokens(coords: Tensor, labels: Tensor, card: Card) -> tuple[Tensor, Tensor]:
    """Tokens that are nobody's: all free slots of EfficientSAM, or one where a mask is the whole prompt."""
    if card.slots and labels.shape[-1] > card.slots:
        raise ValueError(f"{card.model} has {card.slots} slots for a prompt, got {labels.shape[-1]} tokens.")
    empty = (card.slots or max(labels.shape[-1], 1)) - labels.shape[-1]
    code = PADDING_LABEL if card.slots else HIDDEN_LABEL
    pad = torch.nn.functional.pad
    return pad(coords.float(), (0, 0, 0, empty)), pad(labels.long(), (0, empty), value=code)
