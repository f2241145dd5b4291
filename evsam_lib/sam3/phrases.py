"""Phrases to masks on many images: SA-Co Gold's pairs, or COCO with its categories' names as phrases.

    python -m evsam_lib.sam3.phrases --model ES-TV-M --weights FILE --text ES-MC-S --images IMAGES \\
        --saco gold_crowded_merged_{a,b,c}_release_test.json --out crowded.json
    python -m evsam_lib.sam3.phrases --model SAM3 --weights official --coco instances_val2017.json \\
        --images val2017 --out coco.json --resume

Every image is encoded once and asked all its phrases, those that name nothing in it among them. Where there are several
annotators, as in SA-Co Gold, the one that suits an answer best counts, as in SAM3's own evaluation. What is found is
scored by cgF1 in its two parts (`evaluate.cgf1`), COCO's also by AP. Part files, `--shard` and `--resume` are those
of `evsam_lib.evaluate`: a killed run goes on, and many processes share one. Notebook 19 uses it.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evsam_lib import __version__, scores
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.rle import encode_masks
from evsam_lib.data.saco import ConceptImage, ConceptPhrase, SacoImages
from evsam_lib.evaluate import arguments, parts
from evsam_lib.evaluate.cgf1 import PairCounts, best_of, count_pair, mask_ious
from evsam_lib.evaluate.cgf1 import scores as cgf1
from evsam_lib.evaluate.report import write_result, write_results_file
from evsam_lib.models.weights import sha256
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.processor import Sam3Processor

__all__ = ["CocoPhrases", "evaluate_phrases", "main"]

PAIRS = 10_000  # COCO's pairs of image and category are numbered image * PAIRS + category; LVIS has 1,203 categories
THRESHOLD = 0.5  # of cgF1: the least score of an instance
MOST = 100  # detections of an image that COCO's AP looks at


class CocoPhrases(Sequence):
    """COCO's images, each with the names of all categories as phrases; item i is a `ConceptImage`.

    Args:
        images: with annotations.

    Attributes:
        path: of the annotation file.
        crowded: ids of pairs with a crowd annotation, whose instances are not all told apart: left out of cgF1.
    """

    def __init__(self, images: CocoImages):
        self.images, self.path, self.generated = images, images.annotations_json, images.generated
        self.crowded = {
            self._pair(image.image_id, a["category_id"])
            for image in images
            for a in image.annotations
            if a.get("iscrowd", 0)
        }

    def __len__(self) -> int:
        return len(self.images)

    # pyrefly: ignore[bad-override]: by place alone, nobody takes slices
    def __getitem__(self, index: int) -> ConceptImage:
        record = self.images[index]
        pixels = self.images.read(record)
        phrases = (self._phrase(record, number, name, pixels.shape[:2]) for number, name in self._names())
        return ConceptImage(record.image_id, pixels, tuple(phrases))

    def _names(self) -> Iterable[tuple[int, str]]:
        return self.images.categories.items()

    def _phrase(self, record, category: int, name: str, size: tuple[int, int]) -> ConceptPhrase:
        own = [a for a in record.annotations if a["category_id"] == category and not a.get("iscrowd", 0)]
        masks = np.array([self.images.mask(a) for a in own], bool).reshape(-1, *size)
        return ConceptPhrase(self._pair(record.image_id, category), name, masks)

    @staticmethod
    def _pair(image_id: int, category: int) -> int:
        return image_id * PAIRS + category


@dataclass(frozen=True)
class _Job:
    position: int


def evaluate_phrases(
    model,
    images: Sequence[ConceptImage],
    *,
    min_score: float | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
    progress: bool = False,
) -> dict | None:
    """Asks a model all phrases of all images, and scores what it finds.

    Args:
        model: what `load_sam3` returns.
        images: `SacoImages`, `GeneratedConcepts` or `CocoPhrases`; anything of that kind.
        min_score: instances with less are not kept. None is 0.5, cgF1's own threshold, for COCO 0.05, since AP wants
            the doubtful ones too.
        limit: stop after this many images; None for all.
        out: path of the result to be, which the caller writes. Given one, a part file beside it holds what is done.
        shard: (i, n), do the i-th of n shares (from 1); n above 1 needs `out`.
        resume: go on with the part file that an earlier run with the same settings left.
        progress: show a progress bar.

    Returns:
        {"summary": ..., "objects": ...}, ready for JSON: the summary has `cgF1`, `pmF1`, `MCC` and what they depend on;
        for COCO also `AP`, ..., and there is a third entry, "results", in COCO's results form. Objects are pairs of
        image and phrase. With several shards: None as long as others are not done, else the result of all.

    Raises:
        ValueError: no image, a wrong shard, or a part file of other settings.
    """
    count = len(images) if limit is None else min(limit, len(images))
    if count < 1:
        raise ValueError(f"There is no image to ask about: {len(images)} images, limit {limit}.")
    if not 1 <= shard[0] <= shard[1] or (shard[1] > 1 and out is None):
        raise ValueError(f"shard must be i of n with 1 <= i <= n, and needs `out`; got {shard[0]} of {shard[1]}.")
    coco = isinstance(images, CocoPhrases)
    min_score = (0.05 if coco else 0.5) if min_score is None else min_score
    header = {"jobs": count, "shard": list(shard), "image_ids": None, "twice": []}
    header |= {"settings": _settings(model, images, min_score, limit)}
    jobs, lines = [_Job(n) for n in range(count)], []
    ask = _Asking(model, min_score, masks=coco)
    if out is None:
        lines = [ask(images, job.position) for job in tqdm(jobs, desc="phrases", unit="image", disable=not progress)]
        return _finish(header, lines, images)
    if resume and shard == (1, 1) and (files := parts.finished(out, header)):
        return _finish(*parts.join_parts(files), images)
    done, part = parts.open_part(parts.part_path(out, shard), header, resume=resume)
    with part:
        mine = [job for share in parts.share(jobs, 1, shard, done) for job in share]
        for job in tqdm(mine, desc="phrases", unit="image", disable=not progress):
            parts.append(part, [ask(images, job.position)])
    files = [parts.part_path(out, (number, shard[1])) for number in range(1, shard[1] + 1)]
    return None if parts.incomplete(files) else _finish(*parts.join_parts(files), images)


class _Asking:
    """One image after the other; features of phrases are kept by the processor."""

    def __init__(self, model, min_score: float, *, masks: bool):
        self.processor, self.masks = Sam3Processor(model, confidence_threshold=min_score), masks

    def __call__(self, images: Sequence[ConceptImage], position: int) -> dict:
        start = time.perf_counter()
        item = images[position]
        state = self.processor.set_image(item.image)
        pairs = [self._pair(phrase, state) for phrase in item.phrases]
        seconds = round(time.perf_counter() - start, 4)
        return {"position": position, "seconds": seconds, "noted": [], "objects": pairs}

    def _pair(self, phrase: ConceptPhrase, state) -> dict:
        found = self.processor.set_text_prompt(phrase.text, state)
        truths = (phrase.masks, *phrase.others)  # one for each annotator
        answer = {
            "pair_id": int(phrase.pair_id),
            "phrase": phrase.text,
            "presence": float(found.presence),
            "scores": [float(score) for score in found.scores],
            "true": [len(truth) for truth in truths],
            "iou": [mask_ious(found.masks, truth).round(6).tolist() for truth in truths],
        }
        return answer | ({"segmentations": encode_masks(found.masks)} if self.masks and len(found.masks) else {})


def _finish(header: dict, lines: list[dict], images: Sequence[ConceptImage]) -> dict:
    """cgF1 of all pairs, AP of all masks; masks leave the objects and become the results."""
    settings = header["settings"]
    pairs = [pair for line in lines for pair in line["objects"]]
    left_out = images.crowded if isinstance(images, CocoPhrases) else set()
    counted = cgf1(_counts(pair) for pair in pairs if pair["pair_id"] not in left_out)
    summary = {"cgF1": counted.cgf1, "pmF1": counted.pmf1, "MCC": counted.mcc, "pairs": counted.pairs}
    summary |= {"positive": counted.positive, "pairs_with_crowds": len(pairs) - counted.pairs, "images": len(lines)}
    result = {}
    if isinstance(images, CocoPhrases):
        result["results"] = [found for line in lines for found in _best(line["objects"])]
        ids = [images.images[line["position"]].image_id for line in lines]
        summary |= scores.coco_ap(images.path, result["results"], image_ids=ids)
    summary |= settings | {"seconds": round(sum(line["seconds"] for line in lines), 3)}
    kept = [{key: value for key, value in pair.items() if key != "segmentations"} for pair in pairs]
    return {"summary": summary, "objects": kept} | result


def _counts(pair: dict) -> PairCounts:
    """Of a line, against the annotator that suits it best; cgF1 has a threshold of its own."""
    sure = np.array(pair["scores"], float) >= THRESHOLD
    readings = [
        count_pair(np.array(iou, float).reshape(len(sure), true)[sure])
        for iou, true in zip(pair["iou"], pair["true"], strict=True)
    ]
    return best_of(readings)


def _best(pairs: list[dict]) -> list[dict]:
    """COCO's results of one image: what AP will look at."""
    found = []
    for pair in pairs:
        image_id, category = divmod(pair["pair_id"], PAIRS)
        where = {"image_id": image_id, "category_id": category}
        found += [
            where | {"score": score, "segmentation": rle}
            for score, rle in zip(pair["scores"], pair.get("segmentations", []), strict=True)
        ]
    by_category: dict[int, list[dict]] = {}
    for result in found:
        by_category.setdefault(result["category_id"], []).append(result)
    return [r for own in by_category.values() for r in sorted(own, key=lambda r: -r["score"])[:MOST]]


