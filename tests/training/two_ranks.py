"""Runs a function of a test file on two ranks, without the launcher.

    outputs = on_two_ranks("tests.training.health.test_nan_guard:rank_skips", tmp_path)

starts two processes that call `rank_skips(tmp_path)`, its arguments as text, with RANK and what else a
process group needs in their environment.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from cat_fast.training.runtime.ranks import Ranks, free_port

ROOT = Path(__file__).parents[2]


def on_two_ranks(function: str, *arguments: object, codes: tuple[int, int] = (0, 0)) -> list[str]:
    """What the ranks print, after both ended with the expected exit codes."""
    ranks = start_two_ranks(function, *arguments)
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert tuple(rank.returncode for rank in ranks) == codes, "\n".join(outputs)
    return outputs


def start_two_ranks(function: str, *arguments: object) -> list[subprocess.Popen]:
    base = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.two_ranks", function, *map(str, arguments)],
            cwd=ROOT,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]


def gloo_ranks() -> Ranks:
    """This process among the ranks, without DeepSpeed and the time it takes to import."""
    torch.distributed.init_process_group("gloo")
    return Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    try:
        getattr(importlib.import_module(module), name)(*sys.argv[2:])
    finally:  # left to the interpreter's end, gloo's threads have been seen to abort the process
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
