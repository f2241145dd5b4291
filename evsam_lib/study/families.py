"""EfficientSAM3 beside EfficientViT-SAM, for the report: what an answer costs in both, and what the stages brought.

Costs come from the tables of notebooks 01 and 16, seconds from 16, scores from the printed numbers and from notebooks
09 and 17, the stages' gains from the metrics of 17 to 19. What has not run is left out.
"""

import re
from collections.abc import Mapping

import pandas as pd

from .reference import paper
from .tables import digits, pipes

__all__ = ["side_by_side"]

COUNTS, LEDGER = "01_architecture", "16_efficientsam3_compute"
STAGES = {
    "17_efficientsam3_students": "stage 1, image and text students",
    "18_efficientsam3_memory": "stage 2, memory",
    "19_efficientsam3_concepts": "stage 3, phrases",
}
BASIS = "EfficientViT-SAM-L0"  # what the others' images are compared with


def side_by_side(tables: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The section as markdown; empty while notebook 16 has left nothing.

    Args:
        tables: long table of each notebook that has run.
        metrics: single numbers of each, by name.
    """
    ledger = _wide(tables[LEDGER], "ledger") if LEDGER in tables else pd.DataFrame()
    if "click decoder" not in ledger.columns:
        return ""
    costs = _costs(tables)
    shown = costs.map(lambda value: "" if pd.isna(value) else digits(round(value, 2)))
    parts = [
        "# EfficientSAM3 beside EfficientViT-SAM",
        "Both put a small network in the place of a large image encoder. EfficientViT-SAM answers points and boxes. "
        "EfficientSAM3 keeps SAM3's necks, detector and tracker, and answers phrases as well; what it keeps is most of "
        "what it costs. An image is paid once, a box or a phrase each time. For boxes the detector's neck is not run.",
        pipes(shown.reset_index(names="model")),
        "*Parameters and MACs are counted from the architectures, parameters of SAM3's family without the tracker. "
        "Scores are printed ones, mean IoU over COCO val2017 for true boxes, each by its authors' script: "
        "EfficientViT-SAM's takes the best of three masks by predicted IoU and counts crowds, EfficientSAM3's a single "
        "mask without crowds.*",
        _verdict(costs),
        _seconds(tables[LEDGER]),
        _stages(metrics),
    ]
    return "\n\n".join(part for part in parts if part)


def _costs(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Parameters, MACs an image, a box and a phrase, and printed scores; models down, cheapest image first."""
    rows = {}
    if COUNTS in tables:
        counts = _wide(tables[COUNTS], "counts")
        names = {_key(row): row for table in ("table1", "table3") for row in paper(table)["row"]}
        for name, row in counts[counts.index.map(_key).isin(names)].iterrows():
            image = row["MACs, encoder"]
            box = row["MACs, with decoder"] - image
            rows[names[_key(name)]] = {
                "parameters, M": row["params, whole model"],
                "image, GMACs": image,
                "box, GMACs": box,
            }
    ledger, sizes = _wide(tables[LEDGER], "ledger"), _wide(tables[LEDGER], "parameters")
    whole = sizes["detector"].to_dict()
    for name, row in ledger.iterrows():
        trunk, phrase = row["backbone"] + row["head"], row["detector"] - row[["backbone", "head", "neck"]].sum()
        cost = {"image, GMACs": trunk + row["tracker neck"], "box, GMACs": row["click decoder"]}
        cost |= {"image for phrases, GMACs": trunk + row["neck"], "phrase, GMACs": phrase}
        rows[str(name)] = {"parameters, M": whole[name], **cost}
    table = pd.DataFrame.from_dict(rows, orient="index")
    printed = pd.concat([paper("table3"), paper("efficientsam3_boxes")]).query("column == 'COCO mIoU'")
    table["box mIoU, %"] = printed.set_index("row")["value"].reindex(table.index)
    return table.sort_values("image, GMACs", kind="stable")


def _verdict(costs: pd.DataFrame) -> str:
    """The sober comparison, in numbers of the table above."""
    students = costs[costs.index.str.startswith("ES-")]
    if BASIS not in costs.index or students.empty:
        return ""
    own, reported = costs["image, GMACs"], students["box mIoU, %"]
    cheapest, best, basis = own[students.index].idxmin(), reported.idxmax(), own[BASIS]
    scores = paper("table3").query("column == 'COCO mIoU'").set_index("row")["value"]
    ours = scores[scores.index.str.startswith("EfficientViT")]
    return (
        f"Boxes alone are not what EfficientSAM3 is for: its cheapest student, {cheapest}, encodes an image at "
        f"{digits(own[cheapest])} GMACs, {own[cheapest] / basis:.1f} times {BASIS}'s {digits(basis)}, and the best "
        f"printed score of the nine is {digits(reported[best])} % ({best}), against "
        f"{digits(ours.max())} % of {ours.idxmax()}. What it adds is the phrase."
    )


def _seconds(table: pd.DataFrame) -> str:
    frame = _wide(table, "seconds")
    if frame.empty:
        return ""
    frame = frame.map(lambda value: "" if pd.isna(value) else digits(round(value / 1e3, 2)))
    frame.columns = [f"{column}, s" for column in frame.columns]
    note = "*Seconds of the processor, one thread, random weights; conditions in notebook 16.*"
    return f"{pipes(frame.reset_index(names='model'))}\n\n{note}"


def _stages(metrics: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        {"stage": title, "what": key.replace("_", " "), "value": digits(value)}
        for name, title in STAGES.items()
        for key, value in metrics.get(name, {}).items()
        if isinstance(value, int | float)
    ]
    if not rows:
        return ""
    heading = (
        "What each stage of its training brought, on small models and generated data; sections 17 to 19 explain them."
    )
    return f"{heading}\n\n{pipes(pd.DataFrame(rows))}"


def _wide(table: pd.DataFrame, name: str) -> pd.DataFrame:
    rows = table[table["table"] == name]
    return rows.pivot_table(index="row", columns="column", values="value", sort=False)


def _key(name: object) -> str:
    return re.sub(r"\W", "", str(name)).lower()
