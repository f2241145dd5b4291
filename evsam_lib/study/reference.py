"""The numbers printed in the paper, and the verdict on each of ours.

The paper is EfficientViT-SAM (Zhang, Cai and Han, 2024); beside it stand the sizes and scores that the documents of
EfficientSAM3 and SAM3 state (`efficientsam3*.csv`, where `page` names the document). The numbers live once, in
`results/reference/*.csv`, one row per printed cell. Explained in notebooks 00_start_here and 20_report.

A verdict is one of
    match                   within half a unit of the last printed digit
    differs by +0.3         beyond it
    generated data          same protocol, but on data (or in a profile) that cannot be compared with the paper
    not run: <what is missing>
"""

import math
from pathlib import Path

import pandas as pd

from .paths import repo_root, shown

__all__ = ["COMPUTED", "GENERATED", "MEASURED", "compare", "kind", "paper", "tolerance", "verdict"]

COMPUTED = "computed"  # follows from the architecture alone (parameters, MACs): comparable in every profile
MEASURED = "measured"  # on the paper's data or on a real machine: comparable, but never in mini
GENERATED = "generated data"  # never comparable

# Printed twice: where the first is asked for and not given, the second answers (Figure 1 plots Table 1; its mAP is
# Table 4's).
_SAME = {
    ("table1", "COCO mAP"): ("table4", "COCO mAP"),
    ("figure1", "COCO mAP"): ("table4", "COCO mAP"),
    ("figure1", "throughput"): ("table1", "throughput"),
    ("text", "MACs"): ("table1", "MACs"),
}

# What it takes to fill a table: the reason given for a number nobody has made yet.
_NEEDS = {
    "params": "the model's definition",
    "MACs": "the model's definition",
    "efficientsam3": "the models' definitions",
    "efficientsam3_boxes": "COCO val2017 and released weights",
    "efficientsam3_concepts": "SA-Co Gold and released weights, whose owners give access on request",
    "efficientsam3_texts": "SA-Co VEval's noun phrases and released weights",
    "throughput": "TensorRT on an NVIDIA GPU (the paper's is an A100)",
    "speed-up": "TensorRT on an NVIDIA GPU (the paper's is an A100)",
    "table5": "COCO val2017, detector boxes and released weights",
    "sginw": "the 25 SGinW sets, Grounding DINO boxes and released weights",
    "COCO": "COCO val2017 and released weights",
    "LVIS": "LVIS val and released weights",
}


def paper(table: str | None = None) -> pd.DataFrame:
    """The paper's numbers: table, row, column, value, printed (the digits as text), unit, page, claimed_by.

    Raises:
        FileNotFoundError: there is no such reference table.
    """
    folder = repo_root() / "results" / "reference"
    files = [folder / f"{table}.csv"]
    if table is None:  # Tables 1 to 5 first
        files = sorted(folder.glob("*.csv"), key=lambda file: (not file.stem.startswith("table"), file.stem))
    if not files or not files[0].is_file():
        have = ", ".join(sorted(file.stem for file in folder.glob("*.csv"))) or "nothing"
        raise FileNotFoundError(f"no reference table {table or '*'!r} in {shown(folder)}; it holds {have}")
    return pd.concat([_read(file) for file in files], ignore_index=True)


def _read(file: Path) -> pd.DataFrame:
    rows = pd.read_csv(file, dtype={"value": str})
    rows.insert(3, "printed", rows["value"])
    return rows.assign(value=rows["value"].astype(float))


def tolerance(printed: str) -> float:
    """Half a unit of the last printed digit: 0.05 for "34.8", 0.5 for "2973"."""
    return 0.5 * 10.0 ** -_decimals(printed)


def _decimals(printed: str) -> int:
    return len(printed.partition(".")[2])


