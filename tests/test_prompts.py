"""Prompts: the training sampler and the click rule, by hand, at the edges, and against the official helpers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evsam_lib import prompts

GOLDEN = Path(__file__).parent / "golden" / "training_pieces.pt"


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN, weights_only=True)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in text.split()])


# ---- training sampler


def squares(sides: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    masks = torch.zeros(len(sides), 20, 24)
    for mask, side in zip(masks, sides):
        mask[3 : 3 + side, 5 : 5 + side] = 1
    return masks, torch.tensor([[5, 3, 5 + side, 3 + side] for side in sides], dtype=torch.float32)


def draws(masks, boxes, recipe, count=400, **options):
    generator = rng(0)
    return [prompts.sample_prompt(masks, boxes, generator=generator, recipe=recipe, **options) for _ in range(count)]


def test_points_are_the_official_ones_for_the_same_seed(golden):
    case = golden["masks_sample_points"]
    points = prompts.sample_points(case["masks"], case["k"], generator=rng(case["seed"]))
    assert torch.equal(points, case["xy"])


@pytest.mark.parametrize("recipe", prompts.RECIPES)
def test_half_of_the_images_get_boxes_and_the_rest_one_to_ten_points(recipe):
    masks, boxes = squares([4, 9])
    results = draws(masks, boxes, recipe)
    with_box = [coords for coords, labels in results if labels[0, 0] == 2]
    with_points = [(coords, labels) for coords, labels in results if labels[0, 0] != 2]
    assert 160 < len(with_box) < 240  # 400 coins: four standard deviations are 40
    assert {coords.shape[1] for coords, _ in with_points} == set(range(1, 11))
    assert all(torch.equal(coords.reshape(2, 4), boxes) for coords in with_box)
    for coords, labels in with_points:
        assert coords.dtype == torch.float32 and labels.dtype == torch.int64 and (labels == 1).all()
        for mask, points in zip(masks, coords.long()):
            assert mask[points[:, 1], points[:, 0]].all()
            assert len(points.unique(dim=0)) == len(points)


def test_box_labels_are_two_and_three():
    _, labels = prompts.sample_prompt(*squares([4, 9]), generator=rng(0), box_probability=1.0)
    assert labels.tolist() == [[2, 3], [2, 3]]


def test_every_pixel_of_a_mask_can_be_drawn_and_a_faint_one_too():
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 2], mask[0, 3, 0] = 1.0, 0.01
    found = {tuple(prompts.sample_points(mask, 1, generator=rng(seed))[0, 0].tolist()) for seed in range(30)}
    assert found == {(2.0, 1.0), (0.0, 3.0)}


def test_one_small_mask_gives_the_whole_image_boxes_in_the_official_recipe():
    masks, boxes = squares([2, 9])  # 4 pixels: 1-4 points fit
    shapes = [coords.shape[1] for coords, labels in draws(masks, boxes, "official") if labels[0, 0] == 1]
    assert set(shapes) == {1, 2, 3, 4}
    assert all((labels[0] == labels[1]).all() for _, labels in draws(masks, boxes, "official", count=50))


def test_a_small_mask_shows_all_its_pixels_then_repeats_in_the_paper_recipe():
    masks, boxes = squares([2, 9])
    sevens = [c for c, labels in draws(masks, boxes, "paper", box_probability=0.0) if labels.shape[1] == 7]
    assert len(sevens) > 10
    for coords in sevens:
        assert len(coords[0, :4].unique(dim=0)) == 4
        assert torch.equal(coords[0, 4:], coords[0, :3])
        assert len(coords[1].unique(dim=0)) == 7


def test_an_empty_mask_is_clicked_at_the_centre_of_its_box_in_the_paper_recipe():
    masks, boxes = squares([9, 9])
    masks[0] = 0
    coords, labels = prompts.sample_prompt(masks, boxes, generator=rng(1), box_probability=0.0)
    assert (coords[0] == torch.tensor([9.5, 7.5])).all() and (labels == 1).all()
    assert masks[1][coords[1].long()[:, 1], coords[1].long()[:, 0]].all()


def test_one_pixel_mask_gives_that_pixel():
    coords, _ = prompts.sample_prompt(*squares([1]), generator=rng(0), box_probability=0.0)
    assert (coords == torch.tensor([5.0, 3.0])).all()


def test_same_generator_state_same_prompts_and_no_global_randomness():
    masks, boxes = squares([5, 9])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draws(masks, boxes, "paper", count=8)
    assert torch.equal(torch.get_rng_state(), before)
    for (coords, labels), (coords_again, labels_again) in zip(first, draws(masks, boxes, "paper", count=8)):
        assert torch.equal(coords, coords_again) and torch.equal(labels, labels_again)


def test_sampler_refuses_what_does_not_belong_together():
    masks, boxes = squares([5, 9])
    with pytest.raises(ValueError, match="recipe 'papre'"):
        prompts.sample_prompt(masks, boxes, generator=rng(0), recipe="papre")
    with pytest.raises(ValueError, match=r"\(2, 20, 24\) and \(1, 4\)"):
        prompts.sample_prompt(masks, boxes[:1], generator=rng(0))
    with pytest.raises(ValueError, match="no pixel"):
        prompts.sample_points(torch.zeros(1, 3, 3), 1, generator=rng(0))


# ---- clicks


def click(gt: np.ndarray, pred: np.ndarray | None = None, clicked=()) -> tuple[int, int, int]:
    pred = np.zeros_like(gt) if pred is None else pred
    coords, labels = prompts.next_clicks(gt[None], pred[None], np.array(clicked, dtype=int).reshape(1, -1, 2))
    return (*coords[0].tolist(), int(labels[0]))


def official_stand_in(gt: np.ndarray, first: list[int], k: int) -> np.ndarray:
    """The disc that played the model when the golden clicks were made: it slides right and grows, click by click."""
    rows = np.flatnonzero(gt.any(axis=1))
    radius = max(first[1] - rows[0], rows[-1] - first[1]) + k - 2
    y, x = np.mgrid[: gt.shape[0], : gt.shape[1]]
    return (x - first[0] - 4 * (k - 1)) ** 2 + (y - first[1]) ** 2 < radius**2


@pytest.mark.parametrize("case", range(6))
def test_click_sequences_are_the_official_ones(golden, case):
    gt, expected = golden["clicks"][case]["gt"].numpy(), golden["clicks"][case]["xy_label"]
    made, pred = [], np.zeros_like(gt)
    for k in range(1, 6):
        made.append(list(click(gt, pred, [c[:2] for c in made])))
        pred = official_stand_in(gt, expected[0], k)
    assert made == expected
    # the stand-in is the one of the golden file: it ends at the IoU written there
    iou = (pred & gt).sum() / ((pred | gt).sum() + 1e-7) * 100
    assert iou == pytest.approx(golden["clicks"][case]["iou"], abs=1e-9)


def test_first_click_is_the_deepest_pixel():
    assert click(mask_of("....... .#####. .#####. .#####. .#####. .#####. .......")) == (3, 3, 1)


def test_among_equally_deep_pixels_the_first_in_raster_order_is_taken():
    assert click(mask_of(".......... .###...... .###..###. .###..###. ......###.")) == (2, 2, 1)
    assert click(mask_of("..... .##.. .##.. .....")) == (1, 1, 1)


def test_image_border_is_an_edge():
    gt = np.zeros((9, 9), dtype=bool)
    gt[:, :3] = True  # without a border the deepest would be the column at the border itself
    assert click(gt) == (1, 1, 1)
    assert click(np.ones((5, 5), dtype=bool)) == (2, 2, 1)


def test_superfluous_pixels_give_a_negative_click():
    gt = mask_of("##..... ##..... ....... .......")
    pred = mask_of("##..... ##.###. ...###. ...###.")
    assert click(gt, pred) == (4, 2, 0)


def test_tie_goes_to_negative():
    gt = mask_of("#....")
    pred = mask_of("....#")
    assert click(gt, pred) == (4, 0, 0)


def test_a_missed_region_wins_only_when_strictly_deeper():
    gt = mask_of("###.. ###.. ###..")
    pred = mask_of("....# ....# ....#")
    assert click(gt, pred) == (1, 1, 1)


def test_clicked_pixels_are_left_out_and_the_next_best_is_taken():
    gt = mask_of("##### ##### #####")
    assert click(gt) == (1, 1, 1)
    assert click(gt, clicked=[(1, 1)]) == (2, 1, 1)
    assert click(gt, clicked=[(1, 1), (2, 1), (3, 1)]) == (0, 0, 1)


def test_perfect_or_exhausted_masks_get_a_negative_click_in_the_corner():
    gt = mask_of("..... .###. .....")
    assert click(gt, gt) == (0, 0, 0)
    empty = np.zeros((4, 5), dtype=bool)
    assert click(empty, empty) == (0, 0, 0)
    one = mask_of("... .#. ...")
    assert click(one) == (1, 1, 1)
    assert click(one, clicked=[(1, 1)]) == (0, 0, 0)


def test_empty_ground_truth_gets_negative_clicks():
    pred = mask_of("..... .###. .###. .###. .....")
    assert click(np.zeros_like(pred), pred) == (2, 2, 0)


def squared_distance_by_hand(region: np.ndarray) -> np.ndarray:
    """Squared distance of every pixel to the nearest one outside, the ring around the image included: all pairs."""
    padded = np.pad(region, 1)
    inside, outside = np.argwhere(region) + 1, np.argwhere(~padded)
    result = np.zeros(region.shape, dtype=int)
    if len(inside):
        pairs = ((inside[:, None] - outside[None]) ** 2).sum(axis=-1)
        result[region] = pairs.min(axis=1)
    return result


def test_cropping_changes_nothing():
    generator = np.random.default_rng(0)
    gt, pred = (np.kron(generator.random((40, 6, 7)) < 0.4, np.ones((1, 4, 4))) > 0 for _ in range(2))
    clicked = generator.integers(0, 24, size=(40, 6, 2))
    coords, labels = prompts.next_clicks(gt, pred, clicked)
    for i in range(40):
        missed, extra = squared_distance_by_hand(gt[i] & ~pred[i]), squared_distance_by_hand(pred[i] & ~gt[i])
        for x, y in clicked[i]:
            missed[y, x] = extra[y, x] = 0
        winner = missed if missed.max() > extra.max() else extra
        y, x = np.unravel_index(winner.argmax(), winner.shape)
        assert (coords[i].tolist(), labels[i]) == ([x, y], missed.max() > extra.max())
    assert 0 < labels.sum() < 40


def test_no_objects_no_clicks():
    coords, labels = prompts.next_clicks(np.zeros((0, 3, 3), dtype=bool), np.zeros((0, 3, 3), dtype=bool))
    assert coords.shape == (0, 2) and labels.shape == (0,)


def test_clicks_refuse_what_does_not_belong_together():
    gt = np.zeros((2, 3, 3), dtype=bool)
    with pytest.raises(ValueError, match=r"bool \(2, 3, 3\) and bool \(2, 3, 4\)"):
        prompts.next_clicks(gt, np.zeros((2, 3, 4), dtype=bool))
    with pytest.raises(ValueError, match="uint8"):
        prompts.next_clicks(gt, gt.astype(np.uint8))
    with pytest.raises(ValueError, match=r"\(2, P, 2\)"):
        prompts.next_clicks(gt, gt, np.zeros((1, 3, 2), dtype=int))


def test_boxes_keep_their_fractions():
    boxes = prompts.xywh_to_xyxy(np.array([[1.5, 2.25, 10.0, 20.5]]))
    assert boxes.tolist() == [[1.5, 2.25, 11.5, 22.75]]


def test_box_of_a_mask_is_tight_and_of_no_pixels_zero():
    mask = np.zeros((6, 9), bool)
    assert prompts.mask_box(mask).tolist() == [0, 0, 0, 0]
    mask[2, 3] = mask[4, 7] = True
    assert prompts.mask_box(mask).tolist() == [3, 2, 8, 5]
