"""TensorRT: exported graphs built into engine files, and run on torch's tensors and streams.

    python -m evsam_lib.deploy.tensorrt build DIR [--batch 1,8,16] [--prompts 1,4,16] [--package tensorrt_rtx]

Networks are strongly typed: the precision is what the ONNX file says (`onnx export --precision fp16`), so the same file
serves TensorRT 10.12 and later and 11, which knows no other way. `tensorrt` and `tensorrt_rtx` build and run,
`tensorrt_lean` runs what was built version-compatible. An engine fits one GPU and one version, and says which.
Notebook 06 tells what would be built.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from evsam_lib.deploy.card import Card, read_card
from evsam_lib.deploy.plans import Origin, Profile, find_package, numbers, read_origin

__all__ = ["TensorRtGraph", "build", "main"]

OLDEST = (10, 12)  # the first whose strongly typed networks know all operations of the graphs
_KEPT_GRAPHS = 8  # CUDA graphs, one for each combination of input shapes


# ---------------------------------------------------------------- building


def build(
    path: str | Path,
    *,
    package: str = "tensorrt",
    profile: Profile | None = None,
    capability: str | None = None,
    version_compatible: bool = False,
    level: int = 3,
    workspace_gb: float = 4.0,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Builds an ONNX file's engine beside it, or finds it there.

    Args:
        path: of the ONNX file.
        package: "tensorrt" or "tensorrt_rtx".
        profile: lengths to build for.
        capability: of the GPU to build for ("8.9"), for tensorrt_rtx, which needs none here; None is this machine's.
        version_compatible: see `Origin`.
        level: of the builder's optimisation, 0 to 5; 5 for publication.
        workspace_gb: memory that the layers may use at run time.
        say: takes lines of progress.

    Returns:
        The engine file; `Origin` lies beside it as .json, timings of layers as .timing.

    Raises:
        ValueError: a package that builds nothing or is too old, or a graph that it does not understand.
        ModuleNotFoundError: the package is missing.
        RuntimeError: no GPU, or the builder failed.
    """
    trt = find_package(package)
    _check_builder(trt, package, capability)
    path, profile = Path(path), profile or Profile()
    card = read_card(path)
    if card.precision == "int8":
        raise ValueError(
            f"{path} is int8 for CPUs, with zero points that TensorRT does not take; build the fp16 export."
        )
    origin = Origin(
        model=card.model,
        part=card.part,
        precision=card.precision,
        graph_sha256=_sha256(path),
        package=package,
        version=trt.__version__,
        gpu=f"sm{capability.replace('.', '')}" if capability else _gpu(),
        version_compatible=version_compatible,
        profile=profile,
    )
    plan = path.parent / origin.file_name
    if plan.is_file() and plan.with_suffix(".json").is_file():
        return plan
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, path)
    config = _config(trt, builder, network, card, origin, level, workspace_gb)
    cache = path.parent / re.sub(r"[^\w.+-]+", "_", f"{package}{trt.__version__}-{origin.gpu}.timing")
    if not capability:  # nothing is timed for a GPU that is not here
        timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        config.set_timing_cache(timings, False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(
            f"{package} {trt.__version__} built no engine of {path}; its log above says why. If memory ran out, allow "
            f"more than {workspace_gb:g} GB by --workspace-gb, or build for less by --batch and --prompts."
        )
    if not capability:
        _replace(cache, bytes(config.get_timing_cache().serialize()))
    _replace(plan, bytes(engine))
    _replace(plan.with_suffix(".json"), json.dumps({**asdict(origin), "card": card.to_properties()}, indent=1).encode())
    say(f"{plan}: {plan.stat().st_size / 1e6:.1f} MB, {network.num_layers} layers parsed")
    return plan


def _check_builder(trt: ModuleType, package: str, capability: str | None) -> None:
    if package == "tensorrt_lean":
        raise ValueError("tensorrt_lean runs engines and builds none; build with tensorrt and --version-compatible.")
    if package == "tensorrt" and numbers(trt.__version__) < OLDEST:
        raise ValueError(f"TensorRT {trt.__version__} is too old for these graphs; take 10.12 or later.")
    if capability and package != "tensorrt_rtx":
        raise ValueError("Only tensorrt_rtx builds for a GPU that is not here; leave the compute capability out.")
    if not capability and not torch.cuda.is_available():
        more = "; name one by --compute-capability" if package == "tensorrt_rtx" else ""
        raise RuntimeError(f"not run: {package} builds for the GPU it finds, and there is none here{more}.")


def _parse(trt: ModuleType, builder, logger, path: Path):
    """The network of an ONNX file, strongly typed: by a flag up to TensorRT 10, from 11 on there is nothing else."""
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)] or ["no reason given"]
        raise ValueError(f"{path} does not parse in TensorRT {trt.__version__}: {errors[0].splitlines()[0]}")
    return network


