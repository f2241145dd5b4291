"""Samples per second of the training's loader with 0, 1 and 2 workers, and where a step's time goes.

    python -m tests.benchmarks.training [--images 8] [--masks 64] [--samples 16] [--steps 6]

SA-1B-like pictures (1500 x 2250, see `loader`) as a folder and as litdata chunks, read by the batches that training
reads: phase 2 of the paper's recipe at 512 pixels, targets of 256. Then a few steps of both phases with the mini model.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from evsam_lib.data.stream import optimise
from evsam_lib.models import zoo
from evsam_lib.training import command, end_to_end
from evsam_lib.training.clock import PARTS
from evsam_lib.training.ranks import Ranks
from evsam_lib.training.settings import EndToEnd
from evsam_lib.training.sources import open_data
from tests.benchmarks.loader import write


def main() -> None:
    """Prints samples per second of every way, and seconds of every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--masks", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="that count, per way; as many warm up at most")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        root = write(Path(temporary) / "sa", options.images, options.masks)
        optimise([root], Path(temporary) / "chunks", image_size=1024, target_size=256)
        with torch.device("meta"):
            model = zoo.ZOO["efficientvit-sam-l0"].build()
        for name, path in (("folder", root), ("chunks", Path(temporary) / "chunks")):
            for workers in (0, 1, 2):
                rate = samples_per_s(open_data(path), model, workers, options)
                print(f"{name}, {workers} workers: {rate:.1f} samples/s")
        for phase in ("distill", "end-to-end"):
            steps(phase, root, Path(temporary) / phase, options)


def samples_per_s(data, model, workers: int, options: argparse.Namespace) -> float:
    """Rate of one way, its first batches (workers start, files open) left out."""
    batch, warm = 2, 4
    settings = EndToEnd(steps=warm + options.samples // batch, batch_size=batch, lr=0.0, workers=workers, target_px=256)
    stream = iter(end_to_end.batches_of(model, data, settings).open(settings, Ranks(), start=0))
    for _ in range(warm):
        next(stream)
    began = time.perf_counter()
    count = sum(1 for _ in stream)
    return count * batch / (time.perf_counter() - began)


def steps(phase: str, root: Path, out: Path, options: argparse.Namespace) -> None:
    """Seconds of the parts of a step with the mini model, 4 images, at most 16 masks each."""
    parameters = {"model": "efficientvit-sam-mini", "init": "mini", "data": str(root), "split": "all", "batch_size": 4}
    parameters |= {"steps": options.steps + 1, "device": "cpu", "threads": 1}
    if phase == "distill":
        parameters |= {"teacher": "efficientvit-sam-mini", "teacher_weights": "mini"}
    else:
        parameters |= {"masks_per_image": 16}
    log = command.start(phase, parameters, out=out).iloc[1:]
    parts = ", ".join(f"{part} {log[f'{part}_s'].median():.3f}" for part in PARTS)
    print(f"{phase}, mini, 4 images: {log['seconds'].median():.2f} s a step: {parts}; {log['memory_gb'].max():.2f} GB")


if __name__ == "__main__":
    main()
