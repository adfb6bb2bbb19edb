"""Starting the ranks of a test without the launcher: a script as each of them, in processes of their own."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cat_fast.training.runtime.ranks import free_port


def run_ranks(script: Path, world_size: int, *arguments: object, timeout: int = 500) -> list[str]:
    """Run a Python script as each of `world_size` ranks, on one thread each; none outlives the call.

    Returns what each of them printed, the last of it.
    """
    base = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    # Files, not pipes: a rank whose pipe is full waits for its reader, and the others wait for that rank.
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world_size)]
        workers = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [worker.wait(timeout) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
            for log in logs:
                log.seek(0)
            outputs = [log.read()[-20_000:] for log in logs]
        assert codes == [0] * world_size, "\n".join(outputs)
    return outputs
