"""Report of one step of the engine."""

from dataclasses import dataclass, fields

from cat_fast.generator.sampling import SamplingState
from cat_fast.inference.engine.handle import RequestHandle


@dataclass(frozen=True, kw_only=True)
class PackedRequest:
    """One request's place in a step."""

    id: int
    ratio: int
    tokens: int
    passes: int
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """One step of the engine in numbers."""

    number: int
    requests: tuple[PackedRequest, ...]
    left_out: int
    """Number of unfinished requests that did not fit."""
    rows: int
    """Tokens, twins counted, padding not counted."""
    filled_rows: int
    """Tokens of the forward passes, padding counted."""
    max_rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepReport(StepSummary):
    """One step of the engine, with its requests and their states after it."""

    handles: tuple[RequestHandle, ...]
    states: tuple[SamplingState, ...]

    @property
    def summary(self) -> StepSummary:
        """The numbers, which keep no image alive."""
        return StepSummary(**{one.name: getattr(self, one.name) for one in fields(StepSummary)})
