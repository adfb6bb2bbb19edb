"""Time of a function on a GPU by events, or on a CPU by the clock; alternating rounds, rotated inputs."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch

ROTATED_BYTES = 256 * 2**20
"""Inputs are rotated over this many bytes, several times the L2 cache of any GPU."""
ROUND_SECONDS = 0.005
MAX_CALLS = 200
"""Calls per round at most."""

Function = Callable[[], Any]


def copies_needed(size: int, device: torch.device) -> int:
    """Return the number of copies of inputs of `size` bytes that rotate through more than the L2 cache."""
    return max(1, math.ceil(ROTATED_BYTES / max(size, 1))) if device.type == "cuda" else 1


def seconds_per_call(functions: Iterator[Function], calls: int, device: torch.device) -> float:
    """Return the mean seconds of the calls of the next `calls` functions."""
    if device.type != "cuda":
        started = time.perf_counter()
        for function in islice(functions, calls):
            function()
        return (time.perf_counter() - started) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for function in islice(functions, calls):
        function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def alternate(
    contestants: Mapping[str, Sequence[Function]], seconds: float, device: torch.device, rounds: int = 30
) -> dict[str, list[float]]:
    """Time contestants in alternating rounds of about 5 ms for some seconds; return seconds per call.

    Each is a sequence of equal functions on different inputs, which take turns over all rounds. The first
    call of each function, which may compile, is not timed. At least two rounds are timed.
    """
    turns = {name: cycle(functions) for name, functions in contestants.items()}
    calls = {}
    for name, functions in contestants.items():
        for function in functions:
            function()
        once = seconds_per_call(turns[name], min(3, len(functions)), device)
        calls[name] = max(1, min(MAX_CALLS, math.ceil(ROUND_SECONDS / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    started = time.monotonic()
    for number in range(rounds):
        if number >= 2 and time.monotonic() - started > seconds:
            break
        order = list(contestants)
        for name in order if number % 2 == 0 else reversed(order):
            found[name].append(seconds_per_call(turns[name], calls[name], device))
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio_of_medians(times: Mapping[str, Sequence[float]], name: str, over: str) -> float:
    """Return the median over rounds of the time of `name` relative to that of `over`."""
    return statistics.median(a / b for a, b in zip(times[name], times[over], strict=True))
