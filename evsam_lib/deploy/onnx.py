"""Models as ONNX files, checked before they get their names, and verified against PyTorch.

    python -m evsam_lib.deploy.onnx export MODEL --weights mini|official|PATH|random --out DIR [--precision fp16]
    python -m evsam_lib.deploy.onnx verify DIR

`encoder.onnx`, `decoder.onnx` and `pipeline.onnx` (both in one) say in their metadata what they are and what goes in.
torch's exporter by tracing to FX is used: the older TorchScript one has no operator for the decoder and makes an
encoder of twice the nodes. Exit code 0: done; 1: beyond the bounds; 2: wrong request. Notebook 06 uses it.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch

from evsam_lib import __version__
from evsam_lib.deploy.card import Card, fingerprint, need
from evsam_lib.deploy.graphs import PARTS, SELECT, AnyGraph, build_graph
from evsam_lib.deploy.mend import average_by_axis, plain_operations, quietly, restore_epsilons, tidy
from evsam_lib.models.sam import Sam
from evsam_lib.models.weights import sha256
from evsam_lib.models.zoo import load_model, weights_path

__all__ = ["MIN_OPSET", "OPSET", "export", "load_weights", "main"]

OPSET = 20  # the first with GELU as one operation; TensorRT 10 and onnxruntime 1.17 read it
MIN_OPSET = 18  # what torch's exporter writes; layer norm is one operation since 17
ONE_FILE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB; a larger graph keeps its weights in a second file
PRECISIONS = ("fp32", "fp16", "int8")
_ANY = {"batch": 2, "prompts": 3, "points": 4, "height": 96, "width": 160}  # example lengths, none of them 1


class Origin(TypedDict):
    """Where a model's weights are from, as `export` wants to know."""

    weights: str
    weights_sha256: str


