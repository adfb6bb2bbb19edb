"""Start a training run through the DeepSpeed launcher and follow its progress."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cat_fast.errors import UserError
from cat_fast.processes.group import running
from cat_fast.training.health.run_status import summarize
from cat_fast.training.metrics.run_log import last_metrics
from cat_fast.training.runtime.ranks import free_port

_POLL_SECONDS = 0.5


def default_ranks() -> int:
    """Return one rank per GPU; on the CPU two, or one on a single core."""
    import torch

    from cat_fast.hardware import run_device_type

    gpus = torch.cuda.device_count() if run_device_type() == "cuda" else 0
    return gpus or min(2, len(os.sched_getaffinity(0)))


def launch(
    config: str | Path,
    overrides: list[str],
    *,
    run_folder: Path,
    log: Path,
    ranks: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda done, metrics: None,
) -> None:
    """Run `deepspeed --module cat_fast.train CONFIG …` until it exits.

    An exception in this process, such as a signal, stops all ranks before it propagates: they save at the end
    of their step, within a minute (`cat_fast.processes.ending`). So they do if this process is killed.

    Args:
        log: file to which the launcher's output is appended.
        on_step: called with the number of completed steps and the last metrics, as new metrics appear.

    Raises:
        UserError: the run failed (the message quotes its last error line) or was preempted.
    """
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_gpus", str(ranks), "--master_port", free_port()),
        *("--module", "cat_fast.train", str(config), *overrides),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if "CUDA_VISIBLE_DEVICES" not in environment:
        from cat_fast.hardware import run_device_type

        environment["DS_ACCELERATOR"] = run_device_type()
    with log.open("a") as output:
        before = output.tell()
        try:
            with running(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process:
                _watch(process, run_folder, on_step)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_describe_saved(run_folder))
            raise
    if process.returncode:
        error = _last_error(log, before)
        raise UserError(f"training failed with exit code {process.returncode}: {error} (full log: {log})")
    run = summarize(run_folder)
    if run and run.state == "preempted":
        raise UserError(
            f"training was preempted ({run.reason}) after step {run.step} of {run.total_steps}, checkpoint "
            "saved: resume with the same command"
        )


def _watch(
    process: subprocess.Popen, run_folder: Path, on_step: Callable[[int, dict[str, float]], None]
) -> None:
    running = True
    while running:
        try:
            process.wait(_POLL_SECONDS)
            running = False
        except subprocess.TimeoutExpired:
            pass
        record = last_metrics(run_folder)
        if record is not None and "loss" in record:  # a skipped step may not have one
            on_step(int(record["step"]) + 1, record)


def _describe_saved(run_folder: Path) -> str:
    run = summarize(run_folder)
    if run is None or not run.checkpoint:
        return "training was stopped before its first checkpoint; run the same command again to start over"
    step = int(Path(run.checkpoint).name.removeprefix("step_"))
    saved = f"the checkpoint after step {step} of {run.total_steps} is saved"
    return f"{saved}; run the same command again to resume"


def _last_error(log: Path, start: int) -> str:
    """Return the last error line of any rank, from byte `start` of the log: the part of this run."""
    lines = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith(("error:", "error (rank")) or "Error:" in line]
    return errors[-1] if errors else "no error was printed"
