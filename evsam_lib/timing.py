"""Timing that one can believe on a busy machine: warm-up until steady, variants in turns, raw samples.

A variant is a function that makes some calls and says how long they took. All of them are warmed up, then take turns
in random order in one process, so that a busy moment hits them alike; a fast one makes several calls while a slow one
makes one. `evsam_lib.bench` and notebook 07 use it.
"""

import math
import random
import time
from collections.abc import Callable, Hashable
from itertools import pairwise

import torch

__all__ = ["Window", "gemm_ceiling", "take_turns", "warm_up", "window"]

STEADY = 0.02  # spread of the last three windows of a warm-up that is over
MOST_RUNS = 100  # enough for a 99th percentile
LEAST_ROUNDS = 5  # for a median, unless one call takes longer than all should

# calls -> seconds of each, seconds of all by the host's clock, seconds of the process's CPUs
Window = Callable[[int], tuple[list[float], float, float]]


def window(call: Callable[[int], object], *, gpu: bool) -> Window:
    """A function as a variant.

    Args:
        call: gets the number of the call, to take another input each time.
        gpu: what it does runs on the current CUDA stream, and is timed there.
    """
    return (lambda calls: _cuda_window(call, calls)) if gpu else (lambda calls: _cpu_window(call, calls))


def _cpu_window(call: Callable[[int], object], calls: int) -> tuple[list[float], float, float]:
    samples, cpu = [], time.process_time()
    for i in range(calls):
        start = time.perf_counter()
        call(i)
        samples.append(time.perf_counter() - start)
    return samples, sum(samples), time.process_time() - cpu


def _cuda_window(call: Callable[[int], object], calls: int) -> tuple[list[float], float, float]:
    """Events on the calls' own stream; one wait for the whole window, timed by the host as a check."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    events[0].record()
    for i in range(calls):
        call(i)
        events[i + 1].record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)], wall, time.process_time() - cpu


def warm_up(variant: Window, *, seconds: float, gpu: bool) -> dict:
    """Runs a variant until the last three windows agree, after at least two seconds and 20 runs, or time is over.

    Args:
        variant: as `window` makes it.
        seconds: it may take at most; the first call, which may compile or choose kernels, is not counted.
        gpu: windows are of ten calls instead of one.

    Returns:
        first_call_s, warm_up_runs, steady (bool), pace_s (seconds of a call, the least seen).
    """
    calls, means = (10 if gpu else 1), []
    first = variant(1)[1]
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        means.append(variant(calls)[1] / calls)
        if spent > 2 and len(means) * calls >= 20 and _steady(means):
            break
    runs = 1 + len(means) * calls
    return {"first_call_s": first, "warm_up_runs": runs, "steady": _steady(means), "pace_s": min(means, default=first)}


def _steady(means: list[float]) -> bool:
    last = means[-3:]
    return len(last) == 3 and max(last) - min(last) < STEADY * min(last)


def take_turns(
    variants: dict[Hashable, Window], paces: dict[Hashable, float], *, seconds: float, gpu: bool, seed: int
) -> dict[Hashable, dict[str, list[float]]]:
    """Times variants in rounds, each round in another random order.

    Args:
        variants: as `window` makes them, warm.
        paces: about how long a call of each takes, seconds.
        seconds: for each variant; one round takes place in any case, five unless a single call takes longer than this.
        gpu: a window has ten calls at least.
        seed: of the order.

    Returns:
        For each variant samples_s (every call), window_s and cpu_s (mean of a call, one entry a round).
    """
    slowest = max(paces.values())
    calls = {key: max(10 if gpu else 1, min(MOST_RUNS, round(slowest / pace))) for key, pace in paces.items()}
    longest = max(paces[key] * calls[key] for key in variants)
    rounds = min(math.ceil(seconds / longest), math.ceil(MOST_RUNS / min(calls.values())))
    rounds = rounds if slowest > seconds else max(rounds, LEAST_ROUNDS)
    order, dice = list(variants), random.Random(seed)
    found = {key: {"samples_s": [], "window_s": [], "cpu_s": []} for key in variants}
    for _ in range(rounds):
        dice.shuffle(order)
        for key in order:
            samples, wall, cpu = variants[key](calls[key])
            found[key]["samples_s"] += samples
            found[key]["window_s"].append(wall / calls[key])
            found[key]["cpu_s"].append(cpu / calls[key])
    return found


def gemm_ceiling(device: str, dtype: torch.dtype, *, seconds: float = 1.0, cpu_time: bool = False) -> float:
    """FLOP/s of the fastest large matrix product that torch makes here, the ceiling of what any layer can reach.

    Args:
        device: "cpu" or "cuda".
        dtype: of the matrices; a CPU's product in a type that it has no instructions for is slow, and says so.
        seconds: how long it is tried.
        cpu_time: by the process's seconds on the CPU, for one thread on a machine that others use too.
    """
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in range(2))
    product = window(lambda i: a @ b, gpu=device != "cpu")
    least, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or least == math.inf:
        samples, _, cpu = product(2)
        least = min(least, cpu / 2) if cpu_time else min(least, *samples)
    return 2 * side**3 / least
