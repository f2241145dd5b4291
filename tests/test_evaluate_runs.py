"""Whole runs on generated data: detector boxes to AP, rules, batches, shards, kill and resume, and unusable input."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from evsam_lib import evaluate as ev
from evsam_lib import scores
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.write import write_coco
from evsam_lib.evaluate import parts
from evsam_lib.evaluate.batch import read_ahead
from evsam_lib.models.zoo import load_model
from evsam_lib.predict import BatchPredictor, Predictor
from evsam_lib.prompts import xywh_to_xyxy

MODEL, WEIGHTS = "efficientvit-sam-mini", "mini"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    return write_coco(tmp_path_factory.mktemp("data"), 4, seed=4, size=(64, 96))


@pytest.fixture(scope="module")
def images(data) -> CocoImages:
    return CocoImages(*data)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, WEIGHTS)


class Boxes:
    """Stands in for `evsam_lib.data.detections.Detections`, as far as evaluation knows it."""

    def __init__(self, json_path, images, *, min_score=0.0, max_per_image=None):
        self.path = Path(json_path)
        self.by_image: dict[int, list[dict]] = {}
        self.skipped = {"unknown image": 0}
        for detection in json.loads(Path(json_path).read_text()):
            if detection["image_id"] in images.by_id:
                self.by_image.setdefault(detection["image_id"], []).append(detection)
            else:
                self.skipped["unknown image"] += 1


@pytest.fixture(scope="module")
def detections_file(images, tmp_path_factory) -> Path:
    """Jittered boxes of what is there, one box elsewhere in every image but the last, which has none."""
    rng, found = np.random.default_rng(0), []
    for record in list(images)[:-1]:
        for annotation in record.annotations:
            box = (np.array(annotation["bbox"]) + rng.uniform(-1, 1, 4)).clip(0.5).tolist()
            score = round(float(rng.uniform(0.3, 1)), 3)
            found.append({"image_id": record.image_id, "category_id": annotation["category_id"]})
            found[-1] |= {"bbox": box, "score": score}
        found.append({"image_id": record.image_id, "category_id": 1, "bbox": [0.0, 0.0, 9.5, 8.5], "score": 0.5})
    found.insert(3, found[0] | {"image_id": 999})
    path = tmp_path_factory.mktemp("detections") / "boxes.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def detections(detections_file, images) -> Boxes:
    return Boxes(detections_file, images)


def comparable(result: dict) -> dict:
    return result | {"summary": {k: v for k, v in result["summary"].items() if k != "seconds"}}


# ---- detector boxes


@pytest.fixture(scope="module")
def detected(model, images, detections) -> dict:
    return ev.evaluate(model, images, prompt="detector-box", detections=detections, batch=2)


def test_detector_boxes_score_as_the_official_loop_written_out(detected, model, images, detections, data):
    """One box, one prompt, arg-max of three, pycocotools' encode, boxes dropped, COCO's AP; nothing batched."""
    predictor, expected = Predictor(model), []
    for record in images:
        predictor.set_image(images.read(record))
        for detection in detections.by_image.get(record.image_id, []):
            masks, iou, _ = predictor.predict(box=xywh_to_xyxy(detection["bbox"]))
            mask = masks[iou.argmax()]
            packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            kept = {key: detection[key] for key in ("image_id", "category_id", "score")}
            expected.append(kept | {"segmentation": packed | {"counts": packed["counts"].decode()}})
    found, summary = detected["results"], detected["summary"]
    keys = ("image_id", "category_id", "score")
    assert [[r[k] for k in keys] for r in found] == [[r[k] for k in keys] for r in expected]
    same = [a["segmentation"] == b["segmentation"] for a, b in zip(found, expected, strict=True)]
    assert np.mean(same) > 0.9  # batches change the last digits of logits, so a pixel at the threshold may tip
    ap = scores.coco_ap(data[1], expected)
    assert {name: summary[name] for name in ap} == pytest.approx(ap, abs=0.5) and summary["AP"] > 10
    assert summary["detections"] == len(detected["objects"]) == len(expected)
    assert (summary["images"], summary["images_without_detections"]) == (4, 1)
    assert summary["skipped"] == {"unknown image": 1} and len(summary["detections_file_sha256"]) == 64
    assert summary["evaluator"].startswith("pycocotools 2")
    assert all(o["area"] == coco_mask.area(r["segmentation"]) for o, r in zip(detected["objects"], found, strict=True))
    assert set(detected["objects"][0]) == {"image_id", "category_id", "score", "bbox", "area"}
    assert json.loads(json.dumps(detected)) == detected


def test_a_limit_leaves_the_other_images_out_of_the_score(detected, model, images, detections, data):
    limited = ev.evaluate(model, images, prompt="detector-box", detections=detections, limit=2, batch=2)
    ids = [record.image_id for record in list(images)[:2]]
    kept = [r for r in detected["results"] if r["image_id"] in ids]
    assert limited["results"] == kept and limited["summary"]["images"] == 2
    assert limited["summary"]["AP"] == scores.coco_ap(data[1], kept, image_ids=ids)["AP"] > 0


def test_lvis_is_scored_as_lvis(model, data, images, detections, tmp_path, monkeypatch):
    content = json.loads(data[1].read_text())
    for number, category in enumerate(content["categories"]):
        category["frequency"] = "rcf"[number % 3]
    for image in content["images"]:
        image |= {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
        image["coco_url"] = f"http://images.cocodataset.org/{data[0].name}/{image.pop('file_name')}"
    path = tmp_path / "lvis_v1_val.json"
    path.write_text(json.dumps(content))
    lvis = CocoImages(data[0].parent, path)
    run = {"prompt": "detector-box", "detections": detections, "dataset": "lvis", "limit": 2}
    summary = ev.evaluate(model, lvis, **run)["summary"]
    assert {"AP", "AP_S", "AP_M", "AP_L", "AP_r", "AP_c", "AP_f"} < set(summary)
    assert summary["evaluator"].startswith("faster-coco-eval") and "AP_r" in ev.format_table(summary)
    fast = ev.evaluate(model, lvis, evaluator="hotcoco", **run)["summary"]
    assert {k: fast[k] for k in fast if k.startswith("AP")} == pytest.approx(
        {k: summary[k] for k in summary if k.startswith("AP")}
    )
    monkeypatch.setattr(CocoImages, "read", None)  # it is told before a mask is made
    with pytest.raises(ValueError, match="lack 'frequency'"):
        ev.evaluate(model, images, **run)


# ---- rules


def test_choices_and_refinement_by_hand(model, images):
    """What `BatchPredictor` chooses is what one would choose from `Predictor`'s three masks."""
    record = images[0]
    image, one, size = images.read(record), Predictor(model), (record.height, record.width)
    boxes = xywh_to_xyxy(np.array([a["bbox"] for a in record.annotations[:4]]))
    one.set_image(image)

    def masks(**options):
        many = BatchPredictor(model, **options)
        many.set_images([model.preprocess(image)], [size])
        return np.concatenate([found for _, found in many.masks(np.zeros(4, dtype=int), boxes=boxes)])

    three, iou, low_res = one.predict_batch(boxes=boxes)
    stable = ((low_res > 1).sum((2, 3)) / (low_res > -1).sum((2, 3))).argmax(axis=1)
    by_iou = iou.argmax(axis=1)
    n = np.arange(4)
    for expected, options in (
        (three[n, by_iou], {}),
        (three[n, by_iou], {"choose": "model"}),
        (three[n, stable], {"choose": "stability"}),
        (np.stack([one.predict(box=box, multimask_output=False)[0][0] for box in boxes]), {"choose": "single"}),
    ):
        assert (masks(**options) == expected).mean() > 0.9999, options
    again = [one.predict(box=box, mask_input=low[k][None]) for box, low, k in zip(boxes, low_res, by_iou, strict=True)]
    refined = masks(refine=1)
    assert (refined == np.stack([found[quality.argmax()] for found, quality, _ in again])).mean() > 0.9999
    assert (refined != three[n, by_iou]).any()


