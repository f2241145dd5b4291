"""Samples per second of the official way to load SA-1B against ours, and how far ours is from it.

    python -m tests.benchmarks.loader [--image-size 512] [--masks 64] [--images 3] [--repeats 5] [--threads 1]

One generated SA-1B-like folder (1500 x 2250 pixels), one run, the ways in alternation. The official way is written here
from its description: every chosen mask decoded at full size by pycocotools, image and masks to float32, mirrored,
resized by torch's antialiased bilinear filter, normalised and padded. The optimised stream is measured where litdata is
installed, in random order (`data[i]`), without prefetching.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import gaussian_filter

from evsam_lib.data import files, stream, transforms
from evsam_lib.data.sa1b import Sa1bFolder
from evsam_lib.training import samples

SIZE = (1500, 2250)


def write(root: Path, images: int, masks: int) -> Path:
    """Noise pictures with blobs of 20 to 1200 pixels as masks, as SA-1B's json has them."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for image_id in range(1, images + 1):
        coarse = rng.integers(0, 256, (SIZE[0] // 10, SIZE[1] // 10, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(root / f"sa_{image_id}.jpg")
        annotations = []
        for _ in range(masks):
            side = int(np.exp(rng.uniform(*np.log([20, 1200]))))
            blob = gaussian_filter(rng.random((side, side), dtype=np.float32), side / 8)
            top, left = rng.integers(0, SIZE[0] - side), rng.integers(0, SIZE[1] - side)
            mask = np.zeros(SIZE, np.uint8, order="F")
            mask[top : top + side, left : left + side] = blob > np.quantile(blob, 0.5)
            rle = coco_mask.encode(mask)
            counts = rle["counts"].decode()
            box = coco_mask.toBbox(rle).tolist()
            annotations.append({"segmentation": {"size": list(SIZE), "counts": counts}, "bbox": box})
        (root / f"sa_{image_id}.json").write_text(json.dumps({"annotations": annotations}))
    return root


def official(root: Path, image_id: int, size: int, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (3, S, S) and masks (M, S, S)."""
    image = torch.from_numpy(files.read_rgb(root / f"sa_{image_id}.jpg")).permute(2, 0, 1).float()
    annotations = files.read_json(root / f"sa_{image_id}.json", "annotations")["annotations"]
    masks = torch.from_numpy(np.stack([coco_mask.decode(one["segmentation"]) for one in annotations])).float()
    if flip:
        image, masks = image.flip(-1), masks.flip(-1)
    image, masks = samples.resize_and_pad(image, size), samples.resize_and_pad(masks, size)
    height, width = transforms.resized_hw(*SIZE, size)
    mean, std = (torch.tensor(v)[:, None, None] for v in (transforms.PIXEL_MEAN, transforms.PIXEL_STD))
    image[:, :height, :width] = (image[:, :height, :width] - mean) / std
    return image, masks


def main() -> None:
    """Times the ways in turn and prints medians, spreads, ratios and differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--masks", type=int, default=64)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.image_size
    frame = transforms.LongestSide(size, 1024)
    model = SimpleNamespace(name="", frame=frame, image_size=size, frame_size=1024, preprocess=frame.preprocess)

    def ours(data, index: int, target_px: int, flip: float, how: str = "sampled"):
        return samples.training_sample(
            data, data[index], model=model, target_px=target_px, hflip=flip, how=how, generator=torch.Generator()
        )

    with tempfile.TemporaryDirectory() as temporary:
        root = write(Path(temporary) / "sa", options.images, options.masks)
        folder = Sa1bFolder(root)
        ways = {
            f"official way, targets {size}": lambda i, flip: official(root, i + 1, size, flip),
            f"folder, decoded one by one, {size}": lambda i, flip: ours(folder, i, size, flip, "official"),
            f"folder, sampled runs, {size}": lambda i, flip: ours(folder, i, size, flip),
            "folder, sampled runs, 256": lambda i, flip: ours(folder, i, 256, flip),
        }
        if importlib.util.find_spec("litdata"):
            for target in (size, 256):
                out = Path(temporary) / f"chunks{target}"
                done = stream.optimise([root], out, image_size=size, target_size=target)
                data = stream.Sa1bStream(out)
                ways[f"stream, {target}"] = lambda i, flip, data=data, target=target: ours(data, i, target, flip)
                each = done["bytes"] / done["images"] / 1e3
                print(f"optimised at {target}: {done['seconds']:.1f} s, {each:.0f} kB an image")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way(repeat % options.images, float(repeat % 2))
                if repeat:  # the first warms up
                    times[name].append((time.perf_counter() - began) * 1e3)
        report(times, options)
        for name, way in ways.items():
            if name.endswith(f" {size}"):
                differ(name, way(0, 0.0), official(root, 1, size, False)[1])


def report(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Medians, spreads and ratios."""
    base = statistics.median(next(iter(times.values())))
    print(f"{SIZE[0]} x {SIZE[1]}, {options.masks} masks, {platform.machine()}, threads {options.threads}; ms a sample")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"({min(values):.1f}-{max(values):.1f})"
        print(f"{name:<36}{median:8.1f} {spread:<18}{1e3 / median:6.2f}/s {base / median:6.1f} x")


def differ(name: str, made, masks: torch.Tensor) -> None:
    """How far the targets are from the official ones: values, IoU at 0.5, tight boxes, pixels that may be clicked."""
    targets = made.masks if hasattr(made, "masks") else made[1]
    hard, other = targets > 0.5, masks > 0.5
    iou = (hard & other).flatten(1).sum(1) / (hard | other).flatten(1).sum(1).clamp(min=1)
    ends = []
    for which in (hard, other):
        sides = [which.any(axis) for axis in (1, 2)]
        ends.append(torch.stack([e for s in sides for e in (s.int().argmax(1), s.flip(1).int().argmax(1))], 1))
    box = (ends[0] - ends[1]).abs().float()
    clicks = ((targets > 0) != (masks > 0)).sum() / (masks > 0).sum()
    gap = (targets - masks).abs()
    print(f"{name:<36}mean |difference| in masks' pixels {gap.sum() / (masks > 0).sum():.1e}, largest {gap.max():.1e}; "
          f"IoU {iou.mean():.5f} (least {iou.min():.4f}); box sides {box.mean():.3f} px (most {box.max():.0f}); "
          f"clickable pixels that differ {clicks:.2%}")  # fmt: skip


if __name__ == "__main__":
    main()
