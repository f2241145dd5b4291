"""Run lengths: the very text of pycocotools, for every kind of mask."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from evsam_lib.data.rle import encode_masks


def test_a_mask_by_hand():
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=bool)  # down the columns: 0 0 | 1 1 | 1 0
    (rle,) = encode_masks(mask[None])
    assert rle == {"size": [2, 3], "counts": "231"}


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.98, 1])
def test_equal_to_pycocotools(share):
    """Small frames, so that runs often pass from one column to the next and end at the corners."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        masks = rng.random((3, *rng.integers(1, 8, 2))) < share
        expected = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        found = encode_masks(masks)
        assert [rle["counts"] for rle in found] == [rle["counts"].decode() for rle in expected]
        assert (coco_mask.decode(found).transpose(2, 0, 1) == masks).all()


def test_no_masks_and_other_arrays():
    assert encode_masks(np.zeros((0, 4, 5), dtype=bool)) == []
    with pytest.raises(ValueError, match=r"bool \(N, H, W\), got uint8 \(1, 4, 5\)"):
        encode_masks(np.zeros((1, 4, 5), dtype=np.uint8))
