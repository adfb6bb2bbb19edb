"""Setup of every test session: Triton's interpreter, threads, distribution over workers, duration warning."""

import os
import time

import pytest
import torch

from tests.session import ByFile, slow_session_warning, worker_threads

STARTED = pytest.StashKey[float]()

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported
if (threads := worker_threads()) is not None:
    torch.set_num_threads(threads)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    warning = slow_session_warning(time.monotonic() - config.stash[STARTED])
    if warning is not None:
        terminalreporter.write_line(warning, yellow=True)
