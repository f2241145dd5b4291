"""Prompts to masks on one image: a phrase, example boxes, or points and a box as SAM has them.

`Sam3Processor` encodes an image once; phrases and clicks then share its features. A phrase finds every instance of a
concept. Its score is the product of two parts, and both are shown: how well a query fits, and `presence`, whether the
concept is in the image at all, one number for the image. Where a student's presence is off, every score is near zero
though the queries are right; notebook 16 explains the parts, and why one wants to see them apart.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evsam_lib.prompts import mask_box
from evsam_lib.sam3.tokens import tokenize

__all__ = ["Concepts", "ImageState", "Masks", "Sam3Processor", "pixels"]


@dataclass
class Concepts:
    """Instances of a concept, best first.

    Attributes:
        masks: (N, H, W) bool at the image's size.
        boxes: (N, 4) float32, XYXY pixels of the image.
        scores: (N,) float32, `matches * presence`.
        matches: (N,) float32, how well each query fits the prompt, whatever the presence.
        presence: probability that the concept is in the image.
        probabilities: (N, H, W) float32, of each pixel.
    """

    masks: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    matches: np.ndarray
    presence: float
    probabilities: np.ndarray = field(repr=False)


@dataclass
class Masks:
    """The object under points or a box.

    Attributes:
        masks: (K, H, W) bool at the image's size.
        scores: (K,) float32, the predicted IoU of each.
        boxes: (K, 4) float32, XYXY pixels around each mask; zeros around an empty one.
        presence: probability that there is an object at all.
        logits: (K, H, W) float32, what the masks are cut from at 0.
        low_res: (K, 4h, 4w) float32 logits, which `predict` takes back as `mask_input`.
    """

    masks: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    presence: float
    logits: np.ndarray = field(repr=False)
    low_res: np.ndarray = field(repr=False)


@dataclass
class ImageState:
    """An encoded image and the prompts given so far.

    Attributes:
        size: (H, W) of the image.
        features: what SAM3's vision encoder made of it.
        phrase: the concept, or None.
        examples: boxes (cx, cy, w, h) in 0..1 and their labels, 1 or 0.
        points: XY pixels and their labels.
        box: XYXY pixels, or None.
    """

    size: tuple[int, int]
    features: object = field(repr=False)
    phrase: str | None = None
    examples: list[tuple[list[float], int]] = field(default_factory=list)
    points: list[tuple[list[float], int]] = field(default_factory=list)
    box: list[float] | None = None
    tracked: list[Tensor] | None = field(default=None, repr=False)  # the tracker's features, made when first asked for


class Sam3Processor:
    """Prompts on images, for any model of `load_sam3`. Features of phrases are kept: make a new one after training.

    Args:
        model: what `load_sam3` returns.
        confidence_threshold: instances of a concept with a lower score are left out; 0.5 as in SAM3's code.

    Raises:
        ValueError: a threshold that no score can have.
    """

    def __init__(self, model, confidence_threshold: float = 0.5):
        if not 0 <= confidence_threshold <= 1:
            raise ValueError(f"A confidence threshold lies between 0 and 1, got {confidence_threshold}.")
        self.model = model
        self.confidence_threshold = confidence_threshold
        self._phrases: dict[str, tuple[object, Tensor]] = {}

    @torch.inference_mode()
    def set_image(self, image: np.ndarray | Image.Image) -> ImageState:
        """Encodes an image.

        Args:
            image: (H, W, 3) uint8 RGB, or a PIL image.

        Raises:
            ValueError: another type or shape.
        """
        array = rgb(image)
        frame = pixels(array, self.image_size).to(device=self.model.device, dtype=self.model.dtype)
        features = self.model.detector_model.get_vision_features(frame[None])
        return ImageState(array.shape[:2], features)

    @property
    def image_size(self) -> int:
        """Side of the model's input, pixels."""
        return self.model.config.image_size

    @property
    def context(self) -> int:
        """Tokens that a phrase has room for."""
        return self.model.config.detector_config.text_config.max_position_embeddings

    def set_text_prompt(self, phrase: str, state: ImageState) -> Concepts:
        """All instances of a concept; examples given before stay in force.

        Raises:
            ValueError: the phrase is empty or has too many tokens.
        """
        _check_state(state)
        tokenize([phrase], self.context)
        state.phrase = phrase
        return self.find(state)

    def add_example(self, box: np.ndarray, state: ImageState, *, label: int = 1) -> Concepts:
        """One more example of the concept, or of what it is not.

        Args:
            box: (4,) float, XYXY pixels of the image.
            state: of `set_image`.
            label: 1 for an instance of the concept, 0 for something else.

        Raises:
            ValueError: the box lies outside, or the model's file held no encoder of examples.
        """
        self.require("geometry", "example boxes")
        _check_state(state)
        label = _label(label)
        x0, y0, x1, y1 = _box(box, state.size)
        (height, width), middle = state.size, ((x0 + x1) / 2, (y0 + y1) / 2)
        state.examples.append(([middle[0] / width, middle[1] / height, (x1 - x0) / width, (y1 - y0) / height], label))
        return self.find(state)

    def add_point(self, point: tuple[float, float], state: ImageState, *, label: int = 1) -> Masks:
        """One more click on an object (label 1) or beside it (0), XY pixels; answers with the object's masks."""
        _check_state(state)
        label = _label(label)
        if np.shape(point) != (2,):
            raise ValueError(f"A point is X and Y, in pixels of the image; got {point!r}.")
        x, y = map(float, point)
        height, width = state.size
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"The point ({x:g}, {y:g}) lies outside the image of {width} x {height} pixels.")
        state.points.append(([x, y], label))
        return self._clicked(state)

    def add_box(self, box: np.ndarray, state: ImageState) -> Masks:
        """The box of an object, XYXY pixels, in place of an earlier one; answers with the object's masks."""
        _check_state(state)
        state.box = _box(box, state.size)
        return self._clicked(state)

    def reset_prompts(self, state: ImageState) -> None:
        """Forgets phrase, examples, points and box; the image stays encoded."""
        state.phrase, state.examples, state.points, state.box = None, [], [], None

    @torch.inference_mode()
    def find(self, state: ImageState) -> Concepts:
        """All instances of what phrase and examples describe; without a phrase, SAM3's word is "visual".

        Raises:
            ValueError: neither phrase nor example was given.
        """
        if state.phrase is None and not state.examples:
            raise ValueError("A concept needs a phrase or an example box, neither was given.")
        out = self.outputs(state)
        presence = out.presence_logits[0].float().sigmoid().item()
        matches = out.pred_logits[0].float().sigmoid()  # (Q,)
        kept = torch.nonzero(matches * presence > self.confidence_threshold)[:, 0]
        kept = kept[matches[kept].argsort(descending=True)]
        height, width = state.size
        scale = torch.tensor([width, height, width, height], device=matches.device)
        probabilities = enlarged(out.pred_masks[0, kept].float(), state.size).sigmoid()
        return Concepts(
            masks=(probabilities > 0.5).cpu().numpy(),
            boxes=(out.pred_boxes[0, kept].float() * scale).cpu().numpy(),
            scores=(matches[kept] * presence).cpu().numpy(),
            matches=matches[kept].cpu().numpy(),
            presence=presence,
            probabilities=probabilities.cpu().numpy(),
        )

    @torch.inference_mode()
    def outputs(self, state: ImageState):
        """The detector's raw output for phrase and examples: transformers' `Sam3ImageSegmentationOutput`.

        SAM3's code always adds one token of the geometry encoder to a phrase, examples or not; transformers leaves it
        out when there is no box. A box marked as filling brings it back.
        """
        text, mask = self.text(state.phrase or "visual")
        boxes = {}
        if "geometry" not in self.model.report.absent:
            examples = state.examples or [([0.0] * 4, -10)]
            boxes["input_boxes"] = torch.tensor([[b for b, _ in examples]], device=mask.device, dtype=self.model.dtype)
            boxes["input_boxes_labels"] = torch.tensor([[label for _, label in examples]], device=mask.device)
        return self.model.detector_model(vision_embeds=state.features, text_embeds=text, attention_mask=mask, **boxes)

    @torch.inference_mode()
    def predict(
        self,
        state: ImageState,
        *,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
    ) -> Masks:
        """Masks of one object, by SAM's interface.

        Args:
            state: of `set_image`.
            point_coords: (P, 2) float, XY pixels of the image.
            point_labels: (P,) int, 1 for the object, 0 for not the object.
            box: (4,) float, XYXY pixels of the image.
            mask_input: (1, 4h, 4w) float, `low_res` of an earlier answer.
            multimask_output: three masks, or one.

        Raises:
            ValueError: no prompt, one of another shape, or a model whose file held no tracker.
        """
        self.require("tracker", "points and boxes")
        _check_state(state)
        if point_coords is None and box is None and mask_input is None:
            raise ValueError("A prompt needs points, a box or a mask, none was given.")
        tracker, features = self.model.tracker_model, self._tracked(state)
        sparse, dense = tracker.prompt_encoder(
            **self._clicks(state, point_coords, point_labels, box), input_masks=self._mask_input(mask_input)
        )
        code = tracker.get_image_wide_positional_embeddings()
        low_res, iou, _, present = tracker.mask_decoder(
            image_embeddings=features[-1],
            image_positional_embeddings=code,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            high_resolution_features=features[:-1],
        )
        logits = enlarged(low_res[0, 0].float(), state.size)
        masks = (logits > 0).cpu().numpy()
        return Masks(
            masks=masks,
            scores=iou[0, 0].float().cpu().numpy(),
            boxes=np.stack([mask_box(mask) for mask in masks]),
            presence=present.float().sigmoid().item(),
            logits=logits.cpu().numpy(),
            low_res=low_res[0, 0].float().cpu().numpy(),
        )

    def _clicked(self, state: ImageState) -> Masks:
        points = np.array([p for p, _ in state.points]) if state.points else None
        labels = np.array([label for _, label in state.points]) if state.points else None
        several = len(state.points) == 1 and state.box is None  # one click is ambiguous, more are not
        box = None if state.box is None else np.array(state.box)
        return self.predict(state, point_coords=points, point_labels=labels, box=box, multimask_output=several)

    def _clicks(self, state: ImageState, points, labels, box) -> dict[str, Tensor | None]:
        """Prompts in the model's frame; a box comes as two corners before the points, as SAM 2 has it."""
        height, width = state.size
        scale = torch.tensor([self.image_size / width, self.image_size / height])
        coords, codes = [], []
        if box is not None:
            coords.append(torch.tensor(_box(box, state.size)).view(2, 2))
            codes.append(torch.tensor([2, 3]))
        if points is not None:
            if labels is None:
                raise ValueError("Points need labels, 1 for the object and 0 for not the object; none were given.")
            points, labels = torch.as_tensor(points, dtype=torch.float32), torch.as_tensor(labels)
            if points.ndim != 2 or points.shape[1] != 2 or labels.shape != points.shape[:1]:
                raise ValueError(
                    f"Points must be (P, 2) and labels (P,), got {tuple(points.shape)} and {tuple(labels.shape)}."
                )
            if not points.isfinite().all():
                raise ValueError(f"Points must be finite numbers, got {points.tolist()}.")
            if not np.isin(labels, (-1, 0, 1)).all():
                raise ValueError(f"Labels are 1 (object), 0 (not the object) or -1 (no point), got {labels.tolist()}.")
            coords.append(points)
            codes.append(labels.long())
        if not coords:
            return {"input_points": None, "input_labels": None, "input_boxes": None}
        device = self.model.device
        return {
            "input_points": (torch.cat(coords) * scale)[None, None].to(device, self.model.dtype),
            "input_labels": torch.cat(codes)[None, None].to(device),
            "input_boxes": None,
        }

    def _mask_input(self, mask: np.ndarray | None) -> Tensor | None:
        if mask is None:
            return None
        side = self.model.tracker_model.prompt_encoder.mask_input_size[0]
        logits = torch.as_tensor(np.asarray(mask), dtype=self.model.dtype, device=self.model.device)
        if logits.shape != (1, side, side):
            raise ValueError(f"mask_input must have shape (1, {side}, {side}), got {tuple(logits.shape)}.")
        return logits[None]

    def _tracked(self, state: ImageState) -> list[Tensor]:
        """The tracker's view of the image: its own neck's maps, coarse last, `no_memory_embedding` added."""
        if state.tracked is None:
            maps, _ = self.model.get_vision_features_for_tracker(state.features)
            sides = [4, 2, 1]
            grid = self.model.tracker_model.prompt_encoder.image_embedding_size
            maps[-1] = maps[-1] + self.model.tracker_model.no_memory_embedding
            state.tracked = [
                x.permute(1, 2, 0).view(1, -1, n * grid[0], n * grid[1]) for x, n in zip(maps, sides, strict=True)
            ]
        return state.tracked

    def text(self, phrase: str) -> tuple[object, Tensor]:
        """Features of a phrase and its mask, kept. The students see the filling, as in the code they were trained by;
        the detector does not."""
        if phrase not in self._phrases:
            ids, mask = (x.to(self.model.device) for x in tokenize([phrase], self.context))
            students = self.model.config.study["text"] != "SAM3"
            detector = self.model.detector_model
            self._phrases[phrase] = detector.get_text_features(ids, attention_mask=None if students else mask), mask
        return self._phrases[phrase]

    def require(self, part: str, what: str) -> None:
        if part in self.model.report.absent:
            raise ValueError(f"{self.model.report.source} held no {part}, so this model takes no {what}.")


