"""Zero-shot segmentation, measured: mIoU for ground-truth boxes and clicks, AP for a detector's boxes.

The protocols of Table 2 (1, 3, 5 clicks; notebook 08), Table 3 (ground-truth boxes; notebook 09), Tables 4 and 5 and
SGinW (detector boxes; notebooks 10 to 12), with the rules of the authors' script as defaults: of three masks the one of
highest predicted IoU counts, whatever the prompt; no mask is fed back; crowd annotations count; an object whose area is
exactly 32^2 or 96^2 counts in both of its size classes; all clicks so far are given together. Each rule that one may
question is an argument with a name.

`run` is the whole, `plan` what is asked, `batch` what happens to some images, `metrics` what is measured on masks,
`parts` how a run is shared out and taken up again, `report` what is written, `cli` the command line.

    python -m evsam_lib.evaluate --model efficientvit-sam-l0 --weights l0.safetensors --images val2017 \
        --annotations instances_val2017.json --prompt gt-box --out l0_boxes.json
"""

from .batch import evaluate_image
from .cli import main
from .metrics import SIZES, mask_iou, mean_iou
from .parts import part_path
from .report import format_table, write_result, write_results_file
from .run import PROMPTS, evaluate, merge

__all__ = [
    "PROMPTS",
    "SIZES",
    "evaluate",
    "evaluate_image",
    "format_table",
    "main",
    "mask_iou",
    "mean_iou",
    "merge",
    "part_path",
    "write_result",
    "write_results_file",
]
