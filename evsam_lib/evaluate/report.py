"""Results as files and as plain text."""

import json
import os
from pathlib import Path

from evsam_lib.evaluate.metrics import SIZES

__all__ = ["format_table", "write_result", "write_results_file"]


def write_result(result: dict, path: str | Path) -> Path:
    """Writes a result of `evaluate` as JSON, an object a line; until it is whole, an earlier file stays."""
    summary = json.dumps(result["summary"], indent=2, allow_nan=False)
    objects = ",\n".join(json.dumps(record, allow_nan=False) for record in result["objects"])
    return _write(path, f'{{"summary": {summary},\n"objects": [\n{objects}\n]}}\n')


def write_results_file(result: dict, path: str | Path) -> Path:
    """Writes the detections of a result in COCO's results form, a detection a line, for any other evaluator."""
    records = ",\n".join(json.dumps(record, allow_nan=False) for record in result["results"])
    return _write(path, f"[\n{records}\n]\n")


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial_path.write_text(text)
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)
    return path


def format_table(summary: dict) -> str:
    """The scores of a summary as plain text."""
    if summary["prompt"] == "detector-box":
        names = [name for name in summary if name.startswith("AP")]
        cells = ["-" if summary[name] is None else f"{summary[name]:.1f}" for name in names]
        rows = [("", *names), ("AP, detector box", *cells), ("detections", str(summary["detections"]))]
    else:
        rows = [("", *SIZES)]
        for k, means in summary.get("mIoU_after_click", {"": summary["mIoU"]}).items():
            cells = ["-" if means[size] is None else f"{means[size]:.2f}" for size in SIZES]
            rows.append((f"mIoU, {k} click{'s' * (k != '1')}" if k else "mIoU, box", *cells))
        rows.append(("objects", *(str(summary["counts"][size]) for size in SIZES)))
    return "\n".join(f"{label:<16}" + "".join(f"{cell:>9}" for cell in cells) for label, *cells in rows)
