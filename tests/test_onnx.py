"""ONNX: the exported graphs give PyTorch's masks, whoever forgets the padding point; files whole or not there.

Quick tests export one encoder and one decoder of the mini model. The slow ones are for the other choices and models;
`verify` does the comparing there, which the quick tests check with their own hands.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from evsam_lib import Predictor, load_model
from evsam_lib.data.generate import scene
from evsam_lib.data.transforms import LongestSide, Stretch, resized_hw
from evsam_lib.deploy import card as cards
from evsam_lib.deploy import mend
from evsam_lib.deploy import onnx as exporter
from evsam_lib.deploy.graphs import DecoderGraph, EncoderGraph, upscale, with_padding_point
from evsam_lib.deploy.onnx import export, load_weights, main
from evsam_lib.deploy.runtime import Graph, load_engine, pixel_inputs
from evsam_lib.deploy.verify import Row, verify
from evsam_lib.models.efficientvit import relu_linear_attention
from evsam_lib.models.prompt_encoder import join_prompts, prompt_tokens
from evsam_lib.models.zoo import ZOO
from tests.golden import fill

IMAGE = scene(3, 0, size=(120, 180)).image
POINTS = np.array([[[40.0, 50.0], [120.0, 80.0]], [[100.0, 20.0], [10.0, 110.0]], [[60.0, 60.0], [170.0, 5.0]]])
LABELS = np.array([[1, 0], [1, 1], [1, 0]])
BOXES = np.array([[5.0, 5.0, 80.0, 60.0], [40.0, 20.0, 160.0, 110.0], [0.0, 0.0, 180.0, 120.0]])
GOLDEN = Path(__file__).parent / "golden"
ATOL = 1e-3  # logits of up to 100 at these weights, whose last digit is 1e-5


@pytest.fixture
def folder(mini_onnx):
    """The encoder for bytes, and the decoder with everything it can have."""
    return mini_onnx


@pytest.fixture(scope="module")
def predictors(mini, mini_onnx):
    """Eager PyTorch's and the exported folder's, the same image set."""
    both = Predictor(mini[0]), Predictor(load_engine(mini_onnx))
    for predictor in both:
        predictor.set_image(IMAGE)
    return both


class TestParity:
    def test_embedding(self, predictors):
        eager, exported = predictors
        torch.testing.assert_close(exported.features, eager.features, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("multimask", [True, False])
    @pytest.mark.parametrize("kind", ["point", "box", "both", "mask", "mask_and_point"])
    def test_predict(self, predictors, kind, multimask):
        mask = np.random.default_rng(0).normal(size=(1, 128, 128))
        prompt = {
            "point": {"point_coords": POINTS[0], "point_labels": LABELS[0]},
            "box": {"box": BOXES[1]},
            "both": {"point_coords": POINTS[0], "point_labels": LABELS[0], "box": BOXES[1]},
            "mask": {"mask_input": mask},
            "mask_and_point": {"point_coords": POINTS[0], "point_labels": LABELS[0], "mask_input": mask},
        }[kind]
        expected, ours = (p.predict(**prompt, multimask_output=multimask, return_logits=True) for p in predictors)
        for mine, theirs, atol in zip(ours, expected, (ATOL, 1e-5, ATOL), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=atol, rtol=0)

    @pytest.mark.parametrize("count", [0, 1, 3])
    @pytest.mark.parametrize("select", ["all", "best"])
    def test_predict_batch(self, predictors, count, select):
        prompt = {"points": POINTS[:count], "labels": LABELS[:count], "boxes": BOXES[:count], "select": select}
        expected, ours = (p.predict_batch(**prompt, return_logits=True) for p in predictors)
        for mine, theirs, atol in zip(ours, expected, (ATOL, 1e-5, ATOL), strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, atol=atol, rtol=0)

    def test_masks_at_the_original_size(self, predictors, folder):
        eager, exported = predictors
        decoder = Graph(folder / "decoder.onnx")
        coords, labels = join_prompts(None, None, exported.model.to_frame(BOXES, IMAGE.shape[:2])[None])
        for hw in (IMAGE.shape[:2], (33, 150), (600, 81)):
            found = decoder(
                embedding=eager.features,
                coords=coords,
                labels=labels,
                mask_input=torch.zeros(1, 3, 1, 128, 128),
                has_mask=torch.zeros(1, 3, dtype=torch.bool),
                original_size=torch.tensor(hw),
            )
            expected = eager.model.upscale(found["low_res"][0], hw)
            torch.testing.assert_close(found["masks"][0], expected, atol=ATOL, rtol=0)


class TestPaddingPoint:
    def test_the_graph_gives_the_predictors_masks_without_being_told(self, predictors, folder):
        """The official demos pass the points alone, and get other masks."""
        eager, _ = predictors
        coords = eager.model.to_frame(POINTS, IMAGE.shape[:2])[None]
        labels = torch.as_tensor(LABELS)[None]
        _, expected_iou, expected = eager.predict_batch(points=POINTS, labels=LABELS)
        found = load_engine(folder).decode(eager.features, coords, labels)
        np.testing.assert_allclose(found[0][0], expected, atol=ATOL, rtol=0)
        np.testing.assert_allclose(found[1][0], expected_iou, atol=1e-5, rtol=0)
        with torch.inference_mode():
            naive, _ = eager.model.decode(eager.features, coords, labels)
        assert (naive[0] - torch.from_numpy(expected)).abs().max() > 100 * ATOL  # or this would prove nothing

    def test_who_gets_one(self):
        labels = torch.tensor([[[1, 0], [2, 3], [1, -1], [-2, -2], [0, -2], [-1, -2]]])
        coords, codes = with_padding_point(torch.ones(1, 6, 2, 2), labels)
        assert codes[0, :, 2].tolist() == [-1, -2, -2, -2, -1, -2]
        assert coords.shape == (1, 6, 3, 2)
        assert not coords[:, :, 2].any()

    def test_prompts_of_different_lengths_in_one_call(self, mini):
        graph = DecoderGraph(mini[0]).eval()
        embedding = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(0))
        coords = torch.as_tensor(POINTS[None], dtype=torch.float32)
        labels = torch.tensor([[[1, -2], [1, 0], [2, 3]]])
        with torch.inference_mode():
            low_res, _ = graph(embedding, coords, labels)
            for n, length in enumerate((1, 2, 2)):
                points, codes = coords[:, n : n + 1, :length], labels[:, n : n + 1, :length]
                tokens = (points, codes) if codes.max() > 1 else prompt_tokens(points, codes)
                expected, _ = mini[0].decode(embedding, *tokens)
                torch.testing.assert_close(low_res[:, n : n + 1, 1:], expected, atol=1e-4, rtol=1e-4)


class TestGraphs:
    """The modules that are exported, in PyTorch."""

    @pytest.mark.parametrize("shape", [(120, 180), (300, 40), (256, 256)])
    def test_bytes_become_what_preprocess_makes(self, mini, shape):
        model = mini[0]
        image = scene(1, 0, size=shape).image
        inputs = pixel_inputs(image, model.frame)
        inputs["images"][:, inputs["sizes"][0, 0] :] = 77  # padding may be anything
        pixels = EncoderGraph(model, uint8_input=True).pixels(**inputs)
        torch.testing.assert_close(pixels[0], model.preprocess(image), atol=0, rtol=0)

    def test_stretched_bytes(self):
        frame = Stretch(64)
        graph = exporter.build_graph("encoder", _Framed(frame), uint8_input=True)
        pixels = graph.pixels(**pixel_inputs(IMAGE, frame))
        torch.testing.assert_close(pixels[0], frame.preprocess(IMAGE), atol=1e-6, rtol=0)

    def test_upscale_is_the_frames(self):
        logits = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        for frame in (LongestSide(64, 64), Stretch(64)):
            for hw in ((30, 41), (97, 64), (64, 64)):
                ours = upscale(frame, logits, torch.tensor(hw))
                torch.testing.assert_close(ours[0], frame.upscale(logits[0], hw), atol=1e-6, rtol=0)

    def test_sizes_are_rounded_as_officially(self):
        """In whole numbers, since engines have no float64; the official code has floats."""
        for longest in (*range(32, 2500, 7), 2048, 4096, 4032, 5472, 6000):
            short = np.arange(1, longest + 1)
            officially = [resized_hw(int(n), longest, 1024)[0] for n in short[:: max(longest // 50, 1)]]
            ours = (2 * short * 1024 + longest) // (2 * longest)
            assert officially == ours[:: max(longest // 50, 1)].tolist()

    @pytest.mark.parametrize("best_by", ["predicted_iou", "stability"])
    def test_best_is_sams_choice(self, best_by):
        torch.manual_seed(0)
        model = load_model("efficientvit-sam-mini")
        model.best_by = best_by
        embedding = torch.randn(2, 128, 32, 32, generator=torch.Generator().manual_seed(0))
        coords, labels = (
            500 * torch.rand(2, 5, 2, 2, generator=torch.Generator().manual_seed(1)),
            torch.ones(2, 5, 2).long(),
        )
        with torch.inference_mode():
            low_res, iou = DecoderGraph(model, select="best").eval()(embedding, coords, labels)
            every, scores = model.decode(embedding, *prompt_tokens(coords, labels))
        best = model.quality(every, scores).argmax(dim=2, keepdim=True)
        torch.testing.assert_close(iou, scores.take_along_dim(best, dim=2), atol=1e-6, rtol=0)
        torch.testing.assert_close(low_res, every.take_along_dim(best[..., None, None], dim=2), atol=1e-4, rtol=0)


class _Framed(torch.nn.Module):
    """As much of a model as an encoder's input needs."""

    def __init__(self, frame):
        super().__init__()
        self.frame, self.image_size, self.embed_dim, self.grid = frame, frame.image_size, 8, 4
        self.image_encoder = torch.nn.Identity()