def _settings(model, images: Sequence[ConceptImage], min_score: float, limit: int | None) -> dict:
    study, report = model.config.study, model.report
    weights, annotations = Path(report.source), getattr(images, "path", None)
    rules = {"min_score": min_score, "limit": limit}
    found = {"prompt": "phrase", "model": study["name"], "text": study["text"], "scale": study["scale"]}
    found |= {"context": model.config.detector_config.text_config.max_position_embeddings}
    found |= {"image_size": model.config.image_size, "rules": rules, "weights": report.source}
    found["weights_sha256"] = sha256(weights) if weights.is_file() else None
    found |= {"annotations": None if annotations is None else str(annotations)}
    found["annotations_sha256"] = None if annotations is None else sha256(annotations)
    versions = {"evsam": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {"generated": bool(getattr(images, "generated", False)), "device": str(model.device)}
    return found | {"dtype": str(model.dtype).removeprefix("torch."), "versions": versions}


# ---------------------------------------------------------------- command line


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for input that cannot be used, 130 if interrupted."""
    options = _parser().parse_args(words)
    try:
        return _run(options)
    except (ValueError, OSError, ImportError) as error:  # OSError: missing and unreadable files, refused access
        print(f"evsam_lib.sam3.phrases: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evsam_lib.sam3.phrases: interrupted; --resume goes on where it stopped.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    if (options.saco is None) == (options.coco is None):
        raise ValueError("Phrases come from one file, --saco FILE or --coco FILE.")
    if options.saco:
        images: Sequence[ConceptImage] = SacoImages(options.saco[0], options.images, also=options.saco[1:])
    else:
        images = CocoPhrases(CocoImages(options.images, options.coco))
    shard = options.shard or arguments.torchrun_shard() or (1, 1)
    shape = {key: getattr(options, key) for key in ("text", "context", "scale", "image_size")}
    torch.manual_seed(0)  # of a random start
    model = load_sam3(
        options.model,
        None if options.weights == "none" else options.weights,
        **{key: value for key, value in shape.items() if value is not None},
        without=("tracker",),
        device=arguments.device(options.device),
        dtype=getattr(torch, options.dtype),
    )
    asked = {"min_score": options.min_score, "limit": options.limit, "resume": options.resume}
    result = evaluate_phrases(model, images, **asked, out=options.out, shard=shard, progress=sys.stderr.isatty())
    if result is None:
        print(f"shard {shard[0]} of {shard[1]} is done; the result waits for the others")
        return 0
    if "results" in result and options.results:
        write_results_file(result, options.results)
    write_result(result, options.out)
    shown = ("cgF1", "pmF1", "MCC", "AP", "AP50", "pairs", "images", "seconds")
    print("  ".join(f"{key} {result['summary'][key]:.4g}" for key in shown if result["summary"].get(key) is not None))
    print(f"wrote {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.sam3.phrases", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="of evsam_lib.sam3, such as ES-TV-M, LiteText or SAM3")
    add("--weights", required=True, help="a file, 'official', or 'none' for a random start")
    add("--text", help="the text encoder in the file: SAM3, ES-MC-S, ES-MC-M or ES-MC-L")
    add("--context", type=arguments.positive, help="tokens of a phrase that the file was made for")
    add("--scale", help="full, or mini for this study's own small ones")
    add("--image-size", type=arguments.positive, help="side of the model's input, pixels")
    add("--saco", type=Path, nargs="+", help="pairs of image and phrase, JSON in SA-Co's form, one for each annotator")
    add("--coco", type=Path, help="JSON in COCO's form; its categories' names are the phrases")
    add("--images", required=True, type=Path, help="folder of the images that the file names")
    add("--out", required=True, type=Path, help="JSON file to write: summary, and every pair")
    add("--results", type=Path, help="masks to write, JSON in COCO's results form; with --coco")
    add("--min-score", type=float, help="instances with less are not kept; 0.5, with --coco 0.05")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--limit", type=arguments.positive, help="number of images")
    add("--shard", type=arguments.shard, help="i/n: the i-th of n shares; under torchrun each rank takes its own")
    add("--resume", action="store_true", help="go on with the part files that an earlier run left beside --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