def _config(trt: ModuleType, builder, network, card: Card, origin: Origin, level: int, workspace_gb: float):
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace_gb * 2**30))
    config.builder_optimization_level = level
    if origin.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if origin.gpu.startswith("sm"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, origin.gpu), 0)
    profile = builder.create_optimization_profile()
    for port in card.inputs:
        if port.name == "original_size":  # its values decide shapes
            spans = zip(origin.profile.height, origin.profile.width, strict=True)
            profile.set_shape_input(port.name, *(list(span) for span in spans))
        else:
            profile.set_shape(port.name, *origin.profile.shapes(port.shape))
    config.add_optimization_profile(profile)
    return config


def _capability(trt: ModuleType, name: str):
    known = [entry for entry in dir(trt.ComputeCapability) if entry.startswith("SM")]
    if name.upper() not in known:
        listed = ", ".join(f"{entry[2:-1]}.{entry[-1]}" for entry in known)
        raise ValueError(f"TensorRT-RTX {trt.__version__} builds for compute capability {listed}; got {name}.")
    return getattr(trt.ComputeCapability, name.upper())


# ---------------------------------------------------------------- running


class TensorRtGraph:
    """One engine, taking and returning torch tensors by the card's names, on torch's current stream.

    Args:
        path: of an engine file, or of an ONNX file whose engine is found beside it or built.
        precision: wanted of an encoder; None takes what the file has.
        package: "tensorrt", "tensorrt_rtx" or "tensorrt_lean".
        profile: lengths to build for, where it has to be built.
        cuda_graphs: record a CUDA graph for every combination of shapes and replay it.
        device: of the tensors.

    Attributes:
        card: what the exported file says of itself.
        origin: of the engine.

    Raises:
        ValueError: the engine is of another GPU or version, or of another precision.
        FileNotFoundError: there is no such file, or its .json is missing.
        ModuleNotFoundError: the package is missing.
        RuntimeError: no GPU, or the engine does not load.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str | None = None,
        package: str = "tensorrt",
        profile: Profile | None = None,
        cuda_graphs: bool = True,
        device: str | torch.device = "cuda",
    ):
        trt = find_package(package)
        path = Path(path)
        if path.suffix == ".onnx":
            _check_precision(read_card(path), precision, path)
            path = build(path, package=package, profile=profile)
        self.origin, self.card = read_origin(path)
        _check_precision(self.card, precision, path)
        if reason := self.origin.refusal(package, trt.__version__, _gpu(), _gpu_capability()):
            raise ValueError(f"{path.name} {reason}.")
        self.device, self.cuda_graphs = torch.device(device), cuda_graphs
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        if self.origin.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such plans bring their own runtime along
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise RuntimeError(f"{path} does not load in {package} {trt.__version__}; its log above says why.")
        self.context = self.engine.create_execution_context()
        self._host = {port.name for port in self.card.inputs if self.engine.is_shape_inference_io(port.name)}
        self._recorded: dict[tuple, tuple] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Runs the engine.

        Raises:
            ValueError: inputs are missing or unknown, or a shape is outside the profile.
        """
        wanted = {port.name for port in self.card.inputs}
        if inputs.keys() != wanted:
            given = ", ".join(sorted(inputs))
            raise ValueError(f"{self.card.part} takes {', '.join(sorted(wanted))}, got {given}.")
        tensors = {port.name: self._placed(port, inputs[port.name]) for port in self.card.inputs}
        self._check_shapes(tensors)
        if not self.cuda_graphs or self._host:
            return self._enqueue(tensors)
        key = tuple(tuple(tensor.shape) for tensor in tensors.values())
        if key not in self._recorded:
            self._record(key, tensors)
        given, results, replay = self._recorded[key]
        for name, tensor in tensors.items():
            given[name].copy_(tensor)
        replay()
        return {name: value.clone() for name, value in results.items()}  # the next replay writes over these

    def _placed(self, port, value: Tensor) -> Tensor:
        device = torch.device("cpu") if port.name in self._host else self.device
        return value.to(device, getattr(torch, port.dtype)).contiguous()

    def _check_shapes(self, tensors: dict[str, Tensor]) -> None:
        for port in self.card.inputs:
            shape = tensors[port.name].shape
            least, _, most = (tuple(dims) for dims in self.engine.get_tensor_profile_shape(port.name, 0))
            inside = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
            if not inside:
                axes = [name for name in port.shape if isinstance(name, str)]
                spans = [
                    f"{name} {getattr(self.origin.profile, name)[0]} to {getattr(self.origin.profile, name)[2]}"
                    for name in axes
                ]
                raise ValueError(
                    f"{port.name} has shape {tuple(shape)}, this engine was built for {', '.join(spans) or least}; "
                    f"build it for more by {' '.join(f'--{name} LEAST,USUAL,MOST' for name in axes)}."
                )

    def _enqueue(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            if name not in self._host:
                self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        results = {}
        for port in self.card.outputs:
            shape = tuple(self.context.get_tensor_shape(port.name))
            results[port.name] = torch.empty(shape, dtype=getattr(torch, port.dtype), device=self.device)
            self.context.set_tensor_address(port.name, results[port.name].data_ptr())
        if not self.context.execute_async_v3(_stream(self.device)):
            raise RuntimeError(f"TensorRT did not run the {self.card.part} of {self.card.model}; its log says why.")
        return results

    def _record(self, key: tuple, tensors: dict[str, Tensor]) -> None:
        """A CUDA graph on tensors of its own; the oldest goes when there are too many."""
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        self._enqueue(given)  # TensorRT sets itself up at the first run of a shape, which cannot be recorded
        replay, results = _capture(lambda: self._enqueue(given), self.device)
        if len(self._recorded) >= _KEPT_GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[key] = given, results, replay


def _check_precision(card: Card, precision: str | None, path: Path) -> None:
    """The decoder may stay in float32: prompts' coordinates ask for it, and it costs little."""
    if precision not in (None, card.precision) and card.part != "decoder":
        raise ValueError(
            f"{path.name} computes in {card.precision}, not {precision}: the precision is written into the graph, so "
            f"export it with `python -m evsam_lib.deploy.onnx export {card.model} --precision {precision}`."
        )


def _gpu() -> str:
    if not torch.cuda.is_available():
        raise RuntimeError("not run: TensorRT runs on an NVIDIA GPU, and torch finds none here.")
    return f"{torch.cuda.get_device_name()} {_gpu_capability()}"


def _gpu_capability() -> str:
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _capture(work: Callable[[], dict[str, Tensor]], device: torch.device) -> tuple[Callable, dict[str, Tensor]]:
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph.replay, results


def _sha256(path: Path) -> str:
    """Of a graph and the weights beside it."""
    digest = hashlib.sha256()
    for file in sorted(path.parent.glob(f"{path.name}*")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        find_package(options.package)
        paths = [path for path in sorted(options.folder.glob("*.onnx")) if options.part in (None, path.stem)]
        if not paths:
            raise FileNotFoundError(f"No {options.part or '*'}.onnx in {options.folder}; export it first.")
        profile = Profile(**{axis.name: getattr(options, axis.name) for axis in fields(Profile)})
        names = ("package", "capability", "version_compatible", "level", "workspace_gb")
        for path in paths:
            build(path, profile=profile, **{name: getattr(options, name) for name in names}, say=print)
    except (ValueError, FileNotFoundError, ModuleNotFoundError, RuntimeError) as error:
        print(f"evsam_lib.deploy.tensorrt: {error}", file=sys.stderr)
        return 2
    return 0


def _span(text: str) -> tuple[int, ...]:
    lengths = tuple(int(part) for part in text.split(","))
    return lengths * 3 if len(lengths) == 1 else lengths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.deploy.tensorrt", description="Builds engines.")
    make = parser.add_subparsers(dest="command", required=True).add_parser("build", help="build a folder's graphs")
    make.add_argument("folder", type=Path, metavar="DIR", help="that `evsam_lib.deploy.onnx export` wrote")
    make.add_argument("--part", help="encoder, decoder or pipeline (default: all that are there)")
    make.add_argument("--package", default="tensorrt", help="tensorrt (the default) or tensorrt_rtx")
    for axis in fields(Profile):
        text = "one length, or least,usual,most (default {},{},{})".format(*getattr(Profile, axis.name))
        make.add_argument(f"--{axis.name}", type=_span, default=axis.default, help=text)
    make.add_argument("--compute-capability", dest="capability", help="to build for, such as 8.9 (tensorrt_rtx)")
    make.add_argument("--version-compatible", action="store_true", help="for later versions and the lean runtime too")
    make.add_argument("--level", type=int, default=3, help="of optimisation, 0 to 5 (default 3)")
    make.add_argument("--workspace-gb", type=float, default=4.0, help="memory of the layers (default 4)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
