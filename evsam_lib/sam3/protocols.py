"""The tables that need weights: true boxes on COCO (notebook 17), phrases on SA-Co Gold and COCO (notebook 19).

A row is a model with its weights, and SAM3, the teacher, is a row of every table. A row whose weights are not here
says so in one sentence instead of a number, and the others go on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.saco import GeneratedConcepts
from evsam_lib.evaluate import SIZES, evaluate, write_result
from evsam_lib.models.weights import weights_root
from evsam_lib.sam3.as_sam import ClickModel
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.phrases import evaluate_phrases
from evsam_lib.sam3.zoo import FINE_TUNED, IMAGES, LITETEXT, TEACHER
from evsam_lib.study.reference import GENERATED, MEASURED

__all__ = ["BOX_ROWS", "PHRASE_ROWS", "Row", "box_table", "phrase_table"]


@dataclass(frozen=True)
class Row:
    """A model with its weights.

    Attributes:
        name: of `evsam_lib.sam3.zoo.MODELS`.
        weights: as in `load_sam3`: "official", a file (under `weights_root()` if its path is relative), or None for a
            random start.
        text: the text encoder in the file.
        context: tokens of a phrase.
        scale: "full" or "mini".
        image_size: side of the input, pixels; None is the scale's.
        label: of the row; "" is the model's name.
        suffix: of its columns, such as ", geometry fine-tuned".
    """

    name: str
    weights: str | Path | None = "official"
    text: str | None = None
    context: int | None = None
    scale: str = "full"
    image_size: int | None = None
    label: str = ""
    suffix: str = ""

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or self.name


# As released: stage 1 students with SAM3's text, three of them fine-tuned by clicks and boxes; the teacher last.
BOX_ROWS = (
    *(Row(name, text=TEACHER) for name in IMAGES),
    *(Row(name, file, text=TEACHER, suffix=", geometry fine-tuned") for name, file in FINE_TUNED.items()),
    Row(TEACHER),
)
# SAM3's image tower with a student's text; the stage 1 students with SAM3's text; the teacher last.
PHRASE_ROWS = (
    *(Row("LiteText", file, text=text, context=16, label=f"LiteText {text}") for text, file in LITETEXT.items()),
    *(Row(name, text=TEACHER) for name in IMAGES),
    Row(TEACHER),
)


def box_table(
    images: CocoImages | None,
    rows: Sequence[Row] = BOX_ROWS,
    *,
    study=None,
    limit: int = 0,
    device: str | torch.device = "cpu",
    models: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = print,
) -> list[dict]:
    """Mean IoU of one mask for every true box, over objects that are no crowd: EfficientSAM3's protocol (eval_coco).

    Args:
        images: COCO val2017, or generated scenes; None where there are none.
        rows: what is measured.
        study: of a notebook: each result is kept as a file of its own, and in the paper profile a killed run goes on.
        limit: images, 0 for all.
        device: of the models.
        models: by a row's title, models of `load_sam3` that are already there; their rows read no file.
        say: takes a line a row.

    Returns:
        Records for `study.table`: row, column ("COCO mIoU", "COCO mIoU_S", ...), value in percent, n, status.
    """

    def measure(row: Row, model) -> list[dict]:
        kept = _kept(study, "coco", "gt-box-single", row, limit)
        options = {"choose": "single", "keep_crowds": False, "limit": limit or None}
        clicks = ClickModel(model)
        result = evaluate(clicks, images, prompt="gt-box", **options, **kept, weights=clicks.weights)
        _write(study, result, f"boxes_{row.title}{row.suffix}")
        found, status = result["summary"], _status(study, images)
        return [
            _record(row, column, found["mIoU"][size], n=found["counts"][size], status=status)
            for size, column in zip(SIZES, ("COCO mIoU", "COCO mIoU_S", "COCO mIoU_M", "COCO mIoU_L"), strict=True)
            if found["mIoU"][size] is not None
        ]

    missing = None if images is not None else "COCO val2017"
    return _rows(rows, measure, "COCO mIoU", missing=missing, device=device, models=models or {}, say=say)


def phrase_table(
    sets: Mapping[str, Sequence | None],
    rows: Sequence[Row] = PHRASE_ROWS,
    *,
    study=None,
    limit: int = 0,
    device: str | torch.device = "cpu",
    models: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = print,
) -> list[dict]:
    """cgF1 with its two parts on sets of images with phrases, and their mean over sets: SA-Co Gold's protocol.

    Args:
        sets: name to `SacoImages`, such as the seven of SA-Co Gold, or to `CocoPhrases`, which give AP as well; None
            for a set that is not here.
        rows: what is measured.
        study: as in `box_table`.
        limit: images of each set, 0 for all.
        device: of the models.
        models: as in `box_table`.
        say: takes a line a row.

    Returns:
        Records for `study.table`: row, column ("cgF1", "pmF1", "MCC" over all sets, "cgF1 NAME", "AP NAME"), value,
        unit, n (pairs of image and phrase), status. cgF1, pmF1 and AP are percent.
    """

    def measure(row: Row, model) -> list[dict]:
        found = {}
        for name, images in sets.items():
            kept = _kept(study, name, "phrase", row, limit)
            result = evaluate_phrases(model, images, limit=limit or None, **kept)
            _write(study, result, f"phrases_{name}_{row.title}{row.suffix}")
            found[name] = result["summary"]
        status = _status(study, *sets.values())
        parts = [
            _record(row, f"{key} {name}", summary[key], n=summary["pairs"], status=status)
            for name, summary in found.items()
            for key in ("cgF1", "AP")
            if summary.get(key) is not None
        ]
        pairs = sum(summary["pairs"] for summary in found.values())
        means = {key: sum(s[key] for s in found.values()) / len(found) for key in ("cgF1", "pmF1", "MCC")}
        return [_record(row, key, value, n=pairs, status=status) for key, value in means.items()] + parts

    missing = ", ".join(name for name, images in sets.items() if images is None) or None
    return _rows(rows, measure, "cgF1", missing=missing, device=device, models=models or {}, say=say)


def _rows(rows: Sequence[Row], measure: Callable, column: str, *, missing, device, models, say) -> list[dict]:
    records = []
    for row in rows:
        try:
            if missing:
                raise FileNotFoundError(missing)
            model = models.get(row.title)
            records += measure(row, _load(row, device) if model is None else model)
            say(f"{row.title}{row.suffix}: {records[-1]['n']} measured")
        except (OSError, ImportError) as error:  # OSError: no file, no access
            records.append(_record(row, column, nan, n=0, status=f"not run: {' '.join(str(error).split())}"))
            say(f"{row.title}{row.suffix}: {records[-1]['status']}")
    return records


def _load(row: Row, device):
    weights = row.weights
    if weights not in (None, "official"):
        weights = weights_root() / weights  # an absolute path stays one
    torch.manual_seed(0)  # of a random start
    shape = {"text": row.text, "context": row.context, "scale": row.scale, "image_size": row.image_size}
    return load_sam3(row.name, weights, **shape, without=("tracker", "geometry"), device=device)


def _record(row: Row, column: str, value: float, *, n: int, status: str) -> dict:
    unit = "1" if column.startswith("MCC") else "%"
    return {"row": row.title, "column": column + row.suffix, "value": value, "unit": unit, "n": n, "status": status}


def _status(study, *sources) -> str:
    made = any(getattr(source, "generated", False) or isinstance(source, GeneratedConcepts) for source in sources)
    return GENERATED if made or (study is not None and study.profile == "mini") else MEASURED


def _kept(study, source: str, prompt: str, row: Row, limit: int) -> dict:
    if study is None:
        return {}
    label = f"{row.title}{row.suffix}"
    return study.resumable(source, prompt, model=label, weights=str(row.weights), label=label, limit=limit)


def _write(study, result: dict, name: str) -> None:
    if study is not None:
        write_result(result, study.file(f"{name.replace(', ', '_').replace(' ', '_')}.json"))
