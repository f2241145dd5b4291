"""Half precision: what is written into the graph, what the CPU makes of it, and that islands save what fp16 loses.

The mini model's attention is scaled by a power of two, which changes nothing in float32 and overflows in fp16.
"""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evsam_lib import Predictor, load_model
from evsam_lib.data.generate import scene
from evsam_lib.deploy.card import Card, fingerprint
from evsam_lib.deploy.half import FloatGraph, emulated, rounded
from evsam_lib.deploy.judge import Bounds, Deviation, Judge, calibration, disagreement, relative_error, run
from evsam_lib.deploy.narrow import as_computed, narrow, save_half
from evsam_lib.deploy.onnx import main
from evsam_lib.deploy.precision import choose_islands, drift, survey
from evsam_lib.deploy.runtime import load_engine
from evsam_lib.deploy.verify import verify

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def small(nodes, weights, shape=(4,), element=FLOAT):
    """A graph x -> y of these nodes."""
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    for i, node in enumerate(nodes):
        node.name = f"layer{i}/{node.op_type}"
    ends = [helper.make_tensor_value_info(name, element, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


@pytest.fixture
def scaled():
    """y = x * 300 / 300: beyond fp16 in between for x above 218."""
    nodes = [helper.make_node("Mul", ["x", "c"], ["a"]), helper.make_node("Div", ["a", "c"], ["y"])]
    return FloatGraph(small(nodes, {"c": 300.0}))


X = {"x": np.array([1.0, 0.1, 218.0, 219.0], np.float32)}


class TestGraph:
    def test_strongly_typed_with_an_island(self, scaled):
        model = scaled.halved("fp16", ["layer0/Mul", "layer1/Div"])
        assert [node.op_type for node in model.graph.node] == ["Mul", "Div"]  # all in float32, no Cast needed
        model = scaled.halved("fp16", ["layer1/Div"])
        onnx.checker.check_model(model, full_check=True)
        assert [(node.op_type, list(node.input)) for node in model.graph.node] == [
            ("Cast", ["x"]),
            ("Mul", ["x.fp16", "c.fp16"]),
            ("Cast", ["a"]),
            ("Div", ["a.fp32", "c"]),
        ]
        assert {t.name: t.data_type for t in model.graph.initializer} == {"c.fp16": HALF, "c": FLOAT}
        with pytest.raises(ValueError, match="No layer 'neck' in this graph"):
            scaled.halved("fp16", ["neck"])

    def test_emulation_is_numpys_half_precision(self, scaled):
        (found,) = run(emulated(scaled.halved("fp16")), [X])
        with np.errstate(over="ignore"):
            expected = (X["x"].astype(np.float16) * np.float16(300)) / np.float16(300)
        np.testing.assert_array_equal(found, expected.astype(np.float32))
        assert np.isinf(found[3])
        assert not np.isinf(found[:3]).any()

    def test_onnxruntime_on_a_cpu_does_not_overflow_by_itself(self, scaled):
        """Why there is an emulation: the half graph as it is comes out as in float32."""
        session = onnxruntime.InferenceSession(scaled.halved("fp16").SerializeToString())
        np.testing.assert_allclose(session.run(None, X)[0], X["x"], rtol=1e-3)

    def test_bfloat16_rounds_coarser_and_does_not_overflow(self, scaled):
        (found,) = run(emulated(scaled.halved("bf16")), [X])
        expected = torch.from_numpy(X["x"]).bfloat16() * 300 / 300
        np.testing.assert_array_equal(found, expected.float().numpy())
        assert rounded(np.float32(1.001), "bf16") == 1.0

    def test_moves_follow_what_they_are_given(self):
        nodes = [
            helper.make_node("Mul", ["x", "c"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Concat", ["b", "x"], ["d"], axis=0),
            helper.make_node("Slice", ["d", "from", "to"], ["e"]),
            helper.make_node("Mul", ["e", "c"], ["y"]),
        ]
        model = small(nodes, {"c": 3.0})
        for name, value in {"from": 0, "to": 4}.items():
            model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        graph = FloatGraph(model)
        assert list(graph.layers) == ["layer0/Mul", "layer4/Mul"]
        assert graph.consumers("layer0/Mul") == {"layer4/Mul"}
        half = graph.halved("fp16")
        onnx.checker.check_model(half, full_check=True)
        types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(half).graph.value_info}
        assert types["b"] == HALF
        assert types["d"] == FLOAT  # one of what it joins came in float32, and stays whole
        (found,) = run(emulated(half), [X])
        np.testing.assert_allclose(found, 9 * X["x"], rtol=2e-3)

    def test_a_graph_inside_a_graph_is_refused(self):
        body = small([helper.make_node("Relu", ["x"], ["y"])], {}).graph
        model = small([helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)], {})
        with pytest.raises(ValueError, match="layer0/If holds a graph of its own"):
            FloatGraph(model)


class TestMeasures:
    def test_survey(self, scaled):
        product, quotient = survey(scaled, [X])
        assert product.largest == 219 * 300
        assert product.error == float("inf")
        assert product.leaves("fp16")
        assert not product.leaves("bf16")
        assert quotient.divisor == 300
        assert quotient.error == float("inf")  # its own input is too large
        assert survey(scaled, [{"x": X["x"][:2].repeat(2)}])[1].error < 1e-3

    def test_a_vanishing_epsilon(self):
        graph = FloatGraph(small([helper.make_node("Add", ["x", "eps"], ["y"])], {"eps": 1e-15}))
        assert survey(graph, [X])[0].lost_constant
        assert not survey(graph, [X], "bf16")[0].lost_constant

    def test_a_tiny_divisor(self):
        graph = FloatGraph(small([helper.make_node("Div", ["c", "x"], ["y"])], {"c": 1.0}))
        (layer,) = survey(graph, [{"x": np.full(4, 1e-4, np.float32)}])
        assert layer.divisor == pytest.approx(1e-4)
        assert layer.leaves("fp16")
        assert not layer.leaves("fp16", headroom=1.0)

    def test_products_of_activations_need_more_room(self):
        """(x x) x / (x x), and a normalisation in between."""
        nodes = [
            helper.make_node("Mul", ["x", "x"], ["a"]),
            helper.make_node("Mul", ["a", "x"], ["b"]),
            helper.make_node("Mul", ["b", "c"], ["d"]),
            helper.make_node("Div", ["d", "a"], ["e"]),
            helper.make_node("Softmax", ["b"], ["f"]),
            helper.make_node("Mul", ["f", "e"], ["y"]),
        ]
        graph = FloatGraph(small(nodes, {"c": 2.0}))
        assert list(graph.degrees().values()) == [2, 3, 3, 1, 1, 1]
        layers = survey(graph, [{"x": np.full(4, 20.0, np.float32)}])
        assert [layer.largest for layer in layers[:2]] == [400, 8000]
        assert [layer.leaves("fp16") for layer in layers[:2]] == [False, True]
        assert not layers[1].leaves("fp16", headroom=2.0)

    def test_hidden_tokens_are_no_overflow(self):
        graph = FloatGraph(small([helper.make_node("Add", ["x", "x"], ["y"])], {}))
        (layer,) = survey(graph, [{"x": np.array([1, -np.inf, 2, 3], np.float32)}])
        assert layer.largest == 6
        assert layer.error == 0

    def test_drift_gathers(self, scaled):
        errors = drift(scaled, X)
        assert errors == {"layer0/Mul": float("inf"), "layer1/Div": float("inf")}
        errors = drift(scaled, X, islands=list(scaled.layers))
        assert max(errors.values()) == 0

    def test_comparisons(self):
        masks = np.zeros((2, 2, 2), bool)
        other = masks.copy()
        assert disagreement(masks, other) == 0
        masks[0], other[0, 0] = True, True
        assert disagreement(masks, other) == 0.5
        assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(0.1)
        assert relative_error(np.ones(2), np.array([1.0, np.nan])) == float("inf")
        assert Deviation(0.02, 0.01).excess(Bounds(0.01, 0.02)) == 2
        assert not Deviation(float("inf"), float("inf")).excess(Bounds()) <= 1


def scale_attention(model, factor):
    """Keys times a power of two: the attention divides it out again, so nothing changes in float32."""
    for name, weight in model.image_encoder.named_parameters():
        if name.endswith("qkv.conv.weight"):
            keys = weight.data.view(-1, 3, 32, *weight.shape[1:])[:, 1]
            keys *= factor
    return model


@pytest.fixture(scope="module")
def overflowing(mini_onnx, tmp_path_factory):
    """The mini model with keys 256 times as large, and its graphs in float32."""
    model = scale_attention(load_model("efficientvit-sam-mini", "mini"), 256.0)
    weights = {f"image_encoder.{name}": value for name, value in model.image_encoder.named_parameters()}
    folder = tmp_path_factory.mktemp("overflow")
    for part in ("encoder", "decoder"):
        proto = onnx.load(mini_onnx / f"{part}.onnx")
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("qkv.conv.weight"):
                tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].detach().numpy(), tensor.name))
        card = replace(card_of(proto), state_sha256=fingerprint(model))
        helper.set_model_props(proto, card.to_properties())
        onnx.save(proto, folder / f"{part}.onnx")
    proto = onnx.load(folder / "encoder.onnx")
    return model, folder, FloatGraph(proto), card_of(proto)


