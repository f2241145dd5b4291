"""Stage 3: matcher and losses by hand, phrases that share an image, SA-Co's files, training that gets somewhere."""

import copy
import json

import numpy as np
import pytest
import torch

from evsam_lib.data.saco import ConceptPhrase, GeneratedConcepts, SacoImages, write_saco
from evsam_lib.sam3 import Sam3Processor, load_sam3
from evsam_lib.sam3.answers import AS_TRAINED, WITHOUT, Answer, answers, calibrate, score
from evsam_lib.sam3.detect import Found, detect, phrase_features
from evsam_lib.sam3.losses import Targets, Weights, concept_losses, giou, match_many, match_one, xyxy
from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.ship import join, packed, unpacked
from evsam_lib.sam3.stage3 import TRAINED, ConceptStage, _target, concept_batches, train_concepts
from evsam_lib.sam3.tokens import tokenize

SIDE = 112


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_sam3("ES-EV-S", scale="mini", image_size=SIDE)


@pytest.fixture(scope="module")
def images():
    return GeneratedConcepts(5, 4, SIDE)


# ---- files


def test_written_pairs_are_read_back(images, tmp_path):
    path = write_saco((images[i] for i in range(4)), tmp_path)
    read = SacoImages(path, tmp_path / "images")
    assert len(read) == 4 and len(SacoImages(path, tmp_path / "images", limit=2)) == 2
    for made, found in zip((images[i] for i in range(4)), read, strict=True):
        assert np.array_equal(made.image, found.image)
        assert [p.text for p in made.phrases] == [p.text for p in found.phrases]
        assert all(np.array_equal(a.masks, b.masks) for a, b in zip(made.phrases, found.phrases, strict=True))
    content = json.loads(path.read_text())
    assert {"id", "file_name", "text_input", "width", "height"} <= set(content["images"][0])
    assert all(0 <= v <= 1 for annotation in content["annotations"] for v in annotation["bbox"])


def test_pairs_that_are_not_annotated_whole_are_left_out(images, tmp_path):
    path = write_saco([images[0]], tmp_path)
    content = json.loads(path.read_text())
    content["images"][0]["is_instance_exhaustive"] = 0
    path.write_text(json.dumps(content))
    assert len(SacoImages(path, tmp_path / "images")[0].phrases) == len(images[0].phrases) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "no lists 'images' and 'annotations'"),
        (lambda c: c["images"][0].pop("text_input"), r"has no text_input\. COCO's own files name no phrases"),
        (lambda c: c["images"][0].update(text_input=" "), "phrase of image 10000000 is empty"),
        (lambda c: c["annotations"][0].update(image_id=3), "annotation 1 belongs to no pair"),
        (lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1, 1]]), "annotation 1 has no mask of run lengths"),
    ],
)
def test_another_layout_is_named(images, tmp_path, change, message):
    path = write_saco([images[0]], tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        SacoImages(path, tmp_path / "images")


def test_missing_files_and_other_sizes_are_named(images, tmp_path):
    path = write_saco([images[0]], tmp_path)
    with pytest.raises(FileNotFoundError, match="No annotations at"):
        SacoImages(tmp_path / "none.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="No folder of images"):
        SacoImages(path, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="which is not in"):
        SacoImages(path, tmp_path)[0]
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"]["size"] = [9, 9]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is 9 x 9 pixels, its image .* 112 x 112"):
        SacoImages(path, tmp_path / "images")[0]


# ---- boxes, matching, losses


def test_giou_by_hand():
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
    assert giou(a, b) == pytest.approx(1 / 7 - 2 / 9)
    assert giou(a, a) == pytest.approx(1)
    assert giou(a, torch.tensor([2.0, 0, 4, 2])) == pytest.approx(0)  # they touch, nothing in the hull is empty


def test_boxes_of_masks_are_tight():
    masks = np.zeros((2, 10, 20), bool)
    masks[0, 2:5, 4:8] = True
    masks[1, 9, 19] = True  # one pixel
    corners = xyxy(_target(ConceptPhrase(0, "disc", masks), SIDE)[0]) * torch.tensor([20, 10, 20, 10])
    assert torch.allclose(corners, torch.tensor([[4.0, 2, 8, 5], [19, 9, 20, 10]]))


@pytest.fixture
def toy():
    """Two phrases, four queries; the first has two instances, the second none."""
    wanted = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    targets = Targets(torch.zeros(2, 2, 4), torch.zeros(2, 2, 8, 8), torch.tensor([[True, True], [False, False]]))
    targets.boxes[0] = wanted
    targets.masks[0, 0, :4, :4], targets.masks[0, 1, 4:, 4:] = 1, 1
    boxes = torch.tensor([[0.7, 0.7, 0.2, 0.2], [0.22, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], [0.5, 0.1, 0.1, 0.1]])
    return boxes.expand(2, 4, 4).clone(), targets


def test_one_query_an_instance_and_several(toy):
    boxes, targets = toy
    logits = torch.tensor([[2.0, 2.0, 1.9, 5.0]]).expand(2, 4)
    phrase, query, instance = match_one(logits, boxes, targets)
    assert phrase.tolist() == [0, 0]
    assert dict(zip(instance.tolist(), query.tolist(), strict=True)) == {0: 2, 1: 0}  # the exact box, not the close one
    many = {(q, m) for _, q, m in zip(*(x.tolist() for x in match_many(logits, boxes, targets)), strict=True)}
    assert many == {(0, 1), (1, 0), (2, 0)}  # two for the first instance, none for the far query


def test_losses_of_perfect_and_of_hopeless_answers(toy):
    boxes, targets = toy
    logits, presence = torch.tensor([[9.0, -9.0, 9.0, -9.0], [9.0] * 4]), torch.tensor([9.0, -9.0])
    masks = torch.full((1, 4, 8, 8), -9.0)
    masks[0, 2, :4, :4], masks[0, 0, 4:, 4:] = 9.0, 9.0
    found = Found(
        logits[None], boxes[None], presence[None], masks, masks[:, :1], torch.tensor([0]), torch.zeros(2, 1, 1)
    )
    good = concept_losses(found, targets, Weights())
    assert good["loss"] < 0.05 and good["box"] == 0 and good["giou"] == pytest.approx(0, abs=1e-6)
    bad = Found(-logits[None], boxes[None].flip(3), -presence[None], -masks, -masks[:, :1], found.masked, found.cells)
    worse = concept_losses(bad, targets, Weights())
    assert all(worse[name] > good[name] for name in ("loss", "giou", "klass", "presence", "mask", "dice"))
    # The second phrase names nothing: its queries' confidence costs nothing, that is for its presence to say.
    logits[1] = -9.0
    assert concept_losses(found, targets, Weights())["klass"] == good["klass"]


def test_a_batch_without_any_instance_has_a_loss(toy):
    boxes, targets = toy
    targets.exists[:] = False
    found = Found(
        torch.zeros(1, 2, 4, requires_grad=True), boxes[None], torch.zeros(1, 2), torch.zeros(0, 4, 8, 8),
        torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long), torch.zeros(2, 1, 1),
    )  # fmt: skip
    losses = concept_losses(found, targets, Weights(presence=1.0))
    assert losses["loss"].item() == pytest.approx(np.log(2)) and losses["klass"] == 0


