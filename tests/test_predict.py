"""Predictor: SAM's interface, batched prompts, and what bad input says."""

import numpy as np
import pytest
import torch

from evsam_lib import Predictor, load_model


def gradient_image(height=60, width=90):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 2, y * 3, x + y], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    predictor = Predictor(load_model("efficientvit-sam-mini"))
    predictor.set_image(gradient_image())
    return predictor


BOXES = np.array([[5, 5, 40, 30], [20, 10, 80, 55], [0, 0, 90, 60]], dtype=float)
POINTS = np.array([[[10, 10], [60, 40]], [[30, 20], [5, 55]], [[80, 50], [45, 30]]], dtype=float)
LABELS = np.array([[1, 0], [1, 1], [1, 0]])


class TestBatch:
    def test_equals_one_by_one(self, predictor):
        masks, iou, low_res = predictor.predict_batch(boxes=BOXES, chunk=2, return_logits=True)
        for i, box in enumerate(BOXES):
            one = predictor.predict(box=box, return_logits=True)
            np.testing.assert_allclose(masks[i], one[0], atol=1e-4)
            np.testing.assert_allclose(iou[i], one[1], atol=1e-5)
            np.testing.assert_allclose(low_res[i], one[2], atol=1e-4)

    def test_points_equal_one_by_one(self, predictor):
        masks, iou, _ = predictor.predict_batch(points=POINTS, labels=LABELS, return_logits=True)
        for i in range(3):
            one = predictor.predict(POINTS[i], LABELS[i], return_logits=True)
            np.testing.assert_allclose(masks[i], one[0], atol=1e-4)
            np.testing.assert_allclose(iou[i], one[1], atol=1e-5)

    def test_points_and_boxes_together(self, predictor):
        _, iou, _ = predictor.predict_batch(boxes=BOXES, points=POINTS, labels=LABELS)
        one = predictor.predict(POINTS[1], LABELS[1], box=BOXES[1])
        np.testing.assert_allclose(iou[1], one[1], atol=1e-5)

    def test_best_is_the_highest_predicted_iou(self, predictor):
        masks, iou, low_res = predictor.predict_batch(boxes=BOXES)
        best_masks, best_iou, best_low_res = predictor.predict_batch(boxes=BOXES, select="best")
        rows = np.arange(3), iou.argmax(axis=1)
        np.testing.assert_array_equal(best_iou, iou[rows])
        np.testing.assert_array_equal(best_masks, masks[rows])
        np.testing.assert_array_equal(best_low_res, low_res[rows])

    def test_shapes_and_types(self, predictor):
        masks, iou, low_res = predictor.predict_batch(boxes=BOXES)
        assert masks.shape == (3, 3, 60, 90)
        assert masks.dtype == bool
        assert iou.shape == (3, 3)
        assert low_res.shape == (3, 3, 128, 128)

    def test_no_prompts(self, predictor):
        masks, iou, low_res = predictor.predict_batch(boxes=np.zeros((0, 4)), select="best")
        assert masks.shape == (0, 60, 90)
        assert iou.shape == (0,)
        assert low_res.shape == (0, 128, 128)


class TestPredict:
    def test_shapes(self, predictor):
        masks, iou, low_res = predictor.predict(np.array([[10, 10]]), np.array([1]), multimask_output=False)
        assert masks.shape == (1, 60, 90)
        assert masks.dtype == bool
        assert iou.shape == (1,)
        assert low_res.shape == (1, 128, 128)
        assert predictor.features.shape == (1, 128, 32, 32)

    def test_mask_input_is_used(self, predictor):
        _, first, low_res = predictor.predict(POINTS[0], LABELS[0])
        _, with_mask, _ = predictor.predict(POINTS[0], LABELS[0], mask_input=low_res[:1] + 3)
        assert np.abs(first - with_mask).max() > 1e-6

    def test_a_mask_alone_is_a_prompt(self, predictor):
        masks, _, _ = predictor.predict(mask_input=np.zeros((1, 128, 128)))
        assert masks.shape == (3, 60, 90)

    def test_portrait_image(self):
        predictor = Predictor(load_model("efficientvit-sam-mini"))
        predictor.set_image(gradient_image(90, 60))
        assert predictor.predict(box=np.array([1, 2, 50, 80]))[0].shape == (3, 90, 60)


class TestBadInput:
    @pytest.mark.parametrize(
        ("image", "given"),
        [
            (np.zeros((4, 4, 3)), "float64"),
            (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
            (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
            (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
            ([[1, 2]], "list"),
        ],
    )
    def test_images(self, predictor, image, given):
        with pytest.raises(ValueError, match=given):
            Predictor(predictor.model).set_image(image)

    def test_a_refused_image_leaves_no_old_one(self, predictor):
        fresh = Predictor(predictor.model)
        fresh.set_image(gradient_image())
        with pytest.raises(ValueError, match="uint8"):
            fresh.set_image(np.zeros((4, 4, 3)))
        with pytest.raises(RuntimeError, match="No image is set"):
            fresh.predict(box=BOXES[0])

    def test_prompt_before_image(self, predictor):
        with pytest.raises(RuntimeError, match="set_image"):
            Predictor(predictor.model).predict_batch(boxes=BOXES)

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ({"boxes": np.zeros((3, 5))}, r"boxes must have shape \(N, 4\), got \(3, 5\)"),
            ({"boxes": np.zeros(4)}, r"boxes must have shape \(N, 4\), got \(4,\)"),
            ({"boxes": np.full((1, 4), np.nan)}, "finite"),
            ({"points": np.zeros((3, 2)), "labels": np.zeros(3)}, r"points must have shape \(N, P, 2\)"),
            ({"points": np.zeros((3, 1, 2))}, "without labels"),
            ({"points": np.zeros((3, 1, 2)), "labels": np.ones((3, 2))}, r"labels must have the shape \(3, 1\)"),
            ({"points": np.zeros((3, 1, 2)), "labels": np.full((3, 1), 7)}, r"got \[7\]"),
            ({"boxes": np.zeros((2, 4)), "points": np.zeros((3, 1, 2)), "labels": np.ones((3, 1))}, "2 and 3"),
            ({}, "neither was given"),
            ({"boxes": BOXES, "select": "worst"}, "'worst'"),
        ],
    )
    def test_prompts(self, predictor, prompt, message):
        with pytest.raises(ValueError, match=message):
            predictor.predict_batch(**prompt)

    def test_no_prompt_at_all(self, predictor):
        with pytest.raises(ValueError, match="none was given"):
            predictor.predict()

    def test_mask_of_another_size(self, predictor):
        with pytest.raises(ValueError, match=r"mask_input must have shape \(1, 128, 128\), got \(1, 256, 256\)"):
            predictor.predict(mask_input=np.zeros((1, 256, 256)))
