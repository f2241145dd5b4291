"""The processes that train together: who this one is, sums over all, and errors that all of them hear.

Paper: Sec. 3.2 trains with a batch of 256, which takes many GPUs; torchrun starts a process for each and says so in the
environment. Without torchrun there is one process, and everything here does nothing. Notebook 05.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Ranks", "SyncedBatchNorm2d", "process_group"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        world: how many there are.
        rank: number of this one, from 0.
        local: its number on its own machine.
        nodes: machines.
    """

    world: int = 1
    rank: int = 0
    local: int = 0
    nodes: int = 1

    @staticmethod
    def of_torchrun() -> "Ranks":
        """As torchrun's variables say; a single process without them."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        machine = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        return Ranks(world, rank, local, max(world // machine, 1))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """ "cpu", "cuda" or "auto" as a device; of several GPUs each process of a machine gets its own.

        Raises:
            ValueError: there is no such device here.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and self.world > 1:
            name = f"cuda:{self.local}"
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every process, in their order, for all."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def by_first(self, action: Callable[[], Any]) -> Any:
        """Lets the first process act; all get what it returns, or its error.

        Raises:
            ValueError, OSError: what the action raised, with its words.
        """
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = action()
            except (ValueError, OSError) as error:
                if self.world == 1:
                    raise
                answer[1] = error
        if self.world > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            answer[1].heard = not self.first  # the first process says it
            raise answer[1]
        return answer[0]


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Joins the processes for the time of a training: NCCL between GPUs, gloo between CPUs. One needs none."""
    if ranks.world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics are those of all processes' images together; on one process plain BatchNorm.

    torch's own works on GPUs only; this one is the same function and also runs between CPUs, where it can be tested.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> the same; every process must have equally many values a channel."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        count = dist.get_world_size() * input.numel() // input.shape[1]
        values = input.float()
        sums = torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        mean, square = dist.nn.functional.all_reduce(sums) / count
        variance = square - mean.square()
        self._remember(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = self.weight * (variance + self.eps).rsqrt()
        out = values * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return out.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, unbiased: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return  # a norm that keeps no statistics
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum  # None: a plain mean
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


@contextmanager
def batchnorm_mode(model: nn.Module, how: str) -> Iterator[None]:
    """How the BatchNorms of a model in training mode behave for a while: "train", "frozen" or "sync".

    Frozen ones keep the running statistics they have and use them; their weights still train. The class of a module is
    exchanged and put back for "sync": parameters, buffers and names stay the very same.
    """
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    swapped = [m for m in found if type(m) is nn.BatchNorm2d] if how == "sync" else []
    for module in swapped:
        module.__class__ = SyncedBatchNorm2d
    if how == "frozen":
        for module in found:
            module.eval()
    try:
        yield
    finally:
        for module in swapped:
            module.__class__ = nn.BatchNorm2d
