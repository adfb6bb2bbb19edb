"""Goals of the engine against the other schedules, by load."""

import math
from collections.abc import Mapping
from typing import Any

BASELINES = ("dynamic_batching", "fifo_step_batching", "deficit_round_robin")


def goals(
    median: Mapping[str, Mapping[str, float]], load: float, *, predicted: bool
) -> dict[str, dict[str, Any]]:
    """Return the goals of a load with the values reached.

    `predicted` goals of throughput are those of hardware that saturates at 1,000 rows. On a CPU, every
    schedule that always works ends at the FLOP bound.
    """
    ours, a, b, c = (median[name] for name in ("engine", *BASELINES))
    noise = abs(median["engine_again"]["images_per_second"] / ours["images_per_second"] - 1)

    def ratio(column: str, other: Mapping[str, float]) -> float:
        if ours[column] == other[column]:  # also if both are 0
            return 1.0
        return ours[column] / other[column] if other[column] else math.inf

    found: dict[str, tuple[float, float, bool]] = {}
    if load >= 2:
        least = (1.1, 2.0, 1.3) if predicted else (1 - noise, 1.03, 1 - noise)
        for name, other, goal in zip(BASELINES, (a, b, c), least, strict=True):
            value = ratio("images_per_second", other)
            found[f"throughput over {name}"] = (value, goal, value >= goal)
        found["share of the FLOP bound"] = (ours["of_flop_bound"], 0.9, ours["of_flop_bound"] >= 0.9)
        found["fill while requests wait"] = (ours["fill_waiting"], 0.9, ours["fill_waiting"] >= 0.9)
    if load == 0.8:
        for name, other, goal in zip(BASELINES, (a, b, c), (1.5, 1.5, 1.15), strict=True):
            value = ratio("within_three_times_alone", other)
            found[f"share within three times alone over {name}"] = (value, goal, value >= goal)
        for column in ("p50", "p95"):
            for name, other in (("dynamic_batching", a), ("fifo_step_batching", b)):
                value = ratio(column, other)
                found[f"{column} over {name}"] = (value, 0.6, value <= 0.6)
        value = median["engine_fifo_packed"]["p99"] / b["p99"]
        found["p99 of the FIFO order over fifo_step_batching"] = (value, 1.0, value <= 1.0)
        if not predicted:
            for column, goal in (("prediction_error_alone", 0.1), ("prediction_error_shared", 0.25)):
                found[column] = (ours[column], goal, ours[column] <= goal)
    if not predicted:  # simulated time passes in steps only
        found["overhead"] = (ours["overhead"], 0.05, ours["overhead"] < 0.05)
    return {name: {"value": value, "goal": goal, "met": met} for name, (value, goal, met) in found.items()}
