"""Losses of evsam_lib.training.losses: by hand, empty, one pixel, and against the official helpers' outputs."""

import math
from pathlib import Path

import pytest
import torch

from evsam_lib.training import losses

GOLDEN = Path(__file__).parent / "golden" / "training_pieces.pt"


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN, weights_only=True)


# ---- focal


def test_focal_by_hand():
    # p = 0.5 everywhere: wrongness 0.5, cross entropy ln 2; one foreground (alpha 0.25), one background pixel (0.75).
    loss = losses.focal_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx((0.25 + 0.75) * 0.25 * math.log(2) / 2)


def test_focal_of_confident_pixels_by_hand():
    p = torch.tensor([[0.9, 0.2]])
    expected = (0.25 * 0.1**2 * -math.log(0.9) + 0.75 * 0.2**2 * -math.log(0.8)) / 2
    assert losses.focal_loss(p.logit(), torch.tensor([[1.0, 0.0]])).item() == pytest.approx(expected, rel=1e-5)


def test_focal_of_an_empty_mask_vanishes_when_predicted_empty():
    assert losses.focal_loss(torch.full((1, 9), -20.0), torch.zeros(1, 9)).item() < 1e-12


def test_focal_of_no_pixels_is_zero():
    assert losses.focal_loss(torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [0.0, 0.0]


def test_focal_one_pixel():
    assert losses.focal_loss(torch.zeros(1, 1), torch.ones(1, 1)).item() == pytest.approx(0.25 * 0.25 * math.log(2))


def test_focal_with_gamma_0_and_no_alpha_is_cross_entropy(golden):
    ours = losses.focal_loss(golden["ce"]["in"], golden["ce"]["t"], gamma=0.0, alpha=None)
    torch.testing.assert_close(ours, golden["ce"]["none"], rtol=1e-6, atol=1e-6)


# ---- dice


def test_dice_by_hand():
    # p = 0.5 on four pixels, two of them foreground: 1 - (2*1 + 1) / (2 + 2 + 1)
    loss = losses.dice_loss(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(0.4)


def test_dice_of_an_empty_mask_is_zero_when_predicted_empty():
    assert losses.dice_loss(torch.full((1, 9), -30.0), torch.zeros(1, 9)).item() == pytest.approx(0.0, abs=1e-6)


def test_dice_one_pixel():
    assert losses.dice_loss(torch.zeros(1, 1), torch.ones(1, 1)).item() == pytest.approx(1 - 2 / 2.5)


def test_dice_equals_the_official_helper(golden):
    ours = losses.dice_loss(golden["dice"]["in"], golden["dice"]["t"])
    torch.testing.assert_close(ours, golden["dice"]["none"], rtol=1e-6, atol=1e-6)


# ---- the official point-sampled loss


def test_points_equal_the_official_draw(golden):
    piece = golden["loss_masks"]
    points = losses.uncertain_points(piece["logits"], generator=torch.Generator().manual_seed(piece["seed"]))
    # the same draws in the same order: only the rank of equal uncertainties could differ
    torch.testing.assert_close(points, piece["coords"], rtol=0, atol=0)


def test_point_sampled_loss_equals_the_official_one(golden):
    piece = golden["loss_masks"]
    ours = losses.point_sampled_loss(
        piece["logits"], piece["target"], generator=torch.Generator().manual_seed(piece["seed"])
    )
    for part, official in zip(ours, piece["none"], strict=True):
        torch.testing.assert_close(part, official, rtol=1e-6, atol=1e-6)


def test_point_sampled_loss_from_the_global_seed(golden):
    piece = golden["loss_masks"]
    state = torch.get_rng_state()
    torch.manual_seed(piece["seed"])
    bce, dice = losses.point_sampled_loss(piece["logits"], piece["target"])
    torch.set_rng_state(state)
    torch.testing.assert_close(bce.mean(), piece["mean"][0])
    torch.testing.assert_close(dice.mean(), piece["mean"][1])


def test_uncertain_points_lie_where_the_logit_changes_sign():
    ramp = torch.linspace(-8, 8, 64).expand(1, 1, 64, 64)
    points = losses.uncertain_points(ramp, generator=torch.Generator().manual_seed(0))
    near = (points[0, :, 0] - 0.5).abs() < 0.15
    # all but the few points within half a pixel of the border, where the map fades to 0
    assert near[: int(0.75 * 112 * 112)].float().mean() > 0.97
    assert near[int(0.75 * 112 * 112) :].float().mean() == pytest.approx(0.3, abs=0.03)


# ---- lowest of K


def _two_candidates() -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.zeros(2, 4, 4)
    targets[0, :2], targets[1, 2:] = 1.0, 1.0
    good, bad = (targets * 2 - 1) * 3.0, (1 - targets * 2) * 3.0
    logits = torch.stack([torch.stack([good[0], bad[0]]), torch.stack([bad[1], good[1]])])
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("recipe", losses.RECIPES)
def test_only_the_lowest_mask_of_a_prompt_gets_a_gradient(recipe):
    logits, targets = _two_candidates()
    loss = losses.mask_loss(logits, targets, recipe=recipe, generator=torch.Generator().manual_seed(0))
    loss.total.backward()
    assert loss.best.tolist() == [0, 1]
    moved = logits.grad.abs().flatten(2).sum(-1) > 0
    assert moved.tolist() == [[True, False], [False, True]]


def test_paper_loss_by_hand():
    logits, targets = torch.zeros(1, 1, 2, 2), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    loss = losses.mask_loss(logits, targets, recipe="paper")
    focal = 0.5 * 0.25 * math.log(2)  # mean alpha weight 0.5, wrongness squared 0.25
    assert loss.pixel.item() == pytest.approx(focal)
    assert loss.dice.item() == pytest.approx(0.4)
    assert loss.total.item() == pytest.approx(20 * focal + 0.4)


def test_official_loss_by_hand_on_flat_masks():
    # every point of a flat mask reads the same, so sampling cannot matter away from the border
    logits, targets = torch.zeros(1, 2, 8, 8), torch.zeros(1, 16, 16)
    loss = losses.mask_loss(logits, targets, recipe="official", generator=torch.Generator().manual_seed(0))
    assert loss.pixel.item() == pytest.approx(math.log(2))
    assert loss.dice.item() == pytest.approx(1 - 1 / (0.5 * 112 * 112 + 1))


def test_official_points_are_drawn_anew_for_each_mask(golden):
    piece = golden["loss_masks"]
    logits, target = piece["logits"][:1].expand(1, 3, 64, 64), piece["target"][:1, 0]
    generator = torch.Generator().manual_seed(3)
    parts = [losses.point_sampled_loss(logits[:, :1], target[:, None], generator=generator) for _ in range(3)]
    weighted = torch.stack([20 * bce + dice for bce, dice in parts])
    assert len(set(weighted.flatten().tolist())) == 3
    loss = losses.mask_loss(logits, target, recipe="official", generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss.total, weighted.min())


@pytest.mark.parametrize("recipe", losses.RECIPES)
def test_empty_target_is_learnable(recipe):
    targets, generator = torch.zeros(1, 64, 64), torch.Generator().manual_seed(0)
    empty, full = (
        losses.mask_loss(torch.full((1, 3, 64, 64), value), targets, recipe=recipe, generator=generator)
        for value in (-15.0, 15.0)
    )
    assert empty.pixel.item() < 1e-2  # not 0 in the official recipe: points at the very border read a faded logit
    assert full.pixel.item() > 10
    assert empty.total < full.total


@pytest.mark.parametrize("recipe", losses.RECIPES)
def test_one_pixel_masks(recipe):
    generator = torch.Generator().manual_seed(0)
    loss = losses.mask_loss(torch.zeros(1, 3, 1, 1), torch.ones(1, 1, 1), recipe=recipe, generator=generator)
    assert torch.isfinite(loss.total)
    assert loss.total.item() > 0


@pytest.mark.parametrize("recipe", losses.RECIPES)
def test_no_prompts_gives_zero_that_can_be_back_propagated(recipe):
    logits = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = losses.mask_loss(logits, torch.zeros(0, 4, 4), recipe=recipe)
    loss.total.backward()
    assert loss.total.item() == 0.0


def test_logits_are_brought_to_the_targets_size():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(logits, size=(12, 12), mode="bilinear", align_corners=False)
    targets = (large[:, 1] > 0).float()
    ours = losses.mask_loss(logits, targets, recipe="paper")
    torch.testing.assert_close(ours.total, losses.mask_loss(large, targets, recipe="paper").total)


def test_half_precision_logits_give_a_float32_loss():
    loss = losses.mask_loss(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 4, 4), recipe="paper")
    assert loss.total.dtype == torch.float32


def test_unknown_recipe_and_wrong_shapes():
    with pytest.raises(ValueError, match="unknown recipe 'sam'"):
        losses.mask_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), recipe="sam")
    with pytest.raises(ValueError, match="expected logits"):
        losses.mask_loss(torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4), recipe="paper")


