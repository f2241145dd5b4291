"""An exported graph made narrow: fp16 with float32 islands, or int8 convolutions. Notebook 06 holds both to float32."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import ModelProto

from evsam_lib.deploy.card import Card
from evsam_lib.deploy.half import FloatGraph, emulated
from evsam_lib.deploy.judge import Bounds, Judge, calibration, run
from evsam_lib.deploy.precision import choose_islands
from evsam_lib.models.sam import Sam

# int8 is not chosen layer by layer: its bounds catch a broken file, they do not promise anything.
BOUNDS = {"fp16": Bounds(), "int8": Bounds(relative=0.2, masks=0.3)}
INT8_IMAGES = 8  # scenes that the ranges are measured on


def narrow(path: Path, card: Card, model: Sam, *, say: Callable[[str], object] = lambda line: None) -> Card:
    """Rewrites a float32 file in the precision its card names, the layers kept in float32 written into the card.

    Args:
        path: of the file.
        card: of the file.
        model: whose weights it holds.
        say: takes lines of progress.

    Raises:
        ValueError: the graph is too large to be measured, or no islands keep the bounds.
    """
    if sum(file.stat().st_size for file in path.parent.iterdir()) > onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(f"{card.model} is larger than 2 GB, which onnxruntime does not read from memory; take fp32.")
    if card.precision == "int8":
        _quantise(path, calibration(card, model, images=INT8_IMAGES))
        return card
    graph = FloatGraph(onnx.load(path))
    feeds = calibration(card, model)
    judge = Judge(card, model, feeds, run(graph.model, feeds))
    choice = choose_islands(graph, judge, bounds=BOUNDS["fp16"], say=say)
    card = replace(card, fp32_layers=choice.islands)
    save_half(graph, card, path)
    return card


def save_half(graph: FloatGraph, card: Card, path: Path) -> None:
    """Writes a graph in the card's precision with the card's islands."""
    model = graph.halved(card.precision, card.fp32_layers)
    onnx.helper.set_model_props(model, card.to_properties())
    onnx.save(model, path)


def as_computed(path: Path, card: Card) -> ModelProto | bytes:
    """What a CPU runs to give what the file means: onnxruntime would compute fp16 in float32 (see `half`)."""
    return emulated(onnx.load(path)) if card.precision == "fp16" else path.read_bytes()


def _quantise(path: Path, feeds: list[dict]) -> None:
    """Convolutions in int8, a scale for each output channel; ranges without the outermost 0.001 % of the values.

    Activations have zero points, for CPUs: the scales around zero that TensorRT takes cost half as much error again.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.feeds = iter(feeds)

        def get_next(self):  # pyrefly: ignore[bad-override]: onnxruntime's says dict, and expects None at the end
            feed = next(self.feeds, None)
            return feed and {name: feed[name] for name in names}

    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    with tempfile.TemporaryDirectory() as folder, _quietly():
        result = Path(folder) / path.name
        quantization.quantize_static(
            str(path),
            str(result),
            Reader(),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            calibrate_method=quantization.CalibrationMethod.Percentile,
        )
        path.write_bytes(result.read_bytes())


@contextlib.contextmanager
def _quietly():
    """Without onnxruntime's advice, which is about graphs that were not prepared."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger().setLevel(level)