def export(
    model: Sam,
    folder: str | Path,
    *,
    parts: tuple[str, ...] = ("encoder", "decoder"),
    opset: int = OPSET,
    select: str = "all",
    uint8_input: bool = False,
    mask_input: bool = False,
    upsample: bool = False,
    precision: str = "fp32",
    weights: str = "",
    weights_sha256: str = "",
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Path]:
    """Writes graphs of a model, each complete and checked or not at all.

    Args:
        model: on the CPU, float32, in evaluation mode.
        folder: of the files, made if need be.
        parts: of "encoder", "decoder", "pipeline".
        opset: of ONNX, 18 or more.
        select: "all" four masks of a prompt, or the "best" of the three for multimask output.
        uint8_input: the encoder takes bytes and normalises inside, see `graphs.PaddedPixels`.
        mask_input: prompts may hold a mask.
        upsample: masks come out at the original size too.
        precision: "fp32"; "fp16" with the float32 islands that `precision.choose_islands` finds; or "int8", for the
            encoder's convolutions.
        weights: where the model's weights are from: "mini", "official", "random" or a file's name; kept in the card.
        weights_sha256: of that file.
        say: takes lines of progress.

    Returns:
        Part -> path.

    Raises:
        ValueError: an unknown part or choice, an opset out of reach, a model that cannot be exported this way.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    need("onnx", "onnxscript")
    _check_request(model, parts, opset, select, precision)
    folder = Path(folder)
    options = {"select": select, "uint8_input": uint8_input, "mask_input": mask_input, "upsample": upsample}
    graphs = {part: build_graph(part, model, **options) for part in parts}  # refusals come before any work
    known = {"weights": weights, "weights_sha256": weights_sha256, "state_sha256": fingerprint(model)}
    paths = {}
    for part, graph in graphs.items():
        card = _card(part, model, graph, opset=opset, precision=precision, **options, **known)
        paths[part] = _write(graph, card, folder, model, say)
        say(f"{paths[part]}: {_size(paths[part]):.1f} MB, opset {opset}, {precision}")
    return paths


def load_weights(name: str, weights: str | Path) -> tuple[Sam, Origin]:
    """A model as the command line names it, and where its weights are from, as `export` wants to know.

    Args:
        name: of the zoo.
        weights: "mini", "official", a path, or "random": a start that is the same every time and leaves no layer
            silent, unlike the official start, whose residual branches end in a zero.
    """
    if weights == "random":
        torch.manual_seed(0)
        model = load_model(name)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
                torch.nn.init.constant_(module.weight, 0.3)
        return model, {"weights": "random", "weights_sha256": ""}
    model = load_model(name, weights)
    path = weights_path(name, weights)
    assert path is not None  # there is none for a random start only
    label = weights if weights in ("mini", "official") else path.name
    return model, {"weights": str(label), "weights_sha256": sha256(path)}


def _check_request(model: Sam, parts: tuple[str, ...], opset: int, select: str, precision: str) -> None:
    import onnx

    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"Unknown part {unknown[0]!r}; there are {', '.join(PARTS)}.")
    if select not in SELECT:
        raise ValueError(f"select must be 'all' or 'best', got {select!r}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "int8" and parts != ("encoder",):
        raise ValueError("int8 is for the encoder's convolutions: name --part encoder.")
    if precision != "fp32":
        need("onnxruntime")  # which measures
    if opset < MIN_OPSET:
        raise ValueError(
            f"Opset {opset} is too old: the exporter of torch {torch.__version__} writes {MIN_OPSET} or later; "
            f"leave it at {OPSET}, or take {MIN_OPSET} for an old engine."
        )
    if opset > onnx.defs.onnx_opset_version():
        newest = onnx.defs.onnx_opset_version()
        raise ValueError(f"Opset {opset} is unknown to onnx {onnx.__version__}, which ends at {newest}; take {OPSET}.")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"Export needs a float32 model on the CPU, got {model.dtype} on {model.device}.")


def _card(part: str, model: Sam, graph: AnyGraph, **known) -> Card:
    return Card(
        part=part,
        model=model.name,
        study_version=__version__,
        frame=model.frame,
        best_by=model.best_by,
        grid=model.grid,
        embed_dim=model.embed_dim,
        padding_point=not graph.slots,
        slots=graph.slots,
        inputs=graph.inputs,
        outputs=graph.outputs,
        **known,
    )


def _write(graph: AnyGraph, card: Card, folder: Path, model: Sam, say: Callable[[str], object]) -> Path:
    """Exports into a folder of its own, checks what is there, and moves it into place: weights first, graph last."""
    import onnx

    program = _trace(graph, card)
    average_by_axis(program.model)
    restore_epsilons(program.model)
    tidy(program.model, card)
    program.model.metadata_props.update(card.to_properties())
    name = f"{card.part}.onnx"
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as partial:
        program.save(Path(partial) / name, external_data=size > ONE_FILE_BYTES)
        if card.precision != "fp32":
            from evsam_lib.deploy.narrow import narrow

            narrow(Path(partial) / name, card, model, say=say)
        onnx.checker.check_model(str(Path(partial) / name), full_check=True)  # shape inference, strictly, is part of it
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == name):
            file.replace(folder / file.name)
    return folder / name


def _trace(graph: AnyGraph, card: Card) -> torch.onnx.ONNXProgram:
    """The graph as an onnx program, its open axes named."""
    examples, axes = {}, {}
    for port in card.inputs:
        shape = [_ANY[length] if isinstance(length, str) else length for length in port.shape]
        examples[port.name] = torch.ones(shape, dtype=getattr(torch, port.dtype))
        axes[port.name] = {i: length for i, length in enumerate(port.shape) if isinstance(length, str)}
    if "original_size" in examples:
        examples["original_size"] = torch.tensor([_ANY["height"], _ANY["width"]])
    with torch.no_grad(), plain_operations(), quietly():
        program = torch.onnx.export(
            graph,
            kwargs=examples,
            dynamic_shapes=axes,
            output_names=[port.name for port in card.outputs],
            opset_version=card.opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only TorchScript's exporter gives none
    return program


def _size(path: Path) -> float:
    """Megabytes of a graph and the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        need("onnx", "onnxruntime", "onnxscript")
        return _export(options) if options.command == "export" else _verify(options)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"evsam_lib.deploy.onnx: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evsam_lib.deploy.onnx: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _export(options: argparse.Namespace) -> int:
    parts = {"all": PARTS, None: ("encoder", "decoder")}.get(options.part, (options.part,))
    model, known = load_weights(options.model, options.weights)
    names = ("opset", "select", "uint8_input", "mask_input", "upsample", "precision")
    export(model, options.out, parts=parts, **{name: getattr(options, name) for name in names}, **known, say=print)
    print(f"check it with: python -m evsam_lib.deploy.onnx verify {options.out}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from evsam_lib.deploy.verify import verify

    rows = verify(options.folder, weights=options.weights)
    cells = [(r.part, r.case, r.output, f"{r.error:.1e}", f"{r.bound:.1e}", "ok" if r.ok else "BEYOND") for r in rows]
    print(tabulate(cells, headers=("graph", "case", "output", "error", "bound", ""), disable_numparse=True))
    beyond = sum(not row.ok for row in rows)
    print(f"{len(rows)} comparisons with PyTorch, {beyond} beyond the bound")
    return 1 if beyond else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.deploy.onnx", description="Exports and verifies.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("export", help="write ONNX files of a model of the zoo")
    make.add_argument("model", help="such as efficientvit-sam-l0")
    make.add_argument("--weights", required=True, help="mini, official, a path, or random")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files")
    make.add_argument("--part", help="encoder, decoder, pipeline, or all (default: the first two)")
    make.add_argument("--opset", type=int, default=OPSET, help=f"of ONNX, {MIN_OPSET} or later (default {OPSET})")
    make.add_argument("--select", default="all", help="all four masks of a prompt (the default), or the best of three")
    make.add_argument("--precision", default="fp32", help="fp32 (the default), fp16 with float32 islands, or int8")
    make.add_argument("--uint8-input", action="store_true", help="images come as bytes, normalised inside")
    make.add_argument("--mask-input", action="store_true", help="prompts may hold a mask")
    make.add_argument("--upsample", action="store_true", help="masks at the original size come out too")
    check = commands.add_parser("verify", help="hold exported files to PyTorch; exit code 1 beyond the bounds")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.add_argument("--weights", help="the weight file, where the export was given a path")
    return parser


if __name__ == "__main__":
    sys.exit(main())
