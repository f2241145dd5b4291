"""The paper's numbers: all of them, each claimed by a notebook, and what a verdict is."""

import re
from pathlib import Path

import pandas as pd
import pytest

from evsam_lib.study import compare, paper, verdict
from evsam_lib.study.report import verdict_counts

ROOT = Path(__file__).parents[1]
# models x columns, as printed
SIZES = {"table1": 9 * 4, "table2": 2 * 6, "table3": 2 * 8, "table4": 9 * 8, "table5": 2 * 8, "sginw": 2}
SIZES |= {
    "efficientsam3_texts": 3 * 2,
    "efficientsam3": 13,
    "efficientsam3_boxes": 9 + 3 + 9,
    "efficientsam3_concepts": 8 + 2 + 3 * 3 + 1,
}
# of DESIGN: notebooks that make printed numbers
PLANNED = {"01", "06", "07", "08", "09", "10", "11", "12", "16", "17", "19"}


@pytest.mark.parametrize(("table", "cells"), SIZES.items())
def test_every_printed_cell_is_there_once(table, cells):
    rows = paper(table)
    assert len(rows) == cells
    assert not rows.duplicated(["table", "row", "column"]).any()
    assert rows[["value", "unit", "page", "claimed_by"]].notna().all().all()


def test_every_cell_is_claimed_by_a_notebook():
    claimed = set(paper().claimed_by)
    assert all(re.fullmatch(r"\d\d_\w+", name) for name in claimed)
    assert {name[:2] for name in claimed} <= PLANNED
    made = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {name for name in claimed if name[:2] in {file[:2] for file in made}} <= made  # no other spelling


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("table1", "SAM-ViT-H", "MACs", 2973),
        ("table1", "EfficientViT-SAM-XL1", "params", 203.3),
        ("table1", "EfficientViT-SAM-L0", "throughput", 762),
        ("table2", "EfficientViT-SAM-XL1", "LVIS 5 click", 71.7),
        ("table3", "SAM-ViT-H", "COCO mIoU_S", 72.3),
        ("table4", "MobileSAM", "LVIS AP_M", 47.8),
        ("table5", "EfficientViT-SAM-XL1", "GroundingDINO AP_L", 67.3),
        ("sginw", "SAM-ViT-H", "mAP", 48.7),
        ("text", "EfficientViT-SAM-L2", "speed-up", 48.9),
        ("efficientsam3_boxes", "ES-TV-L", "COCO mIoU, SAM3.1 teacher", 69.67),
        ("efficientsam3_concepts", "LiteText ES-MC-S", "cgF1", 53.61),
        ("efficientsam3_texts", "ES-MC-S", "token cosine", 0.8648),
    ],
)
def test_spot_values(table, row, column, value):
    rows = paper(table)
    assert rows[(rows.row == row) & (rows.column == column)].value.tolist() == [value]


def test_what_is_printed_twice_agrees():
    def cells(table, column):
        rows = paper(table)
        return rows[rows.column == column].set_index("row").printed.to_dict()

    assert cells("figure1", "throughput") == cells("table1", "throughput")
    assert cells("figure1", "COCO mAP") == cells("table1", "COCO mAP") == cells("table4", "COCO mAP")
    table1 = paper("table1").pivot(index="row", columns="column", values="value").throughput
    for row, printed in cells("text", "speed-up").items():
        assert verdict(printed, table1[row] / table1["SAM-ViT-H"]) == "match"


def test_an_unknown_table_names_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"'table9'.* holds efficientsam3, .*figure1, .*table5"):
        paper("table9")


class TestVerdict:
    @pytest.mark.parametrize(
        ("printed", "value", "expected"),
        [
            ("34.8", 34.792784, "match"),
            ("34.8", 34.851, "differs by +0.05"),
            ("2973", 2980.5, "differs by +7.5"),
            ("59.8", 59.749, "differs by -0.05"),
            ("59.8", None, "not run: no value"),
            ("59.8", float("nan"), "not run: no value"),
        ],
    )
    def test_half_a_unit_of_the_last_digit(self, printed, value, expected):
        assert verdict(printed, value) == expected

    def test_generated_data_is_never_compared(self):
        assert verdict("59.8", 59.8, status="generated data") == "generated data"

    def test_a_mini_number_is_comparable_only_if_it_follows_from_the_architecture(self):
        assert verdict("59.8", 59.8, profile="mini") == "generated data"
        assert verdict("34.8", 34.8, status="computed", profile="mini") == "match"

    def test_not_run_says_what_is_missing(self):
        assert verdict("59.8", None, status="not run: COCO val2017") == "not run: COCO val2017"


def rows(**changes):
    base = {"table": "table1", "row": "EfficientViT-SAM-L0", "column": "params", "value": 34.79, "unit": "M"}
    return pd.DataFrame([base | {"profile": "paper", "status": "measured"} | changes])


class TestCompare:
    def test_a_match(self):
        cells = compare(rows())
        found = cells[(cells.table == "table1") & (cells.row == "EfficientViT-SAM-L0") & (cells.column == "params")]
        assert found.verdict.tolist() == ["match"]
        assert found.ours.tolist() == [34.79]

    def test_a_mini_model_stands_apart(self):
        cells = compare(
            rows(row="EfficientViT-SAM-mini", table="table3", column="COCO mIoU", value=61.0, profile="mini")
        )
        found = cells[(cells.table == "table3") & (cells.row == "EfficientViT-SAM-XL1") & (cells.column == "COCO mIoU")]
        assert found.verdict.tolist() == ["generated data"]
        assert found.ours.isna().all()
        assert found["on generated data"].tolist() == [61.0]

    def test_a_small_model_never_matches_a_large_one(self):
        cells = compare(rows(row="EfficientViT-SAM-mini", table="table3", column="COCO mIoU", value=79.9))
        found = cells[(cells.table == "table3") & (cells.row == "EfficientViT-SAM-XL1") & (cells.column == "COCO mIoU")]
        assert found.verdict.tolist() == ["generated data"]

    def test_a_name_of_the_zoo_is_understood_and_figure_1_follows_table_1(self):
        cells = compare(rows(row="efficientvit-sam-l0", column="throughput", value=762.0))
        assert set(cells[cells.verdict == "match"].table) == {"table1", "figure1"}

    def test_everything_else_was_not_run_and_says_why(self):
        cells = compare(rows())
        others = cells[cells.verdict != "match"]
        assert len(others) == len(cells) - 1
        assert others.verdict.str.match(r"not run: \d\d_\w+ needs \w|not run: no value from \d\d_").all()
        assert verdict_counts(cells).to_numpy().sum() == len(cells)
