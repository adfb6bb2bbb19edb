"""Estimate of the time that a demo will take, from the first steps of its trainings.

The measured seconds per step, relative to those of the run in docs/demo_metrics.json, give the speed of this
machine. The phases that follow are assumed to take as long as in that run, at this speed.
"""

from collections.abc import Mapping, Sequence

_WARM_UP_STEPS = 2
_MEASURED_STEPS = 8
KINDS = ("tokenizer", "generator")
REFERENCE_STEPS = {"tokenizer": 400, "generator": 900, "sampling": 50}
REFERENCE_TRAINING = {"tokenizer": 280.7, "generator": 621.2}
"""Seconds that all steps of the reference run took."""
REFERENCE_PHASES = {
    "train_tokenizer": 308.3,
    "encode": 189.7,
    "train_generator": 647.7,
    "reconstruct": 83.4,
    "sample": 120.3,
}
"""Seconds that each phase of the reference run took, including the start of the ranks."""
REFERENCE_RESOLUTION, REFERENCE_CROPS = 512, 4


def seconds_per_step(records: Sequence[Mapping[str, float]], first: int) -> float | None:
    """Return the mean over the first steps from `first` on, after a warm-up; None before they are logged.

    Args:
        records: metrics of the training run, one per step.
    """
    measured = [record["seconds"] for record in records if record["step"] >= first + _WARM_UP_STEPS]
    if len(measured) < _MEASURED_STEPS:
        return None
    return sum(measured[:_MEASURED_STEPS]) / _MEASURED_STEPS


def seconds_left(
    kind: str,
    per_step: float,
    steps_left: Mapping[str, int],
    *,
    sampling_steps: int,
    resolution: int,
    crops_per_image: int,
) -> float:
    """Return the estimated seconds until the demo is complete.

    Args:
        kind: training whose steps were measured, "tokenizer" or "generator".
        per_step: measured seconds per step.
        steps_left: steps of the trainings that are not complete, by kind.
    """
    slower = per_step / _per_step(kind)
    total = 0.0
    for name in KINDS[KINDS.index(kind) :]:
        steps = steps_left.get(name, 0)
        total += steps * (per_step if name == kind else slower * _per_step(name))
        if steps and name != kind:
            total += REFERENCE_PHASES[f"train_{name}"] - REFERENCE_TRAINING[name]
    pixels = (resolution / REFERENCE_RESOLUTION) ** 2
    if kind == "tokenizer":
        total += slower * pixels * REFERENCE_PHASES["encode"] * crops_per_image / REFERENCE_CROPS
    total += slower * pixels * REFERENCE_PHASES["reconstruct"]
    total += slower * pixels * REFERENCE_PHASES["sample"] * sampling_steps / REFERENCE_STEPS["sampling"]
    return total


def format_duration(seconds: float) -> str:
    """Format a duration as minutes, or as seconds below two minutes."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _per_step(kind: str) -> float:
    return REFERENCE_TRAINING[kind] / REFERENCE_STEPS[kind]
