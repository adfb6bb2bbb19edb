"""Runs of training on one or two processes, and micro-benchmarks of the link and of AdamW.

Everything that trains goes through the real training command, so that a step includes all that a run does.
"""

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.cluster.settings import SKIPPED_STEPS, Batch, Setting
from cat_fast.processes.group import running

ROOT = Path(__file__).parents[2]
LINK_SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 24)
"""Elements of the collectives that measure the link."""
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
OPTIMIZER_SIZES = (1 << 18, 1 << 22)
"""Elements of the tensors whose updates are timed."""
REPEATS = 9


def step_seconds(setting: Setting, folder: Path, ranks: int, stage: int, seed: int) -> float:
    """Return the mean seconds of a step of a run on one thread per process.

    Raises:
        RuntimeError: a process failed.
    """
    setting.prepare(folder)
    run = folder / "run"
    command = [
        *(sys.executable, "-m", "cat_fast.train", str(setting.config)),
        *setting.overrides(folder),
        f"output_dir={run}",
        f"seed={seed}",
        f"deepspeed=deepspeed/zero{stage}.json",
        "schedule.warmup_steps=1",
        "linear_backend=mkl",  # not the choice of each run by itself
        "checkpoint.every_steps=100000",
        "logging.scalars_every_steps=1",
        "evaluation.every_steps=0",
    ]
    _run_ranks(command, ranks)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return typical_seconds(seconds[SKIPPED_STEPS:], setting.draws(ranks, seed))


def typical_seconds(seconds: Sequence[float], draws: Sequence[tuple[Batch, ...]]) -> float:
    """Return the mean over steps of the median of all steps with the same batches.

    A step that was disturbed then counts as much as the others, and the mix of batches stays that of the run.
    """
    kinds = [tuple(sorted(draw)) for draw in draws]
    medians = {
        kind: statistics.median(taken for taken, other in zip(seconds, kinds, strict=True) if other == kind)
        for kind in kinds
    }
    return statistics.fmean(medians[kind] for kind in kinds)


def measure_link() -> dict[str, dict[int, float]]:
    """Return the median seconds of each collective between two processes, by number of fp32 elements."""
    output = json.loads(_run_ranks([sys.executable, "-m", "benchmarks.cluster.processes", "link"], 2))
    return {
        name: {int(size): float(seconds) for size, seconds in by_size.items()}
        for name, by_size in output.items()
    }


def measure_optimizer() -> dict[int, float]:
    """Return the median seconds of AdamW's update of one flat tensor, as under ZeRO, by its elements."""
    output = json.loads(_run_ranks([sys.executable, "-m", "benchmarks.cluster.processes", "optimizer"], 1))
    return {int(size): float(seconds) for size, seconds in output.items()}


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
    """Time collectives on one of two ranks; rank 0 prints the medians."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for name in COLLECTIVES:
        found[name] = {size: _median_seconds(_collective(name, size)) for size in LINK_SIZES}
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


def _collective(name: str, size: int) -> Callable[[], object]:
    """Return a function that runs a collective on complete tensors of `size` elements, after a barrier."""
    import torch
    from torch import distributed

    complete, half = torch.zeros(size), torch.zeros(size // 2)
    runs: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: distributed.all_reduce(complete),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(half, complete),
        "all_gather": lambda: distributed.all_gather_into_tensor(complete, half),
    }
    return runs[name]


def _median_seconds(run: Callable[[], object]) -> float:
    """Return the median time of a function, which all ranks start together."""
    import torch

    seconds = []
    for _ in range(REPEATS):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _time_optimizer() -> None:
    """Time AdamW on one thread and print the medians."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for size in OPTIMIZER_SIZES:
        weights = torch.zeros(size, requires_grad=True)
        weights.grad = torch.zeros(size)
        found[size] = _median_seconds(torch.optim.AdamW([weights]).step)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    {"link": _link_rank, "optimizer": _time_optimizer}[sys.argv[1]]()
