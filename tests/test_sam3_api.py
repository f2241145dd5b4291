"""EfficientSAM3's interface at toy size: phrases, examples, clicks, video, the official names, bad input."""

import sys

import numpy as np
import pytest
import torch

from evsam_lib.sam3 import Sam3Processor, VideoPredictor, adapter, load_sam3
from evsam_lib.sam3.tokens import tokenize
from tests.golden import fill

IMAGE = fill.reference_image(60, 90)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_sam3("ES-EV-S", scale="mini", image_size=112)


@pytest.fixture
def seen(model):
    processor = Sam3Processor(model, confidence_threshold=0.0)
    return processor, processor.set_image(IMAGE)


def test_tokens_are_clips_with_zeros_behind():
    ids, mask = tokenize(["a dog", "red striped disc"], 16)
    assert ids[0, :5].tolist() == [49406, 320, 1929, 49407, 0]
    assert mask.sum(1).tolist() == [4, 5]
    assert ids.shape == mask.shape == (2, 16)


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("", "A phrase must name something, such as 'red disc'; got ''"),
        ("  ", "must name something"),
        (None, "got None"),
        ("very " * 20 + "long", "takes 23 tokens, this model has room for 16; shorten it"),
    ],
)
def test_empty_and_overlong_phrases(phrase, words, seen):
    processor, state = seen
    with pytest.raises(ValueError, match=words):
        processor.set_text_prompt(phrase, state)
    assert state.phrase is None


def test_a_phrase_finds_instances_and_shows_presence_apart(seen):
    processor, state = seen
    found = processor.set_text_prompt("red disc", state)
    n = len(found.scores)
    assert n == 36  # the small detector's queries: nothing is below a threshold of 0
    assert found.masks.shape == found.probabilities.shape == (n, 60, 90) and found.masks.dtype == bool
    assert found.boxes.shape == (n, 4)
    np.testing.assert_allclose(found.scores, found.matches * found.presence, rtol=1e-6)
    assert (np.diff(found.matches) <= 0).all()
    out = processor.outputs(state)
    assert found.presence == pytest.approx(out.presence_logits.sigmoid().item())
    strict = Sam3Processor(processor.model, confidence_threshold=1.0).set_text_prompt("red disc", state)
    assert strict.masks.shape == (0, 60, 90) and strict.presence == found.presence


def test_the_filling_of_a_phrase_counts_for_students_and_not_for_the_detector(seen):
    processor, state = seen
    text, mask = processor.text("red disc")
    ids, _ = tokenize(["red disc"], 16)
    with torch.inference_mode():
        masked = processor.model.detector_model.get_text_features(ids, attention_mask=mask).pooler_output
    assert not torch.allclose(text.pooler_output, masked)  # the official students attend to zeros
    state.phrase = "red disc"
    with torch.inference_mode():
        before = processor.outputs(state).pred_logits
        text.pooler_output[:, 4:] = 9.0
        torch.testing.assert_close(processor.outputs(state).pred_logits, before)


def test_examples_join_the_phrase(seen):
    processor, state = seen
    with_phrase = processor.set_text_prompt("red disc", state)
    with_example = processor.add_example([20, 10, 60, 50], state)
    assert state.examples == [([pytest.approx(40 / 90), 0.5, pytest.approx(40 / 90), pytest.approx(40 / 60)], 1)]
    assert not np.allclose(with_phrase.matches, with_example.matches, atol=1e-7)
    processor.reset_prompts(state)
    with pytest.raises(ValueError, match="A concept needs a phrase or an example box, neither was given"):
        processor.find(state)
    assert len(processor.add_example([20, 10, 60, 50], state, label=0).scores) == 36  # "visual" stands for the phrase


