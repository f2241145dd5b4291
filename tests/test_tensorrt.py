"""TensorRT without TensorRT: fakes that know the names of the 10.16 and 11.4 bindings, and no others, record the calls.

Their engines compute, on the addresses they are given, so wrong addresses, shapes and streams show. What real builders
say of the graphs, `tests/tensorrt_rtx.py` finds out.
"""

import ctypes
import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import onnx
import pytest
import torch

from evsam_lib.deploy import tensorrt as ours
from evsam_lib.deploy.card import Port, read_card
from evsam_lib.deploy.plans import PACKAGES, Origin, Profile, find_package
from evsam_lib.deploy.tensorrt import TensorRtGraph, build, main
from tests.test_onnx import relabelled

GPU, CAPABILITY = "NVIDIA H200 sm90", "sm90"


class Closed:
    """An object with the given attributes only, as a binding has them."""

    def __init__(self, calls, **attributes):
        self.__dict__["calls"] = calls
        self.__dict__.update(attributes)

    def __setattr__(self, name, value):
        assert name in self.__dict__, f"the binding has no attribute {name}"
        self.calls.append((name, value))
        self.__dict__[name] = value


def fake_tensorrt(version, calls, *, parses=True, builds=True, loads=True):
    """The names of a binding that `evsam_lib.deploy.tensorrt` uses; everything else is an AttributeError."""
    trt = ModuleType("tensorrt")
    trt.__version__ = version
    record = lambda name, result=None: lambda *args: (calls.append((name, *args)), result)[1]  # noqa: E731
    trt.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    trt.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    trt.BuilderFlag = SimpleNamespace(VERSION_COMPATIBLE="version_compatible")
    if version.startswith("10."):  # 11 has neither the old switches nor a need for this one
        trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        trt.BuilderFlag.FP16 = "fp16"
    timing = SimpleNamespace(serialize=lambda: b"timings")
    config = Closed(
        calls,
        builder_optimization_level=3,
        set_memory_pool_limit=record("set_memory_pool_limit"),
        set_flag=record("set_flag"),
        add_optimization_profile=record("add_optimization_profile"),
        create_timing_cache=record("create_timing_cache", timing),
        set_timing_cache=record("set_timing_cache", True),
        get_timing_cache=record("get_timing_cache", timing),
    )
    profile = SimpleNamespace(set_shape=record("set_shape"), set_shape_input=record("set_shape_input"))
    builder = SimpleNamespace(
        create_network=record("create_network", SimpleNamespace(num_layers=3)),
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=record("build_serialized_network", b"plan" if builds else None),
    )
    parser = SimpleNamespace(
        parse_from_file=record("parse_from_file", parses),
        num_errors=1,
        get_error=lambda i: "In node 366: INVALID_NODE\nand more",
    )
    trt.Builder = lambda logger: builder
    trt.OnnxParser = lambda network, logger: parser
    trt.Runtime = lambda logger: Closed(
        calls,
        engine_host_code_allowed=False,
        deserialize_cuda_engine=record("deserialize_cuda_engine", FakeEngine(calls) if loads else None),
    )
    return trt


class FakeEngine:
    """embedding = the mean of each image, in every one of (128, 32, 32) cells."""

    def __init__(self, calls):
        self.calls, self.shapes, self.addresses = calls, {}, {}

    def create_execution_context(self):
        return SimpleNamespace(
            set_input_shape=self.shapes.__setitem__,
            set_tensor_address=self.addresses.__setitem__,
            get_tensor_shape=lambda name: (self.shapes["images"][0], 128, 32, 32),
            execute_async_v3=self.run,
        )

    def is_shape_inference_io(self, name):
        return name == "original_size"

    def get_tensor_profile_shape(self, name, profile):
        return (1, 3, 256, 256), (1, 3, 256, 256), (4, 3, 256, 256)

    def run(self, stream):
        self.calls.append(("execute_async_v3", stream, dict(self.shapes)))
        images, embedding = (
            self.memory(*item)
            for item in (("images", self.shapes["images"]), ("embedding", (self.shapes["images"][0], 128, 32, 32)))
        )
        embedding[:] = images.mean(dim=(1, 2, 3), keepdim=True)
        return True

    def memory(self, name, shape):
        count = torch.Size(shape).numel()
        return torch.frombuffer((ctypes.c_float * count).from_address(self.addresses[name]), dtype=torch.float32).view(
            shape
        )


