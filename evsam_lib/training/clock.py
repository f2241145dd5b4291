"""Where the time of a training step goes: data, teacher, student, decoder, loss, update.

Backward passes are told apart at the image embedding: what is computed until its gradient is known belongs to decoder
and loss, the rest to the student. Shown in notebooks 04 and 05.
"""

import resource
import time
from typing import Any

import torch

__all__ = ["PARTS", "Clock"]

PARTS = ("data", "teacher", "student", "decoder", "loss", "update")


class Clock:
    """Marks along a step; on a GPU by events, so that nothing waits before the step's end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Begins a step."""
        self._marks: list[tuple[str, Any]] = [("", self._now())]  # seconds, or events on a GPU

    def mark(self, part: str) -> None:
        """What happened since the last mark was `part`, one of `PARTS`."""
        self._marks.append((part, self._now()))

    def mark_backward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Sets a mark in the backward pass, when the gradient of the embedding is known; returns the embedding."""
        if embedding.requires_grad:
            embedding.register_hook(lambda gradient: self.mark("decoder"))
        return embedding

    def seconds(self) -> dict[str, float]:
        """Seconds of every part since `start`, and of all; call it when the device has finished the step."""
        self._marks.append(("", self._now()))
        if self.cuda:
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                found[part] += before.elapsed_time(after) / 1e3 if self.cuda else after - before
        first, last = self._marks[0][1], self._marks[-1][1]
        found["all"] = first.elapsed_time(last) / 1e3 if self.cuda else last - first
        return found

    def memory_gb(self) -> float:
        """The most memory so far in GB: of tensors on a GPU, of the whole process on a CPU."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
