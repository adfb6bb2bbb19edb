"""Setup of every test session: signals, Triton's interpreter, threads, workers, duration warning."""

import os
import sys
import time
from contextlib import ExitStack

import pytest
import torch

from cat_fast.processes.ending import descendants, end_processes
from cat_fast.processes.signals import interruptible
from tests.session import ByFile, slow_session_warning, worker_threads

STARTED = pytest.StashKey[float]()
INTERRUPTIBLE = pytest.StashKey[ExitStack]()

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported
if (threads := worker_threads()) is not None:
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of commands that tests start


@pytest.fixture(autouse=True)
def choices_of_backends_are_forgotten() -> None:
    """Forget chosen backends: tests change what they depend on, such as the GPUs that are there."""
    if (backends := sys.modules.get("cat_fast.kernels.backends")) is not None:
        backends.forget_choices()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()
    config.stash[INTERRUPTIBLE] = stack = ExitStack()
    stack.enter_context(interruptible())


def pytest_keyboard_interrupt() -> None:
    """End everything that tests have started, before xdist kills its workers, which could not do so."""
    end_processes(descendants)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[INTERRUPTIBLE].close()


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile | None:
    return None if config.getoption("dist") == "worksteal" else ByFile(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    warning = slow_session_warning(time.monotonic() - config.stash[STARTED])
    if warning is not None:
        terminalreporter.write_line(warning, yellow=True)
