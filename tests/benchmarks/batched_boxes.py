"""Twenty boxes on one image: all at once against one by one, same masks.

    python -m tests.benchmarks.batched_boxes [--model efficientvit-sam-l0] [--boxes 20] [--repeats 5] [--threads 2]

Speed does not depend on the weights, so a random start serves. The two ways take turns in one run; what is quoted is
the ratio of their medians and the range of the paired ratios.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from evsam_lib import Predictor, load_model


def main() -> None:
    """Times both ways in turn and prints medians and ratios."""
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
        "one by one": lambda: [predictor.predict(box=box) for box in boxes],
        "batched, all three": lambda: predictor.predict_batch(boxes=boxes),
        "batched, best": lambda: predictor.predict_batch(boxes=boxes, select="best"),
    }
    times, results = {name: [] for name in ways}, {}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    singles = np.stack([masks for masks, _, _ in results["one by one"]])
    same = (singles == results["batched, all three"][0]).mean()
    print(f"{options.model}, {options.boxes} boxes on 480 x 640, {options.threads} threads, torch {torch.__version__}")
    print(f"pixels of the masks that agree: {same:.6%}")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["one by one"], seconds, strict=True)]
        median = statistics.median(seconds)
        print(f"{name:<20}{median:7.3f} s  {statistics.median(ratios):5.2f} x  ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