def rgb(image: np.ndarray | Image.Image) -> np.ndarray:
    """An image as (H, W, 3) uint8.

    Raises:
        ValueError: it is none.
    """
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim == 0:
        raise ValueError(f"An image must be (H, W, 3) uint8 RGB or a PIL image, got {image!r}; read a file first.")
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"An image must be (H, W, 3) uint8 RGB, got {array.shape} {array.dtype}.")
    return array


def pixels(image: np.ndarray, side: int) -> Tensor:
    """SAM3's frame: stretched to a square, values -1 to 1.

    Args:
        image: (H, W, 3) uint8 RGB.
        side: of the square, pixels.

    Returns:
        (3, side, side) float32.
    """
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(tensor, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].round().clamp(0, 255) / 127.5 - 1


def enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) -> (N, H, W)."""
    if not len(logits):
        return logits.new_zeros(0, *size)
    return F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _check_state(state) -> None:
    if not isinstance(state, ImageState):
        raise ValueError(f"The state must be what set_image returned, got {type(state).__name__}.")


def _label(label) -> int:
    if label not in (0, 1):
        raise ValueError(f"A label is 1 (the object) or 0 (not the object), got {label!r}.")
    return int(label)


def _box(box, size: tuple[int, int]) -> list[float]:
    values, (height, width) = np.asarray(box).reshape(-1), size
    if values.shape != (4,) or values.dtype.kind not in "iuf":
        raise ValueError(f"A box is XYXY, 4 numbers; got shape {np.shape(box)} {values.dtype}.")
    x0, y0, x1, y1 = values.tolist()
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"The box {values.tolist()} is no XYXY box inside the image of {width} x {height} pixels.")
    return [x0, y0, x1, y1]
