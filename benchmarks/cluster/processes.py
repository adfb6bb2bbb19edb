"""Runs of training on one or two processes, and micro-benchmarks of the link and of AdamW.

Everything that trains goes through the real training command, so that a step includes all that a run does.
Each process has a core of its own. Whatever runs on one process is started together with a copy on the other
core: ranks of a machine share its caches and the bandwidth of its memory, whether they communicate or not.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.cluster.settings import SKIPPED_STEPS, Batch, Setting
from cat_fast.errors import UserError
from cat_fast.processes.group import running
from cat_fast.training.runtime.ranks import free_port

ROOT = Path(__file__).parents[2]
CORES = 2
"""Cores in use: one per process."""
_THIS = (sys.executable, "-m", "benchmarks.cluster.processes")
LINK_SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 24)
"""Elements of the collectives that measure the link."""
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
TOGETHER = "all_gather, together"
"""Name of all-gathers that are launched together."""
TOGETHER_CALLS = (16, 64)
TOGETHER_SIZES = (1 << 8, 1 << 15)
"""Numbers of calls that are launched together, and elements of each."""
OPTIMIZER_SIZES = (1 << 18, 1 << 22)
"""Elements of the tensors whose updates are timed."""
REPEATS = 31
Timings = list[tuple[int, int, float]]
"""Numbers of calls, fp32 elements of the complete tensors in all of them, and the median seconds."""


def step_seconds(setting: Setting, folder: Path, ranks: int, stage: int, seed: int) -> float:
    """Return the mean seconds of a step of a run on one thread per process.

    If `ranks` is 1, that of the copy which is slower in each step: ranks wait for each other.

    Raises:
        RuntimeError: a process failed.
        UserError: there are fewer than two cores.
    """
    setting.prepare(folder)
    runs = [folder / f"run_{number}" for number in range(CORES // ranks)]
    _run_ranks([_training(setting, folder, run, stage, seed) for run in runs], ranks)
    slower = [max(copies) for copies in zip(*map(_seconds, runs), strict=True)]
    return typical_seconds(slower, setting.draws(ranks, seed))


def _training(setting: Setting, folder: Path, run: Path, stage: int, seed: int) -> list[str]:
    return [
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


def _seconds(run: Path) -> list[float]:
    """Return the seconds of each measured step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["seconds"] for line in lines][SKIPPED_STEPS:]


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


def measure_link() -> dict[str, Timings]:
    """Return the times of collectives between two processes, one at a time and launched together."""
    (output,) = map(json.loads, _run_ranks([[*_THIS, "link"]], CORES))
    return {name: [tuple(one) for one in timings] for name, timings in output.items()}


def measure_optimizer() -> dict[int, float]:
    """Return the median seconds of AdamW's update of one flat tensor, as under ZeRO, by its elements.

    Two processes update at the same time.
    """
    (output,) = map(json.loads, _run_ranks([[*_THIS, "optimizer"]], CORES))
    return {int(size): float(seconds) for size, seconds in output.items()}


def _run_ranks(commands: Sequence[Sequence[str]], ranks: int) -> list[str]:
    """Run commands at the same time, each once per rank with torch's variables and every process on a core.

    Returns:
        The last line of rank 0's output, for each command.

    Raises:
        RuntimeError: a process failed; the others are ended.
        UserError: there are fewer cores than processes.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(commands) * ranks:
        raise UserError(f"expected {len(commands) * ranks} cores, one per process, got {len(cores)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes: list[subprocess.Popen] = []
        for number, command in enumerate(commands):
            port = free_port()
            for rank in range(ranks):
                variables = {
                    "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                    "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu",
                }  # fmt: skip
                environment = os.environ | {name: str(value) for name, value in variables.items()}
                output, errors = (
                    stack.enter_context((folder / f"{kind}_{number}_{rank}").open("w"))
                    for kind in ("out", "err")
                )
                options = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": errors}
                with _on_core(cores[len(processes)]):
                    processes.append(stack.enter_context(running(command, **options)))
        while any(process.poll() is None for process in processes) and not any(
            process.poll() for process in processes
        ):
            time.sleep(0.1)
        for process, (number, rank) in zip(processes, np.ndindex(len(commands), ranks), strict=True):
            if process.poll():
                error = (folder / f"err_{number}_{rank}").read_text(encoding="utf-8", errors="replace")
                name = " ".join(commands[number][1:4])
                raise RuntimeError(f"{name} failed on rank {rank}: {error.strip()[-2000:]}")
        outputs = [
            (folder / f"out_{number}_0").read_text(encoding="utf-8") for number in range(len(commands))
        ]
    return [output.strip().rpartition("\n")[2] for output in outputs]


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Give processes that are started within the block one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _link_rank() -> None:
    """Time collectives on one of two ranks and print the medians."""
    found: dict[str, Timings] = {
        name: [(1, size, _median_seconds(_collective(name, size))) for size in LINK_SIZES]
        for name in COLLECTIVES
    }
    found[TOGETHER] = [
        (calls, calls * size, _median_seconds(_gathers(calls, size)))
        for calls in TOGETHER_CALLS
        for size in TOGETHER_SIZES
    ]
    print(json.dumps(found), flush=True)


def _collective(name: str, size: int) -> Callable[[], object]:
    """Return a function that runs a collective on complete tensors of `size` elements."""
    import torch
    from torch import distributed

    complete, half = torch.zeros(size), torch.zeros(size // 2)
    runs: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: distributed.all_reduce(complete),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(half, complete),
        "all_gather": lambda: distributed.all_gather_into_tensor(complete, half),
    }
    return runs[name]


def _gathers(calls: int, size: int) -> Callable[[], object]:
    """Return a function that launches all-gathers of `size` elements each, and then waits for them."""
    import torch
    from torch import distributed

    tensors = [(torch.zeros(size), torch.zeros(size // 2)) for _ in range(calls)]

    def run() -> None:
        launched = [distributed.all_gather_into_tensor(*pair, async_op=True) for pair in tensors]
        for work in launched:
            assert work is not None  # as always if `async_op` is set
            work.wait()

    return run


def _median_seconds(run: Callable[[], object]) -> float:
    """Return the median time of a function, which all ranks start together."""
    import torch

    seconds = []
    for _ in range(REPEATS):
        torch.distributed.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _optimizer_rank() -> None:
    """Time AdamW on one of two ranks and print the medians."""
    import torch

    found = {}
    for size in OPTIMIZER_SIZES:
        weights = torch.zeros(size, requires_grad=True)
        weights.grad = torch.zeros(size)
        found[size] = _median_seconds(torch.optim.AdamW([weights]).step)
    print(json.dumps(found), flush=True)


def _rank(measure: Callable[[], None]) -> None:
    """Run a micro-benchmark on one thread of a rank."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    measure()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank({"link": _link_rank, "optimizer": _optimizer_rank}[sys.argv[1]])
