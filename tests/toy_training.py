"""Trainings at toy size in processes of their own: `python -m tests.toy_training JSON`, a list of runs one by one.

Each run is {"phase", "parameters", "out", "resume", "kill", "kill_after_rows"}; "kill": n ends the process by SIGKILL
while it reads its n-th image, "kill_after_rows": n as soon as its log has n rows. Run by tests/test_training_runs.py,
which says with torchrun's variables how many processes there are.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from evsam_lib.data import transforms
from evsam_lib.models import zoo
from evsam_lib.models.sam import Sam, build_sam
from evsam_lib.training import checkpoint, command
from evsam_lib.training.ranks import Ranks, process_group


def tiny_sam(name: str = "tiny", *, image_size: int = 32, seed: int | None = 0, embed_dim: int = 16) -> Sam:
    """A real Sam around an encoder of two convolutions: 4 x 4 cells, 16 x 16 masks, a frame of 64."""
    if seed is not None:
        torch.manual_seed(seed)
    side = image_size // 4
    encoder = nn.Sequential()
    encoder.add_module("conv", nn.Conv2d(3, embed_dim, side, stride=side, bias=False))
    encoder.add_module("norm", nn.BatchNorm2d(embed_dim))
    encoder.add_module("out", nn.Conv2d(embed_dim, embed_dim, 1))
    options = {"embed_dim": embed_dim, "grid": 4, "mlp_hidden": 16, "iou_hidden": 16, "mask_channels": 4}
    return build_sam(encoder, name=name, frame=transforms.LongestSide(image_size, 64), **options).eval()


def add_to_zoo() -> None:
    """Makes `tiny` (32 px) and `tiny-teacher` (64 px) models of the zoo."""
    for name, size in (("tiny", 32), ("tiny-teacher", 64)):
        frame = transforms.LongestSide(size, 64)

        def build(*, name: str, frame: transforms.Frame, size: int = size) -> Sam:
            return tiny_sam(name, image_size=size, seed=None)

        zoo.ZOO[name] = zoo.Entry(name, build, frame)


def main() -> int:
    """Runs what the command line says."""
    torch.set_num_threads(1)
    add_to_zoo()
    with process_group(Ranks.of_torchrun(), torch.device("cpu")):  # one for all runs
        return max(_run(run) for run in json.loads(Path(sys.argv[1]).read_text()))


def _run(run: dict) -> int:
    if "kill" in run:
        _kill_at(run["kill"])
    if "kill_after_rows" in run:
        _kill_after(run["kill_after_rows"])
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in run["parameters"].items()]
    return command.main([run["phase"], f"--out={run['out']}", *flags, *["--resume"] * run.get("resume", False)])


def _kill_at(image: int) -> None:
    real, left = command.open_data, [image]

    class Deadly:
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.data[index]

        def __getattr__(self, name):
            if name == "data":
                raise AttributeError(name)
            return getattr(self.data, name)

    command.open_data = lambda *args, **options: Deadly(real(*args, **options))


def _kill_after(rows: int) -> None:
    real, left = checkpoint.Curve.add, [rows]

    def add(curve, row):
        real(curve, row)
        left[0] -= curve.path.name == "log.csv"
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Curve.add = add


if __name__ == "__main__":
    sys.exit(main())
