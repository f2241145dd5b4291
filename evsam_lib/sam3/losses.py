"""Which query answers for which instance, and what stage 3 minimises (facts of SAM3's and EfficientSAM3's recipes).

Matching is one to one (Hungarian) at the decoder's last layer. One to many, the help SAM3 gives its training by a
second set of answers that its released model lacks, goes to the layers before it: they may answer several times, the
last one learns to choose. Classes are learnt only on phrases that name something in the image; that they do is the
presence token's to learn. So a query's score is "if it is here at all, this is one". Notebook 19.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evsam_lib.sam3.detect import Found
from evsam_lib.training.losses import dice_loss, focal_loss

__all__ = ["Targets", "Weights", "centred", "concept_losses", "giou", "match_many", "match_one", "paired_iou", "xyxy"]

COST = {"class": 2.0, "box": 5.0, "giou": 2.0}  # SAM3's matcher
MANY = {"alpha": 0.3, "threshold": 0.4, "most": 4}  # its one-to-many matcher
ALPHA, GAMMA, POSITIVE = 0.25, 2.0, 10.0  # of its class loss: share of confidence in the target, focus, weight


@dataclass(frozen=True)
class Weights:
    """Weights of the losses; defaults are EfficientSAM3's stage 3 (its released recipe)."""

    box: float = 5.0
    giou: float = 2.0
    klass: float = 20.0
    presence: float = 20.0
    mask: float = 200.0
    dice: float = 10.0
    many: float = 2.0


@dataclass
class Targets:
    """Instances of P phrases, at most M each.

    Attributes:
        boxes: (P, M, 4) centre, width and height, parts of the image.
        masks: (P, M, 4h, 4w) covered part of each pixel.
        exists: (P, M) bool, which of them there are.
    """

    boxes: Tensor
    masks: Tensor
    exists: Tensor


def xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre, width, height -> corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def centred(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> centre, width, height."""
    start, end = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(start + end) / 2, end - start], -1)


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of corner boxes and the area of their union, broadcast over the leading axes of (..., 4)."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return shared / union.clamp(min=1e-9), union


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019): the IoU less the empty part of the smallest box around both."""
    iou, union = paired_iou(a, b)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return iou - (hull - union) / hull.clamp(min=1e-9)


@torch.no_grad()
def match_one(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """One query for each instance, all together cheapest.

    Args:
        logits: (P, Q).
        boxes: (P, Q, 4) centre, width, height.
        targets: of the phrases.

    Returns:
        Phrase, query and instance of each pair, (K,) int64 each.
    """
    probability = logits.float().sigmoid()
    hit = ALPHA * (1 - probability) ** GAMMA * -(probability + 1e-8).log()
    miss = (1 - ALPHA) * probability**GAMMA * -(1 - probability + 1e-8).log()
    distance = (boxes[:, :, None] - targets.boxes[:, None]).abs().sum(-1)  # (P, Q, M)
    overlap = giou(xyxy(boxes)[:, :, None], xyxy(targets.boxes)[:, None])
    cost = COST["class"] * (hit - miss)[..., None] + COST["box"] * distance - COST["giou"] * overlap
    cost, counts = cost.float().cpu().numpy(), targets.exists.sum(1).tolist()
    pairs = [(p, *linear_sum_assignment(cost[p][:, :count])) for p, count in enumerate(counts) if count]
    return _joined(pairs, logits.device)


@torch.no_grad()
def match_many(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Up to four queries for each instance, by confidence and IoU together, and at least the best one.

    Arguments and returns are those of `match_one`.
    """
    iou, _ = paired_iou(xyxy(boxes)[:, :, None], xyxy(targets.boxes)[:, None])  # (P, Q, M)
    quality = logits.float().sigmoid()[..., None] ** MANY["alpha"] * iou ** (1 - MANY["alpha"])
    quality = quality * targets.exists[:, None]
    owner = quality.argmax(2, keepdim=True)  # a query answers for one instance only
    quality = torch.zeros_like(quality).scatter(2, owner, quality.gather(2, owner))
    best = quality.topk(min(MANY["most"], quality.shape[1]), dim=1).values[:, -1:]
    chosen = (quality >= torch.maximum(best, torch.tensor(MANY["threshold"]))) | (quality == quality.amax(1, True))
    phrase, query, instance = (chosen & (quality > 0)).nonzero().unbind(1)
    return phrase, query, instance


def concept_losses(found: Found, targets: Targets, weights: Weights) -> dict[str, Tensor]:
    """The loss of stage 3 and its parts, each before its weight, of the last layer.

    Args:
        found: of `detect`.
        targets: of the same phrases.
        weights: of the parts.

    Returns:
        () tensors: "loss", "box", "giou", "klass", "presence", "mask", "dice".
    """
    present = targets.exists.any(1)
    total, layers = found.logits.new_zeros(()), len(found.logits)
    for layer in range(layers):
        last = layer == layers - 1
        logits, boxes = found.logits[layer].float(), found.boxes[layer].float()
        pairs = (match_one if last else match_many)(logits, boxes, targets)
        parts = _box_losses(boxes, targets, pairs) | {"klass": _class_loss(logits, boxes, targets, pairs, present)}
        share = 1.0 if last else weights.many
        total = total + share * (
            weights.box * parts["box"] + weights.giou * parts["giou"] + weights.klass * parts["klass"]
        )
        presence = F.binary_cross_entropy_with_logits(found.presence[layer].float(), present.float())
        total = total + weights.presence * presence
        if last:
            parts |= {"presence": presence, **_mask_losses(found, targets, pairs)}
            total = total + weights.mask * parts["mask"] + weights.dice * parts["dice"]
            return {"loss": total} | parts
    raise ValueError("A loss needs the answers of at least one layer, got none.")


def _box_losses(boxes: Tensor, targets: Targets, pairs) -> dict[str, Tensor]:
    phrase, query, instance = pairs
    given, wanted = boxes[phrase, query], targets.boxes[phrase, instance]
    count = max(len(phrase), 1)
    return {
        "box": (given - wanted).abs().sum() / count,
        "giou": (1 - giou(xyxy(given), xyxy(wanted))).sum() / count,
    }


def _class_loss(logits: Tensor, boxes: Tensor, targets: Targets, pairs, present: Tensor) -> Tensor:
    """Matched queries aim at how good they are, the others at 0, softly where they are nearly there."""
    phrase, query, instance = pairs
    probability = logits.detach().sigmoid()
    iou, _ = paired_iou(xyxy(boxes.detach()[phrase, query]), xyxy(targets.boxes[phrase, instance]))
    aim = (probability[phrase, query] ** ALPHA * iou ** (1 - ALPHA)).clamp(min=0.01)
    wanted, matched = torch.zeros_like(logits), torch.zeros_like(logits)
    wanted[phrase, query], matched[phrase, query] = aim, 1.0
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    weight = POSITIVE * matched + (1 - matched) * logits.sigmoid() ** GAMMA
    return (entropy * weight * present[:, None]).mean()


def _mask_losses(found: Found, targets: Targets, pairs) -> dict[str, Tensor]:
    """Of matched queries whose masks were decoded."""
    phrase, query, instance = pairs
    row = torch.full((len(targets.exists),), -1, device=phrase.device)
    row[found.masked] = torch.arange(len(found.masked), device=phrase.device)
    kept = row[phrase] >= 0
    if not kept.any():
        nothing = found.masks.sum() * 0
        return {"mask": nothing, "dice": nothing}
    logits = found.masks[row[phrase[kept]], query[kept]].float().flatten(1)
    wanted = targets.masks[phrase[kept], instance[kept]].flatten(1)
    return {"mask": focal_loss(logits, wanted).mean(), "dice": dice_loss(logits, wanted).mean()}


def _joined(pairs: list, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    phrase = [p for p, query, _ in pairs for _ in query]
    query = [q for _, rows, _ in pairs for q in rows]
    instance = [m for _, _, columns in pairs for m in columns]
    first, second, third = (torch.tensor(x, dtype=torch.long, device=device) for x in (phrase, query, instance))
    return first, second, third