def test_prompts_may_be_decoded_across_images(model, images):
    """A GPU's way, tried here: chunks that reach over images give the masks that each image alone gives."""
    pair = list(images)[:2]
    sizes = [(record.height, record.width) for record in pair]
    assert sizes[0] != sizes[1]
    boxes = [xywh_to_xyxy(np.array([a["bbox"] for a in record.annotations[:3]])) for record in pair]
    owners = np.repeat([0, 1], [len(b) for b in boxes])

    class Across(BatchPredictor):
        def _chunks(self, owners):
            return [(0, len(owners) - 1), (len(owners) - 1, len(owners))]

    for options in ({}, {"refine": 1}):
        found = []
        for kind in (BatchPredictor, Across):
            predictor = kind(model, **options)
            predictor.set_images([model.preprocess(images.read(record)) for record in pair], sizes)
            found.append(list(predictor.masks(owners, boxes=np.concatenate(boxes))))
        covered = [i for part, _ in found[1] for i in range(part.start, part.stop)]
        assert covered == list(range(len(owners)))
        for b, size in enumerate(sizes):
            one, across = (np.concatenate([masks for part, masks in made if owners[part.start] == b]) for made in found)
            assert one.shape[1:] == size and (one == across).mean() > 0.9999


def test_pad_shards_repeats_the_first_images(model, images, detected, detections):
    run = {"prompt": "detector-box", "detections": detections, "batch": 2}
    padded = ev.evaluate(model, images, pad_shards=5, **run)  # four images, five processes: the first is repeated
    first = [r for r in detected["results"] if r["image_id"] == images[0].image_id]
    assert padded["results"] == detected["results"] + first
    assert padded["summary"]["AP"] != detected["summary"]["AP"]
    assert ev.evaluate(model, images, pad_shards=2, **run)["results"] == detected["results"]


