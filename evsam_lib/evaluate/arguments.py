"""What command lines of evaluations have in common: their words read, checked, and refused in one sentence."""

import argparse
import os

import torch

__all__ = ["device", "positive", "shard", "torchrun_shard", "whole"]


def torchrun_shard() -> tuple[int, int] | None:
    """This process's share, where torchrun (or any other launcher that sets its variables) started several."""
    rank, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return None if rank is None or count is None else (int(rank) + 1, int(count))


def device(name: str) -> torch.device:
    """A device by its name, under torchrun the rank's own GPU.

    Raises:
        ValueError: it cannot be used here.
    """
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"Device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """The i-th of n shares, from "i/n"."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected i/n with 1 <= i <= n, got {text!r}")
    return int(number), int(count)