@pytest.fixture
def exported(mini_onnx, tmp_path):
    """A folder with an encoder's card on the smallest graph there is: fakes do not look inside."""
    card = replace(read_card(mini_onnx / "encoder.onnx"), inputs=(image_port(),), uint8_input=False)
    graph = onnx.helper.make_graph([], "none", [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, card.to_properties())
    onnx.save(model, tmp_path / "encoder.onnx")
    return tmp_path / "encoder.onnx"


def image_port():
    return Port("images", ("batch", 3, 256, 256), "float32", "")


@pytest.fixture
def install(monkeypatch):
    """Puts a fake in TensorRT's place, and a CPU in the GPU's."""
    calls = []

    def put(version, *, package="tensorrt", gpu=GPU, **options):
        trt = fake_tensorrt(version, calls, **options)
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: trt if name == package else found(name))
        monkeypatch.setitem(sys.modules, package, trt)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(ours, "_gpu", lambda: gpu)
        monkeypatch.setattr(ours, "_gpu_capability", lambda: gpu.split()[-1])
        monkeypatch.setattr(ours, "_stream", lambda device: 77)
        monkeypatch.setattr(ours, "_capture", _capture(calls))
        return calls

    return put


def _capture(calls):
    def capture(work, device):
        results = work()
        calls.append(("capture",))

        def replay():
            calls.append(("replay",))
            for name, value in work().items():
                results[name].copy_(value)

        return replay, results

    return capture


def called(calls, name):
    return [call[1:] for call in calls if call[0] == name]


class TestBuild:
    @pytest.mark.parametrize(("version", "flags"), [("10.16.1.11", 2), ("11.4.0.106", 0)])
    def test_calls(self, version, flags, exported, install):
        calls = install(version)
        lines = []
        profile = Profile(batch=(1, 4, 16))
        plan = build(exported, profile=profile, level=5, workspace_gb=2, version_compatible=True, say=lines.append)
        assert called(calls, "create_network") == [(flags,)]
        assert called(calls, "parse_from_file") == [(str(exported),)]
        assert called(calls, "set_memory_pool_limit") == [("workspace", 2 * 2**30)]
        assert called(calls, "builder_optimization_level") == [(5,)]
        assert called(calls, "set_flag") == [("version_compatible",)]  # and no switch of precision
        assert called(calls, "set_shape") == [("images", (1, 3, 256, 256), (4, 3, 256, 256), (16, 3, 256, 256))]
        assert called(calls, "create_timing_cache") == [(b"",)]
        assert plan.read_bytes() == b"plan"
        for part in ("efficientvit-sam-mini-encoder-fp32", f"tensorrt{version}-vc", "NVIDIA_H200_sm90"):
            assert part in plan.name
        assert json.loads(plan.with_suffix(".json").read_text())["profile"]["batch"] == [1, 4, 16]
        assert "3 layers parsed" in lines[0]
        assert not list(exported.parent.glob(".*"))

    def test_found_again_and_timed_once(self, exported, install):
        calls = install("11.4.0.106")
        plan = build(exported)
        assert build(exported) == plan
        assert len(called(calls, "build_serialized_network")) == 1
        other = build(exported, profile=Profile(batch=(2, 2, 2)))
        assert other != plan
        assert called(calls, "create_timing_cache") == [(b"",), (b"timings",)]

    def test_sizes_are_values_not_shapes(self, mini_onnx, tmp_path, install):
        calls = install("11.4.0.106")
        (tmp_path / "decoder.onnx").write_bytes((mini_onnx / "decoder.onnx").read_bytes())
        build(tmp_path / "decoder.onnx", profile=Profile(height=(10, 20, 30), width=(40, 50, 60)))
        assert called(calls, "set_shape_input") == [("original_size", [10, 40], [20, 50], [30, 60])]
        shapes = {name: (least, most) for name, least, _, most in called(calls, "set_shape")}
        assert shapes["coords"] == ((1, 1, 1, 2), (8, 16, 8, 2))
        assert shapes["mask_input"] == ((1, 1, 1, 128, 128), (8, 16, 1, 128, 128))

    @pytest.mark.parametrize(
        ("version", "options", "error", "message"),
        [
            ("10.9.0", {}, ValueError, "TensorRT 10.9.0 is too old for these graphs; take 10.12 or later"),
            ("11.4.0", {"parses": False}, ValueError, "does not parse in TensorRT 11.4.0: In node 366: INVALID_NODE$"),
            (
                "11.4.0",
                {"builds": False},
                RuntimeError,
                "tensorrt 11.4.0 built no engine .* allow more than 4 GB by --workspace-gb",
            ),
        ],
    )
    def test_failures(self, version, options, error, message, exported, install):
        install(version, **options)
        with pytest.raises(error, match=message):
            build(exported)
        assert [file.name for file in exported.parent.iterdir()] == ["encoder.onnx"]

    def test_int8_for_cpus(self, exported, install):
        install("11.4.0.106")
        graph = onnx.load(exported)
        onnx.helper.set_model_props(graph, replace(read_card(exported), precision="int8").to_properties())
        onnx.save(graph, exported)
        with pytest.raises(ValueError, match=r"is int8 for CPUs, .* build the fp16 export"):
            build(exported)

    def test_for_a_gpu_elsewhere(self, exported, install):
        install("11.4.0.106")
        with pytest.raises(ValueError, match="Only tensorrt_rtx builds for a GPU that is not here"):
            build(exported, capability="8.9")

    def test_lean_builds_nothing(self, exported, install):
        install("11.4.0.106", package="tensorrt_lean")
        with pytest.raises(ValueError, match="tensorrt_lean runs engines and builds none"):
            build(exported, package="tensorrt_lean")


