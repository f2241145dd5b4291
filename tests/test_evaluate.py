"""Evaluation: scores by hand, the official rules, the loop around a stand-in, the command line, and the real thing."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evsam_lib import evaluate as ev
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.write import write_coco
from evsam_lib.evaluate.batch import Loaded, measure
from evsam_lib.models.zoo import load_model
from evsam_lib.predict import Predictor
from evsam_lib.prompts import next_clicks

GOLDEN = Path(__file__).parent / "golden" / "training_pieces.pt"


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN, weights_only=True)


def rectangle(x0: int, y0: int, x1: int, y1: int, hw: tuple[int, int] = (20, 30)) -> np.ndarray:
    mask = np.zeros(hw, dtype=bool)
    mask[max(y0, 0) : y1, max(x0, 0) : x1] = True
    return mask


def annotation(ann_id: int, box: tuple, image_id: int = 1, **more) -> dict:
    return {"id": ann_id, "image_id": image_id, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0, **more}


def mask_of_box(annotation: dict) -> np.ndarray:
    x, y, w, h = annotation["bbox"]
    return rectangle(x, y, x + w, y + h)


class StandIn:
    """A predictor whose masks one can draw by hand.

    A box gives its rectangle, one column too wide; points give squares of 5 x 5 pixels, added around the positive ones,
    then removed around the negative ones. Masks are handed out one by one.
    """

    def __init__(self, model=None, **options):
        self.model, self.options, self.sizes, self.images, self.calls = model, options, [], 0, []

    def set_images(self, pixels, sizes):
        self.images += len(pixels)
        self.sizes = sizes

    def masks(self, owners, *, boxes=None, points=None, labels=None):
        if len(owners):
            self.calls.append((boxes, points, labels))
        for i, owner in enumerate(owners):
            if boxes is not None:
                x0, y0, x1, y1 = boxes[i].astype(int)
                mask = rectangle(x0, y0, x1 + 1, y1, self.sizes[owner])
            else:
                mask = self.squares(points[i], labels[i], self.sizes[owner])
            yield slice(i, i + 1), mask[None]

    def squares(self, points, labels, hw):
        mask = np.zeros(hw, dtype=bool)
        for label in (1, 0):
            for x, y in points[labels == label]:
                mask[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = label
        return mask


IMAGE = np.zeros((20, 30, 3), dtype=np.uint8)


def score(predictor, annotations, masks, clicks: int = 0, **options) -> list[dict]:
    """Records of one image's objects."""
    prompt = "points" if clicks else "gt-box"
    loaded = Loaded(annotations, IMAGE, masks.shape[1:], masks)
    return measure(predictor, [loaded], prompt=prompt, clicks=clicks, **options)[0]


# ---- IoU and its means


def test_iou_of_two_by_two_masks_by_hand():
    gt = np.array([[[1, 1], [0, 0]]] * 4, dtype=bool)
    pred = np.array([[[1, 1], [0, 0]], [[1, 0], [1, 0]], [[0, 0], [1, 1]], [[1, 1], [1, 1]]], dtype=bool)
    assert ev.mask_iou(pred, gt) == pytest.approx([100, 100 / 3, 0, 50], abs=1e-5)  # + 1e-7 in the denominator


def test_iou_of_one_pixel_and_of_nothing():
    pixel, nothing = np.array([[[1, 0]]], dtype=bool), np.zeros((1, 1, 2), dtype=bool)
    assert ev.mask_iou(pixel, pixel).tolist() == [1 / (1 + 1e-7) * 100]  # the official formula to the last digit
    assert ev.mask_iou(nothing, pixel).tolist() == [0.0]
    assert ev.mask_iou(nothing, nothing).tolist() == [0.0]
    assert ev.mask_iou(nothing[:0], nothing[:0]).shape == (0,)


def test_areas_on_a_bound_count_twice():
    means, counts = ev.mean_iou([1023, 1024, 1025, 9216], [10, 20, 30, 40])
    assert counts == {"all": 4, "small": 2, "medium": 3, "large": 1}
    assert means == {"all": 25, "small": 15, "medium": 30, "large": 40}