def card_of(proto):
    return Card.from_properties({entry.key: entry.value for entry in proto.metadata_props}, source="")


@pytest.fixture(scope="module")
def judge(overflowing):
    model, _, graph, card = overflowing
    feeds = calibration(card, model)
    return Judge(card, model, feeds, run(graph.model, feeds))


class TestOverflow:
    def test_float32_does_not_notice(self, overflowing):
        image = scene(5, 0, size=(96, 128)).image
        with torch.inference_mode():
            ours, original = (m.embed(image) for m in (overflowing[0], load_model("efficientvit-sam-mini", "mini")))
        torch.testing.assert_close(ours, original, atol=1e-4, rtol=0)

    def test_naive_fp16_gives_nothing_and_islands_the_mask(self, overflowing, judge):
        model, _, graph, card = overflowing
        choice = choose_islands(graph, judge)
        assert choice.naive == Deviation(float("inf"), float("inf"))
        assert choice.deviation.excess(Bounds()) <= 1
        assert len(choice.islands) < 0.3 * len(graph.layers)
        attention = "image_encoder.backbone.stages.4.op_list.2.context_module.main"
        assert {f"{attention}/MatMul", f"{attention}/MatMul_1", f"{attention}/Add", f"{attention}/Div"} <= {
            *choice.islands
        }
        assert f"{attention.replace('context_module', 'local_module')}.point_conv/Conv" not in choice.islands
        held_out = calibration(card, model, seed=7)
        again = Judge(card, model, held_out, run(graph.model, held_out))
        assert again(emulated(graph.halved("fp16", choice.islands))).excess(Bounds()) <= 1
        assert np.isnan(run(emulated(graph.halved("fp16")), held_out)[0]).all()
        one_less = [name for name in choice.islands if name != f"{attention}/MatMul_1"]
        assert judge(emulated(graph.halved("fp16", one_less))).relative == float("inf")  # none is there for show

    def test_the_file(self, overflowing, tmp_path):
        """Written with its islands, and verified; verify sees it when they are missing."""
        model, folder, _, card = overflowing
        (tmp_path / "encoder.onnx").write_bytes((folder / "encoder.onnx").read_bytes())
        written = narrow(tmp_path / "encoder.onnx", replace(card, precision="fp16"), model)
        proto = onnx.load(tmp_path / "encoder.onnx")
        onnx.checker.check_model(proto, full_check=True)
        assert card_of(proto) == written
        types = {value.name: value.type.tensor_type.elem_type for value in inferred(proto)}
        kinds = ("MatMul", "Conv", "Div")
        found = {n.name for n in proto.graph.node if n.op_type in kinds and types[n.output[0]] == FLOAT}
        assert found == {name for name in written.fp32_layers if name.split("/")[1].split("_")[0] in kinds}
        weights = sum(len(t.raw_data) for t in proto.graph.initializer)
        assert weights < 0.55 * (folder / "encoder.onnx").stat().st_size
        rows = verify(tmp_path, model=model)
        assert [row.case for row in rows] == ["4 scenes, fp16"] * 2
        assert all(row.ok for row in rows)
        save_half(
            FloatGraph(onnx.load(folder / "encoder.onnx")), replace(written, fp32_layers=()), tmp_path / "encoder.onnx"
        )
        assert not any(row.ok for row in verify(tmp_path, model=model))

    def test_predictor_takes_the_file(self, overflowing, tmp_path):
        _, folder, graph, card = overflowing
        (tmp_path / "decoder.onnx").write_bytes((folder / "decoder.onnx").read_bytes())
        save_half(
            graph, replace(card, precision="fp16", fp32_layers=tuple(graph.layers)[:9]), tmp_path / "encoder.onnx"
        )
        predictor = Predictor(load_engine(tmp_path))
        predictor.set_image(scene(5, 0, size=(96, 128)).image)
        masks, _, _ = predictor.predict(box=np.array([5.0, 5.0, 90.0, 80.0]))
        assert masks.shape == (3, 96, 128)


