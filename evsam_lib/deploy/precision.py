"""Which layers have to stay in float32: measured on images, layer by layer, by emulation on the CPU.

`survey` draws the map: the range of every layer and its own error in half precision. `choose_islands` keeps in float32
what leaves the range, and then, while the result is out of bounds, the module whose rounding costs most. Notebook 06
shows both, and why fp16 without islands fails.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from evsam_lib.deploy.half import KINDS, LARGEST, SMALLEST_NORMAL, FloatGraph, emulated, rounded, rounding
from evsam_lib.deploy.judge import Bounds, Deviation, Feed, Judge, open_session, relative_error, run_session

__all__ = ["Choice", "Layer", "choose_islands", "drift", "survey"]

BOUNDS = Bounds()
# Activations of images not seen may be so many times larger than those seen; products of three of them, its cube. On 24
# scenes the mini model's were up to 4.4 times those on 4 others, and the products in its attention 31 times.
HEADROOM = 4.0
TRIED = 12  # modules tried in each round of the search, those with the largest errors of their own


@dataclass(frozen=True)
class Layer:
    """What was measured of one layer.

    Attributes:
        name: of the operation, `module/Type`.
        op_type: of ONNX.
        largest: absolute value that comes out, in float32.
        divisor: smallest absolute value that is divided by, of a Div; infinity elsewhere.
        degree: activations that are multiplied in it, see `FloatGraph.degrees`.
        error: |difference| / |float32| of what comes out, where this layer alone is in half precision.
        lost_constant: a constant other than zero becomes zero or infinity.
    """

    name: str
    op_type: str
    largest: float
    divisor: float
    degree: int
    error: float
    lost_constant: bool

    @property
    def module(self) -> str:
        """Whose operation it is."""
        return self.name.rpartition("/")[0]

    def leaves(self, kind: str, *, headroom: float = HEADROOM) -> bool:
        """What comes out, or is divided by, is out of the kind's range, or may be on other images."""
        too_large = not self.largest * headroom**self.degree <= LARGEST[kind]
        return too_large or self.lost_constant or self.divisor < headroom * SMALLEST_NORMAL[kind]


@dataclass(frozen=True)
class Choice:
    """The islands that were chosen.

    Attributes:
        islands: layers that stay float32.
        by_range: those of them that leave the range, or take in what does.
        naive: deviation without islands.
        deviation: with them, on the same images.
        steps: what the search kept in float32, in order, with the deviation after each.
        layers: the map.
    """

    islands: tuple[str, ...]
    by_range: tuple[str, ...]
    naive: Deviation
    deviation: Deviation
    steps: tuple[tuple[str, Deviation], ...]
    layers: tuple[Layer, ...]


# ---------------------------------------------------------------- the map


def survey(graph: FloatGraph, feeds: Sequence[Feed], kind: str = "fp16") -> list[Layer]:
    """Measures every layer: what comes out of it in float32, and how far off it is with this layer alone in half.

    Args:
        graph: to measure.
        feeds: what goes in; the largest value and error over all of them count.
        kind: "fp16" or "bf16".

    Returns:
        Layers, in the graph's order.
    """
    probe, names = _probe(graph, kind)
    session = open_session(probe)
    rows = np.array([run_session(session, feed, names) for feed in feeds], dtype=np.float64)  # (feeds, names)
    found = dict(zip(names, rows.T, strict=True))
    layers, degrees = [], graph.degrees()
    for name, node in graph.layers.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            error = found[f"{name}:error"] / np.maximum(found[f"{name}:norm"], 1e-30)
        divisor = found.get(f"{name}:divisor", np.array([np.inf])).min()
        lost = any(_lost(graph.weights[i], kind) for i in graph.inputs[name] if i in graph.weights and _few(graph, i))
        largest, error = found[f"{name}:largest"].max(), np.nan_to_num(error, nan=np.inf, posinf=np.inf).max()
        layers.append(Layer(name, node.op_type, float(largest), float(divisor), degrees[name], float(error), lost))
    return layers


