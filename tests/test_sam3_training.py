"""Stage 1 at toy size: losses by hand, the official code's ways, and a student that comes nearer its teacher."""

import copy
import math

import numpy as np
import pytest
import torch

from evsam_lib.data.generate import scene
from evsam_lib.sam3 import load_sam3, stages, training


@pytest.fixture(scope="module")
def pair():
    """A student and a teacher, small and random."""
    torch.manual_seed(0)
    teacher = load_sam3("SAM3", scale="mini", image_size=112)
    return load_sam3("ES-EV-S", scale="mini", image_size=112), teacher


@pytest.fixture(scope="module")
def images():
    return [scene(0, i, size=(96, 128)).image for i in range(4)]


def test_image_loss_by_hand():
    student = torch.tensor([[[3.0, 4.0], [7.0, 7.0]]])
    teacher = torch.tensor([[[4.0, 3.0], [0.0, 0.0]]])
    valid = torch.tensor([[True, False]])  # the second cell is padding
    found = training.image_loss(student, teacher, valid)
    assert found["l2"] == pytest.approx(1.0)  # (1 + 1) / 2 channels
    assert found["cosine"] == pytest.approx(24 / 25)
    assert found["loss"] == pytest.approx(1.0 + 1 / 25)
    official = training.image_loss(student, teacher, valid, official=True)
    assert official["l2"] == pytest.approx(2.0)  # summed over channels
    with pytest.raises(ValueError, match="No cell of the batch shows an image"):
        training.image_loss(student, teacher, ~valid & valid)


def test_text_loss_by_hand():
    student = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    shuffled = torch.tensor([[[3.0, 0.0], [5.0, 5.0]]])
    mask = torch.tensor([[True, False]])
    found = training.text_loss(student, teacher, mask, shuffled, consistency_weight=0.1)
    assert found["l2"] == pytest.approx(1.0) and found["cosine"] == pytest.approx(0.0)
    assert found["consistency"] == pytest.approx(2.0)  # ((1 - 3)^2 + 0) / 2
    assert found["loss"] == pytest.approx(1.0 + 2.0 + 0.2)
    assert training.text_loss(student, teacher, mask, shuffled, official=True)["loss"] == pytest.approx(3.4)


def test_frames_of_training():
    image = np.full((50, 100, 3), 255, np.uint8)
    stretched, everywhere = training.training_frame(image, 112)
    assert everywhere.all() and torch.equal(stretched, torch.ones(3, 112, 112))
    padded, valid = training.training_frame(image, 112, official=True)
    assert padded[0, 0, 0] == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)
    assert (padded[:, 56:] == 0).all()
    assert valid.shape == (8, 8) and valid[:4].all() and not valid[4:].any()


def test_warm_up_and_floor():
    factors = [stages.warm_cosine(i, 7, warmup=3, floor=0.1) for i in range(8)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[5] == pytest.approx(0.55) and factors[7] == pytest.approx(0.1)
    assert stages.warm_cosine(0, 4) == 1.0


def test_heads_are_the_teachers(pair):
    student, teacher = pair
    count = training.adopt_heads(student, teacher)
    assert count > 500
    assert torch.equal(student.tracker_neck.fpn_layers[0].proj1.weight, teacher.tracker_neck.fpn_layers[0].proj1.weight)
    other = copy.deepcopy(student)
    del other.detector_model.mask_decoder.semantic_projection
    with pytest.raises(ValueError, match="differ beyond trunk and text, in 2 tensors, first detector_model"):
        training.adopt_heads(student, other)


def test_image_student_comes_nearer(pair, images, tmp_path):
    student, teacher = pair
    heads = {k: v.clone() for k, v in student.state_dict().items() if "vision_encoder.backbone" not in k}
    before = training.trunk_cosine(student, teacher, images)
    targets = training.teacher_maps(teacher, images)
    assert targets.nbytes == 4 * 64 * 128 * 2  # images, cells, channels, bytes
    settings = training.ImageStage(steps=6, batch_size=4, lr=3e-3)
    log = training.distil_image(student, teacher, images, settings, targets=targets, out=tmp_path / "run")
    assert log.loss.iloc[-1] < log.loss.iloc[0]
    assert training.trunk_cosine(student, teacher, images) > before
    after = student.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in heads.items())
    with pytest.raises(ValueError, match=r"official must be one of .*loss, frame, .*got 'speed'"):
        training.ImageStage(official="speed")
    with pytest.raises(ValueError, match="4 targets for 3 images"):
        training.distil_image(student, teacher, images[:3], settings, targets=targets, out=tmp_path / "run")


