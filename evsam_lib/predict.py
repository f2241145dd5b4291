"""Predictor: SAM's interface over any model of the zoo, and the same for many prompts at once.

Set an image once, then ask as often as you like; the embedding is kept. `predict` has SAM's own arguments and results;
`predict_batch` answers hundreds of boxes or click sequences without a loop over prompts. Notebooks 08 and 09 stand on
it.
"""

import numpy as np
import torch
from torch import Tensor

from evsam_lib.models.sam import Sam

__all__ = ["Predictor"]


class Predictor:
    """Masks for prompts on one image.

    Attributes:
        model: the model.
        features: (1, C, h, w) tensor, the image's embedding, or None before `set_image`.
        original_size: (H, W) of the image, or None.
    """

    def __init__(self, model: Sam):
        self.model = model
        self.reset_image()

    def reset_image(self) -> None:
        """Forgets the image."""
        self.features: Tensor | None = None
        self.original_size: tuple[int, int] | None = None

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Encodes an image; all later prompts are about it.

        Args:
            image: (H, W, 3) uint8, RGB.

        Raises:
            ValueError: another type or shape.
        """
        self.reset_image()
        pixels = self.model.preprocess(image)[None]
        self.features = self.model.encode(pixels.to(self.model.device, self.model.dtype))
        self.original_size = image.shape[:2]

    @torch.inference_mode()
    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt, as SAM's `SamPredictor.predict`.

        Args:
            point_coords: (P, 2) float, XY pixels of the image.
            point_labels: (P,) int, 1 for the object, 0 for not the object.
            box: (4,) float, XYXY pixels of the image.
            mask_input: (1, 4h, 4w) float, low-res logits of an earlier prediction.
            multimask_output: three masks, the better choice for one click; or one.
            return_logits: logits instead of booleans.

        Returns:
            masks (K, H, W) bool, or float32 logits; predicted IoU (K,) float32; low-res logits (K, 4h, 4w) float32.

        Raises:
            RuntimeError: no image was set.
            ValueError: no prompt, or one of another shape.
        """
        self._require_image()
        if point_coords is None and box is None and mask_input is None:
            raise ValueError("A prompt needs points, a box or a mask, none was given.")
        points, labels = _points(point_coords, point_labels, ("P",))
        boxes = None if box is None else _array("box", np.reshape(box, -1) if np.size(box) == 4 else box, (4,))
        coords, codes = self._tokens(*(None if x is None else x[None] for x in (points, labels, boxes)))
        masks = None if mask_input is None else self._mask_input(mask_input)
        low_res, iou = self.model.decode(
            self.features, coords, codes, mask_input=masks, multimask_output=multimask_output
        )
        return (
            self._upscaled(low_res[0], return_logits)[0],
            iou[0, 0].float().cpu().numpy(),
            low_res[0, 0].float().cpu().numpy(),
        )

    @torch.inference_mode()
    def predict_batch(
        self,
        *,
        boxes: np.ndarray | None = None,
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        select: str = "all",
        return_logits: bool = False,
        chunk: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for N prompts on the image, all of them boxes, points, or both.

        Prompts are decoded in parallel; only the masks that are returned are brought to the image's size.

        Args:
            boxes: (N, 4) float, XYXY pixels of the image.
            points: (N, P, 2) float, XY pixels of the image: P points for each prompt.
            labels: (N, P) int, 1 for the object, 0 for not the object.
            select: "all" three masks of each prompt, or the "best": the one of highest `Sam.quality`, which is the
                predicted IoU for all models but EdgeSAM, whose masks are chosen by stability.
            return_logits: logits instead of booleans.
            chunk: prompts decoded together, which bounds memory; None is 2 on a CPU and 256 on a GPU.

        Returns:
            For "all": masks (N, 3, H, W) bool or float32 logits, predicted IoU (N, 3), low-res logits (N, 3, 4h, 4w).
            For "best" the same without the axis of three. N may be 0.

        Raises:
            RuntimeError: no image was set.
            ValueError: prompts of another shape, or an unknown `select`.
        """
        self._require_image()
        if select not in ("all", "best"):
            raise ValueError(f"select must be 'all' or 'best', got {select!r}.")
        if boxes is None and points is None:
            raise ValueError("Prompts need boxes (N, 4) or points (N, P, 2), neither was given.")
        points, labels = _points(points, labels, ("N", "P"))
        boxes = None if boxes is None else _array("boxes", boxes, ("N", 4))
        if boxes is not None and points is not None and len(boxes) != len(points):
            raise ValueError(f"As many boxes as point prompts are needed, got {len(boxes)} and {len(points)}.")
        coords, codes = self._tokens(points, labels, boxes)  # (1, N, T, 2), (1, N, T)
        parts = []
        code = self.model.prompt_encoder.dense_position()
        chunk = chunk or (2 if self.model.device.type == "cpu" else 256)  # a CPU's caches are small
        for start in range(0, max(coords.shape[1], 1), chunk):  # at least once, so that no prompts have a shape too
            part = slice(start, start + chunk)
            low_res, iou = self.model.decode(self.features, coords[:, part], codes[:, part], image_code=code)
            low_res, iou = low_res[0].float(), iou[0].float()  # (n, 3, 4h, 4w), (n, 3)
            if select == "best":
                best = self.model.quality(low_res, iou).argmax(dim=1)[:, None]  # first of equals, as officially
                low_res, iou = low_res.take_along_dim(best[..., None, None], dim=1), iou.take_along_dim(best, dim=1)
            parts.append((self._upscaled(low_res, return_logits), iou.cpu().numpy(), low_res.cpu().numpy()))
        masks, ious, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
        return (masks, ious, logits) if select == "all" else (masks[:, 0], ious[:, 0], logits[:, 0])

    def _require_image(self) -> None:
        if self.features is None:
            raise RuntimeError("No image is set: call set_image(image) before asking for masks.")

    def _tokens(self, points, labels, boxes) -> tuple[Tensor, Tensor]:
        """Arrays in image pixels, first axis N, to prompt tokens (1, N, T, 2) and labels on the model's device."""
        if points is None and boxes is None:  # a mask prompt alone
            coords, codes = torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0, dtype=torch.long)
        else:
            coords, codes = self.model.prompt_encoder.tokens(
                None if points is None else self.model.to_frame(points, self.original_size)[None],
                None if labels is None else torch.as_tensor(labels)[None],
                None if boxes is None else self.model.to_frame(boxes, self.original_size)[None],
            )
        return coords.to(self.model.device), codes.to(self.model.device)

    def _mask_input(self, mask_input: np.ndarray) -> Tensor:
        side = 4 * self.model.grid
        mask = _array("mask_input", mask_input, (1, side, side))
        return torch.from_numpy(mask)[None, None].to(self.model.device)

    def _upscaled(self, low_res: Tensor, return_logits: bool) -> np.ndarray:
        logits = self.model.upscale(low_res, self.original_size)
        return (logits if return_logits else logits > self.model.mask_threshold).cpu().numpy()


def _points(points, labels, axes: tuple[str, ...]) -> tuple[np.ndarray | None, np.ndarray | None]:
    if points is None:
        if labels is not None:
            raise ValueError("Labels were given without points.")
        return None, None
    if labels is None:
        raise ValueError("Points were given without labels (1 for the object, 0 for not the object).")
    points = _array("points", points, (*axes, 2))
    labels = np.asarray(labels)
    if labels.shape != points.shape[:-1]:
        raise ValueError(f"labels must have the shape {points.shape[:-1]} of the points, got {labels.shape}.")
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(f"labels must be 1 (object), 0 (not the object) or -1 (padding), got {np.unique(labels)}.")
    return points, labels.astype(np.int64)


def _array(what: str, value: np.ndarray, shape: tuple) -> np.ndarray:
    """float32 copy of `value`, whose shape must match; letters in `shape` stand for any length."""
    array = np.array(value, dtype=np.float32)
    fits = array.ndim == len(shape) and all(
        isinstance(n, str) or n == m for n, m in zip(shape, array.shape, strict=False)
    )
    if not fits:
        raise ValueError(f"{what} must have shape ({', '.join(map(str, shape))}), got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite numbers, got NaN or infinity.")
    return array
