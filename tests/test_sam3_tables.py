"""SAM3's clicks in the study's own evaluation, its seconds part by part, and the protocols that need weights."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.write import write_coco
from evsam_lib.evaluate import evaluate
from evsam_lib.evaluate import main as evaluate_main
from evsam_lib.predict import BatchPredictor, Predictor
from evsam_lib.sam3 import Sam3Processor, bench, load_sam3
from evsam_lib.sam3.as_sam import ClickModel
from evsam_lib.sam3.load import save_sam3
from tests.golden import fill

IMAGE = fill.reference_image(60, 90)
BOXES = np.array([[10, 10, 50, 40], [20, 5, 70, 50], [1, 2, 30, 58]], dtype=float)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = load_sam3("ES-EV-S", scale="mini", image_size=112)
    with torch.no_grad():  # a random start's logits are so near zero that the order of a sum decides over masks
        for parameter in model.tracker_model.mask_decoder.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    return save_sam3(model, tmp_path_factory.mktemp("weights") / "student.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"), 3, seed=4, size=(64, 96))


class TestClicks:
    """The same numbers as `Sam3Processor`, whose outputs are held to the official code's."""

    @pytest.mark.parametrize("several", [True, False])
    def test_one_by_one_as_the_processor(self, model, several):
        processor, predictor = Sam3Processor(model), Predictor(ClickModel(model))
        state = processor.set_image(IMAGE)
        predictor.set_image(IMAGE)
        prompts = {"box": BOXES[0]}, {"point_coords": BOXES[:2, :2], "point_labels": np.array([1, 0])}
        for prompt in prompts:
            theirs = processor.predict(state, **prompt, multimask_output=several)
            masks, iou, low_res = predictor.predict(**prompt, multimask_output=several)
            np.testing.assert_allclose(low_res, theirs.low_res, atol=1e-6)
            np.testing.assert_allclose(iou, theirs.scores, atol=1e-6)
            np.testing.assert_array_equal(masks, theirs.masks)
            fed = {"mask_input": theirs.low_res[:1], "multimask_output": several}
            again = processor.predict(state, **prompt, **fed).low_res
            np.testing.assert_allclose(predictor.predict(**prompt, **fed)[2], again, atol=1e-6)

    @pytest.mark.parametrize("refine", [0, 1])
    def test_many_on_several_images_as_one_by_one(self, model, refine):
        clicks = ClickModel(model)
        together = BatchPredictor(clicks, choose="single", refine=refine, chunk=8)
        pictures = [IMAGE, np.ascontiguousarray(IMAGE[::-1])]
        together.set_images([clicks.preprocess(picture) for picture in pictures], [IMAGE.shape[:2]] * 2)
        owners = np.array([0, 0, 1])
        found = np.concatenate([masks for _, masks in together.masks(owners, boxes=BOXES)])
        predictor = Predictor(clicks)
        for mask, owner, box in zip(found, owners, BOXES, strict=True):
            predictor.set_image(pictures[owner])
            alone, _, low_res = predictor.predict(box=box, multimask_output=False)
            if refine:
                alone = predictor.predict(box=box, mask_input=low_res, multimask_output=False)[0]
            assert (mask != alone[0]).mean() < 1e-3

    def test_the_detectors_neck_is_not_run(self, model, monkeypatch):
        monkeypatch.setattr(model.detector_model.vision_encoder.neck, "forward", None)
        assert ClickModel(model).embed(IMAGE).levels[-1].shape == (1, 128, 8, 8)

    def test_without_a_tracker(self, model, monkeypatch):
        monkeypatch.setattr(model.report, "absent", ["tracker"])
        with pytest.raises(ValueError, match="held no tracker, so this model takes no points and boxes"):
            ClickModel(model)


