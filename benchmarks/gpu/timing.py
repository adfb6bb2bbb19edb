"""Time of a function on a GPU by events, or on a CPU by the clock; alternating rounds, rotated inputs."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

ROTATED_BYTES = 256 * 2**20
"""Inputs are rotated over this many bytes, several times the L2 cache of any GPU."""
ROUND_SECONDS = 0.005
MAX_CALLS = 200
"""Calls per round at most."""
QUEUE_SECONDS = 0.01
"""Time of the host to launch a round while the GPU waits."""
WAIT_CYCLES = 20_000_000
"""`QUEUE_SECONDS` of a GPU at 2 GHz, and more at lower clocks."""

Function = Callable[[], Any]


class CallTime(NamedTuple):
    """Mean seconds of a call."""

    seconds: float
    """Of the device, from the start of the first call to the end of the last."""
    host: float
    """Of the host, until the call is launched."""


def copies_needed(size: int, device: torch.device) -> int:
    """Return the number of copies of inputs of `size` bytes that rotate through more than the L2 cache."""
    return max(1, math.ceil(ROTATED_BYTES / max(size, 1))) if device.type == "cuda" else 1


def time_calls(functions: Iterator[Function], calls: int, device: torch.device, queue: bool) -> CallTime:
    """Time the calls of the next `calls` functions.

    Args:
        queue: let a GPU wait while the host launches the calls, so that kernels that are shorter than their
            launch are not timed by it. Otherwise the GPU waits for the host, as it does in a program.
    """
    if device.type != "cuda":
        host = _launch(functions, calls)
        return CallTime(host, host)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queue:
        torch.cuda._sleep(WAIT_CYCLES)
    first.record()
    host = _launch(functions, calls)
    last.record()
    last.synchronize()
    return CallTime(first.elapsed_time(last) / 1000 / calls, host)


def _launch(functions: Iterator[Function], calls: int) -> float:
    """Call the next `calls` functions; return the mean seconds of the host."""
    started = time.perf_counter()
    for function in islice(functions, calls):
        function()
    return (time.perf_counter() - started) / calls


def alternate(
    contestants: Mapping[str, Sequence[Function]],
    seconds: float,
    device: torch.device,
    rounds: int = 30,
    *,
    queue: bool = True,
) -> dict[str, list[CallTime]]:
    """Time contestants in alternating rounds of about 5 ms for some seconds; return the times of the rounds.

    Each is a sequence of equal functions on different inputs, which take turns over all rounds. The first
    call of each function, which may compile, is not timed. At least two rounds are timed.

    Args:
        queue: as for `time_calls`.
    """
    turns = {name: cycle(functions) for name, functions in contestants.items()}
    calls = {}
    for name, functions in contestants.items():
        for function in functions:
            function()
        once = time_calls(turns[name], min(3, len(functions)), device, queue)
        calls[name] = min(MAX_CALLS, math.ceil(ROUND_SECONDS / max(once.seconds, 1e-6)))
        if queue and device.type == "cuda":  # all of them are launched while the GPU waits
            calls[name] = max(1, min(calls[name], int(QUEUE_SECONDS / max(once.host, 1e-6))))
    found: dict[str, list[CallTime]] = {name: [] for name in contestants}
    started = time.monotonic()
    for number in range(rounds):
        if number >= 2 and time.monotonic() - started > seconds:
            break
        order = list(contestants)
        for name in order if number % 2 == 0 else reversed(order):
            found[name].append(time_calls(turns[name], calls[name], device, queue))
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio_of_medians(times: Mapping[str, Sequence[CallTime]], name: str, over: str) -> float:
    """Return the median over rounds of the time of `name` relative to that of `over`."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(times[name], times[over], strict=True))
