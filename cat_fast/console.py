"""Console output: results on standard output, progress and errors on standard error.

Output never fails a command: `safe_output` replaces characters that a terminal cannot show, and drops what a
full disk or a closed pipe does not accept.
"""

import codecs
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TextIO

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


def print_json(content: object) -> None:
    """Print a JSON value to standard output, in ASCII."""
    print(json.dumps(content, indent=2))


@contextmanager
def safe_output() -> Iterator[None]:
    """Make standard output and error `SafeStream`s until the end of the context.

    If standard output could not be written, one line on standard error reports it; the exit code stays that
    of the work. A closed pipe, as of `| head`, is not reported.
    """
    before = sys.stdout, sys.stderr
    stdout, stderr = map(_safe, before)
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield
    finally:
        for stream in (stdout, stderr):
            if stream is not None:
                stream.flush()
        error = getattr(stdout, "error", None)
        if error is not None and error.errno != errno.EPIPE:
            print_error(f"standard output cannot be written ({error.strerror or error})")
        sys.stdout, sys.stderr = before


class SafeStream:
    """A text stream whose writes never fail.

    Characters that its encoding lacks are replaced, such as lone surrogates in file names with invalid bytes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """The first failure to write, if any."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"expected str, got {type(text).__name__}")
        self._attempt(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _encodable(self, text: str) -> str:
        encoding = self._stream.encoding or "utf-8"
        return text.encode(encoding, _REPLACE).decode(encoding)

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self.error = self.error or error
            self._drop_pending()

    def _drop_pending(self) -> None:
        """Empty the buffer, which otherwise fails every later write and Python's own at exit."""
        with suppress(OSError, ValueError):  # a stream without a descriptor
            descriptor = self._stream.fileno()
            kept, null = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, descriptor)
                self._stream.flush()
            finally:
                os.dup2(kept, descriptor)
                os.close(kept)
                os.close(null)


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


def _safe(stream: TextIO | None) -> Any:
    """Return a stream as a `SafeStream`; None, in a process without the stream, stays None."""
    return stream if stream is None or isinstance(stream, SafeStream) else SafeStream(stream)


def _replace(error: UnicodeError) -> tuple[bytes, int]:
    """Replace characters by U+FFFD, or by question marks where the encoding lacks that, too."""
    assert isinstance(error, UnicodeEncodeError)
    marks = "\ufffd" * (error.end - error.start)
    return marks.encode(error.encoding, "replace"), error.end


_REPLACE = "cat_fast.replace"
codecs.register_error(_REPLACE, _replace)
