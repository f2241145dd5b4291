"""What an export in lower precision is judged by: generated scenes with prompts, and how far masks and numbers move.

The embedding (or the logits) is compared as a whole, and the masks that come of it pixel by pixel, each on the worst
image. Notebook 06 prints both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from evsam_lib.data.generate import Scene, scene
from evsam_lib.deploy.card import Card, need
from evsam_lib.deploy.runtime import fill_tokens, pixel_inputs
from evsam_lib.models.sam import Sam
from evsam_lib.prompts import mask_box

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Bounds:
    """How far half precision may be from float32, on every image.

    Attributes:
        relative: |difference| / |float32|, Euclidean, of the embedding or the logits.
        masks: share of the pixels of both masks together that belong to one only (1 - IoU, over all prompts).
    """

    relative: float = 0.01
    masks: float = 0.02


@dataclass(frozen=True)
class Deviation:
    """How far it is; NaN and infinity count as infinitely far. Attributes as those of `Bounds`."""

    relative: float
    masks: float

    def excess(self, bounds: Bounds) -> float:
        """1 at the bound."""
        return max(self.relative / bounds.relative, self.masks / bounds.masks)


# ---------------------------------------------------------------- how far off


class Judge:
    """Compares what a graph gives with what float32 gives, on the same images.

    Args:
        card: of the graph.
        model: that decodes masks from an encoder's embedding.
        feeds: of `calibration`.
        expected: the first output of every image in float32.
    """

    def __init__(self, card: Card, model: Sam, feeds: Sequence[Feed], expected: Sequence[np.ndarray]):
        self.card, self.model, self.feeds, self.expected = card, model, list(feeds), list(expected)
        self.masks = [self._masks(feed, value) for feed, value in zip(self.feeds, self.expected, strict=True)]

    def __call__(self, model: ModelProto | bytes) -> Deviation:
        """Runs a float32 or emulated graph; the worst image counts."""
        return self.compare(run(model, self.feeds))

    def compare(self, found: Sequence[np.ndarray]) -> Deviation:
        """The same for results that are there already: the first output of every image."""
        errors, shares = [], []
        for feed, value, expected, masks in zip(self.feeds, found, self.expected, self.masks, strict=True):
            errors.append(relative_error(expected, value))
            shares.append(disagreement(masks, self._masks(feed, value)) if np.isfinite(value).all() else np.inf)
        return Deviation(max(errors), max(shares))

    @torch.inference_mode()
    def _masks(self, feed: Feed, value: np.ndarray) -> np.ndarray:
        if self.card.part != "encoder":
            return value > 0
        coords, labels = torch.from_numpy(feed["coords"]), torch.from_numpy(feed["labels"])
        low_res, _ = self.model.decode(torch.from_numpy(value), coords, labels)
        return (low_res > 0).numpy()


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """|difference| / |expected|, Euclidean; infinity if anything found is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), 1e-30))


def disagreement(one: np.ndarray, other: np.ndarray) -> float:
    """1 - IoU of two sets of masks, all pixels together; 0 where both are empty."""
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one ^ other) / union) if union else 0.0


# ---------------------------------------------------------------- images and prompts


def calibration(card: Card, model: Sam, *, images: int = 4, seed: int = 1000) -> list[Feed]:
    """What a graph takes, made of generated scenes: an image each, prompted by a point in and a box around objects.

    Args:
        card: of the graph.
        model: whose encoder makes the embedding that a decoder takes.
        images: how many.
        seed: of the scenes.
    """
    return [_feed(card, model, seed, index) for index in range(images)]


def calibration_scene(model: Sam, seed: int, index: int) -> Scene:
    """The scene behind a feed of `calibration`: landscape and portrait in turn, half the prompt frame on a side."""
    height, width = ((3, 4), (4, 3))[index % 2]
    unit = model.frame_size // 8
    return scene(seed, index, size=(height * unit, width * unit))


def _feed(card: Card, model: Sam, seed: int, index: int) -> Feed:
    sample = calibration_scene(model, seed, index)
    coords, labels = fill_tokens(*_prompts(model, sample.masks), card)
    with torch.inference_mode():
        pixels = model.preprocess(sample.image)[None]
        values = {"images": pixels, "coords": coords, "labels": labels}
        names = {port.name for port in card.inputs}
        if "images" in names and card.uint8_input:
            values |= pixel_inputs(sample.image, model.frame)
        if "embedding" in names:
            values["embedding"] = model.encode(pixels)
    side = 4 * model.grid
    values["mask_input"] = torch.zeros(*labels.shape[:2], 1, side, side)
    values["has_mask"] = torch.zeros(labels.shape[:2], dtype=torch.bool)
    values["original_size"] = torch.tensor(sample.image.shape[:2])
    prompts = ("images", "coords", "labels") if card.part == "encoder" else ()  # for the judge
    return {name: values[name].numpy() for name in names | {f for f in prompts if f in values}}


def _prompts(model: Sam, masks: np.ndarray, most: int = 4) -> tuple[Tensor, Tensor]:
    """Up to four objects, largest first: a point in the middle row of each, and a box around it, as a prompt each."""
    order = np.argsort(-masks.sum(axis=(1, 2)))[:most]
    coords, labels = [], []
    for mask in masks[order]:
        rows, columns = np.nonzero(mask)
        row = rows[len(rows) // 2]
        inside = columns[rows == row]
        point = (float(inside[len(inside) // 2]), float(row))
        coords += [[point, (0.0, 0.0)], mask_box(mask).reshape(2, 2).tolist()]
        labels += [[1, -1], [2, 3]]
    coords = model.to_frame(np.array(coords), masks.shape[1:])
    return coords[None], torch.tensor(labels)[None]


# ---------------------------------------------------------------- running


def open_session(model: ModelProto | bytes):
    """onnxruntime on the CPU; it leaves explicit roundings where they are."""
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ModelProto | bytes, feeds: Sequence[Feed]) -> list[np.ndarray]:
    """The first output for every feed."""
    session = open_session(model)
    return [run_session(session, feed)[0] for feed in feeds]


def run_session(session, feed: Feed, outputs: list[str] | None = None) -> list[np.ndarray]:
    """Outputs of a session, all by default; of the feed, what the session does not take is left out."""
    return session.run(outputs, {value.name: feed[value.name] for value in session.get_inputs()})
