"""Start a training run through the DeepSpeed launcher and follow its progress."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cat_fast.errors import UserError
from cat_fast.training.health.run_status import summarize
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import free_port

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 30


def default_ranks() -> int:
    """Return one rank per GPU; without a GPU two, or one on a single core."""
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


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

    An exception in this process, such as Ctrl-C, stops all ranks before it propagates; they save at the end
    of their step.

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
        environment.setdefault("DS_ACCELERATOR", _accelerator())
    with log.open("a") as output:
        before = output.tell()
        # A session of its own, so that Ctrl-C reaches this process alone and it ends the ranks in order.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _watch(process, run_folder, on_step)
        finally:
            _terminate(process)
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
        records = read_metrics(run_folder)
        if records and "loss" in records[-1]:  # a skipped step may not have one
            on_step(int(records[-1]["step"]) + 1, records[-1])


def _terminate(process: subprocess.Popen) -> None:
    """Terminate all processes of the launcher's session; the ranks have `_GRACE_SECONDS` to save.

    The launcher's first process dies of the signal at once, so this waits for its process group instead.
    """
    for kind in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_SECONDS
        if _is_group_alive(process.pid):
            os.killpg(process.pid, kind)
        while _is_group_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _is_group_alive(group: int) -> bool:
    """Return True if a process of the group is running; zombies do not count."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (psutil.Error, ProcessLookupError):
            continue
    return False


def _last_error(log: Path, start: int) -> str:
    """Return the last error line of any rank, from byte `start` of the log: the part of this run."""
    lines = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith(("error:", "error (rank")) or "Error:" in line]
    return errors[-1] if errors else "no error was printed"


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
