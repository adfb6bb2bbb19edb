"""Decoder pool: result order, crashes, signals, and exit with the parent process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cat_fast.data.streams.pool import TaskFailure, WorkerPool
from cat_fast.errors import UserError

ROOT = Path(__file__).parents[3]


def double(x: int) -> int:
    return 2 * x


def refuse(x: int) -> int:
    raise UserError(f"{x} is not an image")


def die(x: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


@pytest.mark.parametrize("workers", [0, 2])
def test_each_task_has_its_result_and_a_user_error_is_a_failure(workers):
    pool = WorkerPool(workers)
    tasks = [pool.submit(double, n) for n in range(20)]
    refused = pool.submit(refuse, 3)
    assert [task.result() for task in tasks] == [2 * n for n in range(20)]
    assert refused.result() == TaskFailure("3 is not an image")
    pool.close()


def test_only_tasks_that_crash_their_process_fail():
    pool = WorkerPool(2)
    tasks = [pool.submit(die if n in (2, 5) else double, n) for n in range(8)]
    results = [task.result() for task in tasks]
    for n, result in enumerate(results):
        assert result == (TaskFailure("the process that decoded it died") if n in (2, 5) else 2 * n)
    pool.close()


def number_of_process(_: int) -> int:
    time.sleep(0.02)  # so that every process gets tasks
    return os.getpid()


def slowly_double(x: int) -> int:
    time.sleep(0.05)
    return 2 * x


def processes(pool: WorkerPool) -> set[int]:
    return {task.result() for task in [pool.submit(number_of_process, n) for n in range(20)]}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGUSR1])
def test_workers_ignore_signals_for_the_run(kind):
    """Ctrl-C and Slurm's warning reach all processes of a run, which first saves a checkpoint."""
    pool = WorkerPool(2)
    while len(before := processes(pool)) < 2:
        pass  # one process was still starting
    for pid in before:
        os.kill(pid, kind)
    assert processes(pool) <= before
    assert set(processes_of(pool)) == before
    pool.close()


def test_no_image_is_lost_when_a_launcher_terminates_the_process_tree():
    """SIGTERM stops the workers, as by their executor, while the rank finishes a step."""
    pool = WorkerPool(2)
    alone = pool.run_alone(os.getpid, ())
    tasks = [pool.submit(slowly_double, n) for n in range(30)]
    for pid in [*processes_of(pool), alone]:
        os.kill(pid, signal.SIGTERM)
    assert [task.result() for task in tasks] == [2 * n for n in range(30)]
    pool.close()


def processes_of(pool: WorkerPool) -> list[int]:
    assert pool._executor is not None
    return list(pool._executor._processes)


def test_workers_end_when_their_parent_is_killed():
    script = (
        "import os, time\n"
        "from cat_fast.data.streams.pool import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(2)\n"
        "    tasks = [pool.submit(os.getpid) for _ in range(20)]\n"
        "    print(*{task.result() for task in tasks}, flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.05)


def test_a_closed_pool_starts_no_process():
    pool = WorkerPool(1)
    pool.close()  # while a thread waits for the result of a task, which is cancelled
    assert isinstance(pool.run_alone(abs, (-1,)), TaskFailure)
    assert pool._alone is None
