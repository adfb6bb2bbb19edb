"""Ranks of a test as separate processes, started without the launcher.

    outputs = run_ranks("tests.training.health.test_nan_guard:skip_on_rank", 2, tmp_path)

starts two processes that call `skip_on_rank(tmp_path)` with its arguments as text, and with RANK and the
other variables of a process group in their environment. They are forked from one server per session that has
already imported the training code, which would take each rank seven seconds. Decoder processes import this
module, so torch is imported late.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cat_fast.training.runtime.ranks import Ranks

ROOT = Path(__file__).parents[2]
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Variables that libraries read at import, so the server needs them."""
PRELOADED = [
    "deepspeed",
    "cat_fast.training.loop",
    "cat_fast.training.tasks",
    "tests.training.rank_processes",
]


class RankProcess:
    """A process that writes its output to a file: a full pipe would block it, and the other ranks with it."""

    def __init__(self, function: str, arguments: list[str], environment: dict[str, str]) -> None:
        descriptor, path = tempfile.mkstemp(prefix="rank", suffix=".log")
        os.close(descriptor)
        self.log = Path(path)
        self.process = _fork_server().Process(
            target=_run, args=(function, arguments, environment, path), daemon=False
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def output(self) -> str:
        """Return the last 20,000 characters of its output."""
        return self.log.read_text(errors="replace")[-20_000:]

    def poll(self) -> int | None:
        """Return the exit code, or None while the process is running."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process and return its exit code; raise subprocess.TimeoutExpired after `timeout`."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """Kill the process and delete its log."""
        self.process.kill()
        self.process.join()
        self.log.unlink()


def run_ranks(
    function: str, world_size: int, *arguments: object, code: int = 0, timeout: float = 500
) -> list[str]:
    """Run a function on each rank with one thread; return the outputs. All ranks must exit with `code`."""
    with started_ranks(function, world_size, *arguments) as ranks:
        codes = [rank.wait(timeout) for rank in ranks]
        outputs = [rank.output() for rank in ranks]
    assert codes == [code] * world_size, "\n".join(outputs)
    return outputs


@contextmanager
def started_ranks(function: str, world_size: int, *arguments: object) -> Iterator[list[RankProcess]]:
    """Start a function on each rank; kill the ranks at exit, and print their outputs after a timeout."""
    from cat_fast.training.runtime.ranks import free_port

    environment = {
        **os.environ,
        **SERVER_ENVIRONMENT,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    ranks = [
        RankProcess(
            function, list(map(str, arguments)), environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(world_size)
    ]
    try:
        yield ranks
    except subprocess.TimeoutExpired:
        print(*(rank.output() for rank in ranks), sep="\n")
        raise
    finally:
        for rank in ranks:
            rank.close()


def gloo_ranks() -> "Ranks":
    """Join the process group without DeepSpeed."""
    import torch

    from cat_fast.training.runtime.ranks import Ranks

    torch.distributed.init_process_group("gloo")
    return Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = {name: os.environ.get(name) for name in SERVER_ENVIRONMENT}
    os.environ.update(SERVER_ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _run(function: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Run a function as a rank, then skip interpreter shutdown, in which gloo's threads may abort."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    module, _, name = function.partition(":")
    code: object = 0
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except SystemExit as exit_:
        code = exit_.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
