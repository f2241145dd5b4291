"""The deepest pixel of a region: by hand, and against a distance transform of the whole image, ties included."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from evsam_lib.depth import deepest

NO_CLICKS = np.empty((0, 2), dtype=int)


def by_transform(region, clicked=NO_CLICKS):
    y, x = distance_transform_edt(np.pad(region, 1), return_distances=False, return_indices=True)
    own_y, own_x = np.ogrid[: y.shape[0], : y.shape[1]]
    squared = ((y - own_y) ** 2 + (x - own_x) ** 2)[1:-1, 1:-1]
    squared[clicked[:, 1], clicked[:, 0]] = 0
    y, x = np.unravel_index(squared.argmax(), squared.shape)
    return (int(squared[y, x]), (int(x), int(y))) if squared[y, x] else (0, (0, 0))


def regions(kind, rng):
    """Two regions of 150 x 203 pixels: no multiple of a block, and not square."""
    y, x = np.mgrid[:150, :203]
    if kind == "dots":
        return [rng.random(y.shape) < share for share in (0.02, 0.9)]
    if kind == "wide ridges":  # hundreds of pixels are equally deep
        return [(abs(y - 70) < 31) & (x > 3), abs(x + y - 150) < 40]
    if kind == "narrow ridges":
        return [x % 17 < 11, (x % 26 < 24) & (y % 31 < 29)]
    if kind == "ellipses":
        return [((x - 90) / 80) ** 2 + ((y - 60) / 55) ** 2 < 1, (x - 200) ** 2 + (y - 75) ** 2 < 70**2]
    if kind == "holes":
        return [((x * 7 + y * 3) % 997 != 5) & (x + 2 * y > 50), ((x - 100) ** 2 + (y - 75) ** 2) % 5000 > 40]
    fields = [gaussian_filter(rng.standard_normal(y.shape), sigma) for sigma in (4, 15)]
    return [field > -0.5 * field.std() for field in fields]


@pytest.mark.parametrize("kind", ["dots", "wide ridges", "narrow ridges", "ellipses", "holes", "fields"])
def test_the_answer_is_that_of_a_distance_transform(kind):
    rng = np.random.default_rng(0)
    for region in regions(kind, rng):
        clicked = NO_CLICKS
        for _ in range(4):  # click after click on the deepest
            expected = by_transform(region, clicked)
            assert deepest(region, clicked) == expected
            clicked = np.concatenate([clicked, [expected[1]]])


def test_all_small_regions_agree():
    for number in range(2**12):
        region = np.array([number >> bit & 1 for bit in range(12)], dtype=bool).reshape(3, 4)
        assert deepest(region, NO_CLICKS) == by_transform(region), region


@pytest.mark.parametrize("side", [1, 7, 8, 9, 64, 120, 121])
def test_a_square_is_deepest_in_its_middle(side):
    region = np.zeros((130, 140), dtype=bool)
    region[5 : 5 + side, 9 : 9 + side] = True
    assert deepest(region, NO_CLICKS) == (((side + 1) // 2) ** 2, (9 + (side - 1) // 2, 5 + (side - 1) // 2))


def test_nothing_is_looked_for_below_a_bound():
    for region in regions("ellipses", None) + regions("narrow ridges", None):
        squared, place = by_transform(region)
        assert deepest(region, NO_CLICKS, at_least=squared) == (squared, place)
        assert deepest(region, NO_CLICKS, at_least=squared + 1) == (0, (0, 0))


def test_many_clicks_may_cover_the_deepest_block():
    region = np.ones((100, 100), dtype=bool)
    y, x = np.mgrid[38:62, 38:62]
    clicked = np.stack([x.ravel(), y.ravel()], axis=1)
    assert deepest(region, clicked) == by_transform(region, clicked)


def test_no_pixel_no_depth():
    assert deepest(np.zeros((4, 5), dtype=bool), NO_CLICKS) == (0, (0, 0))
    assert deepest(np.zeros((0, 5), dtype=bool), NO_CLICKS) == (0, (0, 0))
    one = np.zeros((4, 5), dtype=bool)
    one[2, 3] = True
    assert deepest(one, NO_CLICKS) == (1, (3, 2))
    assert deepest(one, np.array([[3, 2]])) == (0, (0, 0))
