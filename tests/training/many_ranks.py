"""Starting the ranks of a test without the launcher: a script as each of them, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from cat_fast.training.distributed import free_port


def run_ranks(script: Path, world_size: int, *arguments: object, timeout: int = 500) -> None:
    """Run a Python script as each of `world_size` ranks, on one thread each; none outlives the call."""
    base = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world_size, "\n".join(outputs)
