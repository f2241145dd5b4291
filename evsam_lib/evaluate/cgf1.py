"""cgF1, SAM3's score of concept segmentation, and the two parts it is the product of (SAM3's paper, and its evaluator).

A pair is an image and a phrase. pmF1 asks how well instances are outlined where the phrase names something: F1 of all
instances of all positive pairs together, averaged over the IoU thresholds 0.5, 0.55 ... 0.95. MCC asks whether the
model knows that it does: Matthews' correlation, over all pairs, of "there are instances" and "something was found". A
model with fine masks and a broken presence loses by MCC alone, which is why they are shown apart. Notebook 19.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

__all__ = ["THRESHOLDS", "ConceptScores", "PairCounts", "best_of", "count_pair", "mask_ious", "scores"]

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
SMALL, TINY = 1e-4, 1e-6  # added to denominators by the official evaluator; kept, so that figures agree


@dataclass(frozen=True)
class PairCounts:
    """What became of one image and phrase.

    Attributes:
        instances: there are.
        found: instances that the model answers with.
        hits: (10,) matched pairs at each IoU threshold.
    """

    instances: int
    found: int
    hits: np.ndarray

    def f1(self) -> float:
        """Mean F1 of this pair alone; 1 where there is nothing and nothing was found."""
        if not self.instances and not self.found:
            return 1.0
        return float(_f1(self.hits, self.found, self.instances).mean())


@dataclass(frozen=True)
class ConceptScores:
    """cgF1 and its parts, in percent but `mcc`, which is -1 to 1.

    Attributes:
        cgf1: `pmf1 * mcc`.
        pmf1: F1 of masks over positive pairs.
        mcc: of presence over all pairs.
        recall: share of the positive pairs that got an answer.
        false_alarms: share of the negative pairs that got one.
        pairs: how many.
        positive: how many of them are positive.
    """

    cgf1: float
    pmf1: float
    mcc: float
    recall: float
    false_alarms: float
    pairs: int
    positive: int


def mask_ious(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU of every found (N, H, W) bool mask with every true (M, H, W) one: (N, M) float64; 0 for two empty ones."""
    a, b = (masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.float32) for masks in (found, truth))
    shared = (a @ b.T).astype(np.float64) if len(a) and len(b) else np.zeros((len(a), len(b)))
    union = a.sum(1, dtype=np.float64)[:, None] + b.sum(1, dtype=np.float64)[None] - shared
    return shared / np.maximum(union, 1)


def count_pair(ious: np.ndarray) -> PairCounts:
    """Pairs found and true instances, each at most once, for the largest sum of IoUs.

    Args:
        ious: (N, M) of what was found with what there is; either may be 0.

    Raises:
        ValueError: another shape.
    """
    if ious.ndim != 2:
        raise ValueError(f"IoUs must be (found, instances), got shape {ious.shape}.")
    best = ious[linear_sum_assignment(-ious)] if ious.size else np.zeros(0)
    return PairCounts(ious.shape[1], ious.shape[0], (best[:, None] >= THRESHOLDS).sum(0))


def best_of(readings: Sequence[PairCounts]) -> PairCounts:
    """Of one pair against several annotators' instances, the reading that suits the model best, as SA-Co Gold's three
    annotators are used; the first of equals."""
    return max(readings, key=PairCounts.f1)


def scores(pairs: Iterable[PairCounts]) -> ConceptScores:
    """Adds up pairs.

    Raises:
        ValueError: there are none.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("cgF1 needs at least one pair of image and phrase, got none.")
    positive = [pair for pair in pairs if pair.instances]
    hits = sum((pair.hits for pair in positive), np.zeros(len(THRESHOLDS), int))
    pmf1 = _f1(hits, sum(pair.found for pair in positive), sum(pair.instances for pair in positive)).mean()
    yes = sum(pair.found > 0 for pair in positive)
    alarms = sum(pair.found > 0 for pair in pairs) - yes
    missed, silent = len(positive) - yes, len(pairs) - len(positive) - alarms
    scale = float(yes + alarms) * float(yes + missed) * float(silent + alarms) * float(silent + missed)
    mcc = (yes * silent - alarms * missed) / (scale**0.5 + TINY)
    return ConceptScores(
        cgf1=float(100 * pmf1 * mcc),
        pmf1=float(100 * pmf1),
        mcc=float(mcc),
        recall=float(100 * yes / max(len(positive), 1)),
        false_alarms=float(100 * alarms / max(len(pairs) - len(positive), 1)),
        pairs=len(pairs),
        positive=len(positive),
    )


def _f1(hits: np.ndarray, found: int, instances: int) -> np.ndarray:
    precision, recall = hits / (found + SMALL), hits / (instances + SMALL)
    return 2 * precision * recall / (precision + recall + SMALL)