# ---- IoU prediction


def test_mask_iou_by_hand():
    targets = torch.tensor([[[1.0, 0.6], [0.4, 0.0]]])  # two pixels above 0.5
    logits = torch.tensor([[[[1.0, -1.0], [-1.0, -1.0]], [[1.0, 1.0], [1.0, 1.0]], [[-1.0, -1.0], [-1.0, 1.0]]]])
    assert losses.mask_iou(logits, targets).tolist() == [[0.5, 0.5, 0.0]]


def test_mask_iou_empty_and_one_pixel():
    assert losses.mask_iou(torch.full((1, 1, 2, 2), -1.0), torch.zeros(1, 2, 2)).item() == 1.0
    assert losses.mask_iou(torch.full((1, 1, 2, 2), 1.0), torch.zeros(1, 2, 2)).item() == 0.0
    assert losses.mask_iou(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)).item() == 1.0
    assert losses.mask_iou(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4)).shape == (0, 3)


def test_iou_loss_by_hand():
    predicted = torch.tensor([[0.5, 0.9]], requires_grad=True)
    loss = losses.iou_loss(predicted, torch.tensor([[0.5, 0.5]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.4**2 / 2)
    assert predicted.grad[0].tolist() == pytest.approx([0.0, 0.4])
    assert losses.iou_loss(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0