class TestFiles:
    def test_clean_and_whole(self, folder):
        assert sorted(file.name for file in folder.iterdir()) == ["decoder.onnx", "encoder.onnx"]
        for file in folder.iterdir():
            graph = onnx.load(file)
            onnx.checker.check_model(graph, full_check=True)
            inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
            assert {value.name for value in inferred.value_info} | {value.name for value in inferred.output} >= {
                name for node in graph.graph.node for name in node.output
            }
            assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [exporter.OPSET]
            for tensor in graph.graph.initializer:
                tensor.ClearField("raw_data")
            text = str(graph)
            assert "site-packages" not in text
            assert ".py" not in text

    def test_operations_are_named_by_module_and_divide_by_a_plain_epsilon(self, folder):
        graph = onnx.load(folder / "encoder.onnx").graph
        nodes = {node.name: node for node in graph.node}
        assert len(nodes) == len(graph.node)
        attention = "image_encoder.backbone.stages.4.op_list.2.context_module.main"
        assert {f"{attention}/MatMul_1", f"{attention}.qkv/Conv", "image_encoder.norm/LayerNormalization"} <= set(nodes)
        values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        np.testing.assert_allclose(values[nodes[f"{attention}/Add"].input[1]], 1e-15, rtol=1e-6)
        assert nodes[f"{attention}/Div"].input[1] == nodes[f"{attention}/Add"].output[0]
        assert max(np.abs(value).max() for value in values.values() if value.dtype == np.float32) < 1e4  # no 2^50 left

    def test_tokens_that_nobody_attends_to_do_not_divide_by_zero(self, tmp_path):
        """The exporter's optimiser takes the attention's eps of 1e-15 for zero and would drop it."""

        class Attention(torch.nn.Module):
            def forward(self, x):
                return relu_linear_attention(x, x, x)

        x = torch.ones(1, 2, 3)
        with mend.quietly():
            torch.onnx.export(Attention().eval(), (x,), tmp_path / "a.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
        for value in (torch.zeros_like(x), 1e-9 * x, x, -x):
            (found,) = session.run(None, {"x": value.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), Attention()(value), atol=0, rtol=1e-6)

    def test_operations(self, mini, folder):
        model, _ = mini
        decoder = [node.op_type for node in onnx.load(folder / "decoder.onnx").graph.node]
        encoder = [node.op_type for node in onnx.load(folder / "encoder.onnx").graph.node]
        norms = [m for m in model.modules() if type(m).__name__ in ("LayerNorm", "LayerNorm2d")]
        assert decoder.count("LayerNormalization") + encoder.count("LayerNormalization") == len(norms)
        assert not {"ReduceMean", "Loop", "If", "Erf", "Tanh"} & {*decoder, *encoder}
        assert decoder.count("Gelu") == 4  # the mask decoder's strips would have two each
        assert encoder.count("BatchNormalization") == 0

    def test_card(self, mini, folder):
        graph = Graph(folder / "decoder.onnx")
        card = graph.card
        assert (card.model, card.part, card.weights, card.opset) == ("efficientvit-sam-mini", "decoder", "mini", 20)
        assert card.frame == ZOO[card.model].frame
        assert card.weights_sha256 == mini[1]["weights_sha256"] != card.state_sha256
        assert [port.name for port in card.inputs] == [value.name for value in graph.session.get_inputs()]
        assert [port.name for port in card.outputs] == [value.name for value in graph.session.get_outputs()]
        for port, value in zip(card.inputs + card.outputs, graph.session.get_inputs() + graph.session.get_outputs()):
            assert tuple(value.shape) == port.shape

    def test_verify(self, mini, folder):
        rows = verify(folder)
        assert len(rows) > 20
        assert all(row.ok for row in rows)
        assert not Row("encoder", "", "", float("nan"), 1.0).ok
        mini_again = load_model("efficientvit-sam-mini", "mini")
        mini_again.mask_decoder.iou_token.weight.data[0, 0] += 1
        with pytest.raises(ValueError, match="other weights"):
            verify(folder, model=mini_again)

    def test_verify_on_the_command_line(self, folder, monkeypatch, capsys):
        rows = [Row("decoder", "3 x box", "iou", 2e-4, 1e-4)]
        monkeypatch.setattr("evsam_lib.deploy.verify.verify", lambda *_, **__: rows)
        assert main(["verify", str(folder)]) == 1
        assert "BEYOND" in capsys.readouterr().out

    def test_a_failure_leaves_the_last_good_file(self, mini, folder, tmp_path, monkeypatch):
        model, known = mini
        shutil.copy(folder / "encoder.onnx", tmp_path)
        before = (tmp_path / "encoder.onnx").read_bytes()
        program = SimpleNamespace(
            model=onnx_ir.load(folder / "encoder.onnx"), save=lambda path, external_data: path.write_bytes(b"half")
        )
        monkeypatch.setattr(exporter, "_trace", lambda graph, card: program)
        with pytest.raises(onnx.checker.ValidationError):
            export(model, tmp_path, parts=("encoder",), **known)
        assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]
        assert (tmp_path / "encoder.onnx").read_bytes() == before

    def test_weights_too_large_for_one_file_lie_beside_it(self, mini, folder, tmp_path, monkeypatch):
        program = torch.onnx.ONNXProgram(onnx_ir.load(folder / "encoder.onnx"), None)
        monkeypatch.setattr(exporter, "_trace", lambda graph, card: program)
        monkeypatch.setattr(exporter, "ONE_FILE_BYTES", 1000)
        export(mini[0], tmp_path, parts=("encoder",), uint8_input=True, **mini[1])
        assert sorted(file.name for file in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
        assert (tmp_path / "encoder.onnx").stat().st_size < 200_000
        inputs = pixel_inputs(IMAGE, mini[0].frame)
        graphs = Graph(tmp_path / "encoder.onnx"), Graph(folder / "encoder.onnx")
        torch.testing.assert_close(*(graph(**inputs)["embedding"] for graph in graphs), atol=0, rtol=0)


@pytest.mark.slow
class TestOtherChoices:
    """Seconds each: one export of every kind that the quick tests leave out."""

    def test_pipeline_from_bytes_to_the_best_mask_in_an_old_opset(self, tmp_path, capsys):
        options = ["--part", "pipeline", "--uint8-input", "--select", "best", "--upsample", "--opset", "18"]
        assert main(["export", "efficientvit-sam-mini", "--weights", "mini", "--out", str(tmp_path), *options]) == 0
        assert main(["verify", str(tmp_path)]) == 0
        assert "comparisons with PyTorch, 0 beyond the bound" in capsys.readouterr().out
        assert Graph(tmp_path / "pipeline.onnx").card.opset == 18

    def test_the_most_sensitive_peer_with_the_official_shapes(self, tmp_path):
        """EdgeSAM multiplies rounding errors by 400; a mean that onnxruntime takes in one go errs by 1e-3."""
        keys = json.loads((GOLDEN / "edge_sam.json").read_text())["keys"]
        torch.save(fill.state_dict(keys), tmp_path / "weights.pt")
        out = str(tmp_path / "out")
        given = ["edge-sam", "--weights", str(tmp_path / "weights.pt"), "--part", "encoder", "--out", out]
        assert main(["export", *given]) == 0
        assert main(["verify", out]) == 2  # whose weights?
        assert main(["verify", out, "--weights", str(tmp_path / "weights.pt")]) == 0

    @pytest.mark.parametrize(("name", "part"), [("sam-vit-mini", "encoder"), ("efficient-sam-ti", "decoder")])
    def test_other_architectures(self, name, part, tmp_path):
        model, known = load_weights(name, "mini" if "mini" in name else "random")
        export(model, tmp_path, parts=(part,), select="best", **known)
        assert all(row.ok for row in verify(tmp_path))


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--opset", "11"], "Opset 11 is too old"),
            (["--opset", "99"], "Opset 99 is unknown"),
            (["--part", "neck"], "Unknown part 'neck'"),
            (["--select", "worst"], "got 'worst'"),
            (["--weights", "nowhere.pt"], "No weight file at nowhere.pt"),
        ],
    )
    def test_command_line(self, arguments, message, tmp_path, capsys):
        given = ["export", "efficientvit-sam-mini", "--weights", "mini", "--out", str(tmp_path / "out"), *arguments]
        assert main(given) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
    def test_missing_package(self, package, monkeypatch, tmp_path, capsys):
        found = cards.importlib.util.find_spec
        monkeypatch.setattr(cards.importlib.util, "find_spec", lambda name: None if name == package else found(name))
        assert main(["verify", str(tmp_path)]) == 2
        assert f"Not installed: {package}. Get it by pip install 'evsam[onnx]'." in capsys.readouterr().err

    def test_folder_without_graphs(self, tmp_path, capsys):
        assert main(["verify", str(tmp_path)]) == 2
        assert "export them first" in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match=r"No encoder.onnx and no decoder.onnx in .*deploy.onnx export"):
            load_engine(tmp_path)

    def test_damaged_and_foreign_files(self, folder, tmp_path):
        (tmp_path / "encoder.onnx").write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="does not load in onnxruntime"):
            Graph(tmp_path / "encoder.onnx")
        with pytest.raises(ValueError, match="was not written by evsam_lib"):
            Graph(relabelled(folder, tmp_path, {"evsam_format": None}))

    def test_another_version(self, folder, tmp_path):
        path = relabelled(folder, tmp_path, {"evsam_format": "0", "study_version": "0.0.9"})
        with pytest.raises(ValueError, match=r"version 0\.0\.9 in format 0.*export efficientvit-sam-mini"):
            Graph(path)

    def test_two_models_in_a_folder(self, folder, tmp_path):
        shutil.copy(folder / "decoder.onnx", tmp_path)
        relabelled(folder, tmp_path, {"state_sha256": "0"})
        with pytest.raises(ValueError, match="different weights"):
            load_engine(tmp_path)

    def test_inputs_of_a_graph(self, folder):
        with pytest.raises(ValueError, match="encoder takes images, sizes, got images"):
            load_engine(folder).encode(torch.zeros(1, 3, 256, 256))

    def test_efficient_sam_has_no_mask_prompts(self):
        model = load_model("efficient-sam-ti")
        with pytest.raises(ValueError, match="no mask prompts"):
            export(model, "nowhere", parts=("decoder",), mask_input=True)

    def test_what_the_decoder_was_not_exported_for(self, predictors):
        model = predictors[1].model
        decoder = SimpleNamespace(card=replace(model.decoder.card, select="best", mask_input=False))
        engine = type(model)(model.encoder, decoder)
        point = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1)
        with pytest.raises(ValueError, match="--mask-input"):
            engine.decode(None, *point, mask_input=torch.zeros(1, 1, 1, 128, 128))
        with pytest.raises(ValueError, match="--select all"):
            engine.decode(None, *point, multimask_output=False)


def relabelled(folder, target, changes):
    """The encoder in another folder, with other metadata; None removes an entry."""
    graph = onnx.load(folder / "encoder.onnx")
    properties = {entry.key: entry.value for entry in graph.metadata_props} | changes
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, {name: value for name, value in properties.items() if value is not None})
    onnx.save(graph, target / "encoder.onnx")
    return target / "encoder.onnx"
