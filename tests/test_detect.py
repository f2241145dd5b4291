"""Detectors run by the study: boxes to COCO's results, categories by name, resuming, what is said when one is missing.

The detectors of transformers are run as they are, at toy size and with random weights; `ultralytics`, whose licence is
not the study's, is played by a stand-in.
"""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from evsam_lib.compat import ensure_torchvision
from evsam_lib.data import detect as module
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.detect import DETECTORS, detect
from evsam_lib.data.detections import Detections

SIZES = {7: (40, 60), 1: (64, 48), 5: (30, 30)}  # (H, W) by image id


@pytest.fixture
def images(tmp_path) -> CocoImages:
    """Three pictures of different sizes; categories 3, cat, and 8, potted plant."""
    rng = np.random.default_rng(0)
    for number, size in SIZES.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    entries = [{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in SIZES.items()]
    categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "potted plant"}]
    content = {"images": entries, "annotations": [], "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return CocoImages(tmp_path, tmp_path / "annotations.json")


@pytest.fixture
def played(monkeypatch):
    """A detector that finds a box the size of the image, its half as another's category, and something unknown."""
    looked_at = []

    def load(weights, names, device):
        def find(image):
            looked_at.append(image.shape[:2])
            h, w = image.shape[:2]
            boxes = np.array([[0, 0, w / 2, h], [0, 0, w, h], [1, 2, 3, 4]])
            return boxes, np.array([0.25, 0.75, 0.9]), ["Cat", "pottedplant", "ufo"]

        return find

    row = module.Detector("json", "-", "none", "-", load)
    monkeypatch.setitem(DETECTORS, "played", row)
    return looked_at


def test_boxes_become_results_that_the_loader_reads(tmp_path, images, played):
    file = detect(images, tmp_path / "new" / "boxes.json", detector="played")
    found = Detections(file, images)
    assert found.by_image[7] == [
        {"image_id": 7, "category_id": 8, "bbox": [0, 0, 60, 40], "score": 0.75},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 30, 40], "score": 0.25},
    ]
    assert len(found) == 6 and not found.skipped and played == list(SIZES.values())
    assert json.loads((tmp_path / "new" / "boxes.detected.json").read_text())["detector"] == "played"
    assert not list(file.parent.glob("*.part"))


def test_scores_and_numbers_of_boxes_are_bounded(tmp_path, images, played):
    few = Detections(detect(images, tmp_path / "a.json", detector="played", min_score=0.5), images)
    assert [record["score"] for record in few.by_image[1]] == [0.75]
    one = Detections(detect(images, tmp_path / "b.json", detector="played", max_per_image=1, limit=2), images)
    assert [len(one.by_image[number]) for number in SIZES] == [1, 1, 0]


def test_a_finished_file_is_kept_and_a_strangers_never_touched(tmp_path, images, played):
    file = detect(images, tmp_path / "boxes.json", detector="played")
    played.clear()
    assert detect(images, file, detector="played") == file and not played
    with pytest.raises(FileExistsError, match="made otherwise"):
        detect(images, file, detector="played", min_score=0.5)
    (tmp_path / "own.json").write_text("[]")
    with pytest.raises(FileExistsError, match=r"own\.json"):
        detect(images, tmp_path / "own.json", detector="played")


def test_a_run_that_was_stopped_goes_on(tmp_path, images, played, monkeypatch):
    whole = detect(images, tmp_path / "whole.json", detector="played").read_text()
    played.clear()
    read, left = images.read, [2]

    def until_killed(image):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return read(image)

    monkeypatch.setattr(images, "read", until_killed)
    with pytest.raises(KeyboardInterrupt):
        detect(images, tmp_path / "boxes.json", detector="played")
    assert not (tmp_path / "boxes.json").exists()
    with (tmp_path / "boxes.part").open("a") as file:
        file.write('[{"image_id": 5, "ca')  # half a line
    left[0] = 9
    assert detect(images, tmp_path / "boxes.json", detector="played").read_text() == whole
    assert played == list(SIZES.values())  # each picture once
    (tmp_path / "other.part").write_text('{"detector": "another run"}\n[]\n[]\n')
    with pytest.raises(FileExistsError, match=r"other.part holds a run with other settings that is not done"):
        detect(images, tmp_path / "other.json", detector="played")
    assert "another run" in (tmp_path / "other.part").read_text()


