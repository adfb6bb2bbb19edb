"""pytest plugin that appends each test's outcome to a file as the test ends."""

import os
from pathlib import Path
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Append `passed NAME`, `failed NAME` or `skipped NAME`; xdist reports to its controller."""
    path = os.environ.get("GPU_CHECK_OUTCOMES")
    if path is None or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when == "call" or report.outcome != "passed":
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")
