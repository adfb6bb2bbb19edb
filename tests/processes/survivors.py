"""Processes that are still running."""

import time
from collections.abc import Callable
from pathlib import Path


def processes_naming(path: Path) -> list[str]:
    """Return the command lines that contain a path, as each process of a test in this folder has it."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = cmdline.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(path) in text:
            found.append(text)
    return found


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Wait until a condition holds; return False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