def test_exclusive_sizes_count_every_object_once():
    means, counts = ev.mean_iou([1023, 1024, 1025, 9216], [10, 20, 30, 40], inclusive_sizes=False)
    assert counts == {"all": 4, "small": 1, "medium": 2, "large": 1}
    assert means == {"all": 25, "small": 10, "medium": 25, "large": 40}


def test_means_are_the_official_ones(golden):
    case = golden["metric"]
    means, _ = ev.mean_iou([r["area"] for r in case["in"]], [r["iou"] for r in case["in"]])
    assert means == pytest.approx(case["out"])


def test_empty_classes_have_no_mean():
    means, counts = ev.mean_iou([5], [50])
    assert means == {"all": 50, "small": 50, "medium": None, "large": None}
    assert counts == {"all": 1, "small": 1, "medium": 0, "large": 0}
    assert ev.mean_iou([], []) == (dict.fromkeys(ev.SIZES), dict.fromkeys(ev.SIZES, 0))


# ---- one image


def test_boxes_of_an_image_are_asked_for_in_one_call():
    predictor = StandIn()
    annotations = [annotation(7, (2, 3, 4, 5)), annotation(9, (10, 10, 9, 6))]
    masks = np.stack([mask_of_box(a) for a in annotations])
    records = score(predictor, annotations, masks)
    assert [(r["image_id"], r["ann_id"], r["area"]) for r in records] == [(1, 7, 20), (1, 9, 54)]
    assert [r["iou"] for r in records] == pytest.approx([80, 90], abs=1e-5)  # 4 of 5 columns, 9 of 10
    assert (predictor.images, len(predictor.calls)) == (1, 1)
    assert predictor.calls[0][0].tolist() == [[2, 3, 6, 8], [10, 10, 19, 16]]
    assert "clicks" not in records[0]


def test_clicks_by_hand():
    predictor = StandIn()
    wide, square = rectangle(3, 3, 13, 8), rectangle(20, 10, 25, 15)  # 10 x 5: two clicks fill it; 5 x 5: one
    annotations = [annotation(1, (3, 3, 10, 5)), annotation(2, (20, 10, 5, 5))]
    records = score(predictor, annotations, np.stack([wide, square]), clicks=3)
    # wide: all columns 5..10 of row 5 are equally deep, the first is taken; 5 of 10 columns are then right, the other
    # five wait for the second click, and the third finds nothing wrong
    assert records[0]["clicks"] == [[5, 5, 1], [10, 5, 1], [0, 0, 0]]
    assert records[0]["iou_after_click"] == pytest.approx([50, 100, 100], abs=1e-5)
    assert records[1]["clicks"] == [[22, 12, 1], [0, 0, 0], [0, 0, 0]]
    assert records[1]["iou"] == pytest.approx(100, abs=1e-5)
    # click k of all objects in one call, together with all clicks before it
    assert [call[1].shape for call in predictor.calls] == [(2, 1, 2), (2, 2, 2), (2, 3, 2)]
    assert predictor.calls[2][2].tolist() == [[1, 1, 0], [1, 0, 0]]


def test_a_corner_click_can_ruin_a_perfect_mask_and_can_be_left_out():
    corner = rectangle(0, 0, 5, 5)  # the official click at (0, 0) cuts a hole of 3 x 3 into it
    item = {"annotations": [annotation(1, (0, 0, 5, 5))], "masks": corner[None], "clicks": 3}
    (official,) = score(StandIn(), **item)
    assert official["clicks"][:2] == [[2, 2, 1], [0, 0, 0]]
    assert official["iou_after_click"][:2] == pytest.approx([100, 64], abs=1e-5)
    predictor = StandIn()
    (stopped,) = score(predictor, **item, corner_clicks=False)
    assert stopped["clicks"] == [[2, 2, 1]] and len(predictor.calls) == 1
    assert stopped["iou_after_click"] == pytest.approx([100, 100, 100], abs=1e-5)


