"""SAM3's clicks in the study's own evaluation, its seconds part by part, and the protocols that need weights."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.saco import GeneratedConcepts, SacoImages, write_saco
from evsam_lib.data.write import write_coco
from evsam_lib.evaluate import evaluate
from evsam_lib.evaluate import main as evaluate_main
from evsam_lib.predict import BatchPredictor, Predictor
from evsam_lib.sam3 import Sam3Processor, bench, load_sam3, phrases, protocols
from evsam_lib.sam3.as_sam import ClickModel
from evsam_lib.sam3.load import save_sam3
from evsam_lib.sam3.phrases import CocoPhrases, evaluate_phrases
from evsam_lib.sam3.protocols import BOX_ROWS, PHRASE_ROWS, Row, box_table, phrase_table
from evsam_lib.sam3.zoo import IMAGES
from evsam_lib.study import paper
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
        processor = np.sum([run["cpu_samples_s"] for run in result["runs"]], axis=0)
        np.testing.assert_allclose(processor, [run["cpu_s"] for run in result["passes"]][1:])
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
        watch._now = lambda: np.array([t := next(clock), t / 2])
        with watch.step("image"):  # 0 to 10
            watch.enter("neck")  # 1 to 9
            watch.enter("head")  # 2 to 5
            watch.leave()
            watch.leave()
        parts = {("image", "rest"): (2.0, 1.0), ("image", "neck"): (5.0, 2.5), ("image", "head"): (3.0, 1.5)}
        assert watch.seconds() == parts

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


class Told:
    """Stands in for `Sam3Processor`: answers with the true instances, but for the phrases it gets wrong."""

    wrong = ()
    asked = 0

    def __init__(self, model, confidence_threshold):
        self.truth = {}

    def set_image(self, image):
        return image.shape[:2]

    def set_text_prompt(self, phrase, size):
        type(self).asked += 1
        masks = self.truth_of[phrase, size] if phrase not in self.wrong else np.ones((1, *size), bool)
        scores = np.linspace(0.9, 0.6, len(masks)) if len(masks) else np.zeros(0)
        return SimpleNamespace(masks=masks, scores=scores, presence=0.9)


class TestPhrases:
    @pytest.fixture(scope="class")
    @classmethod
    def saco(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("saco")
        return write_saco(list(GeneratedConcepts(3, 3, 64)), folder), folder / "images"

    @pytest.fixture
    def told(self, saco, monkeypatch):
        images = SacoImages(*saco)
        Told.truth_of = {(p.text, i.image.shape[:2]): p.masks for i in images for p in i.phrases}
        # phrases return in other images: one image at a time
        monkeypatch.setattr(phrases, "Sam3Processor", Told)
        monkeypatch.setattr(Told, "asked", 0)
        monkeypatch.setattr(Told, "wrong", ())
        return images

    @staticmethod
    def first(images):
        """The first image alone, whose phrases are told apart by their text."""
        return [images[0]]

    def test_true_answers_are_perfect_and_one_false_alarm_is_told_by_mcc(self, told, model, monkeypatch):
        one = self.first(told)
        Told.truth_of = {(p.text, one[0].image.shape[:2]): p.masks for p in one[0].phrases}
        summary = evaluate_phrases(model, one)["summary"]
        assert (summary["cgF1"], summary["pmF1"]) == pytest.approx((100, 100), abs=0.1)
        assert summary["MCC"] == pytest.approx(1, abs=1e-4)
        absent = [p.text for p in one[0].phrases if not len(p.masks)]
        assert summary["pairs"] == len(one[0].phrases) and summary["positive"] == summary["pairs"] - len(absent)
        monkeypatch.setattr(Told, "wrong", absent[:1])
        worse = evaluate_phrases(model, one)["summary"]
        assert worse["pmF1"] == summary["pmF1"]
        assert worse["MCC"] < 0.99

    def test_the_annotator_that_suits_an_answer_counts(self, saco, told, model, tmp_path):
        content = json.loads(saco[0].read_text())
        content["annotations"] = []  # this one saw nothing
        blind = tmp_path / "blind.json"
        blind.write_text(json.dumps(content))
        images = SacoImages(blind, saco[1], limit=1, also=[saco[0]])
        Told.truth_of = {(p.text, images[0].image.shape[:2]): p.others[0] for p in images[0].phrases}
        assert evaluate_phrases(model, images)["summary"]["cgF1"] == pytest.approx(100, abs=0.1)
        alone = evaluate_phrases(model, SacoImages(blind, saco[1], limit=1))["summary"]
        assert alone["positive"] == 0 and alone["cgF1"] == 0

    def test_a_killed_run_goes_on_and_shards_meet(self, told, model, tmp_path):
        images, out = list(told), tmp_path / "run.json"
        with pytest.raises(KeyError):  # the second image has phrases that were not told
            Told.truth_of = {(p.text, images[0].image.shape[:2]): p.masks for p in images[0].phrases}
            evaluate_phrases(model, images, out=out)
        done = Told.asked
        Told.truth_of = {(p.text, i.image.shape[:2]): p.masks for i in images for p in i.phrases}
        whole = evaluate_phrases(model, images)
        Told.asked = 0
        resumed = evaluate_phrases(model, images, out=out, resume=True)
        assert Told.asked == sum(len(i.phrases) for i in images[1:]) and done >= len(images[0].phrases)
        kept = ("pairs", "positive", "images")
        assert {key: resumed["summary"][key] for key in kept} == {key: whole["summary"][key] for key in kept}
        assert evaluate_phrases(model, images, out=tmp_path / "s.json", shard=(1, 2)) is None
        shared = evaluate_phrases(model, images, out=tmp_path / "s.json", shard=(2, 2))
        assert shared["summary"]["cgF1"] == whole["summary"]["cgF1"]
        with pytest.raises(ValueError, match=r"belongs to a run with other settings \(min_score: 0.5 there, 0.1 here"):
            evaluate_phrases(model, images, out=out, resume=True, min_score=0.1)

    @pytest.fixture(scope="class")
    @classmethod
    def coco(cls, tmp_path_factory):
        """Two images, the categories that are in them and one that is not; the first annotation is a crowd's."""
        folder, file = write_coco(tmp_path_factory.mktemp("coco"), 2, seed=4, size=(64, 96))
        content = json.loads(file.read_text())
        shown = {a["category_id"] for a in content["annotations"]}
        absent = next(c["id"] for c in content["categories"] if c["id"] not in shown)
        content["categories"] = [c for c in content["categories"] if c["id"] in shown | {absent}]
        content["annotations"][0]["iscrowd"] = 1
        file.write_text(json.dumps(content))
        return CocoImages(folder, file)

    def test_coco_has_its_categories_as_phrases(self, coco, told, model):
        images = CocoPhrases(coco)
        one = images[0]
        assert [p.text for p in one.phrases] == list(coco.categories.values())
        assert sum(len(p.masks) for p in one.phrases) == sum(not a["iscrowd"] for a in coco[0].annotations)
        Told.truth_of = {(p.text, one.image.shape[:2]): p.masks for p in one.phrases}
        result = evaluate_phrases(model, images, limit=1)
        assert result["summary"]["pairs_with_crowds"] == 1
        assert result["summary"]["AP"] == pytest.approx(100)
        assert result["summary"]["cgF1"] == pytest.approx(100, abs=0.1)

    def test_the_command(self, saco, weights, model, tmp_path, capsys):
        asked = ["--model", "ES-EV-S", "--weights", str(weights), "--scale", "mini", "--image-size", "112"]
        asked += ["--images", str(saco[1]), "--limit", "1", "--min-score", "0", "--out", str(tmp_path / "p.json")]
        assert phrases.main([*asked, "--saco", str(saco[0])]) == 0
        assert "cgF1" in capsys.readouterr().out
        pair = json.loads((tmp_path / "p.json").read_text())["objects"][0]
        processor = Sam3Processor(model, confidence_threshold=0.0)
        state = processor.set_image(SacoImages(*saco)[0].image)
        found = processor.set_text_prompt(pair["phrase"], state)
        np.testing.assert_allclose(pair["scores"], found.scores, rtol=1e-4)
        assert pair["presence"] == pytest.approx(found.presence, rel=1e-4)
        assert phrases.main(asked) == 2
        assert "Phrases come from one file, --saco FILE or --coco FILE" in capsys.readouterr().err
        assert phrases.main(["--model", "ES-TV-M", *asked[2:], "--saco", str(saco[0])]) == 2
        assert "holds the image encoder ES-EV-S, the model asked for has ES-TV-M" in capsys.readouterr().err


