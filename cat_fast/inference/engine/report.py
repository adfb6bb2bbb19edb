"""Report of one step of the engine."""

from dataclasses import dataclass

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
class StepReport:
    """One step of the engine: its requests, rows and time."""

    number: int
    handles: tuple[RequestHandle, ...]
    states: tuple[SamplingState, ...]
    requests: tuple[PackedRequest, ...]
    left_out: int
    """Number of unfinished requests that did not fit."""
    rows: int
    """Tokens, twins counted, padding not counted."""
    filled_rows: int
    """Tokens of the forward passes, padding counted."""
    max_rows: int
    seconds: float
