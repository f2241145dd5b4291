"""Has TensorRT-RTX, which needs no GPU to build, parse and build exported graphs: python -m tests.tensorrt_rtx [--all]

The package goes into an environment of its own, `.venv-rtx`. Without `--all`, a few minutes: every graph of the mini
model in fp32 and in fp16 with its islands, and L0's fp16 encoder. With `--all`, every model of the
zoo in fp32, and the EfficientViT-SAMs in fp16; random weights will do. Folders of exported files can be named instead.
Exit code 0: all built, or `not run` where the package does not install; 1: a graph failed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from evsam_lib.deploy.card import read_card
from evsam_lib.deploy.graphs import PARTS
from evsam_lib.deploy.onnx import export, load_weights
from evsam_lib.deploy.plans import find_package
from evsam_lib.deploy.tensorrt import _parse, build
from evsam_lib.models.zoo import ZOO

ENVIRONMENT = Path(__file__).parents[1] / ".venv-rtx"
CAPABILITY = "8.9"
COMPUTING = ("Conv", "MatMul")  # operations whose precision is looked up in the parsed network
# The first two are too large for one file, and of the same operations as ViT-B; the mini ViT resizes its position
# embedding with antialiasing, which TensorRT does not know.
LEFT_OUT = {"sam-vit-l", "sam-vit-h", "sam-vit-mini"}


def install() -> str:
    """Makes the environment if need be and lets this process import from it; says why not where it cannot."""
    if not list(ENVIRONMENT.glob("lib/*/site-packages/tensorrt_rtx")):
        try:
            venv.create(ENVIRONMENT, with_pip=True, clear=True)
            command = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "-q", "tensorrt-rtx-cu13==1.7.1.116"]
            subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return f"tensorrt-rtx-cu13 does not install ({lines[-1]})"
    sys.path += map(str, ENVIRONMENT.glob("lib/*/site-packages"))  # last: nothing of the study's own is replaced
    try:
        find_package("tensorrt_rtx")
    except ModuleNotFoundError as error:
        return str(error)
    return ""


def folders(root: Path, everything: bool) -> Iterator[Path]:
    """Exports one set of graphs after the other."""
    inside = {"uint8_input": True, "mask_input": True, "upsample": True}
    yield _export(root, "efficientvit-sam-mini", "fp32", PARTS, **inside)
    yield _export(root, "efficientvit-sam-mini", "fp32", ("decoder",), select="best")
    yield _export(root, "efficientvit-sam-mini", "fp16", PARTS)
    if not everything:
        yield _export(root, "efficientvit-sam-l0", "fp16", ("encoder",))
        return
    for name in ZOO.keys() - LEFT_OUT - {"efficientvit-sam-mini"}:
        yield _export(root, name, "fp32", ("encoder", "decoder"))
        if name.startswith("efficientvit"):
            yield _export(root, name, "fp16", ("encoder", "decoder"))


def _export(root: Path, name: str, precision: str, parts: tuple[str, ...], **options) -> Path:
    model, known = load_weights(name, "mini" if name.endswith("mini") else "random")
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-{precision}-", dir=root))
    export(model, folder, parts=parts, precision=precision, **known, **options)
    return folder


def check(path: Path) -> list[str]:
    """Parses and builds one file; a row of the table."""
    card = read_card(path)
    start = time.perf_counter()
    try:
        counts, wrong = precisions(path, set(card.fp32_layers))
        plan = build(path, package="tensorrt_rtx", capability=CAPABILITY)
    except (ValueError, RuntimeError) as error:
        return [card.model, card.part, card.precision, "", "", "", f"FAILED: {error}"]
    size = f"{plan.stat().st_size / 1e6:.1f}"
    plan.unlink()
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    verdict = f"FAILED: {wrong[0]} is in the other precision" if wrong else "built"
    return [card.model, card.part, card.precision, kinds, f"{time.perf_counter() - start:.1f}", size, verdict]


def precisions(path: Path, islands: set[str]) -> tuple[Counter, list[str]]:
    """Convolutions and matrix products of the parsed network by type, and those that are not what the card says."""
    trt = find_package("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, path)
    half = read_card(path).precision == "fp16"
    counts, wrong = Counter(), []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.name.rpartition("/")[2].split("_")[0] not in COMPUTING:
            continue
        if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            continue
        kind = layer.get_output(0).dtype
        counts[kind.name.lower()] += 1
        if half and (kind == trt.float32) is not (layer.name in islands):
            wrong.append(layer.name)
    return counts, wrong


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.tensorrt_rtx", description="Builds exported graphs.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="exported files, instead of new ones")
    parser.add_argument("--all", action="store_true", help="every model of the zoo")
    options = parser.parse_args()
    if reason := install():
        print(f"not run: {reason}")
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for folder in options.folders or folders(Path(root), options.all):
            for path in sorted(folder.glob("*.onnx")):
                rows.append(check(path))
                print(" ".join(rows[-1]), flush=True)
    headers = ("model", "graph", "precision", "products", "s", "MB", "")
    print(tabulate(rows, headers=headers, disable_numparse=True))
    return 1 if any(row[-1].startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