def test_clicking_reproduces_the_official_sequences_and_scores(golden):
    cases = golden["clicks"]
    wanted = np.stack([case["gt"].numpy() for case in cases])
    y, x = np.mgrid[: wanted.shape[1], : wanted.shape[2]]

    class SlidingDisc(StandIn):
        """What played the model when the golden clicks were made: a disc that slides right and grows."""

        def masks(self, owners, *, points, labels):
            k = points.shape[1]
            discs = []
            for mask, (x0, y0) in zip(wanted, points[:, 0], strict=True):
                rows = np.flatnonzero(mask.any(axis=1))
                radius = max(y0 - rows[0], rows[-1] - y0) + k - 2
                discs.append((x - x0 - 4 * (k - 1)) ** 2 + (y - y0) ** 2 < radius**2)
            yield slice(0, len(discs)), np.stack(discs)

    annotations = [annotation(i, (0, 0, 1, 1)) for i in range(len(cases))]
    records = score(SlidingDisc(), annotations, wanted, clicks=5)
    assert [r["clicks"] for r in records] == [case["xy_label"] for case in cases]
    assert [r["iou"] for r in records] == pytest.approx([case["iou"] for case in cases], abs=1e-9)


def test_an_image_of_another_size_than_its_annotations_is_refused():
    with pytest.raises(ValueError, match=r"Image 1 has 20 x 30 pixels .* made for 4 x 5"):
        ev.evaluate_image(
            StandIn(), IMAGE, annotations=[annotation(1, (0, 0, 2, 2))], masks=np.zeros((1, 4, 5), dtype=bool)
        )


# ---- all images, around the stand-in


@dataclass
class Record:
    image_id: int
    annotations: list = field(default_factory=list)
    height: int = 20
    width: int = 30
    path: Path | None = None


class Album(list):
    """Stands in for CocoImages: blank images, masks that fill their boxes."""

    generated = False

    def __init__(self, records, folder: Path):
        super().__init__(records)
        self.images_dir, self.annotations_json = folder / "val2017", folder / "annotations.json"
        self.annotations_json.write_text("{}")
        for record in records:
            record.path = folder / "blank.png"
        Image.fromarray(IMAGE).save(folder / "blank.png")

    def read(self, record):
        return IMAGE

    def mask(self, annotation):
        return mask_of_box(annotation)


class NoModel(nn.Module):
    name, device, dtype = "stand-in", torch.device("cpu"), torch.float32

    def preprocess(self, image):
        return torch.zeros(3, 4, 4)


@pytest.fixture
def album(tmp_path, monkeypatch) -> Album:
    predictors = []

    def stand_in(model, **options):
        predictors.append(StandIn(model, **options))
        return predictors[-1]

    monkeypatch.setattr("evsam_lib.evaluate.run.BatchPredictor", stand_in)
    records = [
        Record(1, [annotation(11, (2, 3, 4, 5)), annotation(12, (5, 5, 9, 6), iscrowd=1)]),
        Record(2),
        Record(3, [annotation(31, (0, 0, 1, 1), 3, area=0.5)]),
        Record(4, [annotation(41, (0, 0, 19, 19), 4, area=1024)]),
    ]
    made = Album(records, tmp_path)
    made.predictors = predictors
    return made


def test_evaluate_by_hand(album):
    result = ev.evaluate(NoModel(), album)
    summary = result["summary"]
    assert [r["ann_id"] for r in result["objects"]] == [11, 12, 41]
    assert [r["iou"] for r in result["objects"]] == pytest.approx([80, 90, 95], abs=1e-5)
    assert summary["mIoU"] == {
        "all": pytest.approx(265 / 3),
        "small": pytest.approx(265 / 3),
        "medium": pytest.approx(95),
        "large": None,
    }
    assert summary["counts"] == {"all": 3, "small": 3, "medium": 1, "large": 0}
    assert (summary["images"], summary["images_without_objects"], summary["tiny_left_out"]) == (2, 2, 1)
    assert (summary["model"], summary["prompt"], summary["clicks"]) == ("stand-in", "gt-box", None)
    assert album.predictors[0].images == 2  # images without objects are not encoded
    assert json.loads(json.dumps(result)) == result