class TestEvaluation:
    def test_mean_iou_is_that_of_the_processors_masks(self, model, data):
        images = CocoImages(*data)
        result = evaluate(ClickModel(model), images, limit=1, choose="single", keep_crowds=False)
        assert not model.training
        record = next(record for record in images if record.annotations)
        asked = [a for a in record.annotations if not a["iscrowd"] and a["area"] >= 1]
        processor = Sam3Processor(model)
        state, ious = processor.set_image(images.read(record)), []
        for annotation in asked[:6]:
            x, y, w, h = annotation["bbox"]
            mask = processor.predict(state, box=np.array([x, y, x + w, y + h]), multimask_output=False).masks[0]
            truth = images.mask(annotation)
            ious.append(100 * (mask & truth).sum() / (mask | truth).sum())
        assert [o["iou"] for o in result["objects"][:6]] == pytest.approx(ious, abs=1e-3)
        assert result["summary"]["model"] == "ES-EV-S"
        assert result["summary"]["scale"] == "mini"

    def test_the_command(self, weights, data, tmp_path, capsys):
        asked = ["--model", "ES-EV-S", "--weights", str(weights), "--scale", "mini", "--image-size", "112"]
        asked += ["--images", str(data[0]), "--annotations", str(data[1]), "--prompt", "gt-box", "--limit", "1"]
        asked += ["--choose", "single", "--exclude-crowds", "--keep-part", "--out", str(tmp_path / "boxes.json")]
        assert evaluate_main(asked) == 0
        summary = json.loads((tmp_path / "boxes.json").read_text())["summary"]
        assert summary["weights"] == str(weights)
        assert evaluate_main([*asked, "--resume"]) == 0  # from the part file
        assert json.loads((tmp_path / "boxes.json").read_text())["summary"]["mIoU"] == summary["mIoU"]
        capsys.readouterr()
        assert evaluate_main([*asked, "--text", "ES-MC-M"]) == 2
        assert "holds the text encoder ES-MC-S, the model asked for has ES-MC-M" in capsys.readouterr().err
        assert evaluate_main(["--model", "edge-sam", "--text", "SAM3", *asked[2:]]) == 2
        assert "--text is for SAM3 and its students, not for edge-sam" in capsys.readouterr().err


class TestSeconds:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("bench")
        asked = ["--models", "ES-EV-S", "--scale", "mini", "--image-size", "112", "--passes", "2", "--out", str(folder)]
        assert bench.main(asked) == 0
        return folder

    def test_parts_and_steps_are_the_same_seconds(self, folder):
        (result,) = bench.read(folder)
        passes = [run["s"] for run in result["passes"]]
        assert len(passes) == 3  # the first warms up
        counted = np.sum([run["samples_s"] for run in result["runs"]], axis=0)
        np.testing.assert_allclose(counted, passes[1:])
        assert min(min(run["samples_s"]) for run in result["runs"]) >= 0
        table = pd.read_csv(folder / "table.csv")
        parts = table[table["part"] != "whole"].groupby("step")["gmacs"].sum()
        wholes = table[table["part"] == "whole"].set_index("step")["gmacs"]
        assert wholes.to_dict() == pytest.approx(parts.to_dict())

    def test_each_part_is_timed_in_its_step(self, folder):
        table = pd.read_csv(folder / "table.csv")
        found = {step: set(rows["part"]) - {"whole", "rest"} for step, rows in table.groupby("step")}
        assert found["image"] == {"backbone", "head", "neck"}
        assert found["phrase"] == {"text", "geometry", "detr encoder", "detr decoder", "scoring", "mask decoder"}
        assert found["box"] == {"tracker neck", "click decoder"}
        assert set(table["weights"]) == {"random"}

    def test_a_row_that_is_there_is_not_timed_again(self, folder, monkeypatch, capsys):
        monkeypatch.setattr(bench, "bench_sam3", None)
        asked = ["--models", "ES-EV-S", "--scale", "mini", "--image-size", "112", "--resume", "--out", str(folder)]
        assert bench.main(asked) == 0
        assert "already there" in capsys.readouterr().out

    def test_marks_hold_their_own_time(self):
        watch = bench._Watch(gpu=False)
        clock = iter([0.0, 1.0, 2.0, 5.0, 9.0, 10.0])
        watch._now = lambda: next(clock)
        with watch.step("image"):  # 0 to 10
            watch.enter("neck")  # 1 to 9
            watch.enter("head")  # 2 to 5
            watch.leave()
            watch.leave()
        assert watch.seconds() == {("image", "rest"): 2.0, ("image", "neck"): 5.0, ("image", "head"): 3.0}

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            (["--models", "ES-XX-S"], "Unknown model 'ES-XX-S'"),
            (["--models", "SAM3", "--image-size", "504"], "SAM3 takes images whose side is a multiple of 336"),
            (["--passes", "0"], "passes must be 1 or more"),
            (["--table", "nowhere"], "No samples"),
        ],
    )
    def test_wrong_requests(self, asked, words, capsys):
        assert bench.main(asked) == 2
        assert words in capsys.readouterr().err