def test_what_is_missing_is_said(tmp_path, images, monkeypatch):
    with pytest.raises(ValueError, match="Unknown detector 'vitdet', expected one of yolov8, grounding-dino, rt-detr"):
        detect(images, tmp_path / "boxes.json", detector="vitdet")
    with pytest.raises(ValueError, match="min_score must be from 0 to 1"):
        detect(images, tmp_path / "boxes.json", detector="yolov8", min_score=2)
    for name in DETECTORS:
        monkeypatch.setitem(DETECTORS, name, replace(DETECTORS[name], package="no_such_package"))
        with pytest.raises(ImportError, match=f"not run: {name} needs no_such_package, .*pip install"):
            detect(images, tmp_path / "boxes.json", detector=name)
    assert sorted(path.name for path in tmp_path.glob("boxes*")) == []


def test_yolo_is_given_its_order_of_colours_and_missing_weights_are_said(tmp_path, images, monkeypatch):
    seen = []

    class YOLO:
        def __init__(self, weights):
            if weights == "none.pt":
                raise FileNotFoundError("No such file")
            self.names = {0: "cat", 1: "sofa"}

        def predict(self, image, **options):
            seen.append((image, options))
            boxes = types.SimpleNamespace(
                xyxy=torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]),
                conf=torch.tensor([0.5, 0.4]),
                cls=torch.tensor([0.0, 1]),
            )
            return [types.SimpleNamespace(boxes=boxes)]

    package = types.ModuleType("ultralytics")
    package.YOLO, package.__spec__ = YOLO, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "ultralytics", package)
    found = Detections(detect(images, tmp_path / "boxes.json", detector="yolov8"), images)
    assert found.by_image[5] == [{"image_id": 5, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.5}]
    np.testing.assert_array_equal(seen[0][0], images.read(images[0])[..., ::-1])
    with pytest.raises(FileNotFoundError, match=r"not run: yolov8 has no weights none\.pt .*No such file"):
        detect(images, tmp_path / "other.json", detector="yolov8", weights="none.pt")


# ---- transformers, at toy size


@pytest.fixture
def transformers():
    ensure_torchvision()
    return pytest.importorskip("transformers", reason="transformers is not installed (extra [detect])")


def saved_object_detector(transformers, folder):
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 64],
        num_detection_tokens=20,
        id2label={0: "cat", 1: "pottedplant", 2: "zebra"},
        label2id={"cat": 0, "pottedplant": 1, "zebra": 2},
    )
    model = transformers.YolosForObjectDetection(config)
    for parameter in (model.vit.embeddings.detection_tokens, *model.class_labels_classifier.parameters()):
        torch.nn.init.normal_(parameter)  # answers that differ
    model.save_pretrained(folder)
    transformers.YolosImageProcessor(size={"height": 64, "width": 64}, do_pad=False).save_pretrained(folder)


