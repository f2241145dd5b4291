"""Losses of end-to-end training: focal or sampled cross entropy plus dice, and the lowest of K masks.

Paper: Sec. 3.2, "End-to-End Training" (focal : dice = 20 : 1, only the lowest of three losses is back-propagated).
Explained in notebook 05. The paper's text and the authors' code disagree, so `mask_loss` has two recipes:

* ``paper``: sigmoid focal loss and dice over every pixel. The text names neither the focal parameters nor the
  reduction; chosen here: gamma 2 and alpha 0.25 (the focal-loss paper's and SAM's defaults) and the mean over pixels,
  which keeps the ratio 20 : 1 independent of the resolution.
* ``official``: plain binary cross entropy and dice on 112 x 112 points per mask, most of them where the logit is
  nearest to 0.

In both, the zero padding of a non-square image counts as background, and all K masks of a prompt compete for one
target.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = [
    "RECIPES",
    "MaskLoss",
    "dice_loss",
    "focal_loss",
    "iou_loss",
    "mask_iou",
    "mask_loss",
    "point_sampled_loss",
    "uncertain_points",
]

RECIPES = ("paper", "official")
PIXEL_WEIGHT = 20.0  # Sec. 3.2: focal : dice = 20 : 1; the official trainer weighs its cross entropy the same
POINTS = 112 * 112  # official samcore/trainer/utils.py, as are the two shares below
OVERSAMPLE = 3.0
UNCERTAIN_SHARE = 0.75


class MaskLoss(NamedTuple):
    """Losses of one set of prompts.

    Attributes:
        total: () float32, mean over prompts of the lowest weighted loss; the only part that carries a gradient.
        pixel: () float32, focal loss (paper) or sampled cross entropy (official) of the winning masks, unweighted.
        dice: () float32, dice loss of the winning masks.
        best: (N,) int64, index of the winning mask of each prompt.
    """

    total: torch.Tensor
    pixel: torch.Tensor
    dice: torch.Tensor
    best: torch.Tensor


def focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, gamma: float = 2.0, alpha: float | None = 0.25
) -> torch.Tensor:
    """Mean sigmoid focal loss over the last axis.

    Args:
        logits: (..., P) float, before the sigmoid.
        targets: (..., P) float in [0, 1], broadcastable to `logits`; soft edges are allowed.
        gamma: how strongly easy pixels are down-weighted; 0 gives (weighted) binary cross entropy.
        alpha: weight of the foreground, 1 - alpha that of the background; None for no weighting.

    Returns:
        (...) float, one loss per mask; 0 where P is 0.
    """
    targets = targets.expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    # A soft target t mixes the two classes, so its "wrongness" is p + t - 2pt: 1 - p at t = 1, p at t = 0.
    wrongness = probability + targets - 2 * probability * targets
    loss = cross_entropy * wrongness**gamma
    if alpha is not None:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return _mean(loss)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, *, smooth: float = 1.0) -> torch.Tensor:
    """Dice loss over the last axis: 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth).

    Args:
        logits: (..., P) float, before the sigmoid.
        targets: (..., P) float in [0, 1], broadcastable to `logits`.
        smooth: keeps empty masks finite; 1 in the official code, and used for both recipes.

    Returns:
        (...) float, one loss per mask; 0 for an empty target predicted as empty.
    """
    probability = logits.sigmoid()
    overlap = 2 * (probability * targets).sum(-1)
    return 1 - (overlap + smooth) / (probability.sum(-1) + targets.sum(-1) + smooth)


def uncertain_points(logits: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw 12,544 points per mask: 75 % the most uncertain of a threefold uniform draw, 25 % uniform.

    Args:
        logits: (N, 1, H, W) float.
        generator: source of the draws; None is torch's global one on the logits' device.

    Returns:
        (N, 12544, 2) float32, XY in [0, 1] of the mask's width and height.
    """
    masks, device = len(logits), logits.device
    uncertain = int(UNCERTAIN_SHARE * POINTS)
    candidates = _uniform((masks, int(OVERSAMPLE * POINTS), 2), device, generator)
    margin = _sample_at(logits, candidates).abs()  # (N, 37632); 0 is the decision boundary
    nearest = torch.topk(-margin, k=uncertain, dim=1).indices  # (N, 9408)
    chosen = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, _uniform((masks, POINTS - uncertain, 2), device, generator)], dim=1)


