"""Twenty boxes on one image, same masks: all at once, one by one, and with SAM's textbook decoder.

    python -m tests.benchmarks.batched_boxes [--model efficientvit-sam-l0] [--boxes 20] [--repeats 5] [--threads 2]

Speed does not depend on the weights, so a random start serves. The ways take turns in one run; what is quoted is the
ratio of each to `predict_batch(select="best")` in the same round: its median and its range.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from evsam_lib import Predictor, load_model
from evsam_lib.models.prompt_encoder import prompt_tokens
from tests.plain_decoder import plain_decode

REFERENCE = "batched, best mask"


def main() -> None:
    """Times the ways in turn and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientvit-sam-l0")
    parser.add_argument("--boxes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    predictor = Predictor(load_model(options.model))
    rng = np.random.default_rng(0)
    predictor.set_image(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    corners = rng.uniform(0, 400, (options.boxes, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 200, (options.boxes, 2))], axis=1)
    ways = {
        "textbook, one by one": lambda: np.concatenate([plain(predictor, box[None]) for box in boxes]),
        "textbook, batched": lambda: plain(predictor, boxes),
        "predict, one by one": lambda: np.stack([predictor.predict(box=box)[0] for box in boxes]),
        "batched, three masks": lambda: predictor.predict_batch(boxes=boxes)[0],
        REFERENCE: lambda: predictor.predict_batch(boxes=boxes, select="best")[0],
    }
    times, masks = {name: [] for name in ways}, {}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            masks[name] = way()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    print(f"{options.model}, {options.boxes} boxes on 480 x 640, {options.threads} threads, torch {torch.__version__}")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[REFERENCE], strict=True)]
        same = "" if name == REFERENCE else f"{(masks[name] == masks['batched, three masks']).mean():12.6%} same pixels"
        spread = f"{statistics.median(ratios):5.2f} x ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:<22}{statistics.median(seconds):7.3f} s {spread}{same}")


@torch.inference_mode()
def plain(predictor: Predictor, boxes: np.ndarray) -> np.ndarray:
    """Three masks (N, 3, H, W) bool for each box by the textbook decoder and SAM's upscaling."""
    model = predictor.model
    coords, labels = prompt_tokens(boxes=model.to_frame(boxes, predictor.original_size))
    low_res, _ = plain_decode(model, predictor.features, coords, labels)
    return (model.upscale(low_res, predictor.original_size) > model.mask_threshold).numpy()


if __name__ == "__main__":
    main()
