"""The machinery of the notebooks: parameters, results with their provenance, the paper's numbers, and the report.

Knows files, pandas and papermill, no model. Explained in notebook 00_start_here.

    study = begin("09_table3_gt_boxes", profile=profile, seed=seed, device=device, ...)
    study.table("table3", {"EfficientViT-SAM-mini": {"COCO mIoU": 61.2}}, unit="%")
    study.figure(fig, "miou_by_size", caption="...")
    study.save()
"""

from .record import Result, Study, begin
from .reference import compare, paper, verdict
from .report import build_report

__all__ = ["Result", "Study", "begin", "build_report", "compare", "paper", "verdict"]
