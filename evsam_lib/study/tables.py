"""The long table every result holds, and how it looks as markdown. See notebook 00_start_here.

One row per number: table, row, column, value, unit, n, spread, profile, status, run_id.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .paths import shown

__all__ = [
    *("COLUMNS", "MINI", "damaged", "digits", "origin_line", "pipes", "read_record", "read_table", "result_markdown"),
    *("title", "wide"),
]

COLUMNS = ["table", "row", "column", "value", "unit", "n", "spread", "profile", "status", "run_id"]
_TITLES = {
    "sginw": "SGinW (Section 4.4)",
    "text": "Numbers in the text",
    "efficientsam3": "EfficientSAM3: sizes",
    "efficientsam3_boxes": "EfficientSAM3: true boxes on COCO",
    "efficientsam3_concepts": "SAM3 and EfficientSAM3: phrases on SA-Co Gold",
    "efficientsam3_texts": "EfficientSAM3: text students against SAM3's",
}
MINI = (
    "**Profile `mini`: small models on generated data. These numbers show that the study runs; none of them is a "
    "result of the paper, and only counts that follow from an architecture alone (parameters, MACs) are compared "
    "with it.**"
)


def read_table(folder: Path) -> pd.DataFrame:
    """The long rows of a result's table.csv; empty units stay empty text.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: the file is damaged.
    """
    file = folder / "table.csv"
    types: dict[str, Any] = dict.fromkeys(("table", "row", "column", "unit", "profile", "status", "run_id"), str)
    types |= dict.fromkeys(("value", "spread"), float)
    try:
        # pyrefly: ignore[no-matching-overload]: pandas' stub knows no mapping
        table = pd.read_csv(file, dtype=types, na_values=[""], keep_default_na=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # pandas' parser has its own kinds
        raise damaged(file, error) from error
    named = table[[name for name in ("table", "row", "column", "profile", "status") if name in table]]
    if list(table.columns) != COLUMNS or named.isna().to_numpy().any():
        raise damaged(file, f"expected the columns {', '.join(COLUMNS)}, filled")
    if not np.isfinite(table[["value", "spread"]].fillna(0).to_numpy()).all():
        raise damaged(file, "expected finite numbers")
    return table.fillna({"unit": ""})


def read_record(file: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON file of a result.

    Args:
        file: metrics.json, provenance.json, ...
        **kinds: what must be in it, and of which type.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # or ValueError: half a letter, which no report can hold
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are no text
        raise damaged(file, error) from error
    for name, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(name, ...), kind):
            raise damaged(file, f"expected an object with {name!r}")
    return found


def damaged(file: Path, reason: object) -> ValueError:
    """The error for a result's file that is not as its notebook wrote it."""
    told = " ".join(str(reason).split())[:200]
    return ValueError(f"{shown(file)} is damaged ({told}): run that notebook again")


def result_markdown(name: str, table: pd.DataFrame, origin: dict[str, Any]) -> str:
    """The tables of one result as markdown, with a line that says where they came from."""
    parts = [f"# {name}"]
    parts += [MINI] if origin["profile"] == "mini" else []
    parts += [wide(str(own), rows) for own, rows in table.groupby("table", sort=False)]
    return "\n\n".join([*parts, origin_line(origin)]) + "\n"


def wide(name: str, rows: pd.DataFrame) -> str:
    """One table, rows down and columns across, with units in the header."""
    cells: dict[str, dict[str, str]] = {}
    for cell in rows.to_dict("records"):
        header = f"{cell['column']} ({cell['unit']})" if cell["unit"] else cell["column"]
        cells.setdefault(cell["row"], {})[header] = _value(cell)
    frame = pd.DataFrame.from_dict(cells, orient="index").fillna("")
    status = sorted({str(status).split(":")[0] for status in rows["status"]})
    heading = f"**{title(name)}** ({', '.join(status)})"
    return f"{heading}\n\n{pipes(frame.reset_index(names=''))}"


def _value(cell: dict) -> str:
    if pd.isna(cell["value"]):
        return "not run" if str(cell["status"]).startswith("not run") else "–"
    spread = "" if pd.isna(cell["spread"]) else f" ± {digits(float(format(cell['spread'], '.2g')))}"
    return digits(cell["value"]) + spread


def digits(value: float) -> str:
    """Four significant digits, whole numbers in full, never an exponent for what a reader can count."""
    value = float(value)
    if value.is_integer() or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def origin_line(origin: dict[str, Any]) -> str:
    """One line of provenance, for under a table."""
    sha = origin["git"]["sha"]
    commit = f"commit {sha[:10]}{' with local changes' if origin['git']['dirty'] else ''}" if sha else "no commit"
    threads = f"{origin['threads']} thread{'' if origin['threads'] == 1 else 's'}"
    machine = origin["gpu"] or f"{origin['machine']['cpu']}, {threads}"
    return (
        f"*Profile {origin['profile']}, run {origin['run_id']}, {origin['seconds']} s, seed {origin['seed']}, "
        f"{commit}, torch {origin['versions'].get('torch', 'absent')}, {machine}.*"
    )


def title(table: str) -> str:
    """The heading of a table: "Table 1" for "table1", "Embedding error" for "embedding_error"."""
    numbered = re.fullmatch(r"(table|figure)(\d+)", table)
    if numbered:
        return f"{numbered[1].capitalize()} {numbered[2]}"
    return _TITLES.get(table) or table.replace("_", " ").capitalize()


def pipes(frame: pd.DataFrame) -> str:
    """A pipe table; a bar inside a cell is escaped."""
    frame = frame.astype(str).map(lambda text: text.replace("|", "\\|"))
    return frame.to_markdown(index=False, disable_numparse=True)
