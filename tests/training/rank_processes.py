"""Ranks of a test as processes of their own, started without the launcher.

    outputs = run_ranks("tests.training.health.test_nan_guard:skip_on_rank", 2, tmp_path)

starts two processes that call `skip_on_rank(tmp_path)`, its arguments as text, with RANK and what else a
process group needs in their environment. Decoding processes import this module, so torch is imported late.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cat_fast.training.runtime.ranks import Ranks

ROOT = Path(__file__).parents[2]


class RankProcess(subprocess.Popen):
    """A process whose output goes to a file: one whose pipe is full would keep the other ranks waiting."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 # closed with the process's other files
        super().__init__(command, cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        """Return the last of what it has printed."""
        self.log.seek(0)
        return self.log.read()[-20_000:]


def run_ranks(
    function: str, world_size: int, *arguments: object, code: int = 0, timeout: float = 500
) -> list[str]:
    """Run a function on each rank, on one thread each, and return what each printed.

    All must exit with `code`.
    """
    with started_ranks(function, world_size, *arguments) as ranks:
        codes = [rank.wait(timeout) for rank in ranks]
        outputs = [rank.output() for rank in ranks]
    assert codes == [code] * world_size, "\n".join(outputs)
    return outputs


@contextmanager
def started_ranks(function: str, world_size: int, *arguments: object) -> Iterator[list[RankProcess]]:
    """Start a function on each rank; none outlives the context, and outputs of hanging ones are shown."""
    from cat_fast.training.runtime.ranks import free_port

    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "tests.training.rank_processes", function, *map(str, arguments)]
    ranks = [
        RankProcess(command, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    try:
        yield ranks
    except subprocess.TimeoutExpired:
        print(*(rank.output() for rank in ranks), sep="\n")
        raise
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.log.close()


def gloo_ranks() -> "Ranks":
    """Join this process to the others, without DeepSpeed and the time it takes to import."""
    import torch

    from cat_fast.training.runtime.ranks import Ranks

    torch.distributed.init_process_group("gloo")
    return Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    try:
        getattr(importlib.import_module(module), name)(*sys.argv[2:])
    finally:  # left to the interpreter's end, gloo's threads have been seen to abort the process
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
