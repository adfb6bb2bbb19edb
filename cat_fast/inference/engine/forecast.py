"""Forecast of when requests finish: the engine's steps simulated, without future arrivals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """Remaining work of one request."""

    steps: int
    rows: int
    flops: int
    """Per step."""
    decoding: float
    """Seconds."""


def finish_seconds(
    ranked: Sequence[Work],
    targets: Sequence[int],
    max_rows: int,
    step_seconds: Callable[[float], float],
    decoding_backlog: float = 0.0,
) -> list[float]:
    """Return the seconds until each of the requests `targets` finishes.

    Each simulated step packs requests in the given order; steps with the same requests are taken together, so
    the simulation costs as many turns as there are requests.

    Args:
        ranked: in order of service.
        targets: indices in `ranked`.
        max_rows: row budget of a step; while a request exceeds it, the rows of that request.
        step_seconds: seconds of a step of this many FLOPs.
        decoding_backlog: seconds of decoding ahead of everything.
    """
    left = [work.steps for work in ranked]
    alive = [i for i, steps in enumerate(left) if steps > 0]
    finished = {i: work.decoding for i, work in enumerate(ranked) if work.steps == 0}
    elapsed, decoder_free = 0.0, decoding_backlog
    while any(target not in finished for target in targets):
        chosen: list[int] = []
        free = max(max_rows, *(ranked[i].rows for i in alive))
        for i in alive:
            if ranked[i].rows <= free:
                chosen.append(i)
                free -= ranked[i].rows
        turns = min(left[i] for i in chosen)
        elapsed += turns * step_seconds(sum(ranked[i].flops for i in chosen))
        for i in chosen:
            left[i] -= turns
            if left[i] == 0:
                decoder_free = max(decoder_free, elapsed) + ranked[i].decoding
                finished[i] = decoder_free
        alive = [i for i in alive if left[i] > 0]
    return [finished[target] for target in targets]
