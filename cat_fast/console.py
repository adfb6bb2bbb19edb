"""Console output: results on standard output, progress and errors on standard error."""

from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_error(message: object) -> None:
    """Print `error: MESSAGE` to standard error, on one line."""
    line = " ".join(str(message).split())
    err.print(Text("error: ", style="bold red").append(line, style="not bold default"), soft_wrap=True)


class NotedProgress(Progress):
    """Progress bars with the lines of `note` below, truncated to the terminal width."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            for line in self.note.splitlines():
                yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")


def progress(unit: str) -> NotedProgress:
    """Return a progress bar with count, rate in `unit` per second, elapsed time and time left.

    The bar is removed at the end, and disabled if standard error is not a terminal.
    """
    return NotedProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _RateAndTimeLeft(unit),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


class _RateAndTimeLeft(ProgressColumn):
    """Column with the mean rate since the start and the time left.

    Work arrives in batches, which make rich's own running rate jump.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit
        self._done_before: dict[TaskID, float] = {}

    def render(self, task: Task) -> Text:
        # Leave out the work of an earlier, interrupted run.
        before = self._done_before.setdefault(task.id, task.completed)
        done, elapsed = task.completed - before, task.finished_time or task.elapsed or 0.0
        if done <= 0 or elapsed <= 0:
            return Text(f"- {self.unit}/s, -:--:-- left")
        rate = done / elapsed
        left = "-:--:--" if task.remaining is None else timedelta(seconds=round(task.remaining / rate))
        return Text(f"{rate:.3g} {self.unit}/s, {left} left")
