"""Forecast of when requests finish: the engine's steps simulated, without future arrivals."""

from collections.abc import Callable, Iterator, Sequence
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
    """Return the seconds until each of the requests `targets`, indices in `ranked`, finishes.

    The other arguments are those of `completions`.
    """
    missing = {*targets}
    finished: dict[int, float] = {}
    for i, seconds in completions(ranked, max_rows, step_seconds, decoding_backlog):
        finished[i] = seconds
        missing.discard(i)
        if not missing:
            break
    return [finished[target] for target in targets]


def completions(
    ranked: Sequence[Work],
    max_rows: int,
    step_seconds: Callable[[float], float],
    decoding_backlog: float = 0.0,
) -> Iterator[tuple[int, float]]:
    """Yield the index of each request and the seconds until it finishes, in the order in which they finish.

    Each simulated step packs requests in the given order; steps with the same requests are taken together, so
    the simulation costs as many turns as there are requests.

    Args:
        ranked: in order of service.
        max_rows: row budget of a step; the first request of a step may exceed it, and is then alone.
        step_seconds: seconds of a step of this many FLOPs.
        decoding_backlog: seconds of decoding ahead of everything.
    """
    yield from ((i, work.decoding) for i, work in enumerate(ranked) if work.steps == 0)
    left = [work.steps for work in ranked]
    alive = [i for i, steps in enumerate(left) if steps > 0]
    elapsed, decoder_free = 0.0, decoding_backlog
    while alive:
        chosen: list[int] = []
        free = max_rows
        for i in alive:
            if not chosen or ranked[i].rows <= free:
                chosen.append(i)
                free -= ranked[i].rows
        turns = min(left[i] for i in chosen)
        elapsed += turns * step_seconds(sum(ranked[i].flops for i in chosen))
        for i in chosen:
            left[i] -= turns
            if left[i] == 0:
                decoder_free = max(decoder_free, elapsed) + ranked[i].decoding
                yield i, decoder_free
        alive = [i for i in alive if left[i] > 0]