def test_every_rule_can_be_turned(album):
    model = NoModel()
    without = ev.evaluate(model, album, keep_crowds=False)
    assert [r["ann_id"] for r in without["objects"]] == [11, 41] and without["summary"]["crowds_left_out"] == 1
    assert ev.evaluate(model, album, inclusive_sizes=False)["summary"]["counts"]["small"] == 2
    assert len(ev.evaluate(model, album, min_area=0)["objects"]) == 4
    assert [r["ann_id"] for r in ev.evaluate(model, album, limit=1)["objects"]] == [11, 12]
    rules = ev.evaluate(model, album, limit=1, min_area=0, corner_clicks=False)["summary"]["rules"]
    expected = {"keep_crowds": True, "inclusive_sizes": True, "min_area": 0, "limit": 1, "corner_clicks": False}
    assert rules == expected | {"choose": "predicted_iou", "refine": 0, "pad_shards": 0}


def test_points_report_every_click_count(album):
    summary = ev.evaluate(NoModel(), album, prompt="points", clicks=3)["summary"]
    assert list(summary["mIoU_after_click"]) == ["1", "2", "3"]
    assert summary["mIoU_after_click"]["3"] == summary["mIoU"]
    one = ev.evaluate(NoModel(), album, prompt="points", clicks=1)["summary"]
    assert one["mIoU"] == summary["mIoU_after_click"]["1"]


def test_nothing_to_evaluate_is_said(album):
    del album[0], album[-1]
    with pytest.raises(ValueError, match="has no object to score"):
        ev.evaluate(NoModel(), album, prompt="points", clicks=2)


def test_generated_data_are_marked(album):
    assert ev.evaluate(NoModel(), album)["summary"]["generated"] is False
    album.generated = True
    assert ev.evaluate(NoModel(), album)["summary"]["generated"] is True


def test_training_goes_on_in_training_mode(album):
    model = NoModel().train()
    ev.evaluate(model, album)
    assert model.training


