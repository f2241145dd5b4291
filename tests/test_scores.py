"""AP: cases by hand, three evaluators on generated data, the published numbers, and results that cannot be scored."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest

from evsam_lib import scores
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.rle import encode_masks
from evsam_lib.data.write import write_coco

HW = (40, 50)


def rle(x: int, y: int, w: int, h: int, hw: tuple[int, int] = HW) -> dict:
    mask = np.zeros((1, *hw), dtype=bool)
    mask[0, y : y + h, x : x + w] = True
    return encode_masks(mask)[0]


def result(box: tuple, score: float, image_id: int = 1, category_id: int = 1, **more) -> dict:
    found = {"image_id": image_id, "category_id": category_id, "score": score, "segmentation": rle(*box)}
    return found | more


def file_of(content: dict, folder: Path, name: str = "truth.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.fixture
def truth() -> dict:
    """Three objects of 10 x 9 pixels in image 1, nothing in image 2."""
    boxes = [(0, 0, 10, 9), (20, 0, 10, 9), (0, 20, 10, 9)]
    annotations = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 90, "iscrowd": 0, "segmentation": rle(*box)}
        for n, box in enumerate(boxes, 1)
    ]
    images = [{"id": n, "height": HW[0], "width": HW[1], "file_name": f"{n}.jpg"} for n in (1, 2)]
    categories = [{"id": 1, "name": "thing", "frequency": "c"}, {"id": 2, "name": "other", "frequency": "r"}]
    return {"images": images, "annotations": annotations, "categories": categories}


# The first is perfect, the second wrong and in the empty image, the third has 70 of 90 pixels: IoU 0.78.
RESULTS = [result((0, 0, 10, 9), 0.9), result((5, 5, 9, 9), 0.8, 2), result((20, 0, 10, 7), 0.7)]


@pytest.mark.parametrize("evaluator", scores.COCO_EVALUATORS)
def test_coco_ap_by_hand(truth, tmp_path, evaluator):
    found = scores.coco_ap(file_of(truth, tmp_path), RESULTS, evaluator=evaluator)
    # IoU 0.50 to 0.75: precision 1 up to recall 1/3, 2/3 up to recall 2/3; above, the third is wrong too
    low, high = (34 + 33 * 2 / 3) / 101, 34 / 101
    ap = (6 * low + 4 * high) / 10 * 100
    assert found["AP"] == pytest.approx(ap) and found["AP_S"] == pytest.approx(ap)
    assert (found["AP50"], found["AP75"]) == pytest.approx((low * 100, low * 100))
    assert (found["AP_M"], found["AP_L"]) == (None, None)


@pytest.mark.parametrize("evaluator", scores.COCO_EVALUATORS)
def test_a_box_without_a_mask_is_no_missed_object(truth, tmp_path, evaluator):
    expected = scores.coco_ap(file_of(truth, tmp_path), RESULTS, evaluator=evaluator)
    truth["annotations"].append(truth["annotations"][0] | {"id": 9, "segmentation": []})
    assert scores.coco_ap(file_of(truth, tmp_path), RESULTS, evaluator=evaluator) == expected


@pytest.mark.parametrize("evaluator", scores.LVIS_EVALUATORS)
def test_lvis_ap_by_hand(truth, tmp_path, evaluator):
    """Whether the wrong detection counts depends on whether image 2 was looked through for its category."""
    for image in truth["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    unknown = scores.lvis_ap(file_of(truth, tmp_path), RESULTS, evaluator=evaluator)
    truth["images"][1]["neg_category_ids"] = [1]
    wrong = scores.lvis_ap(file_of(truth, tmp_path), RESULTS, evaluator=evaluator)
    assert unknown["AP"] == pytest.approx((6 * 67 + 4 * 34) / 1010 * 100)
    assert wrong["AP"] == pytest.approx((6 * 56 + 4 * 34) / 1010 * 100)
    assert wrong["AP_c"] == wrong["AP"] and wrong["AP_r"] is None and wrong["AP_f"] is None


@pytest.mark.parametrize("evaluator", scores.LVIS_EVALUATORS)
def test_lvis_takes_the_300_best_of_an_image_over_all_categories(truth, tmp_path, evaluator):
    for image in truth["images"]:
        image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    path = file_of(truth, tmp_path)
    others = [result((30, 30, 3, 3), 0.95, category_id=2)] * 299
    assert scores.lvis_ap(path, [*others, RESULTS[0]], evaluator=evaluator)["AP"] == pytest.approx(34 / 101 * 100)
    assert scores.lvis_ap(path, [*others, others[0], RESULTS[0]], evaluator=evaluator)["AP"] == 0


def test_areas_come_from_masks_and_inputs_stay_as_they_are(truth, tmp_path):
    """A large box would make the wrong detection a large one, which the small class does not count."""
    results = [*RESULTS[:2], RESULTS[2] | {"bbox": [0, 0, 200, 200], "area": 40000}]
    before = copy.deepcopy(results)
    path = file_of(truth, tmp_path)
    assert scores.coco_ap(path, results) == scores.coco_ap(path, RESULTS)
    assert results == before


def test_no_detection_scores_zero_and_some_images_can_be_scored(truth, tmp_path):
    path = file_of(truth, tmp_path)
    for evaluator in scores.COCO_EVALUATORS:
        assert scores.coco_ap(path, [], evaluator=evaluator)["AP"] == 0
        assert scores.coco_ap(path, RESULTS, image_ids=[2], evaluator=evaluator)["AP"] is None
        only_first = scores.coco_ap(path, RESULTS, image_ids=[1], evaluator=evaluator)
        assert only_first["AP"] == pytest.approx((6 * 67 + 4 * 34) / 1010 * 100)


def jittered(images: CocoImages, rng: np.random.Generator) -> list[dict]:
    """Shifted true masks under true and false names, some missing, some twice."""
    categories, found = list(images.categories), []
    for record in images:
        for annotation in record.annotations:
            for _ in range(rng.integers(0, 4)):
                mask = np.roll(images.mask(annotation), rng.integers(-3, 4, 2), axis=(0, 1))
                category = annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
                score = round(float(rng.random()), 2)  # ties, too
                packed = encode_masks(mask[None])[0]
                found.append({"image_id": record.image_id, "category_id": category, "score": score})
                found[-1]["segmentation"] = packed
    return found


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """A COCO file with crowds, the same as LVIS, and results for both."""
    folder, coco = write_coco(tmp_path_factory.mktemp("data"), 12, seed=1, size=(96, 128))
    images = CocoImages(folder, coco)
    rng = np.random.default_rng(0)
    content = json.loads(coco.read_text())
    for number, category in enumerate(content["categories"]):
        category["frequency"] = "rcf"[number % 3]
    for image in content["images"]:
        present = {a["category_id"] for a in images.by_id[image["id"]].annotations}
        absent = [c for c in images.categories if c not in present]
        image["neg_category_ids"] = rng.choice(absent, 20, replace=False).tolist()
        image["not_exhaustive_category_ids"] = sorted(present)[::2]
    for annotation in content["annotations"]:
        del annotation["iscrowd"]  # LVIS has none
    lvis = file_of(content, tmp_path_factory.mktemp("lvis"), "lvis_v1_val.json")
    return coco, lvis, jittered(images, rng)


@pytest.mark.parametrize("share", [1, 2])
def test_evaluators_agree(generated, share):
    coco, lvis, results = generated
    ids = [image["id"] for image in json.loads(coco.read_text())["images"]][::share]
    ids = None if share == 1 else ids
    reference = scores.coco_ap(coco, results, image_ids=ids)
    assert 5 < reference["AP"] < 90 and None not in (reference["AP_S"], reference["AP_M"])
    for evaluator in scores.COCO_EVALUATORS[1:]:
        found = scores.coco_ap(coco, results, image_ids=ids, evaluator=evaluator)
        assert found == pytest.approx(reference, abs=1e-9)
    ours, other = (scores.lvis_ap(lvis, results, image_ids=ids, evaluator=name) for name in scores.LVIS_EVALUATORS)
    assert ours == pytest.approx(other, abs=1e-9) and ours["AP"] != pytest.approx(reference["AP"])
    assert min(ours["AP_r"], ours["AP_c"], ours["AP_f"]) > 0


@pytest.mark.skipif("EVSAM_COCO_EVAL" not in os.environ, reason="needs COCO's example results, folder EVSAM_COCO_EVAL")
@pytest.mark.parametrize("evaluator", scores.COCO_EVALUATORS)
def test_published_numbers_of_coco(evaluator):
    """The example that COCO's own repository prints: instances_val2014 fake results on 100 images."""
    folder = Path(os.environ["EVSAM_COCO_EVAL"])
    results = json.loads((folder / "instances_val2014_fakesegm100_results.json").read_text())
    found = scores.coco_ap(folder / "instances_val2014_100.json", results, evaluator=evaluator)
    assert {name: round(value / 100, 3) for name, value in found.items()} == {
        "AP": 0.320, "AP50": 0.562, "AP75": 0.299, "AP_S": 0.387, "AP_M": 0.310, "AP_L": 0.327,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_id": 9}, "image 9 is not in"),
        ({"category_id": 7}, "category 7 is not in"),
        ({"score": float("nan")}, "score is nan"),
        ({"segmentation": rle(0, 0, 2, 2, (50, 40))}, r"size \[50, 40\], image 1 has \[40, 50\]"),
        ({"segmentation": None}, "needs image_id"),
    ],
)
def test_results_that_cannot_be_scored_are_named(truth, tmp_path, changes, said):
    with pytest.raises(ValueError, match=rf"Result 1 of 2 cannot be scored: .*{said}"):
        scores.coco_ap(file_of(truth, tmp_path), [RESULTS[0], RESULTS[0] | changes])