class TestRun:
    @pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
    @pytest.mark.parametrize("cuda_graphs", [False, True])
    def test_tensors_in_and_out(self, version, cuda_graphs, exported, install):
        calls = install(version)
        graph = TensorRtGraph(exported, cuda_graphs=cuda_graphs, device="cpu")
        for batch in (2, 1, 2):
            images = torch.randn(batch, 3, 256, 256).double()[:, :, ::1]
            embedding = graph(images=images)["embedding"]
            assert embedding.shape == (batch, 128, 32, 32)
            expected = images.float().mean(dim=(1, 2, 3), keepdim=True)
            torch.testing.assert_close(embedding, expected.expand_as(embedding))
        streams = {stream for stream, _ in called(calls, "execute_async_v3")}
        assert streams == {77}
        assert len(called(calls, "capture")) == (2 if cuda_graphs else 0)
        assert len(called(calls, "replay")) == (3 if cuda_graphs else 0)

    def test_results_outlive_the_next_run(self, exported, install):
        install("11.4.0.106")
        graph = TensorRtGraph(exported, device="cpu")
        first = graph(images=torch.ones(1, 3, 256, 256))["embedding"]
        graph(images=torch.zeros(1, 3, 256, 256))
        assert (first == 1).all()

    def test_few_graphs_are_kept(self, exported, install, monkeypatch):
        install("11.4.0.106")
        monkeypatch.setattr(ours, "_KEPT_GRAPHS", 2)
        graph = TensorRtGraph(exported, device="cpu")
        for batch in (1, 2, 3, 4):
            graph(images=torch.ones(batch, 3, 256, 256))
        assert len(graph._recorded) == 2

    def test_shape_outside_the_profile(self, exported, install):
        install("11.4.0.106")
        graph = TensorRtGraph(exported, profile=Profile(batch=(1, 1, 4)), device="cpu")
        message = (
            r"images has shape \(5, 3, 256, 256\), this engine was built for batch 1 to 4; build it .* --batch LEAST"
        )
        with pytest.raises(ValueError, match=message):
            graph(images=torch.zeros(5, 3, 256, 256))
        with pytest.raises(ValueError, match=r"\(1, 3, 512, 512\)"):
            graph(images=torch.zeros(1, 3, 512, 512))
        with pytest.raises(ValueError, match="encoder takes images, got picture"):
            graph(picture=torch.zeros(1))

    def test_version_compatible_engines_bring_their_runtime(self, exported, install):
        install("11.4.0.106")
        plan = build(exported, version_compatible=True)
        calls = install("11.5.0.1", package="tensorrt_lean")
        TensorRtGraph(plan, package="tensorrt_lean", device="cpu")
        assert called(calls, "engine_host_code_allowed") == [(True,)]

    def test_refuses_another_gpu_version_and_precision(self, exported, install):
        install("10.16.1.11")
        plan = build(exported)
        install("10.16.1.11", gpu="NVIDIA A100 sm80")
        with pytest.raises(
            ValueError, match=r"was built for NVIDIA H200 sm90, this machine has NVIDIA A100 sm80; build"
        ):
            TensorRtGraph(plan)
        install("11.4.0.106")
        with pytest.raises(
            ValueError, match=r"was built by tensorrt 10.16.1.11, here is tensorrt 11.4.0.106; build it"
        ):
            TensorRtGraph(plan)
        with pytest.raises(ValueError, match=r"computes in fp32, not fp16: .* --precision fp16"):
            TensorRtGraph(exported, precision="fp16")
        (plan.with_suffix(".json")).unlink()
        with pytest.raises(FileNotFoundError, match=r"No .*\.json in"):
            TensorRtGraph(plan)

    def test_engine_that_does_not_load(self, exported, install):
        install("11.4.0.106", loads=False)
        with pytest.raises(RuntimeError, match=r"does not load in tensorrt 11.4.0.106"):
            TensorRtGraph(exported)