def test_clicks_have_sams_interface(seen):
    processor, state = seen
    one = processor.add_point((30, 20), state)
    assert one.masks.shape == (3, 60, 90) and one.scores.shape == (3,) and one.low_res.shape == (3, 32, 32)
    two = processor.add_point((5, 5), state, label=0)
    assert two.masks.shape == (1, 60, 90)  # no longer ambiguous
    processor.reset_prompts(state)
    boxed = processor.add_box([10, 10, 50, 40], state)
    again = processor.predict(state, box=np.array([10, 10, 50, 40]), multimask_output=False)
    np.testing.assert_array_equal(boxed.low_res, again.low_res)
    refined = processor.predict(state, box=np.array([10, 10, 50, 40]), mask_input=again.low_res, multimask_output=False)
    assert not np.array_equal(refined.low_res, again.low_res)
    for mask, box in zip(one.masks, one.boxes, strict=True):
        if mask.any():
            x0, y0, x1, y1 = box.astype(int)
            assert mask[y0:y1, x0:x1].sum() == mask.sum()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, s: p.add_point((91, 5), s), r"point \(91, 5\) lies outside the image of 90 x 60 pixels"),
        (lambda p, s: p.add_box([5, 5, 100, 20], s), "no XYXY box inside the image of 90 x 60 pixels"),
        (lambda p, s: p.add_box([50, 5, 10, 20], s), "no XYXY box"),
        (lambda p, s: p.add_example([1, 2, 3], s), r"A box is XYXY, 4 numbers; got shape \(3,\)"),
        (lambda p, s: p.add_box("left", s), r"A box is XYXY, 4 numbers; got shape \(\) <U4"),
        (lambda p, s: p.add_point((3,), s), r"A point is X and Y, in pixels of the image; got \(3,\)"),
        (lambda p, s: p.add_point((3, 3), s, label=5), r"A label is 1 \(the object\) or 0 \(not the object\), got 5"),
        (lambda p, s: p.add_example([1, 2, 30, 40], s, label=2), "A label is 1 .*, got 2"),
        (lambda p, s: p.set_text_prompt("red disc", None), "The state must be what set_image returned, got NoneType"),
        (lambda p, s: p.add_box([1, 2, 30, 40], IMAGE), "The state must be what set_image returned, got ndarray"),
        (lambda p, s: p.predict(s, point_coords=np.zeros((1, 2))), "Points need labels, .* none were given"),
        (
            lambda p, s: p.predict(s, point_coords=np.full((1, 2), np.nan), point_labels=np.ones(1)),
            "Points must be finite numbers, got",
        ),
        (
            lambda p, s: p.predict(s, point_coords=np.zeros((1, 2)), point_labels=np.array([7])),
            r"Labels are 1 \(object\), 0 .* or -1 .*, got \[7\]",
        ),
        (lambda p, s: p.set_image("photo.jpg"), "or a PIL image, got 'photo.jpg'; read a file first"),
        (lambda p, s: Sam3Processor(p.model, confidence_threshold=50), "lies between 0 and 1, got 50"),
        (lambda p, s: p.predict(s), "needs points, a box or a mask, none was given"),
        (
            lambda p, s: p.predict(s, point_coords=np.zeros((2, 2)), point_labels=np.ones(1)),
            r"Points must be \(P, 2\) and labels \(P,\), got \(2, 2\) and \(1,\)",
        ),
        (lambda p, s: p.predict(s, mask_input=np.zeros((1, 9, 9))), r"shape \(1, 32, 32\), got \(1, 9, 9\)"),
        (lambda p, s: p.set_image(np.zeros((4, 4), np.uint8)), r"\(H, W, 3\) uint8 RGB, got \(4, 4\) uint8"),
        (lambda p, s: p.set_image(np.zeros((4, 4, 3))), r"got \(4, 4, 3\) float64"),
    ],
)
def test_prompts_that_cannot_be(call, words, seen):
    with pytest.raises(ValueError, match=words):
        call(*seen)


def test_a_video_keeps_identities(model):
    predictor = VideoPredictor(model)
    with pytest.raises(RuntimeError, match="No video was set"):
        predictor.add_phrase("red disc")
    frames = [np.roll(IMAGE, 4 * i, axis=1) for i in range(4)]
    predictor.set_video(frames)
    with pytest.raises(RuntimeError, match="No phrase was given"):
        next(predictor.propagate())
    predictor.add_phrase("red disc")
    model.score_threshold_detection, before = 0.0, model.score_threshold_detection
    model.new_det_thresh, new_before = 0.0, model.new_det_thresh
    objects = list(predictor.propagate())
    model.score_threshold_detection, model.new_det_thresh = before, new_before
    assert [o.frame for o in objects] == [0, 1, 2, 3]
    assert len(objects[0].ids) > 0
    assert set(objects[1].ids) & set(objects[0].ids)
    for o in objects:
        assert o.masks.shape == (len(o.ids), 60, 90) and o.boxes.shape == (len(o.ids), 4)
        assert o.masks.any((1, 2)).all() and o.phrases == ["red disc"] * len(o.ids)