def _few(graph: FloatGraph, name: str) -> bool:
    """Whether a constant is a single number: a tiny weight among many is no loss, a vanished epsilon is."""
    return graph.weights[name].size == 1


def _lost(constant: np.ndarray, kind: str) -> bool:
    narrow = rounded(constant, kind)
    return bool(np.any((narrow == 0) & (constant != 0)) or np.any(np.isinf(narrow) & np.isfinite(constant)))


def _probe(graph: FloatGraph, kind: str) -> tuple[ModelProto, list[str]]:
    """The float32 graph; beside every layer its shadow in half precision, and the numbers that compare the two."""
    nodes, results, seen = [], [], set()
    constants = list(graph.model.graph.initializer)
    constants.append(numpy_helper.from_array(np.zeros((), np.float32), "probe:zero"))
    for node in graph.model.graph.node:
        nodes.append(node)
        if node.name not in graph.layers:
            continue
        shadow = onnx.NodeProto()
        shadow.CopyFrom(node)
        shadow.name = f"{node.name}:half"
        for i, name in enumerate(node.input):
            if name in graph.inputs[node.name]:
                shadow.input[i] = f"{name}:half"
                if name not in seen and name in graph.weights:
                    constants.append(numpy_helper.from_array(rounded(graph.weights[name], kind), f"{name}:half"))
                elif name not in seen:
                    nodes += rounding(name, f"{name}:half", KINDS[kind])
                seen.add(name)
        result = f"{node.output[0]}:shadow"
        shadow.output[:] = [f"{result}:wide", *(f"{name}:shadow" for name in node.output[1:])]
        nodes += [shadow, *rounding(f"{result}:wide", result, KINDS[kind])]
        made, more = _statistics(node, result)
        nodes += made
        results += more
    return _measuring(graph.model, nodes, constants, results), results


def _statistics(node: onnx.NodeProto, shadow: str) -> tuple[list[onnx.NodeProto], list[str]]:
    """Numbers of a layer; infinities of the float32 graph itself are those of hidden tokens and do not count."""
    value, key = node.output[0], node.name
    make = helper.make_node
    made = [
        make("IsInf", [value], [f"{key}:hidden"]),
        make("Where", [f"{key}:hidden", "probe:zero", value], [f"{key}:value"]),
        make("Sub", [value, shadow], [f"{key}:all"]),
        make("Where", [f"{key}:hidden", "probe:zero", f"{key}:all"], [f"{key}:difference"]),
        make("Abs", [f"{key}:value"], [f"{key}:size"]),
        make("ReduceMax", [f"{key}:size"], [f"{key}:largest"], keepdims=0),
        make("ReduceL2", [f"{key}:value"], [f"{key}:norm"], keepdims=0),
        make("ReduceL2", [f"{key}:difference"], [f"{key}:error"], keepdims=0),
    ]
    names = [f"{key}:largest", f"{key}:norm", f"{key}:error"]
    if node.op_type == "Div":
        made += [
            make("Abs", [node.input[1]], [f"{key}:by"]),
            make("ReduceMin", [f"{key}:by"], [f"{key}:divisor"], keepdims=0),
        ]
        names.append(f"{key}:divisor")
    return made, names


def _measuring(model: ModelProto, nodes, constants, results: list[str]) -> ModelProto:
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in results]
    graph = helper.make_graph(nodes, "probe", model.graph.input, outputs, constants)
    new = helper.make_model(graph, opset_imports=model.opset_import)
    new.ir_version = model.ir_version
    return new