# ---- many phrases on an image


def test_phrases_that_share_an_image_get_what_each_would_alone(model, images):
    processor, texts = Sam3Processor(model), [phrase.text for phrase in images[0].phrases[:3]]
    with torch.inference_mode():
        vision = model.detector_model.vision_encoder(torch.stack([pixels(images[i].image, SIDE) for i in (0, 1)]))
        text, mask = phrase_features(model, texts)
        found = detect(model, vision, torch.tensor([0, 1, 0]), text, mask, masked=torch.tensor([2]))
    for row, (text, image) in enumerate(zip(texts, (0, 1, 0), strict=True)):
        state = processor.set_image(images[image].image)
        state.phrase = text
        alone = processor.outputs(state)
        assert torch.allclose(found.logits[-1, row], alone.pred_logits[0], atol=1e-5)
        assert torch.allclose(xyxy(found.boxes[-1, row]), alone.pred_boxes[0], atol=1e-5)
        assert torch.allclose(found.presence[-1, row], alone.presence_logits[0, 0], atol=1e-5)
    assert torch.allclose(found.masks[0], alone.pred_masks[0], atol=1e-5)


def test_an_empty_or_overlong_phrase_is_refused(model):
    with pytest.raises(ValueError, match="must name something"):
        phrase_features(model, ["red disc", " "])
    with pytest.raises(ValueError, match="has room for 16"):
        phrase_features(model, ["red " * 20])


# ---- training


def test_a_batch_holds_both_kinds_of_phrases(images):
    settings = ConceptStage(steps=1, batch_size=2, phrases=6, masked=2)
    batches = concept_batches(images, settings, side=SIDE)
    samples = [batches.make(images[i], torch.Generator().manual_seed(0)) for i in range(2)]
    batch = batches.collate(samples)
    assert batch.image_of.tolist() == [0] * 6 + [1] * 6
    assert batch.targets.exists.any(1).tolist() == ([True] * 3 + [False] * 3) * 2
    assert batch.masked.tolist() == [0, 1, 6, 7]
    area = batch.targets.masks[0, 0].mean()
    assert area == pytest.approx(samples[0][2][0].masks[0].mean(), rel=0.1)


def test_stage_3_lowers_its_loss(model, images, tmp_path):
    before = copy.deepcopy(model.state_dict())
    settings = ConceptStage(steps=8, batch_size=2, lr=1e-3, phrases=4, masked=1, train="detector", batchnorm="frozen")
    log = train_concepts(model, images, settings, out=tmp_path)
    model.load_state_dict(before)
    assert log.loss.tail(2).mean() < 0.85 * log.loss.head(2).mean()
    assert {"box", "giou", "klass", "presence", "mask", "dice"} <= set(log.columns)


