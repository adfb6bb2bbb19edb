"""Mixes of requests, and their times of arrival."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.shared.mixes import IMAGENET
from cat_fast.generator import SampleRequest
from cat_fast.inference.engine import EngineRequest

RESOLUTION = 256
Arrivals = Sequence[tuple[float, EngineRequest]]
"""Requests with the time of each, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Distribution of requests."""

    grids: Mapping[tuple[int, int], float]
    """(ratio, side of the grid in tokens): share."""
    steps: tuple[int, ...]
    """One per grid, or the choices of all if `steps_by_grid` is False."""
    guidance: tuple[float, ...]
    steps_by_grid: bool = False


MIXES = {
    "cat": Mix(
        grids={(ratio, RESOLUTION // 2 // ratio): share for ratio, share in IMAGENET.items()},
        steps=(5, 10, 25, 50),
        guidance=(1.0, 1.5, 4.0),
    ),
    # shares and steps of vLLM-Omni's Dataset C; tokens 1 : 2.25 : 4 : 9
    "dataset_c": Mix(
        grids={(32, 4): 0.15, (16, 6): 0.25, (16, 8): 0.45, (8, 12): 0.15},
        steps=(20, 20, 25, 35),
        guidance=(1.5,),
        steps_by_grid=True,
    ),
}


def draw_requests(mix: Mix, count: int, seed: int) -> list[EngineRequest]:
    """Draw requests of a mix."""
    rng = np.random.default_rng(seed)
    grids = list(mix.grids)
    found = []
    for number, at in enumerate(rng.choice(len(grids), count, p=list(mix.grids.values()))):
        ratio, side = grids[at]
        steps = mix.steps[at] if mix.steps_by_grid else int(rng.choice(mix.steps))
        found.append(
            EngineRequest(
                sample=SampleRequest(label=number % 1000, ratio=ratio, grid=(side, side), seed=number),
                num_inference_steps=steps,
                guidance_scale=float(rng.choice(mix.guidance)),
                scheduler="ddim",
            )
        )
    return found


def poisson(requests: Sequence[EngineRequest], per_second: float, seed: int) -> Arrivals:
    """Return requests with times of arrival of a Poisson process."""
    times = np.random.default_rng(seed).exponential(1 / per_second, len(requests)).cumsum()
    return list(zip(times.tolist(), requests, strict=True))
