"""How long a simulated click takes: inside the error's bounding box (ours) against the whole image (the official way).

    python -m tests.benchmarks.clicks [--objects 40] [--clicks 5] [--repeats 5]

Both ways click on the same objects, in alternation, in one run; sizes are drawn like COCO's. The official code measures
distances with OpenCV; where that is not installed, the whole-image way uses SciPy as ours does. Predictions are the
object shifted and eroded a little, another way at every click, so that errors lie around the whole outline.
"""

import argparse
import platform
import statistics
import time

import numpy as np
import scipy
from scipy.ndimage import distance_transform_edt, gaussian_filter

from evsam_lib.prompts import next_clicks

try:
    import cv2
except ImportError:
    cv2 = None

SIZE = (480, 640)


def objects(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, H, W) bool blobs; a third each with a side of about 10-32, 32-96 and 96-400 pixels."""
    masks = np.zeros((count, *SIZE), dtype=bool)
    for i, mask in enumerate(masks):
        side = int(np.exp(rng.uniform(*np.log([(10, 32), (32, 96), (96, 400)][i % 3]))))
        blob = gaussian_filter(rng.random((side, side)), side / 6)
        top, left = rng.integers(0, SIZE[0] - side), rng.integers(0, SIZE[1] - side)
        mask[top : top + side, left : left + side] = blob > np.quantile(blob, 0.4)
    return masks


def predictions(masks: np.ndarray, clicks: int, rng: np.random.Generator) -> list[np.ndarray]:
    """What a model may have said after 0, 1, ... clicks."""
    made = [np.zeros_like(masks)]
    for _ in range(clicks - 1):
        shifts = rng.integers(-4, 5, size=(2, 2))
        made.append(np.roll(masks, shifts[0], axis=(1, 2)) & np.roll(masks, shifts[1], axis=(1, 2)))
    return made


def whole_image_click(gt: np.ndarray, pred: np.ndarray, open_map: np.ndarray, distance) -> tuple[int, int, int]:
    """The official rule as it is usually written: x, y, label. `distance` maps a bool image to distances."""
    missed, extra = (distance(np.pad(wrong, 1))[1:-1, 1:-1] * open_map for wrong in (gt & ~pred, pred & ~gt))
    positive = missed.max() > extra.max()
    winner = missed if positive else extra
    y, x = np.unravel_index(winner.argmax(), winner.shape)
    return int(x), int(y), int(positive)


def whole_image(masks: np.ndarray, preds: list[np.ndarray], distance) -> np.ndarray:
    """All clicks on all objects, one after the other: (clicks, N, 3), x, y, label."""
    result = np.zeros((len(preds), len(masks), 3), dtype=np.int64)
    open_maps = np.ones_like(masks)
    for k, pred in enumerate(preds):
        for i, gt in enumerate(masks):
            result[k, i] = whole_image_click(gt, pred[i], open_maps[i], distance)
            open_maps[i, result[k, i, 1], result[k, i, 0]] = False
    return result


def cropped(masks: np.ndarray, preds: list[np.ndarray]) -> np.ndarray:
    """The same by the library: (clicks, N, 3)."""
    result = np.zeros((len(preds), len(masks), 3), dtype=np.int64)
    for k, pred in enumerate(preds):
        clicked = result[:k, :, :2].swapaxes(0, 1)
        result[k, :, :2], result[k, :, 2] = next_clicks(masks, pred, clicked)
    return result


def main() -> None:
    """Times the ways in turn and prints medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=40)
    parser.add_argument("--clicks", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    masks = objects(options.objects, rng)
    preds = predictions(masks, options.clicks, rng)
    ways = {
        "cropped, scipy (ours)": lambda: cropped(masks, preds),
        "whole image, scipy": lambda: whole_image(masks, preds, distance_transform_edt),
    }
    if cv2 is not None:
        cv2.setNumThreads(1)
        ways["whole image, OpenCV (official)"] = lambda: whole_image(
            masks, preds, lambda wrong: cv2.distanceTransform(wrong.astype(np.uint8), cv2.DIST_L2, 0)
        )
    times, results = {name: [] for name in ways}, {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            times[name].append((time.process_time() - start) / options.objects * 1e3)
    ours = next(iter(ways))
    versions = f"scipy {scipy.__version__}" + (f", OpenCV {cv2.__version__}" if cv2 else "")
    print(f"{options.objects} objects in {SIZE[0]} x {SIZE[1]}, {options.clicks} clicks each, one thread, {versions}")
    print(f"{platform.machine()}, python {platform.python_version()}; CPU ms per object, median of {options.repeats}")
    for name in ways:
        median, least, most = statistics.median(times[name]), min(times[name]), max(times[name])
        same = (results[name] == results[ours]).all(axis=-1).mean()
        ratio = median / statistics.median(times[ours])
        print(f"{name:<32}{median:8.2f} ({least:.2f}-{most:.2f})  {ratio:6.1f} x ours, {same:.1%} of clicks the same")


if __name__ == "__main__":
    main()