class TestTables:
    """The teacher has a row in every table, and what is missing is said, not left out."""

    @pytest.mark.parametrize("rows", [BOX_ROWS, PHRASE_ROWS])
    def test_the_teacher_is_there(self, rows):
        assert rows[-1] == Row("SAM3")
        assert {row.name for row in rows} >= set(IMAGES)

    def test_rows_are_those_that_the_documents_print(self):
        printed = paper("efficientsam3_boxes")
        made = {(row.title, f"COCO mIoU{row.suffix}") for row in BOX_ROWS}
        old = printed[~printed["column"].str.contains("SAM3.1")]  # another architecture
        assert {(cell["row"], cell["column"]) for cell in old.to_dict("records")} == made - {("SAM3", "COCO mIoU")}
        titles = {row.title for row in PHRASE_ROWS}
        assert set(paper("efficientsam3_concepts")["row"]) <= titles

    def test_without_data_or_weights(self, data, tmp_path, monkeypatch):
        monkeypatch.setenv("EVSAM_WEIGHTS_ROOT", str(tmp_path))
        records = box_table(None, BOX_ROWS[:1], say=str)
        assert [record["status"] for record in records] == ["not run: COCO val2017"]
        (record,) = box_table(CocoImages(*data), [Row("ES-EV-S", text="SAM3")], say=str)
        assert record["status"].startswith("not run: No checkpoint at")
        assert "python -m evsam_lib.fetch weights ES-EV-S" in record["status"]
        (record,) = phrase_table({"Crowded": None}, PHRASE_ROWS[:1], say=str)
        assert record["status"] == "not run: Crowded" and record["row"] == "LiteText ES-MC-S"

    def test_boxes_with_weights(self, model, weights, data):
        row = Row("ES-EV-S", weights, scale="mini", image_size=112)
        given = {"limit": 1, "say": str}
        (by_file, *_), (by_model, *_) = (
            box_table(CocoImages(*data), [row], **given, models=models) for models in ({}, {"ES-EV-S": model})
        )
        assert by_file == by_model
        assert by_file["status"] == "generated data" and by_file["column"] == "COCO mIoU" and by_file["n"] > 0

    def test_another_students_file_stops(self, weights, data):
        row = Row("ES-TV-M", weights, scale="mini", image_size=112)
        with pytest.raises(ValueError, match="holds the image encoder ES-EV-S, the model asked for has ES-TV-M"):
            box_table(CocoImages(*data), [row], say=str)

    def test_phrases_with_their_means(self, model, monkeypatch):
        found = iter(
            [{"cgF1": 10.0, "pmF1": 20.0, "MCC": 0.5, "pairs": 4}, {"cgF1": 30.0, "pmF1": 40.0, "MCC": 0.7, "pairs": 6}]
        )
        monkeypatch.setattr(protocols, "evaluate_phrases", lambda *_, **__: {"summary": next(found), "objects": []})
        sets = {"Food": GeneratedConcepts(0, 1, 64), "Wiki": GeneratedConcepts(0, 1, 64)}
        records = phrase_table(sets, [Row("ES-EV-S")], models={"ES-EV-S": model}, say=str)
        values = {record["column"]: record["value"] for record in records}
        assert values == {"cgF1": 20, "pmF1": 30, "MCC": pytest.approx(0.6), "cgF1 Food": 10, "cgF1 Wiki": 30}
        assert {record["n"] for record in records} == {4, 6, 10}
        assert {record["status"] for record in records} == {"generated data"}
