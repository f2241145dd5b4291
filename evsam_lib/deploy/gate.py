"""The accuracy gate: an engine is held to eager float32, on the same weights, before anybody is told how fast it is.

The official fp16 engine of one variant is fast and gives no mask at all, so a speed without an accuracy says nothing.
Compared are the embedding and the masks of some prompts on generated scenes. Notebook 07 prints both beside each speed.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from evsam_lib.data.generate import scene
from evsam_lib.models.sam import Promptable, Sam
from evsam_lib.predict import Predictor
from evsam_lib.prompts import mask_box

__all__ = ["BOUNDS", "Accuracy", "Gate"]

SIZES = ((240, 320), (320, 240))  # height and width of the scenes, taken in turn
PROMPTS = 3  # boxes on each, those of its largest masks

# Precision of the encoder -> largest relative error of the embedding, smallest mean IoU of the masks. Half precision
# rounds at 4e-3 (bf16) and 5e-4 (fp16) in each of up to a hundred layers; EdgeSAM at random weights errs by 5e-2 in
# bf16, and its masks have an IoU of 0.99.
BOUNDS = {"fp32": (1e-5, 0.999), "bf16": (1e-1, 0.95), "fp16": (2e-2, 0.98)}


@dataclass(frozen=True)
class Accuracy:
    """What an engine's answers are beside those of eager float32.

    Attributes:
        embedding_error: norm of the difference over the norm.
        mask_iou: mean over all masks of all prompts; 1 where both are empty.
        bad_values: NaN and infinite values among embedding and logits.
    """

    embedding_error: float
    mask_iou: float
    bad_values: int

    def failure(self, precision: str) -> str:
        """Which number is out of `BOUNDS`, in words; "" if none is."""
        most, least = BOUNDS[precision]
        if self.bad_values:
            return f"{self.bad_values} values are NaN or infinite"
        if not self.embedding_error <= most:
            return f"embedding error {self.embedding_error:.2g} is above {most:g}, the bound of {precision}"
        if not self.mask_iou >= least:
            return f"mask IoU {self.mask_iou:.4f} is below {least:g}, the bound of {precision}"
        return ""


class Gate:
    """Eager float32's answers, to hold engines to.

    Args:
        model: eager, float32.
        images: how many scenes are looked at.

    Attributes:
        seconds: that eager float32 took for a scene.

    Raises:
        ValueError: the model is in another precision.
    """

    def __init__(self, model: Sam, *, images: int = 2):
        if model.dtype != torch.float32:
            raise ValueError(f"Engines are held to a float32 model, {model.name} is in {model.dtype}.")
        self.scenes = [scene(0, index, size=SIZES[index % len(SIZES)]) for index in range(images)]
        self.model = model
        start = time.perf_counter()
        self.expected = self._answers(model)
        self.seconds = (time.perf_counter() - start) / images

    def __call__(self, model: Promptable) -> Accuracy:
        """Args: model: the same model behind an engine, see `engines.with_engine`."""
        answers = self.expected if model is self.model else self._answers(model)
        errors, ious, bad = [], [], 0
        for found, expected in zip(answers, self.expected, strict=True):
            bad += sum(int((~np.isfinite(values)).sum()) for values in found)
            errors.append(np.linalg.norm(found[0] - expected[0]) / np.linalg.norm(expected[0]))
            ours, theirs = found[1] > 0, expected[1] > 0  # (N, 3, h, w)
            both, any_of_them = (ours & theirs).sum((2, 3)), (ours | theirs).sum((2, 3))
            ious.append(np.where(any_of_them > 0, both / np.maximum(any_of_them, 1), 1.0).mean())
        return Accuracy(float(np.max(errors)), float(np.mean(ious)), bad)

    def _answers(self, model: Promptable) -> list[tuple[np.ndarray, np.ndarray]]:
        """For every scene the embedding (1, C, h, w) and the low-res logits (N, 3, 4h, 4w)."""
        predictor, answers = Predictor(model), []
        for picture in self.scenes:
            predictor.set_image(picture.image)
            largest = np.argsort(-picture.masks.sum((1, 2)), kind="stable")[:PROMPTS]
            low_res = predictor.predict_batch(boxes=np.array([mask_box(picture.masks[i]) for i in largest]))[2]
            assert predictor.features is not None  # set_image puts them there
            answers.append((predictor.features.float().cpu().numpy(), low_res))
        return answers