def test_an_object_detector_of_transformers_runs(tmp_path, images, transformers):
    saved_object_detector(transformers, tmp_path / "model")
    options = {"detector": "rt-detr", "weights": tmp_path / "model", "min_score": 0.0}
    found = Detections(detect(images, tmp_path / "boxes.json", **options), images)
    model = transformers.YolosForObjectDetection.from_pretrained(tmp_path / "model").eval()
    processor = transformers.YolosImageProcessor.from_pretrained(tmp_path / "model")
    for number, (height, width) in SIZES.items():
        pixels = processor(images=images.read(images.by_id[number]), return_tensors="pt")
        with torch.inference_mode():
            raw = model(**pixels)
        probability = raw.logits[0].softmax(-1)[:, :-1]  # the last is "nothing"
        score, label = probability.max(-1)
        keep = (label < 2) & (score > 0)  # no zebra among the categories
        assert 0 < keep.sum() < 20
        centre, extent = raw.pred_boxes[0][keep, :2].numpy(), raw.pred_boxes[0][keep, 2:].numpy()
        expected = np.concatenate([centre - extent / 2, extent], axis=1) * [width, height, width, height]
        order = np.argsort(-score[keep].double().numpy().round(6), kind="stable")  # as written
        records = found.by_image[number]
        np.testing.assert_allclose([r["bbox"] for r in records], expected[order], atol=2e-3)
        np.testing.assert_allclose([r["score"] for r in records], score[keep].numpy()[order], atol=1e-5)
        assert [r["category_id"] for r in records] == [(3, 8)[i] for i in label[keep].numpy()[order]]


def test_weights_and_categories_that_do_not_fit_are_said(tmp_path, images, transformers):
    with pytest.raises(FileNotFoundError, match=r"not run: rt-detr has no weights .*nothing"):
        detect(images, tmp_path / "boxes.json", detector="rt-detr", weights=tmp_path / "nothing")
    saved_object_detector(transformers, tmp_path / "model")
    images.categories = {1: "salmon"}
    with pytest.raises(ValueError, match="knows none of the categories salmon, only cat, pottedplant, zebra"):
        detect(images, tmp_path / "boxes.json", detector="rt-detr", weights=tmp_path / "model")


def saved_grounding_dino(transformers, folder):
    torch.manual_seed(0)
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "potted", "plant", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, encoder_ffn_dim=32, num_queries=15,
        init_std=0.5, decoder_layers=2, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2,
    )  # fmt: skip
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 192})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)


def test_grounding_dino_is_asked_for_the_categories(tmp_path, images, transformers):
    saved_grounding_dino(transformers, tmp_path / "model")
    options = {"detector": "grounding-dino", "weights": tmp_path / "model", "min_score": 0.0}
    found = Detections(detect(images, tmp_path / "boxes.json", **options), images)
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(tmp_path / "model").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    for number, (height, width) in SIZES.items():
        inputs = processor(images=images.read(images.by_id[number]), text="cat. potted plant.", return_tensors="pt")
        assert processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])[1:6] == [
            "cat", ".", "potted", "plant", "."
        ]  # fmt: skip
        with torch.inference_mode():
            raw = model(**inputs)
        belief = raw.logits[0].sigmoid()
        scores = {3: belief[:, 1], 8: belief[:, 3:5].mean(dim=1)}
        records = found.by_image[number]
        assert len(records) == 30  # every query under both names
        for category, by_query in scores.items():
            mine = [record for record in records if record["category_id"] == category]
            np.testing.assert_allclose([r["score"] for r in mine], by_query.sort(descending=True)[0], atol=1e-5)
        best = int(scores[records[0]["category_id"]].argmax())
        x, y, w, h = raw.pred_boxes[0, best].tolist()
        expected = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        np.testing.assert_allclose(records[0]["bbox"], expected, atol=2e-3)


def test_more_names_than_can_be_read_at_once_make_several_captions():
    class Words:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": text.split()}

    names = [f"{'very ' * (i % 3)}thing_{i}" for i in range(200)]
    captions = module._captions(Words(), names)
    assert len(captions) > 1 and [name for some, _, _ in captions for name in some] == names
    for some, caption, spans in captions:
        tokens = ["CLS", *caption.replace(".", " .").split(), "SEP"]
        assert len(tokens) <= 256
        for name, span in zip(some, spans, strict=True):
            assert [tokens[i] for i in span] == name.lower().replace("_", " ").split()