def verdict(printed: str, value: float | None, *, status: str = MEASURED, profile: str = "paper") -> str:
    """The verdict on one of our values against the printed one.

    Args:
        printed: the paper's number, digit for digit.
        value: ours; None or NaN where there is none.
        status: how ours came about ("measured", "computed", "generated data" or "not run: <what is missing>").
        profile: under "mini" nothing but a computed value is comparable.
    """
    if status.startswith("not run"):
        return status
    if value is None or math.isnan(value):
        return "not run: no value"
    if status == GENERATED or (profile == "mini" and status != COMPUTED):
        return GENERATED
    difference = value - float(printed)
    if abs(difference) <= tolerance(printed) + 1e-9:
        return "match"
    return f"differs by {difference:+.{_decimals(printed) + 1}f}"


def kind(verdict: str) -> str:
    """The class of a verdict: "match", "differs", "generated data" or "not run"."""
    return next(name for name in ("match", "differs", GENERATED, "not run") if verdict.startswith(name))


def compare(measured: pd.DataFrame, *, notebook: str | None = None) -> pd.DataFrame:
    """The paper's numbers beside ours, one row per printed cell.

    A row is found by its table, its column, and the model's name (case and hyphens do not count, so `sam-vit-h` is
    `SAM-ViT-H`). Where the model itself is absent, the mini model of its family (`EfficientViT-SAM-mini`) shows that
    the protocol ran: its value stands in `on generated data`, never beside the paper's.

    Args:
        measured: long rows as in a result's table.csv.
        notebook: only the cells that this notebook claims; all where None.

    Returns:
        table, row, column, unit, paper, ours, difference, verdict, on generated data. `paper` holds the digits as
        printed; `ours` and `difference` are empty wherever the two may not stand side by side.
    """
    cells = paper()
    cells = cells if notebook is None else cells[cells["claimed_by"] == notebook]
    ours = {(row["table"], row["column"], _key(row["row"])): row for row in measured.to_dict("records")}
    rows = [_compare_cell(cell, ours) for cell in cells.to_dict("records")]
    columns = ["table", "row", "column", "unit", "paper", "ours", "difference", "verdict", "on generated data"]
    return pd.DataFrame(rows, columns=columns)


def _compare_cell(cell: dict, ours: dict) -> dict:
    """One row of `compare`: the cell, our value if it may stand beside it, and the verdict."""
    found = _find(cell, ours)
    if found is None:
        value, result = math.nan, f"not run: {_missing(cell)}"
    else:
        value = float(found["value"])
        result = verdict(cell["printed"], value, status=str(found["status"]), profile=str(found["profile"]))
        if _key(found["row"]) != _key(cell["row"]) and kind(result) != "not run":
            result = GENERATED
    comparable = kind(result) in ("match", "differs")
    return {
        **{name: cell[name] for name in ("table", "row", "column", "unit")},
        "paper": cell["printed"],
        "ours": round(value, _decimals(cell["printed"]) + 2) if comparable else math.nan,
        "difference": round(value - cell["value"], _decimals(cell["printed"]) + 2) if comparable else math.nan,
        "verdict": result,
        "on generated data": round(value, 2) if result == GENERATED else math.nan,
    }


def _find(cell: dict, ours: dict) -> dict | None:
    """Our row for a printed cell: the model itself, else its number in another table, else the family's mini model."""
    places = [(cell["table"], cell["column"])]
    if places[0] in _SAME:
        places.append(_SAME[places[0]])
    for name in (cell["row"], _stand_in(cell["row"])):
        for table, column in places:
            row = ours.get((table, column, _key(name)))
            if row is not None and (name == cell["row"] or row["status"] != COMPUTED):
                return row
    return None


def _stand_in(row: str) -> str:
    return row.rpartition("-")[0] + "-mini"


def _key(row: str) -> str:
    return str(row).lower().replace("-", "").replace("_", "")


def _missing(cell: dict) -> str:
    for name in (cell["column"], cell["table"], cell["column"].split()[0]):
        if name in _NEEDS:
            return f"{cell['claimed_by']} needs {_NEEDS[name]}"
    return f"no value from {cell['claimed_by']}"