@pytest.mark.parametrize("clicks", [0, 2])
def test_batches_and_workers_change_nothing(model, images, clicks):
    prompt = {"prompt": "points", "clicks": clicks} if clicks else {}
    single = ev.evaluate(model, images, **prompt)
    batched = ev.evaluate(model, images, batch=3, workers=2, **prompt)
    assert [o["ann_id"] for o in batched["objects"]] == [o["ann_id"] for o in single["objects"]]
    ious = np.array([[o["iou"] for o in result["objects"]] for result in (single, batched)])
    assert np.mean(np.abs(ious[0] - ious[1]) < 1e-2) > 0.9  # tiny images: a pixel that tips weighs a lot
    assert batched["summary"]["mIoU"]["all"] == pytest.approx(single["summary"]["mIoU"]["all"], abs=0.1)


def test_half_precision_runs_and_says_so(images):
    summary = ev.evaluate(load_model(MODEL, WEIGHTS, dtype=torch.bfloat16), images, limit=1)["summary"]
    assert summary["dtype"] == "bfloat16" and summary["mIoU"]["all"] > 10


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    def read(job):
        time.sleep(0.001 * (job % 3))
        if job == 7:
            raise ValueError("job 7")
        return job

    made = read_ahead(read, range(20), workers=3, ahead=5)
    assert [next(made) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="job 7"):
        next(made)


# ---- shards and resumption


@pytest.mark.parametrize("prompt", ["gt-box", "points", "detector-box"])
def test_one_process_and_three_shards_give_identical_numbers(model, images, detections, tmp_path, prompt):
    run = {"prompt": prompt, "clicks": 2, "batch": 1, "pad_shards": 3}
    run |= {"detections": detections} if prompt == "detector-box" else {}
    alone = ev.evaluate(model, images, **run)
    out = tmp_path / "out.json"
    found = [ev.evaluate(model, images, **run, out=out, shard=(number, 3)) for number in (3, 1, 2)]
    assert found[:2] == [None, None]
    assert comparable(found[2]) == comparable(alone)
    assert comparable(ev.merge([ev.part_path(out, (n, 3)) for n in (1, 2, 3)])) == comparable(alone)


