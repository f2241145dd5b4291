"""What torch's exporter gets wrong or leaves ugly, put right before and after it has run.

Operations it has no good form for are taken apart, an epsilon its optimiser would drop is put back, means that
onnxruntime would add up one by one are split, and operations are named by the module they come from. Notebook 06
reads those names.
"""

import ast
import contextlib
import logging
import warnings
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as functional

from evsam_lib.deploy.card import Card


@contextlib.contextmanager
def plain_operations():
    """Attention and group norm as the operations they are made of, for the exporter alone."""
    ours = {"scaled_dot_product_attention": _attention, "group_norm": _group_norm}
    theirs = {name: getattr(functional, name) for name in ours}
    try:
        for name, function in ours.items():
            setattr(functional, name, function)
        yield
    finally:
        for name, function in theirs.items():
            setattr(functional, name, function)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """The exporter's own has to have 4 axes, and multiplies the long keys by a scale."""
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask
    return scores.softmax(-1) @ v


def _group_norm(x, groups, weight, bias, eps):
    """The exporter's own is an InstanceNormalization, in which onnxruntime errs by 1e-3 on a million values."""
    y = x.unflatten(1, (groups, -1))  # (B, groups, C, h, w)
    y = y - y.mean(dim=(2, 3, 4), keepdim=True)
    y = y / torch.sqrt(y.square().mean(dim=(2, 3, 4), keepdim=True) + eps)
    return y.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


@contextlib.contextmanager
def quietly():
    """Without the exporter's notes on its own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", module="torch.onnx")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def average_by_axis(model) -> None:
    """Splits a mean over several axes into one for each: onnxruntime adds the values up one by one.

    Over 256 x 256 cells that costs a digit (1.5e-6 instead of 2e-7), and EdgeSAM's embedding errs by 1e-3.
    """
    import onnx_ir

    for node in list(model.graph.all_nodes()):
        if node.op_type != "ReduceMean" or node.attributes.get_int("keepdims", 1) != 1:
            continue
        axes = node.inputs[1].const_value.numpy()
        value = node.inputs[0]
        for axis in axes[:0:-1].tolist():
            step = onnx_ir.node("ReduceMean", [value, _axis(model, node, axis)], attributes={"keepdims": 1})
            model.graph.insert_before(node, step)
            value = step.outputs[0]
        node.replace_input_with(0, value)
        node.replace_input_with(1, _axis(model, node, int(axes[0])))


def restore_epsilons(model) -> None:
    """(x * c + eps * c) / c -> x + eps: how `relu_linear_attention` carries its epsilon past the exporter's optimiser.

    The factor c of 2^50 would be infinite in fp16, and so would every divisor.
    """
    import onnx_ir

    for node in list(model.graph.all_nodes()):
        total = node.inputs[0].producer() if node.op_type == "Div" else None
        scaled = total.inputs[0].producer() if total is not None and total.op_type == "Add" else None
        if total is None or scaled is None or scaled.op_type != "Mul" or scaled.inputs[1] is not node.inputs[1]:
            continue
        factor, summand = (value.const_value.numpy() for value in (node.inputs[1], total.inputs[1]))
        epsilon = _constant(model, f"{node.outputs[0].name}_eps", summand / factor)
        total.replace_input_with(0, scaled.inputs[0])
        total.replace_input_with(1, epsilon)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], total.outputs[0])
        model.graph.remove([node, scaled], safe=True)
    for value in [value for value in model.graph.initializers.values() if not value.uses()]:
        del model.graph.initializers[value.name]


def _axis(model, node, axis: int):
    return _constant(model, f"{node.outputs[0].name}_axis_{axis}", np.array([axis], dtype=np.int64))


def _constant(model, name: str, array: np.ndarray):
    """A new initialiser of the graph."""
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    kind, shape = onnx_ir.TensorType(tensor.dtype), onnx_ir.Shape(array.shape)
    value = onnx_ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    model.graph.register_initializer(value)
    return value


def tidy(model, card: Card) -> None:
    """Names the outputs' axes, and operations by their module; removes the exporter's notes, which name folders."""
    import onnx_ir

    for output, port in zip(model.graph.outputs, card.outputs, strict=True):
        output.shape = onnx_ir.Shape(port.shape)
    _name_by_module(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def _name_by_module(model) -> None:
    """`image_encoder.neck.middle.op_list.0.main.point_conv/Conv` instead of `node_Conv_642`."""
    seen: Counter[str] = Counter()
    modules: dict[str, str] = {}  # of every value
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        known = [modules[value.name] for value in node.inputs if value is not None and value.name in modules]
        module = scopes[-2] if len(scopes) > 1 else next(iter(known), "")
        module = "" if module.startswith("_empty") else module
        if node.op_type in ("Conv", "Gelu"):  # a folded convolution belongs to all three
            for leaf in (".conv", ".norm", ".act"):
                module = module.removesuffix(leaf)
        modules |= {value.name: module for value in node.outputs}
        name = f"{module}/{node.op_type}"
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