def point_sampled_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and dice on uncertain points, as the official trainer computes them.

    Args:
        logits: (N, 1, H, W) float.
        targets: (N, 1, H', W') float in [0, 1]; read bilinearly at the same relative points.
        generator: source of the draws; None is torch's global one on the logits' device.

    Returns:
        Binary cross entropy (N,) and dice loss (N,), each a mean over the points of one mask.
    """
    with torch.no_grad():
        points = uncertain_points(logits, generator=generator)
        labels = _sample_at(targets, points)  # (N, 12544)
    values = _sample_at(logits, points)  # (N, 12544)
    cross_entropy = F.binary_cross_entropy_with_logits(values, labels, reduction="none").mean(1)
    return cross_entropy, dice_loss(values, labels)


def mask_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, recipe: str, generator: torch.Generator | None = None
) -> MaskLoss:
    """20 x pixel loss + 1 x dice per mask, the lowest of the K masks per prompt, mean over prompts.

    Logits are brought to the targets' resolution (bilinear), so the caller chooses where masks are compared: the
    official code uses the encoder's input size; targets at the decoder's own resolution need no upsampling and are
    much cheaper.

    Args:
        logits: (N, K, h, w) float, low-res logits of K candidate masks per prompt.
        targets: (N, H, W) float in [0, 1], one soft target per prompt.
        recipe: "paper" or "official", see the module's text.
        generator: source of the official recipe's points, drawn anew for each of the K masks.

    Returns:
        A `MaskLoss` in float32. Without prompts (N = 0) it is 0 and can still be back-propagated.

    Raises:
        ValueError: unknown recipe, or shapes that do not fit together.
    """
    _check(logits, targets, recipe)
    logits, targets = logits.float(), targets.float()
    if len(logits) == 0:
        nothing = logits.sum() * 0
        return MaskLoss(nothing, nothing.detach(), nothing.detach(), logits.new_zeros(0, dtype=torch.int64))
    if recipe == "official":
        parts = [_official_parts(logits[:, k : k + 1], targets[:, None], generator) for k in range(logits.shape[1])]
        pixel, dice = (torch.stack(part, dim=1) for part in zip(*parts, strict=True))  # (N, K) each
    else:
        logits = _resized(logits, targets.shape[-2:]).flatten(2)  # (N, K, H*W)
        flat = targets.flatten(1)[:, None]  # (N, 1, H*W)
        pixel, dice = focal_loss(logits, flat), dice_loss(logits, flat)
    weighted = PIXEL_WEIGHT * pixel + dice  # (N, K)
    best = weighted.detach().argmin(dim=1)  # (N,)
    won = best[:, None]
    return MaskLoss(
        total=weighted.gather(1, won).mean(),
        pixel=pixel.detach().gather(1, won).mean(),
        dice=dice.detach().gather(1, won).mean(),
        best=best,
    )


def mask_iou(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of every predicted mask with its prompt's target.

    Args:
        logits: (N, K, h, w) float, brought to the targets' size; a pixel is foreground where the logit is above 0.
        targets: (N, H, W) float in [0, 1]; a pixel is foreground where the target is above 0.5.

    Returns:
        (N, K) float32 in [0, 1], without gradient. Two empty masks count as 1.
    """
    if len(logits) == 0:
        return logits.new_zeros(logits.shape[:2], dtype=torch.float32)
    with torch.no_grad():
        masks = (_resized(logits.float(), targets.shape[-2:]) > 0).flatten(2)  # (N, K, H*W)
        truth = (targets > 0.5).flatten(1)[:, None]  # (N, 1, H*W)
        union = (masks | truth).sum(-1)
        return torch.where(union > 0, (masks & truth).sum(-1) / union.clamp(min=1), 1.0)


def iou_loss(predicted: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Mean squared error between the predicted and the actual IoU of every mask.

    Neither the paper nor the official trainer supervises the IoU head (a distilled student inherits SAM's), so
    training weighs this term 0 unless asked. A decoder trained from random weights needs it, since evaluation picks
    the mask of highest predicted IoU; SAM uses weight 1. All K predictions are supervised, not only the winner's:
    their ranking is what is used.

    Args:
        predicted: (N, K) float, the decoder's IoU predictions.
        actual: (N, K) float, from `mask_iou`.

    Returns:
        () float32; 0 that can be back-propagated if N is 0.
    """
    if len(predicted) == 0:
        return predicted.float().sum() * 0
    return F.mse_loss(predicted.float(), actual)


def _sample_at(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Read maps bilinearly at relative points; outside counts as 0.

    So values fade to 0 within half a pixel of the border, which makes border points look uncertain; kept because the
    official loss has it.

    Args:
        maps: (N, 1, H, W) float.
        points: (N, P, 2) float, XY in [0, 1].

    Returns:
        (N, P) float.
    """
    return F.grid_sample(maps, 2.0 * points[:, :, None] - 1.0, align_corners=False)[:, 0, :, 0]


def _official_parts(
    logits: torch.Tensor, targets: torch.Tensor, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Official loss of one of the K masks: upsample (N, 1, h, w) to the targets' (N, 1, H, W), then draw points."""
    return point_sampled_loss(_resized(logits, targets.shape[-2:]), targets, generator=generator)


def _resized(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """Uniform draws on the generator's own device, moved where they are needed."""
    where = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=where).to(device)


def _mean(loss: torch.Tensor) -> torch.Tensor:
    return loss.mean(-1) if loss.shape[-1] else loss.sum(-1)


def _check(logits: torch.Tensor, targets: torch.Tensor, recipe: str) -> None:
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    if logits.ndim != 4 or targets.ndim != 3 or len(logits) != len(targets):
        raise ValueError(
            "expected logits (N, K, h, w) and targets (N, H, W) of equal N, "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