@pytest.mark.parametrize("part", ["trunk+neck", "presence"])
def test_only_what_is_told_to_learns(model, images, tmp_path, part):
    before = copy.deepcopy(model.state_dict())
    settings = ConceptStage(steps=1, batch_size=1, lr=1e-3, phrases=2, masked=1, train=part, batchnorm="frozen")
    train_concepts(model, images, settings, out=tmp_path)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    model.load_state_dict(before)
    assert changed and all(key.startswith(TRAINED[part]) for key in changed)
    assert not any("running_" in key for key in changed), "batch norms are frozen"


def test_what_learns_is_a_choice_by_name():
    with pytest.raises(ValueError, match="train must be one of trunk"):
        ConceptStage(train="text")
    assert ConceptStage(mask_weight=1.0).weights() == Weights(mask=1.0)


# ---- scoring


def test_answers_are_scored_like_single_prompts(model, images):
    found = answers(model, [images[0]])
    assert [a.text for a in found] == [phrase.text for phrase in images[0].phrases]
    state = Sam3Processor(model, 0.0).set_image(images[0].image)
    alone = Sam3Processor(model, 0.0).set_text_prompt(found[0].text, state)
    assert alone.presence == pytest.approx(float(AS_TRAINED.probability(found[0].presence)), abs=1e-5)
    assert found[0].matches[:3] == pytest.approx(alone.matches[:3], abs=1e-5)
    assert score(found).positive == sum(len(phrase.masks) > 0 for phrase in images[0].phrases)


def _answer(match: float, presence: float, there: bool) -> Answer:
    ious = np.full((1, int(there)), 0.9)
    return Answer(0, "red disc", np.array([match]), presence, ious, np.full(int(there), 50), (SIDE, SIDE))


def test_a_broken_presence_is_mended_by_calibration():
    """Presence orders the pairs rightly but stands three too low: nothing is found until it is shifted."""
    found = [_answer(0.9, x - 3.0, x > 0) for x in np.linspace(-2, 2, 40)]
    assert score(found).cgf1 == 0
    without, mended = score(found, calibration=WITHOUT), score(found, calibration=calibrate(found))
    assert without.recall == 100 and without.false_alarms == 100 and without.mcc == pytest.approx(0)
    assert mended.mcc > 0.9 and mended.pmf1 > 85
    assert calibrate(found).shift / calibrate(found).scale == pytest.approx(3.0, abs=0.3)
    with pytest.raises(ValueError, match="positive and negative pairs"):
        calibrate(found[:5])


# ---- the teacher's file


def test_parts_are_joined_once_each():
    whole = {"a": torch.zeros(2), "b": torch.zeros(3)}
    joined = join(whole, [{"a": torch.ones(2)}, {"b": torch.ones(3)}])
    assert joined["a"].sum() == 2 and joined["b"].sum() == 3 and whole["a"].sum() == 0
    with pytest.raises(ValueError, match="do not fit the model, first c"):
        join(whole, [{"c": torch.ones(2)}])
    with pytest.raises(ValueError, match="do not fit the model, first a"):
        join(whole, [{"a": torch.ones(3)}])
    with pytest.raises(ValueError, match="Two parts hold 1 tensors, first a"):
        join(whole, [{"a": torch.ones(2)}, {"a": torch.ones(2)}])


def test_a_packed_table_keeps_the_words_in_use():
    key = "text.token_embedding.weight"
    table = torch.randn(1000 + 48_408, 4).half().float()
    small = packed({key: table, "n": torch.ones(1, dtype=torch.long)}, ["red disc"])
    assert small[key].shape == (5, 4)  # filling, begin, two words, end
    back = unpacked(small, len(table))
    ids = tokenize(["red disc"], 16)[0][0]
    assert torch.equal(back[key][ids], table[ids]) and back[key].abs().sum(1).count_nonzero() == 5
    large = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    back |= unpacked(packed({"w": large}, ["disc"]), 9)
    assert (back["w"] - large).abs().max() < 0.02 and not torch.equal(back["w"], large)
    assert set(back) == {key, "n", "w"} and unpacked({key: table}, len(table))[key] is table


def test_the_shipped_teacher_finds_concepts():
    """Far from chance on scenes that nobody trained on; provenance.json has the figures on forty."""
    teacher = load_sam3("SAM3", "mini")
    assert teacher.config.study["scale"] == "mini"
    found = score(answers(teacher, GeneratedConcepts(2027, 4, 168, first=1_000_000)))
    assert found.mcc > 0.5 and found.pmf1 > 3
    with pytest.raises(ValueError, match="Only SAM3 ships with mini weights, not ES-EV-S"):
        load_sam3("ES-EV-S", "mini")
