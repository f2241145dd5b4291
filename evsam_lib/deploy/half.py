"""ONNX graphs in half precision: written strongly typed, and emulated on a CPU.

A strongly typed graph says of every value whether it is half or float32, and Cast operations stand where the two meet;
TensorRT 10.12 and later read it with `STRONGLY_TYPED`, TensorRT 11 reads nothing else. onnxruntime on a CPU cannot
judge such a graph: it has few operations in half, computes the rest in float32 and drops the roundings in between, so
nothing ever overflows. `emulated` therefore writes the roundings out: every operation takes rounded values, adds up in
float32, as tensor cores do, and rounds what comes out, to infinity where it is too large. Engines that add up in half
are worse than that. Notebook 06 draws what it finds.
"""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LARGEST = {"fp16": 65504.0, "bf16": 3.3895314e38}
SMALLEST_NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126}
# These hand values on as they are, so they take the precision of what they are given.
MOVES = frozenset(
    {
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Neg",
        "Pad",
        "Relu",
        "Reshape",
        "ScatterND",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
_NOT_FLOAT = frozenset(
    {
        "Shape",
        "Size",
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "ArgMax",
        "ArgMin",
        "IsNaN",
        "IsInf",
    }
)
_FLOATS = (TensorProto.FLOAT, *KINDS.values())


class FloatGraph:
    """A float32 graph, to be written in half precision again and again.

    Args:
        model: as `evsam_lib.deploy.onnx` exports it.

    Attributes:
        model: the same.
        layers: operations that compute with floats, name -> node, in order; a precision can be chosen for each.
        weights: names of the float32 constants -> values.
        inputs: for every operation by name, the names of its float32 inputs.
    """

    def __init__(self, model: ModelProto):
        self.model = model
        self.weights = {t.name: numpy_helper.to_array(t) for t in _constants(model, TensorProto.FLOAT)}
        types = _types(model)
        self.inputs = {
            node.name: [name for name in _typed_inputs(node) if types.get(name) == TensorProto.FLOAT]
            for node in model.graph.node
        }
        self._made = {name for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT}
        self.layers = {
            node.name: node for node in model.graph.node if node.op_type not in MOVES and self._made & set(node.output)
        }

    def halved(self, kind: str, islands: Iterable[str] = ()) -> ModelProto:
        """The graph strongly typed: float32 where `islands` says, half elsewhere; inputs and outputs stay float32.

        Args:
            kind: "fp16" or "bf16" (whose convolutions ONNX knows since opset 22; below, it is for `emulated` alone).
            islands: names of layers that stay float32.

        Raises:
            ValueError: a name is of no layer.
        """
        islands = set(islands)
        if unknown := sorted(islands - self.layers.keys()):
            raise ValueError(f"No layer {unknown[0]!r} in this graph to keep in float32.")
        return _Writer(self, kind, islands).write()

    def degrees(self) -> dict[str, int]:
        """How many activations are multiplied in what comes out of each layer, at least 1.

        When an image makes all activations larger by a factor, a convolution's result grows by that factor, the sum of
        products of two of them by its square, and so on; a normalisation starts anew.
        """
        degrees = dict.fromkeys((value.name for value in self.model.graph.input), 1)
        for node in self.model.graph.node:
            given = [degrees.get(name, 0) for name in self.inputs[node.name]] or [0]
            if node.op_type in ("MatMul", "Mul"):
                degree = sum(given)
            elif node.op_type == "Div":
                degree = max(given[0] - given[-1], 1)
            else:
                degree = {"LayerNormalization": 1, "Softmax": 0, "Sin": 0, "Cos": 0}.get(node.op_type, max(given))
            degrees |= dict.fromkeys(node.output, degree)
        return {name: max(degrees[node.output[0]], 1) for name, node in self.layers.items()}

    def consumers(self, name: str) -> set[str]:
        """Layers that a layer's values reach, be it through operations that only move them."""
        reached, found = set(self.layers[name].output), set()
        for node in self.model.graph.node:
            if reached & set(self.inputs[node.name]):
                if node.name in self.layers:
                    found.add(node.name)
                elif node.op_type in MOVES:
                    reached |= set(node.output)
        return found


class _Writer:
    """One walk over a graph, each operation in the precision it was given or takes over."""

    def __init__(self, graph: FloatGraph, kind: str, islands: set[str]):
        self.graph, self.kind, self.half, self.islands = graph, kind, KINDS[kind], islands
        self.precision: dict[str, int] = dict.fromkeys((i.name for i in graph.model.graph.input), TensorProto.FLOAT)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {
            tensor.name: tensor for tensor in graph.model.graph.initializer if tensor.name not in graph.weights
        }
        self.done: dict[tuple[str, int], str] = {}  # value and precision -> its name there

    def write(self) -> ModelProto:
        source = self.graph.model.graph
        for node in source.node:
            self._add(node)
        results = {value.name for value in source.output}
        casts = [name for name in results if self.precision.get(name) == self.half]
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name in casts:
                        names[i] = f"{name}.{self.kind}"
        self.nodes += [_cast(f"{name}.{self.kind}", name, TensorProto.FLOAT) for name in casts]
        return _model_like(self.graph.model, self.nodes, self.constants.values())

    def _add(self, node: NodeProto) -> None:
        floats, made = self.graph.inputs[node.name], self.graph._made & set(node.output)
        if (not floats and not made) or node.op_type in ("Shape", "Size"):
            self.nodes.append(node)
            return
        precision = self._wanted(node, floats)
        copy = NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in floats:
                copy.input[i] = self._as(name, precision)
        if node.op_type == "Cast" and made:
            del copy.attribute[:]
            copy.attribute.append(helper.make_attribute("to", precision))
        self.nodes.append(copy)
        self.precision |= dict.fromkeys(made, precision)

    def _wanted(self, node: NodeProto, floats: list[str]) -> int:
        if node.name in self.graph.layers and node.op_type not in ("ConstantOfShape", "Range"):
            return TensorProto.FLOAT if node.name in self.islands else self.half
        given = [self.precision[name] for name in floats if name not in self.graph.weights]
        fixed = node.name in self.graph.layers  # of a float32 attribute
        return TensorProto.FLOAT if fixed or TensorProto.FLOAT in given else self.half

    def _as(self, name: str, precision: int) -> str:
        """The name of a value in a precision; a constant or a Cast is made where there is none yet."""
        weight = self.graph.weights.get(name)
        suffix = self.kind if precision == self.half else "fp32"
        if weight is not None:
            new = name if precision == TensorProto.FLOAT else f"{name}.{suffix}"
            if new not in self.constants:
                self.constants[new] = numpy_helper.from_array(_rounded(weight, precision), new)
            return new
        if self.precision[name] == precision:
            return name
        if (name, precision) not in self.done:
            self.done[name, precision] = f"{name}.{suffix}"
            self.nodes.append(_cast(name, f"{name}.{suffix}", precision))
        return self.done[name, precision]


def emulated(model: ModelProto) -> ModelProto:
    """A strongly typed graph as a float32 one that rounds where the other is half: what it means, on any CPU."""
    types = _types(model)
    constants = [
        numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float32), t.name) if _half(t.data_type) else t
        for t in model.graph.initializer
    ]
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        source, target = (types.get(names[0]) if len(names) else None for names in (node.input, node.output))
        if node.op_type == "Cast" and _half(source) and target == TensorProto.FLOAT:
            nodes.append(helper.make_node("Identity", node.input, node.output, name=node.name))
        elif node.op_type in MOVES or not any(_half(types.get(name)) for name in node.output):
            nodes.append(node)
        else:
            nodes += _with_rounding(node, [types.get(name) for name in node.output])
    return _model_like(model, nodes, constants)


