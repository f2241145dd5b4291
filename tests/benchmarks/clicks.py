"""How long a simulated click takes: measuring few pixels (ours) against the whole image (the official way).

    python -m tests.benchmarks.clicks [--objects 40] [--clicks 5] [--repeats 5] [--scenes 4]

Both ways click on the same objects, in alternation, in one run: small and middling objects with sizes like COCO's and
errors around their outlines; large blobs with holes; and what the shipped model, clicked at, got wrong on generated
scenes. The official code measures distances with OpenCV; where that is not installed, the whole-image way uses SciPy.
"""

import argparse
import platform
import statistics
import tempfile
import time
from unittest import mock

import numpy as np
import scipy
from scipy.ndimage import distance_transform_edt, gaussian_filter

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.write import write_coco
from evsam_lib.evaluate import batch, evaluate
from evsam_lib.models.zoo import load_model
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


Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # (N, H, W) truth, (N, H, W) prediction, (N, P, 2) earlier clicks


def shifted(masks: np.ndarray, clicks: int, rng: np.random.Generator) -> list[Case]:
    """Objects and what a model may have said of them after 0, 1, ... clicks."""
    cases, clicked = [], np.zeros((len(masks), 0, 2), dtype=np.int64)
    for pred in predictions(masks, clicks, rng):
        cases.append((masks, pred, clicked))
        clicked = np.concatenate([clicked, next_clicks(*cases[-1])[0][:, None]], axis=1)
    return cases


def large(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, H, W) bool, ellipses over much of the image with thirty holes each."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    masks = np.zeros((count, *SIZE), dtype=bool)
    for mask in masks:
        center, radii = rng.uniform((200, 280), (280, 360)), rng.uniform((120, 150), (230, 310))
        mask[:] = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 < 1
        for top, left in rng.integers((0, 0), SIZE, size=(30, 2)):
            mask[top : top + 8, left : left + 8] = False
    return masks


def of_a_model(scenes: int, clicks: int) -> list[Case]:
    """What the shipped model is asked in an evaluation by clicks."""
    cases: list[Case] = []

    def kept(gt, pred, clicked):
        cases.append((gt, pred.copy(), clicked))
        return next_clicks(gt, pred, clicked)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(batch, "next_clicks", kept):
        images = CocoImages(*write_coco(folder, scenes, seed=0, size=SIZE))
        evaluate(load_model("efficientvit-sam-mini", "mini"), images, prompt="points", clicks=clicks)
    return cases


def whole_image(case: Case, distance) -> np.ndarray:
    """The next click on every object, one after the other: (N, 3), x, y, label."""
    made = []
    for gt, pred, clicked in zip(*case, strict=True):
        open_map = np.ones_like(gt)
        open_map[clicked[:, 1], clicked[:, 0]] = False
        made.append(whole_image_click(gt, pred, open_map, distance))
    return np.array(made)


def few_pixels(case: Case) -> np.ndarray:
    """The same by the library: (N, 3)."""
    coords, labels = next_clicks(*case)
    return np.column_stack([coords, labels])


def compare(name: str, cases: list[Case], ways: dict, repeats: int) -> None:
    """Times the ways in turn and prints medians, spreads and ratios."""
    clicks = sum(len(gt) for gt, _, _ in cases)
    times, results = {way: [] for way in ways}, {}
    for _ in range(repeats):
        for way, click in ways.items():
            start = time.process_time()
            results[way] = np.concatenate([click(case) for case in cases])
            times[way].append((time.process_time() - start) / clicks * 1e3)
    ours = next(iter(ways))
    print(f"{name}: {clicks} clicks; CPU ms of one, median of {repeats}")
    for way in ways:
        median, least, most = statistics.median(times[way]), min(times[way]), max(times[way])
        same = (results[way] == results[ours]).all(axis=-1).mean()
        ratio = median / statistics.median(times[ours])
        print(f"  {way:<30}{median:8.2f} ({least:.2f}-{most:.2f})  {ratio:6.1f} x ours, {same:.1%} of clicks the same")


def main() -> None:
    """Compares the ways on three kinds of errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=40)
    parser.add_argument("--clicks", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--scenes", type=int, default=4, help="generated images that the shipped model is clicked at on"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ways = {
        "few pixels (ours)": few_pixels,
        "whole image, SciPy": lambda case: whole_image(case, distance_transform_edt),
    }
    if cv2 is not None:
        cv2.setNumThreads(1)
        ways["whole image, OpenCV (official)"] = lambda case: whole_image(
            case, lambda wrong: cv2.distanceTransform(wrong.astype(np.uint8), cv2.DIST_L2, 0)
        )
    versions = f"scipy {scipy.__version__}" + (f", OpenCV {cv2.__version__}" if cv2 else "")
    print(f"{SIZE[0]} x {SIZE[1]}, one thread, {versions}, {platform.machine()}, python {platform.python_version()}")
    rng = np.random.default_rng(options.seed)
    cases = {"objects of COCO's sizes": shifted(objects(options.objects, rng), options.clicks, rng)}
    cases["large blobs with holes"] = shifted(large(max(options.objects // 5, 1), rng), options.clicks, rng)
    cases["errors of the shipped model"] = of_a_model(options.scenes, options.clicks)
    for name, found in cases.items():
        compare(name, found, ways, options.repeats)


if __name__ == "__main__":
    main()
