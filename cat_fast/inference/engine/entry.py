"""One unfinished request in the engine."""

from dataclasses import dataclass

from cat_fast.generator.sampling import SamplingState
from cat_fast.inference.engine.cost import Cost
from cat_fast.inference.engine.forecast import Work
from cat_fast.inference.engine.handle import RequestHandle
from cat_fast.inference.engine.report import PackedRequest
from cat_fast.inference.engine.request import EngineRequest


@dataclass(kw_only=True, eq=False)
class Entry:
    """An unfinished request in the engine; see `order.Waiting`."""

    handle: RequestHandle
    request: EngineRequest
    """The request at the ratio that it is drawn at."""
    cost: Cost
    number: int
    arrived: float
    last_step: int
    state: SamplingState | None = None
    started: float | None = None
    alone: bool = True
    """Whether no other request has been in the engine at the same time."""

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def rows(self) -> int:
        return self.request.passes * self.request.sample.num_tokens

    @property
    def remaining_steps(self) -> int:
        return self.handle.record.steps - self.handle.record.steps_done

    @property
    def remaining_seconds(self) -> float:
        return self.cost.step_seconds * self.remaining_steps

    @property
    def work(self) -> Work:
        decoding = self.cost.seconds - self.cost.step_seconds * self.handle.record.steps
        return Work(self.remaining_steps, self.rows, self.cost.step_flops, decoding)

    @property
    def place(self) -> PackedRequest:
        """Its place in the step that has just run."""
        record = self.handle.record
        return PackedRequest(
            id=self.handle.id,
            ratio=record.ratio,
            tokens=record.tokens,
            passes=self.request.passes,
            step=record.steps_done,
            steps=record.steps,
        )

    @property
    def has_left(self) -> bool:
        """True once no further step is needed."""
        return self.handle.done() or self.handle.status == "decoding"
