"""Lets timm import beside a CPU build of torch. Not part of the paper; notebook 00_start_here reports what was found.

The torchvision wheels of most package indexes are built for CUDA. Beside a CPU build of torch their compiled part
cannot load; torchvision goes on without it and then stops at `operator torchvision::nms does not exist`, and so does
every package that imports it, timm among them. What is missing at import are two operator declarations. This module
supplies them, with an implementation of `nms` in torch. `torchvision.ops.nms`, `batched_nms` and all transforms and
models then work; `torchvision.io` and `ops.deform_conv2d` do not.

Only the models that stand on timm need this: the study's own models, prediction and evaluation use neither package.
"""

import importlib.util
import sys
from pathlib import Path

import torch

__all__ = ["ensure_torchvision"]

# torch unregisters a library's operators when the object is collected, so it must outlive the call.
_LIBRARIES: list[torch.library.Library] = []


def ensure_torchvision() -> bool:
    """Makes `import torchvision` work where its compiled operators cannot load. Call it before timm is first imported.

    Does nothing where torchvision is absent or already imported, where torch has CUDA or ROCm, and where torchvision
    was itself built for the CPU. Calling it again is harmless.

    Returns:
        True if the operators were declared by this call, False if there was nothing to do.
    """
    if not _operators_missing():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):  # the two that torchvision describes to torch while it is imported
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    _LIBRARIES.append(library)

    import torchvision

    _open_gate(torchvision)
    _pool_by_products()
    return True


def _operators_missing() -> bool:
    if "torchvision" in sys.modules or torch.version.cuda or torch.version.hip:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    # Read, not imported: importing is what fails. A wheel built for the CPU brings operators that can be loaded.
    version_file = Path(spec.origin).with_name("version.py")
    return version_file.is_file() and "+cu" in version_file.read_text()


def _open_gate(torchvision) -> None:
    """Lets torchvision's Python functions run: each of them first asks whether the compiled operators are there."""
    gate = torchvision.extension._assert_has_ops
    for name, module in list(sys.modules.items()):
        if name.startswith("torchvision.") and getattr(module, "_assert_has_ops", None) is gate:
            module._assert_has_ops = lambda: None


def _pool_by_products() -> None:
    """Without its operators torchvision pools boxes (SAM3's examples) by a Python function that takes the samples of
    every cell for every box, and compiles itself on first use. `_roi_align` does as well, in a thousandth of the
    time."""
    sys.modules["torchvision.ops.roi_align"]._roi_align = _roi_align


def _roi_align(
    features: torch.Tensor,
    boxes: torch.Tensor,
    spatial_scale: float,
    rows: int,
    columns: int,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """RoIAlign (Mask R-CNN, Section 3) with torchvision's rules, as two matrix products a box: a bin is the mean over
    a grid of bilinear samples, and both the mean and the samples separate into rows and columns.

    Args:
        features: (B, C, H, W).
        boxes: (K, 5) float, number of the map and XYXY.
        spatial_scale: cells per unit of the boxes.
        rows: of the answer.
        columns: of the answer.
        sampling_ratio: samples a bin and axis; 0 or less takes as many as the bin has cells.
        aligned: the middle of the first cell is at 0.

    Returns:
        (K, C, rows, columns).
    """
    edges = boxes[:, 1:].to(features.dtype) * spatial_scale - (0.5 if aligned else 0.0)  # (K, 4)
    of_rows = _bin_weights(edges[:, 1], edges[:, 3], rows, features.shape[2], sampling_ratio, aligned)
    of_columns = _bin_weights(edges[:, 0], edges[:, 2], columns, features.shape[3], sampling_ratio, aligned)
    maps = features[boxes[:, 0].long()]  # (K, C, H, W)
    return of_rows[:, None] @ maps @ of_columns[:, None].mT


def _bin_weights(
    start: torch.Tensor, end: torch.Tensor, bins: int, cells: int, sampling_ratio: int, aligned: bool
) -> torch.Tensor:
    """(K, bins, cells): what every cell of an axis contributes to every bin of K intervals."""
    length = end - start
    length = length if aligned else length.clamp(min=1)
    size = length / bins
    count = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else size.ceil().clamp(min=0)  # (K,)
    steps = torch.arange(max(int(count.max().item()) if len(count) else 0, 1), device=size.device)  # (S,)
    offset = (steps + 0.5) / count.clamp(min=1)[:, None]  # (K, S), in bins
    at = (
        start[:, None, None] + (torch.arange(bins, device=size.device)[:, None] + offset[:, None]) * size[:, None, None]
    )
    used = (steps < count[:, None])[:, None] & (at >= -1) & (at <= cells)  # (K, bins, S); beyond the map is nothing
    at = at.clamp(0, cells - 1)[..., None]  # (K, bins, S, 1)
    weights = (1 - (at - torch.arange(cells, device=size.device)).abs()).clamp(min=0)  # (K, bins, S, cells)
    return (weights * used[..., None]).sum(2) / count.clamp(min=1)[:, None, None]


def _nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression.

    Args:
        dets: (N, 4) float, XYXY boxes.
        scores: (N,) float.
        iou_threshold: a box is dropped if it overlaps a kept one of higher score by more than this.

    Returns:
        (M,) int64, indices of the kept boxes, highest score first.
    """
    order = scores.sort(descending=True, stable=True).indices
    boxes = dets[order].float()  # (N, 4); half precision cannot hold the areas
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    dropped = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for i in range(len(boxes)):
        if dropped[i]:
            continue
        kept.append(i)
        corner = torch.minimum(boxes[i, 2:], boxes[i + 1 :, 2:])
        side = (corner - torch.maximum(boxes[i, :2], boxes[i + 1 :, :2])).clamp_(min=0)  # (rest, 2)
        shared = side[:, 0] * side[:, 1]
        dropped[i + 1 :] |= shared / (area[i] + area[i + 1 :] - shared) > iou_threshold
    return order[torch.tensor(kept, dtype=torch.long)]
