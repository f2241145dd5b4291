"""Detector-box files: indexed once, in the order of the file, everything unusable counted; and the made-up detector."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.detections import Detections
from evsam_lib.data.write import write_coco, write_detections, write_lvis

SIZE = (96, 128)


def box(image_id=1, category_id=1, bbox=(1, 2, 3, 4), score=0.5, **more) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score, **more}


@pytest.fixture
def images(tmp_path) -> CocoImages:
    """Images 7, 1 and 5 of 8 x 6 pixels, categories 1 and 3."""
    entries = [{"id": number, "file_name": f"{number}.jpg", "height": 6, "width": 8} for number in (7, 1, 5)]
    categories = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}]
    content = {"images": entries, "annotations": [], "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return CocoImages(tmp_path, tmp_path / "annotations.json")


def written(folder, content) -> Path:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_detections_lie_by_image_in_the_order_of_the_file(tmp_path, images):
    records = [box(1, score=0.25), box(7, 3, (0.5, 0, 2.5, 6), 0.9), box(1, 3, score=0.75), box(1, score=0.5)]
    found = Detections(written(tmp_path, records), images)
    assert len(found) == 4
    assert list(found.by_image) == [7, 1, 5]
    assert found.by_image[1] == [records[i] for i in (0, 2, 3)]
    assert found.by_image[5] == []
    assert found.skipped == found.noted == {}
    boxes, scores, categories = found.of(7)
    np.testing.assert_array_equal(boxes, [[0.5, 0, 3, 6]])
    assert (scores.tolist(), categories.tolist()) == ([0.9], [3])
    assert [array.shape for array in found.of(5)] == [(0, 4), (0,), (0,)]
    with pytest.raises(KeyError):
        found.by_image[2]


def test_numbers_are_read_exactly(tmp_path, images):
    record = box(bbox=(0.1, 1 / 3, 2.7182818284590451, 1e-12), score=0.12345678901234567)
    assert Detections(written(tmp_path, [record]), images).by_image[1][0]["bbox"] == record["bbox"]
    assert Detections(written(tmp_path, [record]), images).by_image[1][0]["score"] == record["score"]


def test_more_keys_do_not_matter(tmp_path, images):
    record = box(segmentation={"size": [6, 8], "counts": "abc"}, area=3)
    assert len(Detections(written(tmp_path, [record]), images)) == 1


def test_best_of_an_image_and_threshold(tmp_path, images):
    records = [box(1, score=s, bbox=(i, 0, 1, 1)) for i, s in enumerate((0.3, 0.9, 0.5, 0.9, 0.5))] + [
        box(7, score=0.1)
    ]
    found = Detections(written(tmp_path, records), images, max_per_image=3)
    assert [d["bbox"][0] for d in found.by_image[1]] == [1, 2, 3]  # of the two with 0.5 the first
    assert len(found.by_image[7]) == 1
    assert found.skipped == {"detection beyond the 3 best of its image": 2}
    found = Detections(found.path, images, min_score=0.5, max_per_image=3)
    assert found.skipped == {"detection with a score below 0.5": 2, "detection beyond the 3 best of its image": 1}
    assert len(found) == 3


def test_every_unusable_detection_is_counted(tmp_path, images):
    records = [
        box(score=0.5),
        box(image_id=2),
        box(image_id=None),
        box(image_id=[1]),
        box(category_id=2),
        box(category_id="1"),
        box(score=math.nan),
        box(score=math.inf),
        box(score=None),
        box(score="0.5"),
        box(bbox=(1, math.nan, 2, 3)),
        box(bbox=(1, 2, math.inf, 3)),
        box(bbox=(1, 2, 3)),
        box(bbox=(1, 2, None, 3)),
    ]
    found = Detections(written(tmp_path, records), images)
    assert len(found) == 1
    assert found.skipped == {
        "detection of an image that the annotation file does not list": 3,
        "detection of a category that the annotation file does not list": 2,
        "detection whose score is no finite number": 4,
        "detection whose box is not four finite numbers": 4,
    }
    assert len(found) + sum(found.skipped.values()) == len(records)


def test_odd_boxes_are_used_and_noted(tmp_path, images):
    """The official evaluation passes every box on."""
    records = [box(bbox=(1, 1, 0, 3)), box(bbox=(3, 1, 2, -1)), box(bbox=(8, 0, 4, 4)), box(bbox=(-5, 0, 4, 4)), box()]
    found = Detections(written(tmp_path, records), images)
    assert len(found) == 5
    assert found.skipped == {}
    assert found.noted == {"detection whose box has no area": 2, "detection whose box lies outside its image": 2}


def test_no_detections_is_an_answer(tmp_path, images):
    found = Detections(written(tmp_path, []), images, max_per_image=5)
    assert len(found) == 0
    assert found.by_image[7] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not valid JSON"),
        ({"annotations": []}, "must be a JSON list of detections, got dict"),
        ([box(), {"image_id": 1, "bbox": [0, 0, 1, 1]}], "Detection 1 .* lacks category_id, score"),
        ([None], "Detection 0 .* lacks everything"),
        ([box(image_id=40), box(image_id=41)], "None of the 2 detections .* is of the images of .*annotations.json"),
        ([box(category_id=40)], "None of the 1 detections .* is of the categories of"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, images, content, message):
    with pytest.raises(ValueError, match=f"boxes.json.*{message}|{message}.*") as error:
        Detections(written(tmp_path, content), images)
    assert "boxes.json" in str(error.value)


def test_missing_file_and_bad_options(tmp_path, images):
    with pytest.raises(FileNotFoundError, match=r"Detection file .*absent\.json does not exist"):
        Detections(tmp_path / "absent.json", images)
    with pytest.raises(ValueError, match="max_per_image must be at least 1 or None, got 0"):
        Detections(written(tmp_path, []), images, max_per_image=0)


# ---- the made-up detector


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco", 6, seed=9, size=SIZE)


def test_it_hits_misses_doubles_and_errs(tmp_path, coco):
    images = CocoImages(*coco)
    found = Detections(write_detections(tmp_path / "boxes.json", coco[1], seed=1), images)
    assert found.skipped == found.noted == {}
    right = wrong_name = nothing = doubles = 0
    hit = set()
    qualities, scores = [], []
    for image in images:
        truth = [a for a in image.annotations if not a["iscrowd"]]
        for x0, y0, x1, y1, score, category in np.column_stack(found.of(image.image_id)).tolist():
            assert 0 <= x0 < x1 <= image.width + 0.01
            assert 0 <= y0 < y1 <= image.height + 0.01
            assert 0 < score < 1
            ious = [_iou((x0, y0, x1, y1), a["bbox"]) for a in truth]
            best = int(np.argmax(ious))
            qualities.append(ious[best])
            scores.append(score)
            if ious[best] < 0.4:
                nothing += 1
            elif truth[best]["category_id"] != category:
                wrong_name += 1
            else:
                right += 1
                doubles += truth[best]["id"] in hit
                hit.add(truth[best]["id"])
    objects = sum(not a["iscrowd"] for image in images for a in image.annotations)
    assert right > 3 * wrong_name > 0
    assert 0.6 * objects < len(hit) < objects
    assert doubles > 0
    assert nothing > len(images)
    assert np.corrcoef(qualities, scores)[0, 1] > 0.6


def _iou(box, truth_xywh) -> float:
    x, y, w, h = truth_xywh
    common = max(min(box[2], x + w) - max(box[0], x), 0) * max(min(box[3], y + h) - max(box[1], y), 0)
    return common / (w * h + (box[2] - box[0]) * (box[3] - box[1]) - common)


def test_a_detector_of_full_skill_places_boxes_exactly(tmp_path, coco):
    path = write_detections(tmp_path / "boxes.json", coco[1], seed=1, skill=1.0)
    exact = {(d["image_id"], *d["bbox"]) for d in json.loads(path.read_text())}
    truth = [(a["image_id"], *a["bbox"]) for a in json.loads(coco[1].read_text())["annotations"]]
    assert np.mean([box in exact for box in truth]) > 0.9


def test_an_image_keeps_its_detections_whatever_stands_beside_it(tmp_path, coco):
    content = json.loads(coco[1].read_text())
    content["images"] = content["images"][::-1][:3]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "part.json").write_text(json.dumps(content))
    whole, part = (
        json.loads(write_detections(tmp_path / f"{path.stem}_boxes.json", path, seed=4).read_text())
        for path in (coco[1], tmp_path / "part.json")
    )
    for image_id in kept:
        assert [d for d in part if d["image_id"] == image_id] == [d for d in whole if d["image_id"] == image_id]


def test_lvis_is_detected_too(tmp_path):
    folder, annotations = write_lvis(tmp_path / "lvis", 4, seed=9, size=SIZE)
    images = CocoImages(folder, annotations)
    found = Detections(write_detections(tmp_path / "boxes.json", annotations, seed=1), images)
    assert len(found) > 10
    assert found.skipped == {}


def test_equal_files_are_used_again_and_others_of_ours_replaced(tmp_path, coco):
    path = write_detections(tmp_path / "deep/boxes.json", coco[1], seed=1)
    stamp, first = path.stat().st_mtime_ns, path.read_bytes()
    assert write_detections(path, coco[1], seed=1).stat().st_mtime_ns == stamp
    assert write_detections(path, coco[1], seed=2).read_bytes() != first
    assert sorted(file.name for file in path.parent.iterdir()) == ["boxes.generated.json", "boxes.json"]
    assert json.loads((path.parent / "boxes.generated.json").read_text())["seed"] == 2


@pytest.mark.parametrize("with_mark", [True, False])
def test_real_detections_are_never_overwritten(tmp_path, coco, with_mark):
    path = tmp_path / "boxes.json"
    if with_mark:
        write_detections(path, coco[1], seed=1)
    path.write_text('["precious"]')
    with pytest.raises(FileExistsError, match=r"boxes\.json was not generated"):
        write_detections(path, coco[1], seed=1)
    assert path.read_text() == '["precious"]'


def test_bad_arguments_are_named(tmp_path, coco):
    with pytest.raises(ValueError, match=r"skill must be from 0 to 1 .* got 2"):
        write_detections(tmp_path / "boxes.json", coco[1], seed=1, skill=2)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_detections(tmp_path / "boxes.json", tmp_path / "absent.json", seed=1)
