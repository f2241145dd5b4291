"""Segment everything: SAM's records, made by SAM's published generator around the same stand-in model.

`golden/everything.json` holds, for six sets of options, the records of segment-anything's generator (commit dca509f) on
`picture()` with `Thresholds` as its model: box, area, scores, point, crop, and sums of the mask's coordinates.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from evsam_lib import load_model
from evsam_lib.data.generate import scene
from evsam_lib.data.transforms import LongestSide
from evsam_lib.everything import crop_boxes, nms, point_grid, segment_everything
from evsam_lib.models.prompt_encoder import PromptEncoder

GOLDEN = json.loads((Path(__file__).parent / "golden" / "everything.json").read_text())


class Thresholds:
    """A stand-in for a model: a point's three masks are the pixels near to it in place and in grey, nearer, nearest."""

    mask_threshold = 0.0
    device, dtype = torch.device("cpu"), torch.float32
    frame = LongestSide(128, 128)
    prompt_encoder = PromptEncoder(4, 32, 128)

    def preprocess(self, image):
        return self.frame.preprocess(image)

    def to_frame(self, coords, hw):
        return self.frame.to_frame(coords, hw)

    def upscale(self, low_res, hw):
        return self.frame.upscale(low_res, hw)

    def encode(self, pixels):
        return F.avg_pool2d(pixels.mean(1, keepdim=True), 3, stride=1, padding=1)  # (1, 1, 128, 128)

    def decode(self, embedding, coords, labels, *, image_code=None):
        x, y = coords[0, :, 0].round().long().clamp(0, 127).unbind(-1)
        grey = embedding[0, 0]
        rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
        far = torch.hypot(rows - y[:, None, None], columns - x[:, None, None]) / 60
        apart = (grey - grey[y, x][:, None, None]).abs() + far  # (P, 128, 128)
        limits = torch.tensor([0.6, 0.4, 0.25])
        logits = 60 * (limits[:, None, None] - apart[:, None])  # (P, 3, 128, 128)
        iou = torch.sigmoid((logits > 0).float().mean((-1, -2)) * 20 + 1.0)
        return logits[None], iou[None]


def picture():
    return scene(7, 3, size=(150, 201)).image


def checked(record):
    """What the golden file keeps of a record."""
    y, x = np.nonzero(record["segmentation"])
    return {
        "bbox": [int(v) for v in record["bbox"]],
        "area": int(record["area"]),
        "predicted_iou": round(float(record["predicted_iou"]), 5),
        "stability_score": round(float(record["stability_score"]), 5),
        "crop_box": [int(v) for v in record["crop_box"]],
        "point": [round(float(v), 3) for v in record["point_coords"][0]],
        "mask_sum_y": int(y.sum()),
        "mask_sum_x": int(x.sum()),
    }


@pytest.mark.parametrize("name", GOLDEN["options"])
def test_records_are_sams(name):
    ours = [checked(record) for record in segment_everything(Thresholds(), picture(), **GOLDEN["options"][name])]
    expected = GOLDEN["records"][name]
    assert len(ours) == len(expected) > 1
    for record, wanted in zip(ours, expected, strict=True):
        scores = ("predicted_iou", "stability_score")
        assert {k: v for k, v in record.items() if k not in scores} == {
            k: v for k, v in wanted.items() if k not in scores
        }
        assert [record[k] for k in scores] == pytest.approx([wanted[k] for k in scores], abs=2e-5)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batches_change_nothing(batch):
    options = GOLDEN["options"]["loose"]
    whole = segment_everything(Thresholds(), picture(), **options)
    parts = segment_everything(Thresholds(), picture(), **options, points_per_batch=batch)
    assert [checked(record) for record in parts] == [checked(record) for record in whole]


def test_outputs_are_the_same_mask():
    options = GOLDEN["options"]["loose"]
    kinds = ("binary_mask", "coco_rle", "uncompressed_rle")
    binary, compressed, runs = (segment_everything(Thresholds(), picture(), **options, output_mode=k) for k in kinds)
    for mask, short, long in zip(binary, compressed, runs, strict=True):
        assert (coco_mask.decode(short["segmentation"]) == mask["segmentation"]).all()
        again = coco_mask.frPyObjects(long["segmentation"], *long["segmentation"]["size"])
        assert (coco_mask.decode(again) == mask["segmentation"]).all()
        json.dumps([short, long])


def test_approximate_says_so_and_is_near():
    options = GOLDEN["options"]["loose"]
    exact = segment_everything(Thresholds(), picture(), **options)
    rough = segment_everything(Thresholds(), picture(), **options, approximate=True)
    assert all(record["approximate"] for record in rough)
    assert not any("approximate" in record for record in exact)
    assert abs(len(rough) - len(exact)) <= 0.02 * len(exact)


def test_a_real_model_with_every_option():
    model = load_model("efficientvit-sam-mini", "mini")
    image = scene(7, 3, size=(240, 320)).image
    options = {"points_per_side": 8, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2}
    records = segment_everything(
        model, image, **options, pred_iou_thresh=0.4, stability_score_thresh=0.6, min_mask_region_area=50
    )
    assert len(records) > 3
    for record in records:
        left, top, width, height = record["bbox"]
        y, x = np.nonzero(record["segmentation"])
        assert (x.min(), y.min(), x.max(), y.max()) == (left, top, left + width, top + height)
        assert record["area"] == len(x)


def test_nothing_found_is_an_empty_list():
    assert segment_everything(Thresholds(), picture(), points_per_side=4, pred_iou_thresh=0.999999) == []
    assert segment_everything(Thresholds(), picture(), points_per_side=4, pred_iou_thresh=1.0, crop_n_layers=1) == []


def test_suppression_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    corner = 20 * torch.rand(200, 2, generator=generator)
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(200, 2, generator=generator)], 1)
    scores = (10 * torch.rand(200, generator=generator)).round() / 10  # many ties
    kept = []
    for i in sorted(range(200), key=lambda i: -scores[i].item()):
        inner = (torch.minimum(boxes[i, 2:], boxes[kept, 2:]) - torch.maximum(boxes[i, :2], boxes[kept, :2])).clamp(0)
        shared, area = inner.prod(1), (boxes[:, 2:] - boxes[:, :2]).prod(1)
        if not (shared / (area[i] + area[kept] - shared) > 0.4).any():
            kept.append(i)
    assert nms(boxes, scores, 0.4).tolist() == kept
    assert nms(boxes[:0], scores[:0], 0.4).tolist() == []


def test_grid_and_crops():
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    boxes = crop_boxes((150, 201), 1, 512 / 1500)
    assert boxes[0] == ((0, 0, 201, 150), 0)
    assert len(boxes) == 5
    assert {layer for _, layer in boxes[1:]} == {1}
    assert max(box[2] for box, _ in boxes[1:]) == 201


def test_bad_input():
    with pytest.raises(ValueError, match="uint8"):
        segment_everything(Thresholds(), picture().astype(np.float32))
    with pytest.raises(ValueError, match="one of the two"):
        segment_everything(Thresholds(), picture(), point_grids=[point_grid(2)])
    with pytest.raises(ValueError, match="output_mode must be one of"):
        segment_everything(Thresholds(), picture(), output_mode="png")
