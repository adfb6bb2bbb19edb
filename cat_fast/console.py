"""How the program speaks: results on standard output, progress and errors on standard error."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_error(message: object) -> None:
    """`error: MESSAGE` on standard error, on one line however long."""
    line = " ".join(str(message).split())
    err.print(Text("error: ", style="bold red").append(line, style="not bold default"), soft_wrap=True)


def progress(unit: str) -> Progress:
    """A bar with count, rate in `unit` a second, time so far and time left.

    It clears itself at the end, and where nobody watches (standard error is no terminal) it keeps quiet.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            f"{speed:.1f} {self.unit}/s" if speed else f"- {self.unit}/s", style="progress.data.speed"
        )
