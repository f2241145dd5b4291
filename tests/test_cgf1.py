"""cgF1 against figures that SAM3's own evaluator gave, and by hand."""

import numpy as np
import pytest

from evsam_lib.evaluate.cgf1 import PairCounts, best_of, count_pair, mask_ious, scores

# Rectangles on 40 x 40 pixels: what there is, and what was found with which score.
PAIRS = [
    ([], []),
    ([], [([11, 15, 20, 24], 0.38)]),
    ([], [([16, 21, 25, 30], 0.54)]),
    ([], []),
    ([[15, 19, 33, 37]], []),
    ([[9, 12, 21, 28]], []),
    ([[9, 9, 22, 26], [10, 7, 28, 24]], [([9, 8, 22, 26], 0.96), ([10, 6, 27, 25], 0.64)]),
    ([[7, 4, 24, 19], [3, 15, 17, 25]], [([7, 4, 25, 18], 0.45)]),
    ([[14, 3, 23, 14], [18, 6, 32, 15]], [([15, 4, 23, 13], 0.98), ([18, 6, 32, 14], 0.93)]),
    ([[0, 16, 16, 26], [3, 7, 21, 24]], [([4, 6, 20, 25], 0.74), ([10, 12, 19, 21], 0.07)]),
    ([], []),
    ([], [([1, 16, 10, 25], 0.37)]),
]
SECOND = {2: [[16, 21, 24, 30]], 4: [], 9: [[4, 6, 20, 24]]}  # where another annotator saw it otherwise


def masks(rectangles) -> np.ndarray:
    found = np.zeros((len(rectangles), 40, 40), bool)
    for mask, (x0, y0, x1, y1) in zip(found, rectangles, strict=True):
        mask[y0:y1, x0:x1] = True
    return found


def counted(truth, found) -> PairCounts:
    return count_pair(mask_ious(masks([box for box, score in found if score >= 0.5]), masks(truth)))


def test_one_annotator_as_the_official_evaluator_has_it():
    """facebookresearch/sam3, sam3/eval/cgf1_eval.py, run on these pairs."""
    found = scores(counted(*pair) for pair in PAIRS)
    assert found.cgf1 == pytest.approx(17.44032012907168, abs=1e-9)
    assert found.pmf1 == pytest.approx(49.328675970683314, abs=1e-9)
    assert found.mcc == pytest.approx(0.3535533801766075, abs=1e-12)
    assert found.recall == pytest.approx(50) and found.false_alarms == pytest.approx(100 / 6)
    assert (found.pairs, found.positive) == (12, 6)


def test_two_annotators_as_the_official_evaluator_has_it():
    first = [counted(*pair) for pair in PAIRS]
    second = [counted(SECOND.get(k, truth), found) for k, (truth, found) in enumerate(PAIRS)]
    found = scores(best_of(pair) for pair in zip(first, second, strict=True))
    assert (found.cgf1, found.pmf1, found.mcc) == pytest.approx(
        (44.30837836130983, 62.66151145150533, 0.707106760353215), abs=1e-9
    )


def test_matching_is_one_to_one_and_for_the_largest_sum():
    ious = np.array([[0.9, 0.8], [0.85, 0.1], [0.6, 0.6]])  # greedy would give 0.9 + 0.6
    assert count_pair(ious).hits.tolist() == [2, 2, 2, 2, 2, 2, 2, 1, 0, 0]  # 0.85 and 0.8
    assert count_pair(np.zeros((0, 3))).hits.sum() == 0
    with pytest.raises(ValueError, match=r"must be \(found, instances\), got shape \(3,\)"):
        count_pair(np.zeros(3))


def test_perfect_silent_and_empty():
    perfect = [count_pair(np.eye(2)), count_pair(np.zeros((0, 0)))]
    assert scores(perfect).cgf1 == pytest.approx(100, abs=0.05)  # the official eps
    silent = scores([count_pair(np.zeros((0, 2))), count_pair(np.zeros((0, 0)))])
    assert (silent.cgf1, silent.pmf1, silent.mcc) == (0, 0, 0)
    with pytest.raises(ValueError, match="at least one pair"):
        scores([])


def test_one_pixel_and_nothing():
    pixel = np.zeros((1, 4, 4), bool)
    pixel[0, 1, 1] = True
    assert mask_ious(pixel, pixel)[0, 0] == 1
    assert mask_ious(np.zeros((1, 4, 4), bool), np.zeros((1, 4, 4), bool))[0, 0] == 0
    assert mask_ious(pixel[:0], pixel).shape == (0, 1)
