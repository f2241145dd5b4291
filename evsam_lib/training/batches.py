"""Which images a step sees, and the way of samples from a data set to a training process.

Two ways. From a folder or tars, a batch is a pure function of (seed, step): any step can be made by any process at any
time, so a resumed run needs no memory and the number of processes changes nothing. From litdata chunks, each process
streams chunks of its own, and the loader's state is kept in the checkpoint. Paper: Sec. 3.2; notebook 05.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from evsam_lib.training.ranks import Ranks
from evsam_lib.training.settings import Settings

__all__ = ["Batches", "epoch_positions", "generator_for"]

ORDER, SAMPLE, STEP = 0, 1, 2  # second number of a generator's key: order of an epoch, one sample, one step


def generator_for(seed: int, *numbers: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on its arguments only: equal numbers give equal draws, whatever was drawn before."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(2, np.uint32)
    return torch.Generator(device=device).manual_seed((int(state[0]) << 31) ^ int(state[1]))


def epoch_positions(seed: int, first: int, last: int, *, count: int) -> list[tuple[int, int]]:
    """Which images stand at places first ... last - 1 of a training's order: every image once per epoch, shuffled anew.

    Args:
        seed: of the run.
        first: place, counted through all epochs.
        last: one past the last place; a batch may reach over the end of an epoch.
        count: images in the set.

    Returns:
        Pairs (epoch, index).

    Raises:
        ValueError: the set is empty.
    """
    if count < 1:
        raise ValueError("the training set is empty: expected at least one image")
    positions = (divmod(position, count) for position in range(first, last))
    return [(epoch, int(_order(seed, epoch, count)[place])) for epoch, place in positions]


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch; SA-1B's order takes half a second to draw
def _order(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator_for(seed, ORDER, epoch))


@dataclass(frozen=True)
class Batches:
    """Where a training's samples come from; `open` gives a process its forward passes in order.

    Attributes:
        data: `len(data)` and `data[i]`, a record with `image_id`; with a `loader` (litdata chunks) it is streamed.
        make: (record, generator) -> sample, in the worker that read the record.
        collate: list of samples -> batch.
    """

    data: Any
    make: Callable[[Any, torch.Generator], Any]
    collate: Callable[[list], Any]

    @property
    def streamed(self) -> bool:
        """Whether the data set keeps its own order."""
        return hasattr(self.data, "loader")

    def open(self, settings: Settings, ranks: Ranks, *, start: int, sampler: list[Any] | None = None) -> Any:
        """The batches of this process from step `start` on: iterable, with `passes` per step and a `state()` to keep.

        Args:
            settings: complete ones.
            ranks: who this process is.
            start: steps already done.
            sampler: what `state` gave every process when it stopped, None for a fresh start.

        Raises:
            ValueError: the batch cannot be cut so, there are no images, or a streamed run had other processes.
        """
        if len(self.data) < 1:
            raise ValueError("the training set is empty: expected at least one image")
        if not self.streamed:
            return _Indexed(self, settings, ranks, start)
        if sampler is not None and len(sampler) != ranks.world:
            raise ValueError(
                f"this run streams chunks on {len(sampler)} processes, each with its own: it can only be resumed on as "
                f"many, got {ranks.world}"
            )
        return _Streamed(self, settings, ranks, start, None if sampler is None else sampler[ranks.rank])


class _Indexed(Dataset):
    """Item i of this process: forward pass i % passes of step start + i // passes."""

    def __init__(self, batches: Batches, settings: Settings, ranks: Ranks, start: int) -> None:
        self.batches, self.settings, self.ranks, self.start = batches, settings, ranks, start
        self.schedule = settings.schedule
        self.micro, self.passes = settings.share(ranks.world)

    def __len__(self) -> int:
        return (self.schedule.steps - self.start) * self.passes

    def __getitem__(self, index: int) -> Any:
        step, part = divmod(index, self.passes)
        cut = part * self.ranks.world + self.ranks.rank
        first = (self.start + step) * self.schedule.batch_size + cut * self.micro
        seed, data = self.settings.seed, self.batches.data
        picked = epoch_positions(seed, first, first + self.micro, count=len(data))
        made = [self.batches.make(data[i], generator_for(seed, SAMPLE, epoch, i)) for epoch, i in picked]
        return self.batches.collate(made)

    def __iter__(self) -> Iterator[Any]:
        if self.settings.workers == 0:
            return map(self.__getitem__, range(len(self)))
        # Its own generator: a DataLoader otherwise takes a number from torch's global one.
        loader = DataLoader(self, batch_size=None, num_workers=self.settings.workers, generator=torch.Generator())
        return iter(loader)

    def state(self) -> Any:
        """Nothing to remember: the step says all."""
        return None


class _Streamed:
    """litdata's loader, epoch after epoch."""

    def __init__(self, batches: Batches, settings: Settings, ranks: Ranks, start: int, state: Any) -> None:
        self.micro, self.passes = settings.share(ranks.world)
        self.left = (settings.schedule.steps - start) * self.passes

        def make(record: Any, epoch: int) -> Any:
            return batches.make(record, generator_for(settings.seed, SAMPLE, epoch, record.image_id))

        self.loader = batches.data.loader(
            self.micro, make=make, collate=batches.collate, workers=settings.workers, seed=settings.seed
        )
        self.loader.generator = torch.Generator()  # as in `_Indexed`
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        empty = 0
        while True:
            found = False
            for batch in self.loader:
                found = True
                yield batch
                self.left -= 1
                if self.left <= 0:
                    return
            empty = 0 if found else empty + 1
            if empty > 1:  # one may be: a run that stopped exactly at an epoch's end
                raise ValueError(
                    f"an epoch of these chunks holds no batch of {self.micro} images for each process and worker: "
                    "expected more images, a smaller batch or fewer processes"
                )

    def state(self) -> Any:
        """Where the loader stands, plain values."""
        return self.loader.state_dict()
