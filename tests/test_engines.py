"""Engines: one interface, the accuracy gate before anything else, and what is said when one cannot run."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from evsam_lib import Predictor, load_model
from evsam_lib.data.generate import scene
from evsam_lib.deploy import engines
from evsam_lib.deploy.engines import with_engine
from evsam_lib.deploy.gate import Accuracy, Gate
from evsam_lib.models.fast import with_encoder


@pytest.fixture(scope="module")
def mini():
    return load_model("efficientvit-sam-mini", "mini")


@pytest.fixture(scope="module")
def gate(mini):
    return Gate(mini, images=1)


class Broken(nn.Module):
    """An encoder whose embedding comes out wrong."""

    def __init__(self, encoder, change):
        super().__init__()
        self.encoder, self.change = encoder, change

    def forward(self, images):
        return self.change(self.encoder(images))


class TestGate:
    def test_the_model_itself_passes(self, mini, gate):
        assert gate(mini) == Accuracy(0.0, 1.0, 0)

    def test_error_and_iou_by_hand(self, mini, gate):
        """The embedding is 1 % too large; an empty engine has no mask in common."""
        found = gate(with_encoder(mini, Broken(mini.image_encoder, lambda x: 1.01 * x)))
        assert found.embedding_error == pytest.approx(0.01, rel=1e-3)
        assert 0.9 < found.mask_iou < 1
        assert "embedding error 0.01 is above 1e-05, the bound of fp32" in found.failure("fp32")

    def test_an_overflow_is_named(self, mini, gate):
        found = gate(with_encoder(mini, Broken(mini.image_encoder, lambda x: x / 0)))
        assert "values are NaN or infinite" in found.failure("fp16")

    @pytest.mark.parametrize(
        ("accuracy", "precision", "words"),
        [
            (Accuracy(9e-6, 0.9995, 0), "fp32", ""),
            (Accuracy(2e-5, 1.0, 0), "fp32", "embedding error 2e-05 is above 1e-05"),
            (Accuracy(2e-3, 0.97, 0), "bf16", ""),
            (Accuracy(2e-3, 0.5, 0), "bf16", "mask IoU 0.5000 is below 0.95, the bound of bf16"),
            (Accuracy(float("nan"), 1.0, 0), "bf16", "embedding error nan"),
        ],
    )
    def test_which_number_failed(self, accuracy, precision, words):
        failure = accuracy.failure(precision)
        assert words in failure and bool(failure) == bool(words)

    def test_a_half_precision_reference_is_refused(self):
        with pytest.raises(ValueError, match="held to a float32 model"):
            Gate(load_model("efficientvit-sam-mini", dtype=torch.bfloat16))


class TestInterface:
    @pytest.mark.parametrize(("engine", "precision"), [("fused", "fp32"), ("fused", "bf16")])
    def test_predictor(self, mini, gate, engine, precision):
        predictor = Predictor(mini, engine=engine, precision=precision)
        assert gate(predictor.model).failure(precision) == ""
        image = scene(0, 5, size=(96, 128)).image
        predictor.set_image(image)
        masks, _, _ = predictor.predict(box=np.array([10.0, 10.0, 90.0, 70.0]))
        assert masks.shape == (3, 96, 128) and predictor.features.dtype == torch.float32

    def test_eager_is_the_model_itself(self, mini):
        assert Predictor(mini).model is mini and with_engine(mini) is mini

    @pytest.mark.parametrize(
        ("request_", "error", "words"),
        [
            ({"engine": "opnvino"}, ValueError, "Unknown engine 'opnvino'; there are .* Did you mean 'openvino'?"),
            ({"precision": "bf16"}, ValueError, "eager knows fp32, got precision 'bf16'"),
            ({"engine": "fused", "precision": "int4"}, ValueError, "fused knows fp32, bf16, fp16, got .*int4"),
        ],
    )
    def test_wrong_requests(self, mini, request_, error, words):
        with pytest.raises(error, match=words):
            with_engine(mini, **request_)

    @pytest.mark.parametrize("package", ["openvino", "onnxruntime", "tensorrt"])
    def test_a_missing_package_is_named_with_its_remedy(self, mini, monkeypatch, package):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
        with pytest.raises(ModuleNotFoundError, match=rf"^{package} missing; get it by pip install 'evsam\["):
            with_engine(mini, package)

    def test_a_device_it_does_not_run_on(self, mini, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
        with pytest.raises(ValueError, match="tensorrt runs on cuda, efficientvit-sam-mini is on cpu"):
            with_engine(mini, "tensorrt")

    def test_a_half_precision_model_is_refused(self):
        with pytest.raises(ValueError, match="made from a float32 model in evaluation mode"):
            with_engine(load_model("efficientvit-sam-mini", dtype=torch.bfloat16), "fused")


class TestCache:
    def test_other_weights_and_other_code_have_other_folders(self, mini, tmp_path, monkeypatch):
        folder = engines._folder(mini, tmp_path)
        assert folder == engines._folder(mini, tmp_path)
        assert folder != engines._folder(load_model("efficientvit-sam-mini"), tmp_path)
        monkeypatch.setattr(engines, "_source", lambda: "changed")
        assert folder != engines._folder(mini, tmp_path)

    def test_root(self, monkeypatch):
        monkeypatch.setenv("EVSAM_ENGINES_ROOT", "elsewhere")
        assert str(engines.engines_root()) == "elsewhere"


@pytest.mark.slow
class TestFiles:
    def test_exported_engines(self, mini, gate, tmp_path):
        """onnxruntime exports, OpenVINO finds the files again."""
        pytest.importorskip("openvino")
        times = set()
        for engine, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
            behind = with_engine(mini, engine, precision=precision, cache=tmp_path)
            assert gate(behind).failure(precision) == ""
            times |= {file.stat().st_mtime_ns for file in tmp_path.glob("*/onnx-*/*.onnx")}
        assert len(times) == 2  # encoder and decoder, written once

    def test_ahead_of_time(self, mini, tmp_path):
        """A small encoder: that of the model takes a minute to compile."""
        small = with_encoder(mini, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU()).eval())
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        for _ in range(2):  # made, then found
            with torch.inference_mode():
                found = with_engine(small, "aoti", cache=tmp_path).encode(images)
                torch.testing.assert_close(found, small.encode(images), atol=1e-5, rtol=0)
        assert len(list(tmp_path.glob("*/aoti-fp32-*/encoder-batch2.pt2"))) == 1
