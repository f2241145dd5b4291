"""python -m evsam_lib.evaluate: the command line, alone, as one shard of several, or under torchrun."""

import argparse
import sys
from pathlib import Path

import torch

from evsam_lib.data.coco import CocoImages
from evsam_lib.evaluate import arguments, parts
from evsam_lib.evaluate.report import format_table, write_result, write_results_file
from evsam_lib.evaluate.run import DATASETS, PROMPTS, evaluate
from evsam_lib.models.zoo import ZOO, load_model, weights_path
from evsam_lib.predict import CHOICES
from evsam_lib.scores import COCO_EVALUATORS

__all__ = ["main"]

SAM3_NAMES = ("SAM3", "LiteText", "ES-")  # how the names of `evsam_lib.sam3.zoo.MODELS` begin
SAM3_OPTIONS = ("text", "context", "scale", "image_size")


def main(words: list[str] | None = None) -> int:
    """The command line; returns its exit status: 0, 2 for input that cannot be used, 130 if interrupted."""
    options = _parser().parse_args(words)
    try:
        return _run(options)
    except (ValueError, OSError, ImportError) as error:  # OSError: missing and unreadable files
        print(f"evsam_lib.evaluate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        part = parts.part_path(options.out, options.shard or arguments.torchrun_shard() or (1, 1))
        print(f"evsam_lib.evaluate: interrupted; --resume goes on with what {part} holds.", file=sys.stderr)
        return 130  # what a shell reports for Ctrl-C


def _run(options: argparse.Namespace) -> int:
    _check_files(options)
    shard = options.shard or arguments.torchrun_shard() or (1, 1)
    images = CocoImages(options.images, options.annotations)
    detections = None if options.detections is None else _detections(options.detections, images)
    weights = None if options.weights == "none" else options.weights
    if weights is None:
        torch.manual_seed(0)
        print("NO WEIGHTS: the model starts at random (seed 0), its scores say nothing about it.", file=sys.stderr)
    model, file = _model(options, weights)
    result = evaluate(
        model,
        images,
        prompt=options.prompt,
        clicks=options.clicks,
        detections=detections,
        dataset=options.dataset,
        limit=options.limit,
        keep_crowds=not options.exclude_crowds,
        inclusive_sizes=not options.exclusive_sizes,
        min_area=options.min_area,
        corner_clicks=not options.no_corner_clicks,
        choose=options.choose,
        refine=options.refine,
        pad_shards=options.pad_shards,
        batch=options.batch,
        workers=options.workers,
        evaluator=options.evaluator,
        out=options.out,
        shard=shard,
        resume=options.resume,
        weights=file,
        progress=sys.stderr.isatty(),
    )
    files = [parts.part_path(options.out, (number, shard[1])) for number in range(1, shard[1] + 1)]
    if result is None:
        print(f"shard {shard[0]} of {shard[1]} is done; the result waits for the others: {parts.incomplete(files)}")
        return 0
    return _report(result, options, files)


def _model(options: argparse.Namespace, weights: str | None):
    """The model, and the file its weights are from, None for a random start."""
    device, dtype = arguments.device(options.device), getattr(torch, options.dtype)
    if options.model in ZOO or not options.model.startswith(SAM3_NAMES):
        given = [name for name in SAM3_OPTIONS if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for SAM3 and its students, not for {options.model}.")
        return load_model(options.model, weights, device, dtype), weights_path(options.model, weights)
    from evsam_lib.sam3.as_sam import load_clicks  # needs the extra [sam3]

    shape = {name: getattr(options, name) for name in SAM3_OPTIONS if getattr(options, name) is not None}
    model = load_clicks(options.model, weights, device=device, dtype=dtype, **shape)
    return model, model.weights


def _report(result: dict, options: argparse.Namespace, files: list[Path]) -> int:
    if options.results is not None:
        write_results_file(result, options.results)
    write_result(result, options.out)
    if len(files) == 1 and not options.keep_part:  # those of several shards stay: another process may be reading them
        files[0].unlink()
    summary = result["summary"]
    print(f"{summary['model']}, weights {options.weights}, {summary['images']} images, {summary['seconds']} s")
    print(format_table(summary))
    for kind in ("skipped", "noted"):
        if summary[kind]:
            print(f"{kind}: " + ", ".join(f"{count} {reason}" for reason, count in summary[kind].items()))
    print(f"wrote {options.out}" + ("" if options.results is None else f" and {options.results}"))
    return 0


def _check_files(options: argparse.Namespace) -> None:
    for name in ("out", "results"):
        path = getattr(options, name)
        if path is not None and path.is_dir():
            raise ValueError(f"--{name} {path} is a folder, expected the name of a JSON file.")
    if (options.prompt == "detector-box") != (options.detections is not None):
        raise ValueError("--prompt detector-box and --detections FILE belong together.")
    if options.results is not None and options.detections is None:
        raise ValueError("--results is a file of detections: it needs --prompt detector-box.")


def _detections(path: Path, images: CocoImages):
    from evsam_lib.data.detections import Detections

    return Detections(path, images)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"evsam_lib.evaluate: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m evsam_lib.evaluate", description="Measures a model: mIoU, or AP of masks.")
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="a name of the zoo, such as efficientvit-sam-l0, or of evsam_lib.sam3, such as ES-EV-S",
    )
    add("--weights", required=True, help="a file, 'mini', 'official', or 'none' for a random start")
    add("--images", required=True, type=Path, help="folder of images; for LVIS that of train2017 and val2017")
    add("--annotations", required=True, type=Path, help="JSON in COCO's form")
    add("--dataset", choices=DATASETS, default="coco", help="whose AP; sginw is COCO's, set by set")
    add("--prompt", required=True, choices=PROMPTS)
    add("--clicks", type=arguments.positive, default=1, help="for --prompt points; the paper has 1, 3 and 5")
    add("--detections", type=Path, help="for --prompt detector-box: boxes, JSON in COCO's results form")
    add("--out", required=True, type=Path, help="JSON file to write: summary and objects")
    add("--results", type=Path, help="for --prompt detector-box: masks to write, JSON in COCO's results form")
    add("--evaluator", choices=COCO_EVALUATORS, help="of AP; pycocotools for COCO, faster-coco-eval for LVIS")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--batch", type=arguments.positive, help="images encoded together; 1 on a CPU, 16 on a GPU")
    add("--workers", type=arguments.whole, help="threads that read images ahead; 0 on a CPU, up to 8 on a GPU")
    add("--shard", type=arguments.shard, help="i/n: the i-th of n shares; under torchrun each rank takes its own")
    add("--resume", action="store_true", help="go on with the part files that an earlier run left beside --out")
    add("--keep-part", action="store_true", help="leave the part file, for notebooks with this folder as `evaluations`")
    add("--limit", type=arguments.positive, help="number of images (that have objects, unless boxes are a detector's)")
    sam3 = parser.add_argument_group("SAM3, LiteText and EfficientSAM3, with the extra [sam3]")
    sam3.add_argument("--text", help="the text encoder in the file: SAM3, ES-MC-S, ES-MC-M or ES-MC-L")
    sam3.add_argument("--context", type=arguments.positive, help="tokens of a phrase that the file was made for")
    sam3.add_argument("--scale", help="full, or mini for this study's own small ones")
    sam3.add_argument(
        "--image-size", type=arguments.positive, help="side of the model's input, pixels; 1008, at mini scale 224"
    )
    rules = parser.add_argument_group("rules that one may question, by default those of the authors' script")
    add = rules.add_argument
    add("--exclude-crowds", action="store_true", help="leave iscrowd annotations out; official: kept")
    add("--exclusive-sizes", action="store_true", help="count areas on a size bound once; official: twice")
    add("--min-area", type=float, default=1, help="leave smaller annotations out; official: 1")
    add("--no-corner-clicks", action="store_true", help="a perfect mask is done; official: clicked at (0, 0)")
    add("--choose", choices=CHOICES, default=CHOICES[0], help="which mask counts; official: %(default)s")
    add("--refine", type=arguments.whole, default=0, help="times that the mask is fed back; official: 0")
    add(
        "--pad-shards",
        type=arguments.whole,
        default=0,
        help="count the first images twice, as that many processes would",
    )
    return parser
