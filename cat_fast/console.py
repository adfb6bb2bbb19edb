"""How the program speaks: results on standard output, progress and errors on standard error."""

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
    """`error: MESSAGE` on standard error, on one line however long."""
    line = " ".join(str(message).split())
    err.print(Text("error: ", style="bold red").append(line, style="not bold default"), soft_wrap=True)


class NotedProgress(Progress):
    """Bars, and below them lines that say `note`, cut off where the terminal ends."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            for line in self.note.splitlines():
                yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")


def progress(unit: str) -> NotedProgress:
    """A bar with count, rate in `unit` a second, time so far and time left.

    It clears itself at the end, and where nobody watches (standard error is no terminal) it keeps quiet.
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
    """Both from the mean since the start: work comes in batches, over which rich's own running rate leaps."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit
        self._done_before: dict[TaskID, float] = {}

    def render(self, task: Task) -> Text:
        # What an earlier, interrupted run has done says nothing about the speed of this one.
        before = self._done_before.setdefault(task.id, task.completed)
        done, elapsed = task.completed - before, task.finished_time or task.elapsed or 0.0
        if done <= 0 or elapsed <= 0:
            return Text(f"- {self.unit}/s, -:--:-- left")
        rate = done / elapsed
        left = "-:--:--" if task.remaining is None else timedelta(seconds=round(task.remaining / rate))
        return Text(f"{rate:.3g} {self.unit}/s, {left} left")
