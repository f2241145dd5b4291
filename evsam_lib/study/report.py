"""The report: every result of a profile, gathered into one page that reads like a paper's results section.

`results/<profile>/RESULTS.md`: the count of verdicts, the two families side by side, a section per notebook with its
figures and tables, and the verdict on every number the paper prints. Made by notebook 20_report.
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from .families import side_by_side
from .paths import repo_root, resolve, write_text
from .picture import labels
from .reference import GENERATED, compare, kind
from .tables import COLUMNS, MINI, damaged, digits, origin_line, pipes, read_record, read_table, title, wide

__all__ = ["build_report", "verdict_counts"]

MAKER = "20_report"  # the notebook that calls `build_report`
_KINDS = ["match", "differs", GENERATED, "not run"]


def build_report(results_root: str | Path = "results", profile: str = "mini") -> Path:
    """Write results/<profile>/RESULTS.md from what the notebooks left there.

    Raises:
        FileNotFoundError: there is no folder of results for this profile, or a result lacks a file.
        ValueError: a file of a result is damaged.
    """
    root = resolve(results_root) / profile
    if not root.is_dir():
        raise FileNotFoundError(f"no results in {root}: run `python -m evsam_lib.run --profile {profile}` first")
    folders = sorted(file.parent for file in root.glob("[0-9][0-9]_*/metrics.json"))
    folders = [folder for folder in folders if folder.name != MAKER]  # whose own result is not there yet
    tables = [read_table(folder) for folder in folders]
    filled = [table for table in tables if len(table)]
    cells = compare(pd.concat(filled) if filled else pd.DataFrame(columns=COLUMNS))
    metrics = {folder.name: read_record(folder / "metrics.json") for folder in folders}
    beside = side_by_side({f.name: table for f, table in zip(folders, tables, strict=True) if len(table)}, metrics)
    parts = [_head(profile, cells), beside, "# What the notebooks found"]
    parts += [_section(folder, table) for folder, table in zip(folders, tables, strict=True)]
    parts += ["# Every printed number"]
    parts += [_verdicts(str(name), rows) for name, rows in cells.groupby("table", sort=False)]
    parts += [_runs(root, folders)]
    return write_text(root / "RESULTS.md", "\n\n".join(part for part in parts if part) + "\n")


def verdict_counts(cells: pd.DataFrame) -> pd.DataFrame:
    """How many printed numbers of each table match, differ, were made on generated data, or were not made.

    Args:
        cells: the rows of `reference.compare`.
    """
    kinds = cells["verdict"].map(kind)
    counts = pd.crosstab(cells["table"], kinds).reindex(index=cells["table"].unique(), columns=_KINDS, fill_value=0)
    return counts.rename_axis(index="table", columns=None)


def _head(profile: str, cells: pd.DataFrame) -> str:
    """Title, the warning for mini, and the count of verdicts."""
    counts = verdict_counts(cells)
    total = counts.sum()
    summary = ", ".join(f"{total[name]} {name}" for name in _KINDS)
    counts.index = [title(name) for name in counts.index]
    warning = MINI if profile == "mini" else f"Profile `{profile}`."
    return "\n\n".join(
        [
            "# EfficientViT-SAM and EfficientSAM3: results of this study",
            warning,
            f"Of the {len(cells)} printed numbers: {summary}. "
            "A number matches within half a unit of its last printed digit. After ± stands the spread over repeated "
            "measurements; the notebook says of which kind.",
            pipes(counts.reset_index(names="paper")),
        ]
    )


def _section(folder: Path, table: pd.DataFrame) -> str:
    """One notebook: its title and claim, figures, tables, origin. Empty if it made neither."""
    figures = [_picture(file) for file in folder.glob("figures/*.*")]
    if not figures and not len(table):
        return ""
    heading, claim = _title_and_claim(folder)
    parts = [f"## {heading}", claim]
    for _, name, finding, caption in sorted(figures):
        parts.append(f"![{finding}]({folder.name}/figures/{name})\n\n*{finding}.{' ' + caption if caption else ''}*")
    parts += [wide(str(name), rows) for name, rows in table.groupby("table", sort=False)]
    parts.append(origin_line(_origin(folder)))
    return "\n\n".join(part for part in parts if part)


def _picture(file: Path) -> tuple[int, str, str, str]:
    """Order, file name, title and caption of a figure; they travel in the picture itself."""
    try:
        text = labels(file)
        order = int(text.get("Order", 0))
    except Exception as error:  # Pillow's readers have many kinds
        raise damaged(file, error) from error
    return order, file.name, text.get("Title", file.stem).rstrip("."), text.get("Description", "")


def _origin(folder: Path) -> dict[str, Any]:
    """provenance.json, with what `origin_line` and `_runs` show of it."""
    file = folder / "provenance.json"
    texts = {"git": dict, "machine": dict, "versions": dict, "profile": str, "run_id": str, "finished": str}
    found = read_record(file, **texts, seconds=(int, float), gpu=(str, type(None)))
    if not {"seed", "threads"} <= found.keys() or "cpu" not in found["machine"]:
        raise damaged(file, "expected seed, threads and the machine's cpu")
    if not {"sha", "dirty"} <= found["git"].keys() or not isinstance(found["git"]["sha"], str | None):
        raise damaged(file, "expected the commit")
    return found


def _title_and_claim(folder: Path) -> tuple[str, str]:
    """Heading and first paragraph of the notebook, from its executed copy or its source; else the folder's name."""
    for file in (folder / "run.ipynb", repo_root() / "notebooks" / f"{folder.name}.ipynb"):
        if file.is_file():
            from .params import UsageError, read_notebook  # takes seconds, and few who come here build a report

            try:
                cells = read_notebook(file).cells
            except UsageError as error:
                raise damaged(file, error) from None
            paragraphs = re.split(r"\n\s*\n", cells[0].source.strip()) if cells else []
            heading, *rest = (re.sub(r"\s+", " ", text).strip() for text in paragraphs or [""])
            if heading.startswith("# "):
                claim = rest[0] if rest and not rest[0].startswith(("**", "#", "-", "|")) else ""
                return heading[2:].strip(), claim
    return folder.name.replace("_", " "), ""


def _verdicts(name: str, rows: pd.DataFrame) -> str:
    """The verdict on every cell of one printed table."""
    frame = rows.drop(columns=["table"]).rename(columns={"row": "model", "column": "number"})
    for column in ("ours", "on generated data"):
        frame[column] = ["" if pd.isna(value) else digits(value) for value in frame[column]]
    frame["difference"] = ["" if pd.isna(value) else f"{value:+g}" for value in frame["difference"]]
    if not frame["on generated data"].any():
        frame = frame.drop(columns=["on generated data"])
    return f"## {title(name)}\n\n{pipes(frame)}"


def _runs(root: Path, folders: list[Path]) -> str:
    """When each notebook ran, how long it took, and which of them failed since."""
    rows = []
    for folder in sorted({*folders, *(file.parent for file in root.glob("[0-9][0-9]_*/failed.ipynb"))}):
        ran = folder in folders
        origin = _origin(folder) if ran else {}
        failed = (folder / "failed.ipynb").exists()
        state = ("last run failed, an earlier result is shown" if ran else "failed") if failed else "ran whole"
        rows.append([folder.name, state, *(origin.get(key, "") for key in ("finished", "seconds", "run_id"))])
    if not rows:
        return ""
    return "# Runs\n\n" + pipes(pd.DataFrame(rows, columns=["notebook", "state", "finished", "seconds", "run"]))
