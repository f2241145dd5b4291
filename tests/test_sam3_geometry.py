"""Clicks and boxes in batches, the fine-tune with prompts in the loop, and the teacher's own training, at toy size."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch

from evsam_lib.data.concepts import concept_scene
from evsam_lib.sam3 import Sam3Processor, click_training, clicks, geometry, load_sam3, training

SIDE = 112


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    teacher = load_sam3("SAM3", scale="mini", image_size=SIDE)
    student = load_sam3("ES-EV-S", scale="mini", image_size=SIDE)
    training.adopt_heads(student, teacher)
    return student, teacher


@pytest.fixture(scope="module")
def scenes():
    return [concept_scene(0, i, size=(96, 128)) for i in range(4)]


def generator():
    return torch.Generator().manual_seed(0)


def test_a_batch_of_prompts_answers_as_the_processor_does(pair, scenes):
    model, scene = pair[1], scenes[0]
    processor = Sam3Processor(model)
    state = processor.set_image(scene.image)
    box = np.array([10.0, 20.0, 70.0, 80.0])
    point = np.array([[30.0, 40.0]])
    scale = torch.tensor([SIDE / 128, SIDE / 96])
    with torch.inference_mode():
        tokens = torch.cat([state.features.last_hidden_state, torch.zeros_like(state.features.last_hidden_state)])
        maps = clicks.click_maps(model, tokens)
        corners = torch.tensor(box, dtype=torch.float32).view(1, 1, 2, 2) * scale
        boxed = clicks.decode(model, maps, corners.expand(2, 3, 2, 2), torch.tensor([2, 3]).expand(2, 3, 2))
        click = torch.tensor(point, dtype=torch.float32)[None, None] * scale
        clicked = clicks.decode(model, maps, click.expand(2, 1, 1, 2), torch.ones(2, 1, 1, dtype=torch.long))
    for prompt, (masks, iou, present) in (({"box": box}, boxed), ({"point_coords": point}, clicked)):
        labels = {"point_labels": np.array([1])} if "point_coords" in prompt else {}
        one = processor.predict(state, **prompt, **labels)
        np.testing.assert_allclose(masks[0, 0].numpy(), one.low_res, rtol=1e-4, atol=1e-4)  # order of sums
        np.testing.assert_allclose(iou[0, 0].numpy(), one.scores, rtol=1e-4)
        assert present[0, 0].sigmoid().item() == pytest.approx(one.presence, rel=1e-4)
        assert not torch.allclose(masks[0], masks[1])  # the second image is another one


def test_the_wrong_level_is_half_as_fine(pair):
    model = pair[1]
    tokens = torch.randn(1, 64, 128, generator=generator())
    right, wrong = (clicks.click_maps(model, tokens, level=k) for k in (0, 1))
    assert [m.shape[-1] for m in right] == [32, 16, 8] and [m.shape[-1] for m in wrong] == [16, 8, 4]
    coords, labels = torch.full((1, 2, 1, 2), 50.0), torch.ones(1, 2, 1, dtype=torch.long)
    assert clicks.decode(model, right, coords, labels)[0].shape == (1, 2, 3, 32, 32)
    assert clicks.decode(model, wrong, coords, labels)[0].shape == (1, 2, 3, 16, 16)


def test_prompts_lie_where_the_objects_are(scenes):
    masks = scenes[1].masks
    asked = clicks.ask(masks, SIDE, prompts=9, generator=generator(), max_points=3, box_probability=0.0)
    assert asked.coords.shape == (9, 3, 2) and asked.targets.shape == (9, 32, 32)
    assert set(asked.labels.unique().tolist()) <= {-1, 1} and (asked.labels[:, 0] == 1).all()
    cells = (asked.coords[:, 0] * 32 / SIDE).long()
    covered = asked.targets[torch.arange(9), cells[:, 1], cells[:, 0]]
    assert (covered > 0).all()
    boxed = clicks.ask(masks, SIDE, prompts=9, generator=generator(), box_probability=1.0)
    assert (boxed.labels[:, :2] == torch.tensor([2, 3])).all() and (boxed.labels[:, 2] == -1).all()
    shaken = clicks.ask(masks, SIDE, prompts=9, generator=generator(), box_probability=1.0, box_jitter=0.1)
    moved = (shaken.coords - boxed.coords)[:, :2].abs()
    assert 0 < moved.max() <= 20 * SIDE / 96
    with pytest.raises(ValueError, match=r"Prompts need masks \(M, H, W\) with M > 0, got \(0, 96, 128\)"):
        clicks.ask(masks[:0], SIDE, prompts=1, generator=generator())


def test_geometry_loss_by_hand():
    student, teacher = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])  # squared error 2
    wanted = torch.tensor([[[[[0.0]], [[math.log(3)]]]]])  # of two masks the second counts: probability 0.75
    masks = torch.zeros(1, 1, 2, 1, 1)
    best = torch.tensor([[1]])
    found = geometry.geometry_loss(student, teacher, masks, wanted, best, mse_weight=0.5)
    assert found["bce"] == pytest.approx(math.log(2))
    assert found["dice"] == pytest.approx(1 - (2 * 0.5 * 0.75 + 1) / (0.5 + 0.75 + 1))
    assert found["l2"] == pytest.approx(1.0)
    assert found["loss"] == pytest.approx((found["bce"] + found["dice"] + found["l2"]).item())
    assert found["iou"] == 0.0  # a logit of 0 is not above 0
    assert geometry.geometry_loss(teacher, teacher, wanted, wanted, best)["iou"] == 1.0


@pytest.mark.parametrize("official", ["", "level"])
def test_the_fine_tune_brings_masks_nearer_and_moves_the_trunk_alone(pair, scenes, official, tmp_path):
    torch.manual_seed(2)
    student, teacher = load_sam3("ES-EV-S", scale="mini", image_size=SIDE), pair[1]
    training.adopt_heads(student, teacher)
    kept = {k: v.clone() for k, v in student.state_dict().items() if "vision_encoder.backbone" not in k}
    theirs = {k: v.clone() for k, v in teacher.state_dict().items()}
    settings = geometry.GeometryStage(steps=4, batch_size=2, lr=2e-3, prompts=3, official=official)
    log = geometry.fine_tune_geometry(student, teacher, scenes[:2], settings, out=tmp_path / "run")
    assert log.loss.iloc[-1] < log.loss.iloc[0]
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in kept.items())
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in theirs.items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match=r"official must be one of .*level, got 'speed'"):
        geometry.GeometryStage(official="speed")


def test_iou_by_size_of_objects(pair, scenes):
    objects = clicks.box_iou_by_object(pair[0], scenes[:2])
    assert len(objects) == sum(len(scene.masks) for scene in scenes[:2])
    assert objects.iou.between(0, 1).all()
    area = scenes[0].masks[0].sum() * (SIDE / 96) * (SIDE / 128)
    assert objects.cells[0] == pytest.approx(math.sqrt(area) / 14)
    table = pd.DataFrame({"iou": [0.2, 0.4, 0.9], "cells": [1.0, 2.0, 3.0]})
    found = clicks.mean_by_size(table, (1.5, 5.0))
    assert found[["all", "< 1.5 cells", "1.5 to 5 cells"]].tolist() == pytest.approx([50, 20, 65])
    assert math.isnan(found["> 5 cells"])


def test_click_loss_by_hand():
    logits = torch.tensor([[[[5.0, -5.0]], [[-5.0, 5.0]]]])  # of two masks the first is right
    targets = torch.tensor([[[1.0, 0.0]]])
    iou, present = torch.tensor([[1.0, 0.5]]), torch.zeros(1, 1)
    late = click_training.click_loss(logits, iou, present, targets, done=0.9)
    assert late["iou"] == 1.0 and late["iou_error"] == pytest.approx(0.125)
    wrong = click_training.click_loss(-logits[:, :1], iou[:, :1], present, targets, done=0.9)
    assert wrong["mask"] > late["mask"] + 1 and wrong["iou"] == 0.0
    assert late["loss"] == pytest.approx(late["mask"].item() + 0.125 + 0.1 * math.log(2), abs=1e-6)
    early = click_training.click_loss(logits, iou, present, targets, done=0.0)  # every mask counts, both sides alike
    entropy = (math.log1p(math.exp(-5)) + math.log1p(math.exp(5))) / 2  # mean of the right and the wrong mask
    right, p = torch.tensor(5.0).sigmoid().item(), 3.0
    dice = 1 - ((2 * right + 1) / p + (2 * (1 - right) + 1) / p) / 2
    assert early["mask"] == pytest.approx(2 * entropy + dice, rel=1e-5)


def test_the_tracker_learns_clicks_and_nothing_else_moves(pair, scenes, tmp_path):
    model = copy.deepcopy(pair[1])
    click_training.align_positions(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = click_training.ClickStage(steps=6, batch_size=2, lr=3e-3, prompts=3, multimask=0.5)
    log = click_training.train_clicks(model, scenes[:2], settings, out=tmp_path)
    assert log.iou_error.iloc[-1] < log.iou_error.iloc[0]
    trained = click_training.click_weights(model)
    assert "tracker_model.shared_image_embedding.positional_embedding" in trained
    assert not any("memory" in key or "detector" in key for key in trained)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and moved <= set(trained)
    assert any(key.startswith("tracker_neck") for key in moved)
    assert any("mask_tokens" in key for key in moved)