def test_wrong_files_and_evaluators_are_named_before_anything_is_done(truth, tmp_path, monkeypatch):
    path = file_of(truth, tmp_path)
    with pytest.raises(ValueError, match="'lvis' is no evaluator of COCO's AP, expected one of pycocotools"):
        scores.coco_ap(path, [], evaluator="lvis")
    with pytest.raises(ValueError, match="'pycocotools' is no evaluator of LVIS's AP"):
        scores.check_scoring("pycocotools", lvis=True)
    del truth["categories"][0]["frequency"]
    with pytest.raises(ValueError, match="lack 'frequency': it is no LVIS file"):
        scores.check_scoring("hotcoco", lvis=True, annotations=file_of(truth, tmp_path))

    def missing(name):
        raise scores.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(scores.importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"faster-coco-eval is not installed; it comes with evsam\[eval\]"):
        scores.lvis_ap(path, [])


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (rle(0, 0, 9, 9, (50, 40)), "made for 50 x 40 pixels"),
        ({"size": [*HW], "counts": [5, 5]}, "sum to 10"),
        ({"size": [*HW], "counts": "PP"}, "sum to 0"),
        ([[1, 2, 3, 4]], "three x, y pairs"),
    ],
)
def test_annotations_whose_masks_cannot_be_compared_stop_before_anything_is_scored(
    truth, tmp_path, segmentation, reason
):
    truth["annotations"][1]["segmentation"] = segmentation
    file = file_of(truth, tmp_path)
    with pytest.raises(ValueError, match=f"Segmentation of annotation 2 in .*truth.json cannot be decoded: .*{reason}"):
        scores.check_scoring("pycocotools", lvis=False, annotations=file)
    with pytest.raises(ValueError, match="annotation 2"):
        scores.lvis_ap(file, RESULTS)