def test_frames_of_another_size_and_no_frames(model):
    predictor = VideoPredictor(model)
    with pytest.raises(ValueError, match="Frame 1 is 60 x 90 pixels, the first is 90 x 60; all frames"):
        predictor.set_video([IMAGE, IMAGE.transpose(1, 0, 2)])
    with pytest.raises(ValueError, match="at least one frame"):
        predictor.set_video([])


SNIPPET = """
from sam3.model_builder import build_efficientsam3_image_model
from sam3.model.sam3_image_processor import Sam3Processor

# Load model
model = build_efficientsam3_image_model(
  checkpoint_path="efficient_sam3_efficientvit_s.pt",
  backbone_type="efficientvit",
  model_name="b0",
  enable_inst_interactivity=True,
)

# Process image and predict
processor = Sam3Processor(model)
inference_state = processor.set_image(image)

# Single positive point prompt (x, y) in pixels
points = [[image.size[0] / 2, image.size[1] / 2]]
labels = [1]
masks, scores, _ = model.predict_inst(inference_state, point_coords=points, point_labels=labels)
"""


@pytest.fixture
def official_names(monkeypatch):
    for name in [n for n in sys.modules if n == "sam3" or n.startswith("sam3.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(adapter, "_scale", "mini")
    adapter.install()
    yield
    for name in [n for n in sys.modules if n == "sam3" or n.startswith("sam3.")]:
        del sys.modules[name]


def test_the_readmes_quick_start_runs_as_printed(official_names, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    model = load_sam3("ES-EV-S", scale="mini", text="SAM3")
    torch.save(model.state_dict(), "efficient_sam3_efficientvit_s.pt")
    names = {"image": Image.fromarray(IMAGE)}
    exec(SNIPPET, names)
    assert names["masks"].shape == (3, 60, 90) and names["masks"].dtype == np.float32
    assert set(np.unique(names["masks"])) <= {0.0, 1.0}
    assert names["scores"].shape == (3,)


def test_official_state_has_its_keys(official_names):
    from sam3.model.sam3_image_processor import Sam3Processor as Official
    from sam3.model_builder import build_efficientsam3_image_model

    with pytest.raises(ValueError, match=r"No student repvit b0; there are efficientvit b0, .*tinyvit 21m"):
        build_efficientsam3_image_model(backbone_type="repvit")
    with pytest.raises(ValueError, match="No text encoder MobileCLIP-B; there are MobileCLIP-S0"):
        build_efficientsam3_image_model(text_encoder_type="MobileCLIP-B")
    model = build_efficientsam3_image_model(
        device="cpu", backbone_type="repvit", model_name="m0_9", text_encoder_type="MobileCLIP-S0"
    )
    with pytest.raises(ValueError, match="built for 168 pixels, the processor is asked for 1008"):
        Official(model, resolution=1008)
    processor = Official(model, confidence_threshold=0.0)
    with pytest.raises(ValueError, match="call set_image first"):
        processor.set_text_prompt("red disc", {})
    state = processor.set_image(IMAGE)
    assert (state["original_height"], state["original_width"]) == (60, 90)
    state = processor.set_text_prompt("red disc", state)
    n = len(state["scores"])
    assert n == 36 and state["masks"].shape == (n, 1, 60, 90) and state["boxes"].shape == (n, 4)
    assert 0 < state["presence"] < 1
    processor.add_geometric_prompt([0.5, 0.5, 0.4, 0.4], True, state)
    assert len(processor.set_confidence_threshold(1.0, state)["scores"]) == 0
    processor.reset_all_prompts(state)
    assert "masks" not in state


def test_the_adapter_hides_no_other_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam3", sys)
    with pytest.raises(RuntimeError, match="'sam3' is already imported"):
        adapter.install()


def test_small_holes_are_filled_as_in_the_official_predictor():
    ring = np.full((1, 9, 9), 5.0, np.float32)
    ring[0, 4, 4] = -1
    ring[0, :, 0] = -2
    out = adapter.filled(ring, area=1)
    assert out[0, 4, 4] == 10 and (out[0, :, 0] == -2).all() and out[0, 2, 2] == 5
    assert ring[0, 4, 4] == -1
