"""Distribution of tests over workers, tests of compiled Triton kernels, the warning of a slow session."""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

RANK_TESTS = (
    "tests/training/",
    "tests/demo/test_story.py",
    "tests/inference/encoding/test_shard_processes.py",
    "tests/test_launch_scripts.py",
)
LIMIT_SECONDS = 20 * 60
"""A session of the ordinary tests should take no longer on two cores, whatever the processor."""


class ByFile(LoadScopeScheduling):
    """Scheduler that assigns tests to workers by file; all files that start ranks are one unit, run first.

    Ranks are processes with one thread each, so two tests that start ranks would slow each other down.
    Session and module fixtures, such as training runs on two ranks, are set up on one worker only.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "ranks" if path.startswith(RANK_TESTS) else path


def triton_is_compiled() -> bool:
    """Return True if Triton kernels run on a GPU in this session, rather than in the interpreter."""
    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def runs_triton(test: Callable) -> Callable:
    """Mark a test of Triton kernels as a gpu test where they are compiled, as `mark_compiled_triton` does."""
    return pytest.mark.gpu(test) if triton_is_compiled() else test


def mark_compiled_triton(items: Iterable[Any]) -> None:
    """Mark cases named triton as gpu tests where its kernels are compiled; skip those of CPU tensors."""
    if not triton_is_compiled():
        return
    for item in items:
        case = re.split(r"[\W_]", item.name.partition("[")[2])
        if "triton" in case and "cpu" in case:
            item.add_marker(
                pytest.mark.skip(reason="Triton's interpreter is not used where a GPU is present")
            )
        elif "triton" in case:
            item.add_marker(pytest.mark.gpu)


def worker_threads() -> int | None:
    """Return the number of threads per worker at which all workers together use each core once.

    None without workers.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, len(os.sched_getaffinity(0)) // workers) if workers > 1 else None


def slow_session_warning(seconds: float) -> str | None:
    """Return a warning with the machine's features if a session exceeded `LIMIT_SECONDS`, else None."""
    if seconds <= LIMIT_SECONDS:
        return None
    try:
        from cat_fast._bindings import cpu_features

        features = " ".join(name for name, present in cpu_features().items() if present)
    except ImportError:
        features = "unknown features: the package is built without C++"
    return (
        f"warning: the tests took {seconds / 60:.1f} minutes, more than {LIMIT_SECONDS // 60}, on "
        f"{len(os.sched_getaffinity(0))} cores; torch uses {torch.backends.cpu.get_cpu_capability()}, "
        f"the processor has {features}"
    )