def test_an_interrupted_run_goes_on_where_it_was(model, images, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    whole = ev.evaluate(model, images, out=out)
    part = ev.part_path(out)
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # the header, two images, and half a line
    read = []
    monkeypatch.setattr(CocoImages, "read", lambda self, record: read.append(record) or _read(self, record))
    assert comparable(ev.evaluate(model, images, out=out, resume=True)) == comparable(whole)
    assert [record.image_id for record in read] == [record.image_id for record in list(images)[2:]]
    assert len(part.read_text().splitlines()) == len(lines)
    assert comparable(ev.evaluate(model, images, out=out, resume=True)) == comparable(whole) and len(read) == 2
    part.write_bytes(lines[0][:30])  # not even the header
    assert comparable(ev.evaluate(model, images, out=out, resume=True)) == comparable(whole)
    ev.evaluate(model, images, out=out, limit=1)  # without `resume` a part is begun anew
    assert len(part.read_text().splitlines()) == 2


def test_what_several_processes_finished_is_taken_by_one(model, images, tmp_path, monkeypatch):
    out = tmp_path / "coco[gt].json"
    ev.evaluate(model, images, out=out, shard=(1, 2), batch=1)
    assert parts.finished(out, {}) is None  # the other half is missing
    shared = ev.evaluate(model, images, out=out, shard=(2, 2), batch=1)
    monkeypatch.setattr(CocoImages, "read", lambda *_: pytest.fail("nothing is to be read again"))
    assert comparable(ev.evaluate(model, images, out=out, batch=1, resume=True)) == comparable(shared)
    with pytest.raises(ValueError, match=r"other settings \(refine: 0 there, 1 here\)"):
        ev.evaluate(model, images, out=out, batch=1, refine=1, resume=True)


_read = CocoImages.read


def test_parts_of_other_runs_and_damaged_parts_are_refused(model, images, tmp_path):
    out = tmp_path / "out.json"
    ev.evaluate(model, images, out=out, limit=2, shard=(1, 2), batch=1)
    with pytest.raises(ValueError, match=r"other settings \(refine: 0 there, 1 here\)"):
        ev.evaluate(model, images, out=out, limit=2, shard=(1, 2), batch=1, refine=1, resume=True)
    first, second = (ev.part_path(out, (n, 2)) for n in (1, 2))
    with pytest.raises(FileNotFoundError, match=r"part-2-of-2.* does not exist"):
        ev.merge([first, second])
    with pytest.raises(ValueError, match="1 of 2 images are in none of the 1 parts"):
        ev.merge([first])
    header, line = first.read_text().splitlines()
    second.write_text(header + "\n" + line.replace('"position": 0', '"position": 1') + "\n")
    assert len(ev.merge([first, second, first])["objects"]) == 2 * len(images[0].annotations)  # nothing twice
    second.write_text(header + "\nno json\n" + line + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*part-2-of-2.* is damaged"):
        ev.merge([first, second])
    changed = json.loads(header)
    changed["settings"] |= {"threads": 9, "images_dir": "elsewhere"}  # another machine may do a share
    second.write_text(json.dumps(changed) + "\n" + line.replace('"position": 0', '"position": 1') + "\n")
    assert len(ev.merge([first, second])["objects"]) == 2 * len(images[0].annotations)
    changed["settings"]["device"] = "cuda:3"
    second.write_text(json.dumps(changed) + "\n")
    with pytest.raises(ValueError, match="device: cuda there, cpu here"):
        ev.merge([first, second])


def command(data, out: Path, *more: str, prompt: str = "gt-box") -> list[str]:
    fixed = {
        "model": MODEL,
        "weights": WEIGHTS,
        "images": data[0],
        "annotations": data[1],
        "prompt": prompt,
        "out": out,
    }
    return [str(word) for name, value in fixed.items() for word in (f"--{name}", value)] + [str(word) for word in more]


@pytest.mark.slow
def test_a_killed_process_is_resumed_with_identical_numbers(tmp_path, capsys):
    data = write_coco(tmp_path / "data", 16, seed=8, size=(96, 128))
    out, reference = tmp_path / "out.json", tmp_path / "reference.json"
    words = command(data, out, "--batch", "2")
    process = subprocess.Popen([sys.executable, "-m", "evsam_lib.evaluate", *words], cwd=Path(__file__).parents[1])
    part = ev.part_path(out)
    deadline = time.monotonic() + 120
    while not part.is_file() or part.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    done = part.read_bytes().count(b"\n") - 1
    assert 3 <= done < 16
    part.write_bytes(part.read_bytes() + b'{"position": 15, "sec')
    assert ev.main([*words, "--resume"]) == 0
    assert ev.main(command(data, reference, "--batch", "2")) == 0
    found, expected = (json.loads(path.read_text()) for path in (out, reference))
    found["summary"].pop("threads"), expected["summary"].pop("threads")
    assert comparable(found) == comparable(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.json", "reference.json"]


# ---- the command line


@pytest.fixture
def detections_module(monkeypatch):
    module = types.ModuleType("evsam_lib.data.detections")
    module.Detections = Boxes
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_command_line_of_detector_boxes(detections_module, data, detections_file, detected, tmp_path, capsys):
    out, results = tmp_path / "out.json", tmp_path / "results.json"
    more = ["--detections", detections_file, "--results", results, "--batch", 2, "--workers", 1]
    assert ev.main(command(data, out, *more, prompt="detector-box")) == 0
    written = json.loads(out.read_text())
    assert written["objects"] == detected["objects"] and set(written) == {"summary", "objects"}
    assert written["summary"]["AP"] == detected["summary"]["AP"]
    assert json.loads(results.read_text()) == detected["results"]
    shown = capsys.readouterr().out
    assert "AP_M" in shown and "skipped: 1 unknown image" in shown and "results.json" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "results.json"]


def test_command_line_in_shards_and_under_torchrun(data, tmp_path, monkeypatch, capsys):
    alone, out, launched = (tmp_path / f"{name}.json" for name in ("alone", "out", "launched"))
    assert ev.main(command(data, alone)) == 0
    assert ev.main(command(data, out, "--shard", "2/2")) == 0
    assert "shard 2 of 2 is done; the result waits" in capsys.readouterr().out and not out.exists()
    assert ev.main(command(data, out, "--shard", "1/2")) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert ev.main(command(data, launched)) == 0
    results = [comparable(json.loads(path.read_text())) for path in (alone, out, launched)]
    assert results[0] == results[1] == results[2]


def test_an_interrupt_says_how_to_go_on(data, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out.json"
    with monkeypatch.context() as patch:
        patch.setattr(CocoImages, "read", interrupt)
        assert ev.main(command(data, out)) == 130
    assert "--resume" in capsys.readouterr().err and ev.part_path(out).is_file()
    assert ev.main(command(data, out, "--resume")) == 0 and out.is_file()


def test_a_full_disk_is_said_and_the_run_goes_on(data, tmp_path, capsys, monkeypatch):
    out, append = tmp_path / "x.json", parts.append

    def full(part, lines):
        if part.tell():
            raise OSError(errno.ENOSPC, "No space left on device")
        append(part, lines)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "append", full)
        assert ev.main(command(data, out)) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"evsam_lib.evaluate: {out} cannot be written: No space left on device; free some space")
    assert not out.exists()
    assert ev.main(command(data, out, "--resume")) == 0 and out.is_file()


def test_command_line_refuses_what_does_not_belong_together(data, detections_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    cases = {
        "belong together": command(data, out, prompt="detector-box"),
        "--detections FILE": command(data, out, "--detections", detections_file),
        "needs --prompt detector-box": command(data, out, "--results", tmp_path / "r.json"),
        "expected i/n with 1 <= i <= n, got '3/2'": command(data, out, "--shard", "3/2"),
        "is a folder": command(
            data, out, "--detections", detections_file, "--results", tmp_path, prompt="detector-box"
        ),
        "'best'": command(data, out, "--choose", "best"),
        "'-1'": command(data, out, "--refine", "-1"),
    }
    for said, words in cases.items():
        try:
            status = ev.main(words)
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert (status, error.count("\n")) == (2, 1) and said in error, (said, error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "detector-box"}, "Detections belong to prompt"),
        ({"detections": object()}, "Detections belong to prompt"),
        ({"dataset": "voc"}, "Unknown data set 'voc', expected one of coco, lvis, sginw"),
        ({"choose": "best"}, "Unknown choice 'best'"),
        ({"refine": -1}, "refine must be 0 or more"),
        ({"shard": (3, 2)}, "got 3 of 2"),
        ({"shard": (1, 2)}, "need `out`"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(model, images, options, said):
    with pytest.raises(ValueError, match=said):
        ev.evaluate(model, images, **options)


def test_an_image_of_another_size_than_the_file_says_stops_the_run(model, images, detections):
    record = dataclasses.replace(images[0], height=images[0].height + 1)

    class Wrong(list):
        images_dir, annotations_json, read = images.images_dir, images.annotations_json, images.read
        generated = True

    with pytest.raises(ValueError, match=rf"Image {record.image_id} has .* made for {record.height} x"):
        ev.evaluate(model, Wrong([record]), prompt="detector-box", detections=detections)


def test_odd_input_is_used_and_counted(data, tmp_path, capsys):
    pictures, content = tmp_path / "pictures", json.loads(data[1].read_text())
    shutil.copytree(data[0], pictures)
    files = [pictures / entry["file_name"] for entry in content["images"]]
    Image.open(files[0]).convert("CMYK").save(files[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(files[1]).save(files[1], exif=turned)
    content["images"].append(content["images"][0] | {"id": 1000})  # without annotations
    content["annotations"][0]["bbox"] = [500, 500, 9, 9]
    content["annotations"][1]["bbox"] = [5, 5, 0, 9]
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(content))
    for number in (1, 2):  # counted by whoever reads the picture, once
        assert ev.main(command((pictures, odd), tmp_path / "out.json", "--shard", f"{number}/2")) == 0
    assert json.loads((tmp_path / "out.json").read_text())["summary"]["noted"] == {
        "annotation whose box has no area": 1,
        "annotation whose box lies outside its image": 1,
        "image without annotations": 1,
        "picture of mode CMYK, converted to RGB": 1,
        "picture with an EXIF rotation, which is not applied": 1,
    }
    assert "noted: 1 annotation whose box has no area, 1 " in capsys.readouterr().out


def test_nothing_to_score_stops(data, tmp_path, capsys):
    content = json.loads(data[1].read_text())
    tiny = tmp_path / "tiny.json"
    tiny.write_text(json.dumps(content | {"annotations": [a | {"area": 0.5} for a in content["annotations"]]}))
    assert ev.main(command((data[0], tiny), tmp_path / "out.json")) == 2
    count = len(content["annotations"])
    assert f"tiny.json has no object to score: {count} tiny ones and 0 crowds were left out" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
