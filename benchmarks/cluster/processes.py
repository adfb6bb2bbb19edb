"""Runs of the tokenizer's training on one or two processes, and the bandwidth of the link between two.

Everything goes through the real training command, so that a step includes all that a run does.
"""

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cat_fast.processes.group import running

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/tokenizer/nano.yaml"
SKIPPED_STEPS = 3
"""First steps, which also set up."""
LINK_SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 24)
"""Elements of the all-reduces that measure the link."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration of a short run."""

    name: str
    batch: int
    """Images per rank."""
    width: int = 1
    """Factor on all channels."""
    shares: Mapping[int, float]
    side: int = 64
    steps: int = 15

    @property
    def channels(self) -> list[int]:
        """Channels of the blocks."""
        return [32 * self.width] * 4 + [64 * self.width] * 2

    def overrides(self, folder: Path, stage: int) -> list[str]:
        """Return the settings of the run; GAN and networks in the loss are off, so that ZeRO 3 works."""
        shares = ", ".join(f"{ratio}: {self.shares.get(ratio, 0.0)}" for ratio in (8, 16, 32))
        return [
            f"output_dir={folder}",
            f"deepspeed=deepspeed/zero{stage}.json",
            f"model.block_out_channels={self.channels}",
            "model.initialisation=default",
            f"data.image_size={self.side}",
            f"data.batch_size={self.batch}",
            f"sampler.shares={{{shares}}}",
            "sampler.pool=all",
            "loss.gan_weight=0",
            "loss.perceptual_weight=0",
            f"schedule.total_steps={self.steps}",
            "schedule.warmup_steps=1",
            "checkpoint.every_steps=100000",
            "logging.grid_every_steps=0",
            "logging.scalars_every_steps=1",
            "evaluation.every_steps=0",
        ]


def step_seconds(setting: Setting, folder: Path, ranks: int, stage: int) -> float:
    """Return the median seconds of a step of a run on one thread per process.

    Raises:
        RuntimeError: a process failed.
    """
    command = [sys.executable, "-m", "cat_fast.train", str(CONFIG), *setting.overrides(folder, stage)]
    _run_ranks(command, ranks)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return statistics.median(seconds[SKIPPED_STEPS:])


def measure_link() -> dict[int, float]:
    """Return the median seconds of an all-reduce between two processes, by number of fp32 elements."""
    output = _run_ranks([sys.executable, "-m", "benchmarks.cluster.processes"], 2)
    return {int(size): float(seconds) for size, seconds in json.loads(output).items()}


def _run_ranks(command: Sequence[str], ranks: int) -> str:
    """Run a command once per rank with torch's variables; return the last line of rank 0's output.

    Raises:
        RuntimeError: a rank failed; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = []
        for rank in range(ranks):
            variables = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            output, errors = (
                stack.enter_context((folder / f"{kind}_{rank}").open("w")) for kind in ("out", "err")
            )
            options = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": errors}
            processes.append(stack.enter_context(running(command, **options)))
        while any(process.poll() is None for process in processes) and not any(
            process.poll() for process in processes
        ):
            time.sleep(0.1)
        for rank, process in enumerate(processes):
            if process.poll():
                message = (folder / f"err_{rank}").read_text(encoding="utf-8", errors="replace").strip()
                raise RuntimeError(f"{' '.join(command[1:4])} failed on rank {rank}: {message[-2000:]}")
        lines = (folder / "out_0").read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else ""


def _link_rank() -> None:
    """Time all-reduces on one of two ranks; rank 0 prints the medians."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for size in LINK_SIZES:
        tensor, seconds = torch.ones(size), []
        for _ in range(9):
            torch.distributed.barrier()
            start = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            seconds.append(time.perf_counter() - start)
            tensor.fill_(1.0)
        found[size] = statistics.median(seconds)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _link_rank()
