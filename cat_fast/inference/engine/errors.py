"""Reasons why the engine does not draw a valid request."""


class QueueFull(RuntimeError):
    """The limit of unfinished requests would be exceeded."""

    reason = "queue_full"

    def __init__(self, unfinished: int, limit: int, retry_after: float) -> None:
        super().__init__(
            f"{unfinished} requests are unfinished, the limit is {limit}; retry in {retry_after:.0f} s"
        )
        self.retry_after = retry_after
        """Predicted seconds until as many of them have finished as the new requests need places."""


class DeadlineUnreachable(RuntimeError):
    """The request would finish after its deadline."""

    reason = "deadline"

    def __init__(self, deadline: float, earliest: float) -> None:
        super().__init__(
            f"the deadline of {deadline:.3g} s cannot be met; the earliest possible time is {earliest:.3g} s"
        )
        self.earliest = earliest
        """Predicted seconds until it finishes, at the coarsest ratio that it allows; of several submitted
        together, until the last of those with a deadline does."""


class Draining(RuntimeError):
    """The engine finishes what it has and takes no further requests."""

    reason = "draining"

    def __init__(self) -> None:
        super().__init__("the engine is shutting down and takes no further requests")


class Cancelled(RuntimeError):
    """The request was cancelled before its image was complete."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"cancelled after {step} of {steps} steps")
        self.step = step
