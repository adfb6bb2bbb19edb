"""Peak memory by the reports of torch's CPU allocator."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENT = "[memory]"


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the peak of bytes that a call allocates, on one thread.

    The allocator reports every allocation, also those inside operators, so that the figure neither depends on
    the C library's heap nor on the number of cores. Memory that existed before does not count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        torch.set_num_threads(threads)
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == MEMORY_EVENT]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
