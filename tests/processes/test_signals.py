"""Signals as exceptions of the main thread: none is lost."""

import os
import signal

import pytest

from cat_fast.processes.signals import SIGNALS, Interrupted, deferred, interruptible, run_command


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_is_an_interruption_with_the_exit_code_of_shells(kind, capsys):
    def main() -> int:
        os.kill(os.getpid(), kind)
        return 0

    before = signal.getsignal(kind)
    assert run_command(main) == 128 + kind
    assert capsys.readouterr().err == f"interrupted ({kind.name}): no partially written files remain\n"
    assert signal.getsignal(kind) is before


class Signals:
    """Object that gets a signal while it is deleted, where Python ignores exceptions."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_arrives_in_a_callback_is_raised_after_it():
    with interruptible():
        Signals()
        with pytest.raises(Interrupted, match="SIGTERM"):
            signal.pause()


def test_a_deferred_signal_is_raised_at_the_end_of_the_context():
    steps = []

    def defer() -> None:
        with deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            steps.append("completed")

    with interruptible(), pytest.raises(Interrupted, match="SIGHUP"):
        defer()
    assert steps == ["completed"]
