"""Predictor: SAM's interface over any model of the zoo, and the same for many prompts at once.

Set an image once, then ask as often as you like; the embedding is kept. `predict` has SAM's own arguments and results;
`predict_batch` answers hundreds of boxes or click sequences without a loop over prompts. `BatchPredictor` goes over
several images at once and returns one mask for each prompt, which is what evaluation asks for; notebooks 08 to 12 stand
on it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from evsam_lib.models.sam import Promptable, Sam, stability_score

__all__ = ["BatchPredictor", "Predictor"]

CHOICES = ("predicted_iou", "stability", "model", "single")


class Predictor:
    """Masks for prompts on one image.

    Args:
        model: a `Sam`, or one that is behind an engine already.
        engine: what runs it, a key of `evsam_lib.deploy.engines.ENGINES`, such as "compile" or "openvino".
        precision: of the image encoder in that engine: "fp32", "bf16" or "fp16".

    Attributes:
        model: the model, behind the engine.
        features: (1, C, h, w) tensor, the image's embedding, or None before `set_image`.
        original_size: (H, W) of the image, or None.

    Raises:
        ValueError: an engine for what is no `Sam`, or see `with_engine`.
    """

    def __init__(self, model: Promptable, *, engine: str = "eager", precision: str = "fp32"):
        self.model = model
        if (engine, precision) != ("eager", "fp32"):
            if not isinstance(model, Sam):
                raise ValueError(
                    f"An engine is made from a Sam, got {type(model).__name__}; give it without an engine."
                )
            from evsam_lib.deploy.engines import with_engine  # above this module, and most need none of them

            self.model = with_engine(model, engine, precision=precision)
        self.reset_image()

    def reset_image(self) -> None:
        """Forgets the image."""
        self.features: Tensor | None = None
        self.original_size: tuple[int, int] | None = None
        self._code: Tensor | None = None  # the cells' position code, the same for all prompts

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Encodes an image; all later prompts are about it.

        Args:
            image: (H, W, 3) uint8, RGB.

        Raises:
            ValueError: another type or shape.
        """
        self.reset_image()
        self.features, self._code = self.model.embed(image), self.model.prompt_encoder.dense_position()
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
        low_res, iou = self.predict_low_res(point_coords, point_labels, box, mask_input, multimask_output)
        _, size = self._image()
        return self._upscaled(low_res[None], size, return_logits)[0], iou.cpu().numpy(), low_res.cpu().numpy()

    @torch.inference_mode()
    def predict_low_res(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """`predict` without its last step, the enlarging: for those who want one of the masks, or another size.

        Args and errors are those of `predict`.

        Returns:
            Low-res logits (K, 4h, 4w) and predicted IoU (K,), float32 tensors on the model's device.
        """
        features, size = self._image()
        if point_coords is None and box is None and mask_input is None:
            raise ValueError("A prompt needs points, a box or a mask, none was given.")
        points, labels = _points(point_coords, point_labels, ("P",))
        boxes = None if box is None else _array("box", np.reshape(box, -1) if np.size(box) == 4 else box, (4,))
        coords, codes = self._tokens(*(None if x is None else x[None] for x in (points, labels, boxes)), size=size)
        masks = None if mask_input is None else self._mask_input(mask_input)
        low_res, iou = self.model.decode(
            features, coords, codes, mask_input=masks, multimask_output=multimask_output, image_code=self._code
        )
        return low_res[0, 0].float(), iou[0, 0].float()

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
        features, size = self._image()
        if select not in ("all", "best"):
            raise ValueError(f"select must be 'all' or 'best', got {select!r}.")
        if boxes is None and points is None:
            raise ValueError("Prompts need boxes (N, 4) or points (N, P, 2), neither was given.")
        points, labels = _points(points, labels, ("N", "P"))
        boxes = None if boxes is None else _array("boxes", boxes, ("N", 4))
        if boxes is not None and points is not None and len(boxes) != len(points):
            raise ValueError(f"As many boxes as point prompts are needed, got {len(boxes)} and {len(points)}.")
        coords, codes = self._tokens(points, labels, boxes, size)  # (1, N, T, 2), (1, N, T)
        parts = []
        chunk = chunk or _chunk(self.model)
        for start in range(0, max(coords.shape[1], 1), chunk):  # at least once, so that no prompts have a shape too
            part = slice(start, start + chunk)
            low_res, iou = self.model.decode(features, coords[:, part], codes[:, part], image_code=self._code)
            low_res, iou = low_res[0].float(), iou[0].float()  # (n, 3, 4h, 4w), (n, 3)
            if select == "best":
                best = self.model.quality(low_res, iou).argmax(dim=1)[:, None]  # first of equals, as officially
                low_res, iou = low_res.take_along_dim(best[..., None, None], dim=1), iou.take_along_dim(best, dim=1)
            parts.append((self._upscaled(low_res, size, return_logits), iou.cpu().numpy(), low_res.cpu().numpy()))
        masks, ious, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
        return (masks, ious, logits) if select == "all" else (masks[:, 0], ious[:, 0], logits[:, 0])

    def _image(self) -> tuple[Tensor, tuple[int, int]]:
        """Its embedding and size."""
        if self.features is None or self.original_size is None:
            raise RuntimeError("No image is set: call set_image(image) before asking for masks.")
        return self.features, self.original_size

    def _tokens(self, points, labels, boxes, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Arrays in image pixels, first axis N, to prompt tokens (1, N, T, 2) and labels on the model's device."""
        if points is None and boxes is None:  # a mask prompt alone
            coords, codes = torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0, dtype=torch.long)
        else:
            coords, codes = self.model.prompt_encoder.tokens(
                None if points is None else self.model.to_frame(points, size)[None],
                None if labels is None else torch.as_tensor(labels)[None],
                None if boxes is None else self.model.to_frame(boxes, size)[None],
            )
        return coords.to(self.model.device), codes.to(self.model.device)

    def _mask_input(self, mask_input: np.ndarray) -> Tensor:
        side = 4 * self.model.grid
        mask = _array("mask_input", mask_input, (1, side, side))
        return torch.from_numpy(mask)[None, None].to(self.model.device)

    def _upscaled(self, low_res: Tensor, size: tuple[int, int], return_logits: bool) -> np.ndarray:
        logits = self.model.upscale(low_res, size)
        return (logits if return_logits else logits > self.model.mask_threshold).cpu().numpy()


class BatchPredictor:
    """One mask for each of many prompts on several images.

    Images are encoded in one batch. Prompts are decoded in chunks of a fixed size, which on a GPU reach across images,
    and one of three masks is chosen while it is small: only that one is brought to its image's size, image by image.
    Memory is that of one chunk, however many prompts there are.

    Attributes:
        model: the model.
        features: (B, C, h, w) tensor, the images' embeddings, or None before `set_images`.
        sizes: (H, W) of each image.
    """

    def __init__(self, model: Sam, *, choose: str = "predicted_iou", refine: int = 0, chunk: int | None = None):
        """Args:
            model: the model.
            choose: which of three masks is returned: "predicted_iou", the one of highest predicted IoU (authors'
                script); "stability", the one that changes least with its threshold; "model", what `Sam.quality` of this
                model says. "single" asks for the model's one mask instead of three.
            refine: how often the chosen mask's logits are given back together with the prompt (SAM's paper: once, for
                detector boxes; authors' script: never).
            chunk: prompts decoded together; None is 2 on a CPU and 256 on a GPU.

        Raises:
            ValueError: an unknown choice, or a negative `refine`.
        """
        if choose not in CHOICES:
            raise ValueError(f"Unknown choice {choose!r}, expected one of {', '.join(CHOICES)}.")
        if refine < 0:
            raise ValueError(f"refine must be 0 or more, got {refine}.")
        self.model, self.choose, self.refine = model, choose, refine
        self.chunk = chunk or _chunk(model)
        self.features: Tensor | None = None
        self.sizes: list[tuple[int, int]] = []
        self._code: Tensor | None = None

    @torch.inference_mode()
    def set_images(self, pixels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> None:
        """Encodes images; all later prompts are about them.

        Args:
            pixels: B tensors (3, S, S) float, as `Sam.preprocess` makes them.
            sizes: (H, W) of each image.
        """
        self.features = self.model.encode(torch.stack(list(pixels)).to(self.model.device, self.model.dtype))
        self._code = self.model.prompt_encoder.dense_position()
        self.sizes = list(sizes)

    def masks(
        self,
        owners: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Masks for N prompts, all of them boxes, points, or both; handed out as they are made, some at a time.

        Args:
            owners: (N,) int, the position of each prompt's image in the batch, ascending.
            boxes: (N, 4) float, XYXY pixels of the image.
            points: (N, P, 2) float, XY pixels of the image.
            labels: (N, P) int, 1 for the object, 0 for not the object.

        Yields:
            which of the prompts, n of them and all of one image, and their masks (n, H, W) bool at that image's size.

        Raises:
            RuntimeError: no images were set.
            ValueError: prompts of another shape.
        """
        if self.features is None:
            raise RuntimeError("No images are set: call set_images(pixels, sizes) before asking for masks.")
        if len(owners) == 0:
            return
        coords, codes = self._tokens(owners, boxes, points, labels)
        for start, stop in self._chunks(owners):
            part = slice(start, stop)
            low_res = self._best(self.features, owners[part], coords[part], codes[part])  # (n, 4h, 4w)
            for first, last in _runs(owners[part]):
                masks = self._upscaled(low_res[first:last], self.sizes[owners[start + first]])
                yield slice(start + first, start + last), masks

    def _tokens(self, owners, boxes, points, labels) -> tuple[Tensor, Tensor]:
        """Prompts in their images' pixels -> (N, T, 2) tokens in the prompt frame, (N, T) labels."""
        points, labels = _points(points, labels, ("N", "P"))
        boxes = None if boxes is None else _array("boxes", boxes, ("N", 4))
        in_frame = [
            None
            if prompts is None
            else torch.cat([self.model.to_frame(prompts[a:b], self.sizes[owners[a]]) for a, b in _runs(owners)])
            for prompts in (points, boxes)
        ]
        labels = None if labels is None else torch.from_numpy(labels)
        coords, codes = self.model.prompt_encoder.tokens(in_frame[0], labels, in_frame[1])
        return coords.to(self.model.device), codes.to(self.model.device)

    def _chunks(self, owners: np.ndarray) -> Iterator[tuple[int, int]]:
        """First and last + 1 of prompts decoded together. A CPU gains by sharing one image, a GPU by full chunks."""
        runs = _runs(owners) if self.model.device.type == "cpu" else [(0, len(owners))]
        for first, last in runs:
            for start in range(first, last, self.chunk):
                yield start, min(start + self.chunk, last)

    @torch.inference_mode()
    def _best(self, features: Tensor, owners: np.ndarray, coords: Tensor, codes: Tensor) -> Tensor:
        """The chosen low-res logits (n, 4h, 4w) of n prompts with T tokens each."""
        shared = owners[0] == owners[-1]
        features = features[owners[:1] if shared else owners]  # (1 or n, C, h, w)
        lead = (1, len(owners)) if shared else (len(owners), 1)  # images, prompts of each
        prompts = features, coords.unflatten(0, lead), codes.unflatten(0, lead)
        low_res = self._chosen(*prompts, None)
        for _ in range(self.refine):
            low_res = self._chosen(*prompts, low_res.unflatten(0, lead))
        return low_res[:, 0]

    def _chosen(self, features: Tensor, coords: Tensor, codes: Tensor, mask_input: Tensor | None) -> Tensor:
        """One mask of each prompt: low-res logits (n, 1, 4h, 4w)."""
        answer = self.model.decode(
            features, coords, codes,
            mask_input=mask_input, multimask_output=self.choose != "single", image_code=self._code,
        )  # fmt: skip
        low_res, iou = (x.flatten(0, 1).float() for x in answer)
        best = self._quality(low_res, iou).argmax(dim=1)  # first of equals, as officially
        return low_res.take_along_dim(best[:, None, None, None], dim=1)

    def _quality(self, low_res: Tensor, iou: Tensor) -> Tensor:
        if self.choose == "stability":
            return stability_score(low_res, threshold=self.model.mask_threshold)
        return self.model.quality(low_res, iou) if self.choose == "model" else iou

    @torch.inference_mode()
    def _upscaled(self, low_res: Tensor, size: tuple[int, int]) -> np.ndarray:
        return (self.model.upscale(low_res[:, None], size)[:, 0] > self.model.mask_threshold).cpu().numpy()


def _chunk(model: Promptable) -> int:
    return 2 if model.device.type == "cpu" else 256  # a CPU's caches are small


def _runs(owners: np.ndarray) -> list[tuple[int, int]]:
    """First and last + 1 of each stretch of equal owners."""
    edges = np.flatnonzero(np.diff(owners)) + 1
    bounds = [0, *edges.tolist(), len(owners)]
    return [pair for pair in pairwise(bounds) if pair[0] < pair[1]]


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
