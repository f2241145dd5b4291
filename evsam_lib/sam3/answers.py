"""What a model answers to phrases on images, kept in a form that any threshold and any presence can be scored on.

The score of an instance is match times presence. To see which of them fails, answers are computed once, with all
queries, and cut afterwards: at another threshold, without presence, or with a recalibrated one. Notebook 19.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evsam_lib.data.saco import ConceptImage
from evsam_lib.evaluate.cgf1 import ConceptScores, PairCounts, count_pair, mask_ious, scores
from evsam_lib.sam3.detect import detect, phrase_features
from evsam_lib.sam3.processor import enlarged, pixels, rgb

__all__ = ["Answer", "Calibration", "answers", "calibrate", "kept", "score"]

FAINT = 0.01  # queries whose match is lower are not kept: no threshold anybody uses lets them through


@dataclass(frozen=True)
class Answer:
    """One phrase on one image.

    Attributes:
        pair_id: of image and phrase.
        text: the phrase.
        matches: (N,) float, of the queries above `FAINT`, best first.
        presence: logit.
        ious: (N, M) of their masks with the true instances.
        areas: (M,) of the true instances, pixels.
        size: (H, W) of the image.
    """

    pair_id: int
    text: str
    matches: np.ndarray
    presence: float
    ious: np.ndarray
    areas: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True)
class Calibration:
    """A straight line for the presence logit: `scale * logit + shift`. (0, inf) drops presence."""

    scale: float = 1.0
    shift: float = 0.0

    def probability(self, logit: float | np.ndarray) -> np.ndarray:
        """Of the concept being in the image."""
        return 1 / (1 + np.exp(-np.clip(self.scale * np.asarray(logit) + self.shift, -60, 60)))


AS_TRAINED = Calibration()
WITHOUT = Calibration(0.0, np.inf)  # the workaround that users of students pass on to each other


@torch.inference_mode()
def answers(model, images: Iterable[ConceptImage], *, phrases: Sequence[str] | None = None) -> list[Answer]:
    """Asks a model all phrases of all images.

    Args:
        model: of `load_sam3`.
        images: with their phrases and instances.
        phrases: ask only these; None for all.

    Raises:
        ValueError: a phrase that is empty or too long for the model.
    """
    found = []
    for image in images:
        asked = [phrase for phrase in image.phrases if phrases is None or phrase.text in phrases]
        if asked:
            found += _asked(model, image, asked)
    return found


def kept(answer: Answer, *, threshold: float = 0.5, calibration: Calibration = AS_TRAINED) -> np.ndarray:
    """(N,) bool, which queries are instances."""
    return answer.matches * calibration.probability(answer.presence) >= threshold


def score(found: Sequence[Answer], *, threshold: float = 0.5, calibration: Calibration = AS_TRAINED) -> ConceptScores:
    """cgF1 and its parts.

    Args:
        found: of `answers`.
        threshold: least score of an instance, 0.5 in SAM3's evaluation.
        calibration: of presence; `WITHOUT` scores by the match alone.
    """
    return scores(_counts(answer, kept(answer, threshold=threshold, calibration=calibration)) for answer in found)


def calibrate(found: Sequence[Answer], *, steps: int = 50) -> Calibration:
    """The line for presence that fits held-out answers best: logistic regression of "there are instances" (Newton).

    Args:
        found: of `answers`, on images that nothing is reported on.
        steps: of Newton's method, at most.

    Raises:
        ValueError: all pairs are positive, or all negative.
    """
    x, y = np.array([a.presence for a in found]), np.array([a.ious.shape[1] > 0 for a in found], float)
    if y.min() == y.max():
        raise ValueError("A calibration needs positive and negative pairs, these are all of one kind.")
    design, line = np.stack([x, np.ones_like(x)], 1), np.array([1.0, 0.0])
    for _ in range(steps):
        p = Calibration(*line).probability(x)
        slope = design.T @ (y - p) - 1e-3 * line  # a touch of shrinkage: separable pairs have no best line
        curve = (design * (p * (1 - p))[:, None]).T @ design + 1e-3 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        line = line + step * min(1.0, 4 / np.abs(step).max())
        if np.abs(step).max() < 1e-6:
            break
    return Calibration(*line.tolist())


def _asked(model, image: ConceptImage, asked: list) -> list[Answer]:
    array = rgb(image.image)
    frame = pixels(array, model.config.image_size)[None].to(device=model.device, dtype=model.dtype)
    vision = model.detector_model.vision_encoder(frame)
    text, mask = phrase_features(model, [phrase.text for phrase in asked])
    image_of = torch.zeros(len(asked), dtype=torch.long, device=text.device)
    found = detect(model, vision, image_of, text, mask)
    matches, size = found.logits[-1].float().sigmoid(), array.shape[:2]
    made = []
    for row, phrase in enumerate(asked):
        order = matches[row].argsort(descending=True)
        order = order[matches[row][order] > FAINT]
        masks = (enlarged(found.masks[row, order].float(), size) > 0).cpu().numpy()
        ious, areas = mask_ious(masks, phrase.masks), phrase.masks.sum((1, 2))
        presence = found.presence[-1, row].item()
        made.append(Answer(phrase.pair_id, phrase.text, matches[row][order].cpu().numpy(), presence, ious, areas, size))
    return made


def _counts(answer: Answer, chosen: np.ndarray) -> PairCounts:
    return count_pair(answer.ious[chosen])