def drift(graph: FloatGraph, feed: Feed, kind: str = "fp16", islands: Sequence[str] = ()) -> dict[str, float]:
    """Error that has gathered up to every layer when all are in half precision but the islands.

    Keeps all values of one image in memory, twice.

    Returns:
        Layer -> |difference| / |float32| of what comes out; infinity where that is not finite.
    """
    names = [node.output[0] for node in graph.layers.values()]
    runs = []
    for model in (graph.model, emulated(graph.halved(kind, islands))):
        session = open_session(_with_outputs(model, names))
        runs.append(run_session(session, feed, names))
    errors = {}
    for layer, value, other in zip(graph.layers, *runs, strict=True):
        seen = np.isfinite(value)
        errors[layer] = relative_error(value[seen], other[seen])
    return errors


def _with_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    new = ModelProto()
    new.CopyFrom(model)
    del new.graph.output[:]
    new.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return new


# ---------------------------------------------------------------- the choice


def choose_islands(
    graph: FloatGraph,
    judge: Judge,
    *,
    kind: str = "fp16",
    bounds: Bounds = BOUNDS,
    headroom: float = HEADROOM,
    say: Callable[[str], object] = lambda line: None,
) -> Choice:
    """The fewest layers in float32 with which every image stays within bounds.

    Layers that leave the range stay in float32, and so do those that take in what left it. While that is not enough,
    of the modules with the largest errors the one joins whose rounding is measured to cost most; in the end, every
    layer that joined so and is not missed goes back.

    Args:
        graph: in float32.
        judge: of the results.
        kind: "fp16" or "bf16".
        bounds: to keep.
        headroom: how many times larger activations may be on images not seen.
        say: takes lines of progress.

    Raises:
        ValueError: no choice of islands keeps the bounds.
    """
    layers = survey(graph, judge.feeds, kind)

    def deviation(islands: set[str]) -> Deviation:
        return judge(emulated(graph.halved(kind, islands)))

    naive = deviation(set())
    by_range = {layer.name for layer in layers if layer.leaves(kind, headroom=headroom)}
    by_range |= {name for layer in by_range.copy() for name in graph.consumers(layer)}
    now = deviation(by_range)
    say(
        f"{kind}: {len(by_range)} of {len(layers)} layers leave the range; "
        f"without islands {_text(naive)}, with them {_text(now)}"
    )
    islands, steps = set(by_range), []
    while now.excess(bounds) > 1:
        module, now = _next_island(layers, islands, deviation, bounds, now, kind)
        islands |= {layer.name for layer in layers if layer.module == module}
        steps.append((module, now))
        say(f"{module} in float32: {_text(now)}")
    for layer in sorted(layers, key=lambda layer: layer.error):
        if layer.name in islands - by_range and (then := deviation(islands - {layer.name})).excess(bounds) <= 1:
            islands, now = islands - {layer.name}, then
    order = [layer.name for layer in layers]
    chosen, ranged = (tuple(sorted(names, key=order.index)) for names in (islands, by_range))
    return Choice(chosen, ranged, naive, now, tuple(steps), tuple(layers))


def _next_island(layers, islands, deviation, bounds, now, kind) -> tuple[str, Deviation]:
    """The module that helps most, and the deviation with it."""
    errors: dict[str, float] = {}
    for layer in layers:
        if layer.name not in islands:
            errors[layer.module] = max(errors.get(layer.module, 0.0), layer.error)
    tried = sorted(errors, key=errors.__getitem__, reverse=True)[:TRIED]
    found = {m: deviation(islands | {layer.name for layer in layers if layer.module == m}) for m in tried}
    best = min(found, key=lambda module: found[module].excess(bounds), default=None)
    if best is None or not found[best].excess(bounds) < now.excess(bounds):
        raise ValueError(
            f"No set of float32 islands was found that keeps {kind} within {bounds.relative:g} of float32 and "
            f"{bounds.masks:g} of the masks' pixels: with {len(islands)} layers in float32 it is {_text(now)}."
        )
    return best, found[best]


def _text(deviation: Deviation) -> str:
    if not np.isfinite(deviation.relative):
        return "NaN or infinity"
    return f"error {deviation.relative:.1e}, {100 * deviation.masks:.2f} % of the masks"