def rounding(name: str, result: str, kind: int) -> list[NodeProto]:
    """Two operations: a float32 value rounded to a half type and back."""
    return [_cast(name, f"{result}.narrow", kind), _cast(f"{result}.narrow", result, TensorProto.FLOAT)]


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 values through "fp16" or "bf16" and back."""
    return _rounded(values, KINDS[kind]).astype(np.float32)


def _with_rounding(node: NodeProto, types: list[int | None]) -> list[NodeProto]:
    if node.op_type == "Cast" and types[0] is not None:
        return [
            _cast(node.input[0], f"{node.output[0]}.narrow", types[0]),
            _cast(f"{node.output[0]}.narrow", node.output[0], TensorProto.FLOAT),
        ]
    copy = NodeProto()
    copy.CopyFrom(node)
    nodes = [copy]
    for i, (name, kind) in enumerate(zip(node.output, types, strict=True)):
        if name and kind is not None and _half(kind):
            copy.output[i] = f"{name}.wide"
            nodes += rounding(f"{name}.wide", name, kind)
    return nodes


def _types(model: ModelProto) -> dict[str, int]:
    """Element types of the float values: results have the type of the floats that go in, but for Cast."""
    types: dict[str, int] = {
        tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.data_type in _FLOATS
    }
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        types |= {value.name: kind} if kind in _FLOATS else {}
    for node in model.graph.node:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise ValueError(f"{node.name or node.op_type} holds a graph of its own, which half precision is not for.")
        found = [types[name] for name in _typed_inputs(node) if name in types]
        if node.op_type == "Cast":
            found = [attribute.i for attribute in node.attribute if attribute.name == "to" and attribute.i in _FLOATS]
        elif node.op_type == "ConstantOfShape":
            found = [a.t.data_type for a in node.attribute if a.t.data_type in _FLOATS] or [TensorProto.FLOAT]
        if found and node.op_type not in _NOT_FLOAT:
            types |= dict.fromkeys(node.output, found[0])
    return types


def _typed_inputs(node: NodeProto) -> list[str]:
    """Inputs that have the operation's precision; a Resize's scales are float32 whatever it resizes."""
    return list(node.input[:1] if node.op_type == "Resize" else node.input)


def _half(kind: int | None) -> bool:
    return kind in KINDS.values()


def _constants(model: ModelProto, kind: int) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_type == kind]


def _cast(name: str, result: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [name], [result], name=f"{result}/Cast", to=kind)


def _rounded(values: np.ndarray, kind: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity is what it becomes
        return values.astype(helper.tensor_dtype_to_np_dtype(kind))


def _model_like(model: ModelProto, nodes: Iterable[NodeProto], constants: Iterable[TensorProto]) -> ModelProto:
    """Other operations and constants between the same inputs and outputs."""
    graph = helper.make_graph(list(nodes), model.graph.name, model.graph.input, model.graph.output, list(constants))
    new = helper.make_model(graph, opset_imports=model.opset_import, producer_name=model.producer_name)
    new.ir_version = model.ir_version
    new.metadata_props.extend(model.metadata_props)
    return new
