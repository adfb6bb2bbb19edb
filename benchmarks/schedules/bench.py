"""A machine that serves, or a queue model of one, with its capacity at the FLOP bound."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.schedules.arrivals import MIXES, RESOLUTION
from benchmarks.schedules.clock import Clock
from benchmarks.schedules.simulated_stages import SimulatedStages
from benchmarks.shared.configs import tokenizer_run
from cat_fast.generator import DiT, SampleRequest, paper_schedule
from cat_fast.generator.flops import forward_flops
from cat_fast.inference import CATPipeline
from cat_fast.inference.engine import EngineRequest
from cat_fast.inference.engine.cost import CostModel, median_seconds
from cat_fast.inference.engine.stages import Stages
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL

SATURATED_ROWS = 1000
"""Rows at which the simulated hardware saturates; the CPU saturates at fewer."""
SIMULATED_RATE = 1e14
"""FLOPs per second of the simulated hardware."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A machine or its model, and its capacity."""

    make_stages: Callable[[Clock, int], Stages]
    """Stages on a clock, filled up to multiples of some rows."""
    measure: Callable[[], float] | None
    pipeline: Any
    flops_per_second: float
    cost: CostModel
    """Predicts the engine's seconds."""
    decoding: Mapping[tuple[int, tuple[int, int]], float]
    """Seconds of the decoder per image, by ratio and grid."""

    def flops(self, request: EngineRequest) -> int:
        """Return the FLOPs of all steps of a request."""
        per_pass = forward_flops(self.pipeline.transformer).of(request.sample.num_tokens)
        return per_pass * request.passes * request.num_inference_steps

    def least_seconds(self, request: EngineRequest) -> float:
        """Return the seconds of a request at the FLOP bound."""
        decoding = self.decoding.get((request.sample.ratio, request.sample.grid), 0.0)
        return self.flops(request) / self.flops_per_second + decoding

    def capacity(self, requests: Sequence[EngineRequest]) -> float:
        """Return the images per second at the FLOP bound."""
        return 1 / statistics.mean(map(self.least_seconds, requests))


def untrained_pipeline() -> CATPipeline:
    """Return DiT-S and the nano tokenizer at 256 px, with random weights."""
    torch.manual_seed(0)
    tokenizer = build_model(NestedAutoencoderKL, tokenizer_run("nano_corpus").model)
    arguments = {"in_channels": 16, "hidden_size": 384, "depth": 12, "num_heads": 6, "position_frame": 16}
    transformer = DiT(**arguments)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return CATPipeline(tokenizer, transformer, paper_schedule(), resolution=RESOLUTION)


def decoding_times(pipeline: CATPipeline, repeats: int) -> dict[tuple[int, tuple[int, int]], float]:
    """Measure the decoder on an image of each ratio and grid of `MIXES`."""
    stages = Stages(pipeline)
    found = {}
    for ratio, side in {grid for mix in MIXES.values() for grid in mix.grids}:
        request = EngineRequest(sample=SampleRequest(label=0, ratio=ratio, grid=(side, side), seed=0))
        latent = stages.latent(stages.prepare(request))
        stages.decode([latent], ratio)  # warm-up
        found[ratio, (side, side)] = median_seconds(partial(stages.decode, [latent], ratio), repeats)
    return found


def rates(pipeline: CATPipeline, repeats: int) -> dict[str, Any]:
    """Measure rows per second against rows per step, and where co-batching stops paying."""
    stages = Stages(pipeline)
    flops = forward_flops(pipeline.transformer)
    points = []
    for rows in (16, 32, 64, 128, 256, 512, 1024, 2048):
        count = max(1, rows // 64)
        side = 8 if rows >= 64 else 4
        requests = [
            EngineRequest(
                sample=SampleRequest(label=0, ratio=16, grid=(side, rows // count // side), seed=i),
                guidance_scale=1.0,
            )
            for i in range(count)
        ]
        states = [stages.prepare(request) for request in requests]
        stages.denoise_step(states)
        seconds = median_seconds(partial(stages.denoise_step, states), repeats)
        total = sum(flops.of(state.request.num_tokens) for state in states)
        points.append(
            {
                "rows": rows,
                "seconds": seconds,
                "rows_per_second": rows / seconds,
                "flops_per_second": total / seconds,
            }
        )
    best = max(point["flops_per_second"] for point in points)
    saturated = next(point["rows"] for point in points if point["flops_per_second"] >= 0.95 * best)
    return {"points": points, "flops_per_second": best, "co_batching_stops_paying_at_rows": saturated}


def calibrated(pipeline: CATPipeline) -> CostModel:
    """Return a cost model measured on packs of 16 to 1,024 rows."""
    cost = CostModel(Stages(pipeline))
    packs = []
    for counts in ({4: 1}, {4: 2, 8: 1}, {4: 4, 8: 3}, {4: 8, 8: 6, 16: 2}):
        packs.append(
            [
                EngineRequest(
                    sample=SampleRequest(label=0, ratio=128 // side, grid=(side, side), seed=seed),
                    guidance_scale=1.0,
                )
                for side, count in counts.items()
                for seed in range(count)
            ]
        )
    cost.calibrate(packs)
    return cost


def simulated_bench(pipeline: CATPipeline) -> tuple[Bench, dict[str, Any]]:
    """Return hardware that saturates at `SATURATED_ROWS` rows of the transformer, and its curve."""
    full_step = SATURATED_ROWS * forward_flops(pipeline.transformer).of(64) / 64
    cost = CostModel(Stages(pipeline))
    cost.assume(SIMULATED_RATE, full_step)
    bench = Bench(
        make_stages=lambda clock, rows: SimulatedStages(pipeline, clock, SIMULATED_RATE, full_step),
        measure=None,
        pipeline=pipeline,
        flops_per_second=SIMULATED_RATE,
        cost=cost,
        decoding={},
    )
    return bench, {"model": f"seconds = max(FLOPs, those of {SATURATED_ROWS} rows) / rate"}


def measured_bench(pipeline: CATPipeline, repeats: int) -> tuple[Bench, dict[str, Any]]:
    """Measure this machine; return it and its curve of rows per second against rows per step."""
    curve = rates(pipeline, repeats)
    bench = Bench(
        make_stages=lambda clock, rows: Stages(pipeline, rows=rows),
        measure=time.perf_counter,
        pipeline=pipeline,
        flops_per_second=curve["flops_per_second"],
        cost=calibrated(pipeline),
        decoding=decoding_times(pipeline, repeats),
    )
    return bench, curve