def inferred(proto):
    return onnx.shape_inference.infer_shapes(proto).graph.value_info


@pytest.fixture
def lossy():
    """y = ((x + 1000) - 1000) * 3 * 1: fp16 loses the digits in the sum."""
    operations = {"sum/Add": "Add", "sum/Sub": "Sub", "sum/Mul": "Mul", "scale/Mul": "Mul"}
    names = ["x", "a", "b", "c", "y"]
    nodes = [helper.make_node(op, [names[i], "kd"[i > 1]], [names[i + 1]]) for i, op in enumerate(operations.values())]
    model = small(nodes, {"k": 1000.0, "d": 1.5})
    for node, name in zip(model.graph.node, operations):
        node.name = name
    return FloatGraph(model)


class ToyJudge:
    """The first output alone, for graphs that have no masks."""

    feeds: ClassVar = [{"x": np.array([0.1, 0.2, 0.3, 0.7], np.float32)}]

    def __init__(self, graph):
        self.expected = run(graph.model, self.feeds)[0]

    def __call__(self, model):
        return Deviation(relative_error(self.expected, run(model, self.feeds)[0]), 0.0)


class TestChoice:
    def test_the_search_adds_what_helps_most_and_takes_back_what_is_not_missed(self, lossy):
        lines = []
        choice = choose_islands(lossy, ToyJudge(lossy), say=lines.append)
        assert choice.by_range == ()
        assert choice.naive.relative > 0.1
        assert [module for module, _ in choice.steps] == ["sum"]
        assert choice.islands == ("sum/Add", "sum/Sub")
        assert choice.deviation.relative < 1e-3
        assert len(lines) == 2

    def test_bounds_nobody_can_keep(self, lossy):
        """Where no module alone helps, the search says so."""
        for node, name in zip(lossy.model.graph.node, ("one/Add", "two/Sub", "three/Mul", "four/Mul")):
            node.name = name
        graph = FloatGraph(lossy.model)
        with pytest.raises(ValueError, match=r"No set of float32 islands was found that keeps fp16 within 0.01 of"):
            choose_islands(graph, ToyJudge(graph))


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--precision", "fp8"], "precision must be one of fp32, fp16, int8, got 'fp8'"),
            (["--precision", "int8"], "int8 is for the encoder's convolutions: name --part encoder"),
        ],
    )
    def test_bad_requests(self, arguments, message, tmp_path, capsys):
        given = ["export", "efficientvit-sam-mini", "--weights", "mini", "--out", str(tmp_path / "out"), *arguments]
        assert main(given) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_fp16_and_int8_with_the_shipped_weights(self, tmp_path, capsys):
        given = ["export", "efficientvit-sam-mini", "--weights", "mini", "--out"]
        assert main([*given, str(tmp_path / "half"), "--part", "all", "--precision", "fp16"]) == 0
        assert main(["verify", str(tmp_path / "half")]) == 0
        assert main([*given, str(tmp_path / "int8"), "--part", "encoder", "--precision", "int8"]) == 0
        path = tmp_path / "int8" / "encoder.onnx"
        assert path.stat().st_size < 0.5 * 7.7e6
        assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
        assert main(["verify", str(tmp_path / "int8")]) == 0
        assert (
            as_computed(path, Card.from_properties({p.key: p.value for p in onnx.load(path).metadata_props}, source=""))
            == path.read_bytes()
        )
