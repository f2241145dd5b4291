"""One way to every engine: `Predictor(load_model(...), engine="openvino")`, whatever runs the model behind it.

Some engines run the PyTorch encoder in another way and share the decoder; the others run files, which are exported to
a cache folder at the first use and found there again by the same model with the same weights, code and versions. Every
engine can be held to eager float32 by `gate.Gate`. Notebook 07 times them.

An engine is one row of `ENGINES`. One that runs exported files needs a runner only: a class that is called with the
path of an ONNX file (and `precision=`, if that is not "fp32"), has that file's `card` and the `device` of its tensors,
and takes and returns tensors by the card's names (encoder: images -> embedding; decoder: embedding, coords, labels ->
low_res, iou).
"""

import copy
import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import evsam_lib
from evsam_lib.deploy.card import fingerprint
from evsam_lib.deploy.runtime import OnnxSam
from evsam_lib.models.fast import compiled, fused, with_encoder
from evsam_lib.models.sam import Sam

__all__ = ["DTYPES", "ENGINES", "Engine", "engines_root", "with_engine"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: the key of `ENGINES`.
        build: (model, precision, cache folder) -> the model behind the engine.
        precisions: of the image encoder, that it knows.
        devices: it runs on: "cpu", "cuda".
        packages: that it needs beyond the study's own, by the names they are imported under.
        remedy: how to get them.
    """

    name: str
    build: Callable[[Sam, str, Path], Sam | OnnxSam]
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    packages: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def with_engine(
    model: Sam, engine: str = "eager", *, precision: str = "fp32", cache: str | Path | None = None
) -> Sam | OnnxSam:
    """A model behind an engine; it has what `Predictor` and `gate.Gate` ask of a model.

    Args:
        model: as `load_model` gives it, float32 and in evaluation mode; left as it is.
        engine: a key of `ENGINES`.
        precision: of the image encoder; the decoder works in float32, which a prompt's coordinates need.
        cache: folder of what has to be exported or compiled to files; None is `engines_root()`.

    Raises:
        ValueError: an engine or precision that is not there, a device it does not run on, or a model that is not
            float32 and in evaluation mode.
        ModuleNotFoundError: the engine's package is missing; says how to get it.
    """
    if engine not in ENGINES:
        near = difflib.get_close_matches(engine, ENGINES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown engine {engine!r}; there are {', '.join(ENGINES)}.{hint}")
    row = ENGINES[engine]
    if row.missing:
        raise ModuleNotFoundError(f"{', '.join(row.missing)} missing; {row.remedy}")
    if precision not in row.precisions:
        raise ValueError(f"{engine} knows {', '.join(row.precisions)}, got precision {precision!r}.")
    if model.device.type not in row.devices:
        raise ValueError(f"{engine} runs on {' and '.join(row.devices)}, {model.name} is on {model.device}.")
    if model.dtype != torch.float32 or model.training:
        state = f"{model.dtype}{', in training mode' if model.training else ''}"
        raise ValueError(f"An engine is made from a float32 model in evaluation mode, {model.name} is {state}.")
    return row.build(model, precision, Path(cache) if cache else engines_root())


def engines_root() -> Path:
    """Folder of exported and compiled files: $EVSAM_ENGINES_ROOT, or `engines` in the working directory."""
    return Path(os.environ.get("EVSAM_ENGINES_ROOT", "engines"))


# ---------------------------------------------------------------- PyTorch


def _eager(model: Sam, precision: str, cache: Path) -> Sam:
    return model


def _fused(model: Sam, precision: str, cache: Path) -> Sam:
    return fused(model, dtype=DTYPES[precision])


def _compile(model: Sam, precision: str, cache: Path) -> Sam:
    return compiled(fused(model, dtype=DTYPES[precision]))


def _aoti(model: Sam, precision: str, cache: Path) -> Sam:
    where = _cpu() if model.device.type == "cpu" else torch.cuda.get_device_name(model.device)
    folder = _folder(model, cache) / _file_name(f"aoti-{precision}-torch{torch.__version__}-{where}")
    return with_encoder(model, _AheadOfTime(fused(model, dtype=DTYPES[precision]).image_encoder, folder))


class _AheadOfTime(nn.Module):
    """An encoder compiled to a file by AOTInductor, one file for every batch size, made when it is first wanted."""

    def __init__(self, encoder: nn.Module, folder: Path):
        super().__init__()
        self.encoder, self.folder = encoder, folder
        self.loaded: dict[int, Callable[[Tensor], Tensor]] = {}

    def forward(self, images: Tensor) -> Tensor:
        batch = len(images)
        if batch not in self.loaded:
            path = self.folder / f"encoder-batch{batch}.pt2"
            if not path.is_file():
                self._write(path, images.shape, images.device)
            self.loaded[batch] = torch._inductor.aoti_load_package(str(path))
        return self.loaded[batch](images)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(self, path: Path, shape: torch.Size, device: torch.device) -> None:
        options = {"freezing": True} if device.type == "cpu" else {"max_autotune": True}
        program = torch.export.export(self.encoder, (torch.zeros(shape, device=device),))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compile-") as partial:
            file = f"{partial}/{path.name}"
            torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)
            Path(file).replace(path)


def _cpu() -> str:
    """What compiled code is made for: its instructions, and a number of threads that is written into it."""
    return f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}threads"


# ---------------------------------------------------------------- exported files


def _exported(runner: str, model: Sam, precision: str, cache: Path, *, typed: bool = False) -> OnnxSam:
    """The model's two graphs, exported if need be, in a runner named as "module:class".

    Where the engine is `typed`, the encoder's precision is written into its graph; else the runner chooses it.
    """
    module, _, name = runner.partition(":")
    run = getattr(importlib.import_module(module), name)
    options = {} if precision == "fp32" else {"precision": precision}
    encoder = _onnx_file("encoder", model, cache, **(options if typed else {}))
    return OnnxSam(run(encoder, **options), run(_onnx_file("decoder", model, cache), **options))


def _onnx_file(part: str, model: Sam, cache: Path, *, precision: str = "fp32") -> Path:
    from evsam_lib.deploy.onnx import OPSET, export

    folder = _folder(model, cache) / _file_name(f"onnx-{precision}-opset{OPSET}-torch{torch.__version__}")
    if not (folder / f"{part}.onnx").is_file():
        on_cpu = model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
        export(on_cpu, folder, parts=(part,), precision=precision)
    return folder / f"{part}.onnx"


def _folder(model: Sam, cache: Path) -> Path:
    """Of one model with these weights, as this version of the code builds it."""
    return cache / f"{model.name}-{fingerprint(model)[:12]}-evsam{evsam_lib.__version__}-{_source()}"


@once
def _source() -> str:
    """Digest of the code that decides what a file holds."""
    package = Path(evsam_lib.__file__).parent
    files = sorted([*package.glob("models/*.py"), *package.glob("deploy/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)


ENGINES: dict[str, Engine] = {
    row.name: row
    for row in (
        Engine("eager", _eager, precisions=("fp32",)),
        Engine("fused", _fused),
        Engine("compile", _compile),
        Engine("aoti", _aoti),
        Engine(
            "onnxruntime",
            partial(_exported, "evsam_lib.deploy.runtime:Graph"),
            precisions=("fp32",),
            devices=("cpu",),
            packages=("onnx", "onnxscript", "onnxruntime"),
            remedy="get it by pip install 'evsam[onnx]'",
        ),
        Engine(
            "openvino",
            partial(_exported, "evsam_lib.deploy.openvino:OpenVinoGraph"),
            precisions=("fp32", "bf16"),
            devices=("cpu",),
            packages=("onnx", "onnxscript", "openvino"),
            remedy="get it by pip install 'evsam[openvino]'",
        ),
        Engine(
            "tensorrt",
            partial(_exported, "evsam_lib.deploy.tensorrt:TensorRtGraph", typed=True),
            precisions=("fp32", "fp16"),
            devices=("cuda",),
            packages=("onnx", "onnxscript", "tensorrt"),
            remedy="get it by pip install 'evsam[export]' on a machine with an NVIDIA GPU",
        ),
    )
}
