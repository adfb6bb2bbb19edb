"""Progress bars: rate and time left with batched work and after an interruption."""

import io

import pytest
from rich.console import Console

from cat_fast import console


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