class TestOrigin:
    ORIGIN = Origin("m", "encoder", "fp16", "0", "tensorrt", "10.14.1", GPU, True)

    @pytest.mark.parametrize(
        ("package", "version", "runs"),
        [
            ("tensorrt", "10.14.1", True),
            ("tensorrt", "10.16.0", True),
            ("tensorrt_lean", "10.16.0", True),
            ("tensorrt", "10.9.5", False),  # older, though 9 sorts after 1
            ("tensorrt", "11.0.0", False),
            ("tensorrt_rtx", "10.14.1", False),
        ],
    )
    def test_version_compatible(self, package, version, runs):
        assert (self.ORIGIN.refusal(package, version, GPU, CAPABILITY) is None) is runs
        strict = replace(self.ORIGIN, version_compatible=False)
        same = (package, version) == ("tensorrt", "10.14.1")
        assert (strict.refusal(package, version, GPU, CAPABILITY) is None) is same

    def test_built_elsewhere_for_this_capability(self):
        origin = replace(self.ORIGIN, gpu="sm89")
        assert origin.refusal("tensorrt", "10.14.1", "NVIDIA L4 sm89", "sm89") is None
        assert "was built for sm89, this machine has" in origin.refusal("tensorrt", "10.14.1", GPU, CAPABILITY)

    def test_profiles(self):
        with pytest.raises(ValueError, match=r"batch of a profile is least, usual, most.*got \(4, 2, 8\)"):
            Profile(batch=(4, 2, 8))
        assert Profile().shapes(("batch", 3)) == [(1, 3), (1, 3), (8, 3)]


class TestMissing:
    @pytest.mark.parametrize("package", list(PACKAGES))
    def test_not_installed(self, package, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert main(["build", str(tmp_path), "--package", package]) == 2
        message = capsys.readouterr().err
        assert f"not run: {package} missing; get it by pip install" in message
        assert len(message.splitlines()) == 1

    def test_bindings_without_libraries(self, install, monkeypatch):
        install("11.4.0.106")
        monkeypatch.setattr(importlib, "import_module", _fails)
        with pytest.raises(
            ModuleNotFoundError, match=r"not run: tensorrt does not load \(libnvinfer.so.11: .*\); get it by"
        ):
            find_package("tensorrt")

    def test_unknown_package(self):
        with pytest.raises(ValueError, match="TensorRT comes as tensorrt, tensorrt_rtx, tensorrt_lean, got 'trt'"):
            find_package("trt")

    def test_no_gpu(self, exported, install, monkeypatch, capsys):
        install("11.4.0.106")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["build", str(exported.parent)]) == 2
        assert "not run: tensorrt builds for the GPU it finds, and there is none here." in capsys.readouterr().err

    def test_no_graph(self, install, tmp_path, capsys):
        install("11.4.0.106")
        assert main(["build", str(tmp_path), "--part", "encoder"]) == 2
        assert "No encoder.onnx in" in capsys.readouterr().err

    def test_foreign_graph(self, mini_onnx, install, tmp_path, capsys):
        install("11.4.0.106")
        relabelled(mini_onnx, tmp_path, {"evsam_format": None})
        assert main(["build", str(tmp_path)]) == 2
        assert "was not written by evsam_lib" in capsys.readouterr().err

    def test_the_command_line_builds(self, exported, install, capsys):
        calls = install("11.4.0.106")
        assert main(["build", str(exported.parent), "--batch", "3", "--level", "1"]) == 0
        assert called(calls, "set_shape")[0][1:] == ((3, 3, 256, 256),) * 3
        assert called(calls, "builder_optimization_level") == [(1,)]
        assert "encoder-fp32" in capsys.readouterr().out


def _fails(name):
    raise ImportError("libnvinfer.so.11: cannot open shared object file")
