"""Console: progress bars, one-line errors, and output that no terminal, full disk or closed pipe can fail."""

import errno
import io
import os
import resource
import sys

import pytest
from rich.console import Console

from cat_fast import console
from cat_fast.console import SafeStream, safe_output


@pytest.fixture
def terminal(monkeypatch):
    """A wide terminal with a clock that the test sets."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=160, highlight=False)
    monkeypatch.setattr(console, "err", screen)
    return screen


def shown(bar, terminal: Console) -> str:
    with terminal.capture() as capture:
        terminal.print(bar.get_renderable())
    return capture.get()


@pytest.mark.parametrize("before", [0, 50])
def test_rate_and_time_left_use_the_work_of_this_run_only(terminal, before):
    bar = console.progress("images")
    now = 1000.0
    bar.get_time = lambda: now
    task = bar.add_task("encoding", total=100, completed=before)
    assert "- images/s, -:--:-- left" in shown(bar, terminal)
    now += 5
    for _ in range(10):  # a batch arrives at once
        bar.advance(task)
    text = shown(bar, terminal)
    assert f"{before + 10}/100" in text
    assert f"2 images/s, 0:00:{(90 - before) // 2:02d} left" in text


def test_nothing_is_drawn_if_stderr_is_not_a_terminal(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=pipe))
    with console.progress("images") as bar:
        bar.advance(bar.add_task("encoding", total=2))
    assert pipe.getvalue() == ""


def test_error_is_printed_on_one_line(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=pipe, width=20))
    console.print_error("[red]file[/red] is\n  broken " + "x" * 100)
    assert pipe.getvalue() == "error: [red]file[/red] is broken " + "x" * 100 + "\n"


NAME = "caf\u00e9 \u2713 \udce9.jpg"
"""A file name with an accent, a tick, and a byte that is not UTF-8."""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"caf? ? ?.jpg"), ("latin-1", b"caf\xe9 ? ?.jpg"), ("utf-8", "café ✓ \ufffd.jpg".encode())],
)
def test_characters_that_the_terminal_lacks_are_replaced(monkeypatch, encoding, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with safe_output():
        print(NAME)
        console.out.print(NAME)
    assert raw.getvalue() == (shown + b"\n") * 2


@pytest.mark.parametrize("target", ["full disk", "closed pipe"])
def test_output_that_cannot_be_written_is_reported_once(monkeypatch, target):
    if target == "full disk":
        raw = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        raw = open(writer, "wb", buffering=0)  # noqa: SIM115
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    monkeypatch.setattr(sys, "stderr", errors)
    with safe_output():
        for _ in range(3):
            console.out.print("result")
            print("x" * 100_000)
    sys.stdout.close()  # flushes, as Python does at exit
    expected = "error: standard output cannot be written (No space left on device)\n"
    assert errors.getvalue() == (expected if target == "full disk" else "")


def test_writing_resumes_when_there_is_room_again(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "log").open("w") as file:
        stream = SafeStream(file)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            print("lost " * 10, file=stream, flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        print(" kept", file=stream, flush=True)
    assert stream.error.errno == errno.EFBIG
    assert (tmp_path / "log").read_text() == "lost lost  kept\n"


def test_a_failed_standard_error_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))  # noqa: SIM115
    with safe_output():
        console.print_error("unreadable")
    sys.stderr.close()


def test_missing_streams_are_accepted(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with safe_output():
        console.out.print("nothing")