@pytest.mark.parametrize("options", [{"prompt": "boxes"}, {"clicks": 0}, {"limit": 0}])
def test_wrong_arguments_are_refused(album, options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        ev.evaluate(NoModel(), album, **options)


# ---- files


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "out.json"
    result = {"summary": {"mIoU": {"all": None}}, "objects": [{"iou": 1.5}, {"iou": 2.5}]}
    assert json.loads(ev.write_result(result, path).read_text()) == result
    with pytest.raises(ValueError):
        ev.write_result({"summary": {}, "objects": [{"iou": float("nan")}]}, path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        ev.write_result({"summary": {}, "objects": []}, path)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


# ---- the real thing: generated data, the mini model with a random start


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    return write_coco(tmp_path_factory.mktemp("data"), 2, seed=3, size=(96, 128))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_model("efficientvit-sam-mini")


@pytest.mark.parametrize("clicks", [0, 2])
def test_batches_score_as_one_object_at_a_time(data, model, clicks):
    """The official loop, written out: one annotation, one prompt, arg-max of three; nothing batched."""
    images = CocoImages(*data)
    result = ev.evaluate(model, images, prompt="points" if clicks else "gt-box", clicks=max(clicks, 1))
    predictor, expected = Predictor(model), []
    for record in images:
        predictor.set_image(images.read(record))
        for ann in record.annotations:
            gt = images.mask(ann)
            points, labels, pred = np.empty((0, 2), dtype=int), [], np.zeros_like(gt)
            for _ in range(clicks):
                (xy,), (label,) = next_clicks(gt[None], pred[None], points[None])
                points, labels = np.vstack([points, xy]), [*labels, label]
                masks, iou, _ = predictor.predict(points, np.array(labels))
                pred = masks[iou.argmax()]
            if not clicks:
                x, y, w, h = ann["bbox"]
                masks, iou, _ = predictor.predict(box=np.array([x, y, x + w, y + h]))
                pred = masks[iou.argmax()]
            expected.append((record.image_id, ann["id"], (pred & gt).sum() / ((pred | gt).sum() + 1e-7) * 100))
    assert [(r["image_id"], r["ann_id"]) for r in result["objects"]] == [e[:2] for e in expected]
    # batching changes the last digits of logits, so a pixel at the threshold may tip
    assert [r["iou"] for r in result["objects"]] == pytest.approx([e[2] for e in expected], abs=0.05)
    assert result["summary"]["generated"] is True


def command(data, out: Path, **changes) -> list[str]:
    options = {
        "model": "efficientvit-sam-mini",
        "weights": "none",
        "images": data[0],
        "annotations": data[1],
        "prompt": "gt-box",
        "clicks": 1,
        "out": out,
    } | changes
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def test_command_line_writes_summary_and_objects(data, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert ev.main([*command(data, out, prompt="points", clicks=3, limit=1), "--exclude-crowds"]) == 0
    written = json.loads(out.read_text())
    assert written["summary"]["counts"]["all"] == len(written["objects"]) > 0
    assert set(written["objects"][0]) == {"image_id", "ann_id", "area", "iou", "clicks", "iou_after_click"}
    assert len(written["objects"][0]["clicks"]) == 3
    assert written["summary"]["weights_sha256"] is None and written["summary"]["rules"]["keep_crowds"] is False
    shown = capsys.readouterr()
    assert "NO WEIGHTS" in shown.err and "3 clicks" in shown.out and "medium" in shown.out


def test_command_line_refuses_bad_input_in_one_sentence_and_leaves_the_earlier_file(data, tmp_path, capsys):
    out = tmp_path / "out.json"
    out.write_text("earlier")
    no_annotations = tmp_path / "no.json"
    no_annotations.write_text('{"images": []}')
    no_json = tmp_path / "text.json"
    no_json.write_text("not json")
    bad_weights = tmp_path / "bad.safetensors"
    bad_weights.write_bytes(b"no weights")
    cases = {
        "efficientvit-sam-l9": {"model": "efficientvit-sam-l9"},
        "missing.pt": {"weights": tmp_path / "missing.pt"},
        "bad.safetensors": {"weights": bad_weights},
        "nowhere": {"images": tmp_path / "nowhere"},
        "nothing.json": {"annotations": tmp_path / "nothing.json"},
        "no.json": {"annotations": no_annotations},
        "text.json": {"annotations": no_json},
        "gt-boxes": {"prompt": "gt-boxes"},
        "three": {"clicks": "three"},
        "--clicks: expected a whole number above 0, got '0'": {"clicks": 0},
        "--limit: expected a whole number above 0, got '-1'": {"limit": -1},
        "float8": {"dtype": "float8"},
        "abacus": {"device": "abacus"},
        "folder": {"out": tmp_path},
    }
    for named, changes in cases.items():
        try:
            status = ev.main(command(data, changes.pop("out", out), **changes))
        except SystemExit as stop:  # argparse's own way out
            status = stop.code
        error = [line for line in capsys.readouterr().err.splitlines() if "NO WEIGHTS" not in line]
        assert (status, len(error)) == (2, 1), (named, error)
        assert named in error[0]
    assert out.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors", "no.json", "out.json", "text.json"]


def test_a_corrupt_image_stops_the_run_and_is_named(data, tmp_path, capsys):
    folder = tmp_path / "val2017"
    folder.mkdir()
    names = sorted(path.name for path in data[0].iterdir())
    Image.open(data[0] / names[0]).save(folder / names[0])
    (folder / names[1]).write_bytes((data[0] / names[1]).read_bytes()[:200])
    out = tmp_path / "out.json"
    assert ev.main(command((folder, data[1]), out)) == 2
    assert names[1] in capsys.readouterr().err
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.part-1-of-1.jsonl", "val2017"]  # to go on with