def test_online_and_cached_teachers_agree_and_the_official_loss_hides_the_cosine(pair, images, tmp_path):
    _, teacher = pair
    logs = {}
    for name in ("online", "cached", "official"):
        torch.manual_seed(1)
        student = load_sam3("ES-EV-S", scale="mini", image_size=112)
        ways = "loss,frame" if name == "official" else ""
        targets = training.teacher_maps(teacher, images) if name == "cached" else None
        settings = training.ImageStage(steps=2, batch_size=2, lr=1e-3, official=ways)
        logs[name] = training.distil_image(student, teacher, images, settings, targets=targets, out=tmp_path / name)
    assert logs["cached"].loss.iloc[0] == pytest.approx(logs["online"].loss.iloc[0], rel=1e-3)  # half precision
    share = {name: log.l2.iloc[0] / log.loss.iloc[0] for name, log in logs.items()}
    assert share["official"] > share["online"]
    assert math.isclose(
        logs["online"].loss.iloc[0], logs["online"].l2.iloc[0] + 1 - logs["online"].cosine.iloc[0], rel_tol=1e-5
    )


def test_text_student_comes_nearer(pair, tmp_path):
    student, teacher = pair
    phrases = ["red striped disc", "blue square", "green dotted ring", "small yellow star"]
    settings = training.TextStage(steps=8, batch_size=4, lr=3e-3)
    log = training.distil_text(student, teacher, phrases, settings, out=tmp_path / "run")
    assert log.cosine.iloc[-1] > log.cosine.iloc[0] and log.l2.iloc[-1] < log.l2.iloc[0]
    assert (log.consistency > 0).all()
    with pytest.raises(ValueError, match="takes 23 tokens, this model has room for 16"):
        training.distil_text(student, teacher, ["very " * 20 + "long"], settings, out=tmp_path / "other")


def test_a_resumed_run_must_have_the_same_schedule(pair, images, tmp_path):
    student, teacher = pair
    settings = {"steps": 2, "batch_size": 2, "lr": 1e-3}
    log = training.distil_image(student, teacher, images, training.ImageStage(**settings), out=tmp_path)
    again = training.ImageStage(**settings)
    assert training.distil_image(student, teacher, images, again, out=tmp_path, resume=True).equals(log)
    with pytest.raises(ValueError, match="warmup_steps"):
        other = training.ImageStage(**settings, warmup_steps=1)
        training.distil_image(student, teacher, images, other, out=tmp_path, resume=True)


def test_lower_layers_of_the_text_student_learn_more_slowly(pair, tmp_path):
    student, teacher = copy.deepcopy(pair[0]), pair[1]
    before = {k: v.clone() for k, v in student.detector_model.named_parameters()}
    settings = training.TextStage(steps=1, batch_size=2, lr=1e-3, layer_decay=0.5, weight_decay=0.0, clip_norm=1e9)
    training.distil_text(student, teacher, ["red disc", "blue square"], settings, out=tmp_path)
    after = dict(student.detector_model.named_parameters())
    # AdamW's first step moves every entry that has a gradient by the learning rate
    moved = {k: (after[k] - before[k]).abs().max().item() for k in before if k.startswith("text_")}
    rates = {
        "text_projection.weight": 1.0,
        "text_encoder.final_layer_norm.weight": 1.0,
        "text_encoder.layers.2.conv_feed_forward.mlp.fc1.weight": 0.5,
        "text_encoder.layers.1.mlp.fc1.weight": 0.25,
        "text_encoder.layers.0.conv_feed_forward.mlp.fc1.weight": 0.125,
        "text_encoder.embeddings.token_embedding.weight": 0.0625,
    }
    for name, factor in rates.items():
        assert moved[name] == pytest.approx(1e-3 * factor, rel=1e-2)
