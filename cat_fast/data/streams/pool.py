"""Decoder pool that survives inputs that crash a worker.

An image can crash its decoder (a bug in a library, or out of memory). The pool then restarts its processes
and repeats the interrupted tasks one at a time in a separate process. This identifies the task that crashes,
and only that one fails. Signals sent to the run also reach its workers: they ignore SIGINT, SIGHUP and
SIGUSR1, which their rank handles; SIGTERM, which executors use to stop them, is treated like a crash.
"""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from cat_fast.errors import UserError
from cat_fast.processes.worker import follow_parent


@dataclass(frozen=True)
class TaskFailure:
    """Result of a task that raised, or crashed its process."""

    reason: str


class WorkerPool:
    """Pool of `workers` processes that run functions; with 0, `submit` runs them in the calling process.

    Processes start at the first task, with `spawn`: a fork would copy the locks of other threads, including
    those of NCCL and CUDA, in an arbitrary state.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._lock, self._alone_lock = threading.Lock(), threading.Lock()
        self._generation = 0
        self._closed = False
        self._executor: ProcessPoolExecutor | None = None
        self._alone: ProcessPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Task":
        """Start a task of picklable function and arguments; an exception becomes a `TaskFailure` result."""
        return Task(self, function, arguments)

    def close(self) -> None:
        """Cancel waiting tasks and stop the processes."""
        self._closed = True
        for executor in (self._executor, self._alone):
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> "tuple[Future[Any], int]":
        """Return the future of a task, and the generation of processes that runs it."""
        while True:
            with self._lock:
                if self.workers and self._executor is None:
                    if self._closed:
                        raise RuntimeError("the pool is closed")
                    self._executor = _start(self.workers)
                generation, executor = self._generation, self._executor
            if executor is None:
                future: Future[Any] = Future()
                future.set_result(_guarded(function, arguments))
                return future, 0
            try:
                return executor.submit(_guarded, function, arguments), generation
            except RuntimeError:  # the processes have crashed, or have just been replaced
                if self._closed:
                    raise
                self.restart(generation)

    def run_alone(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run a task in a process of its own and return the result; `TaskFailure` if it crashes twice
        or the pool is closed."""
        with self._alone_lock:
            if self._closed:  # which has cancelled the task
                return TaskFailure("the pool is closed")
            for _ in range(2):  # the first process may have been killed from outside
                self._alone = self._alone or _start(1)
                try:
                    return self._alone.submit(_guarded, function, arguments).result()
                except BrokenProcessPool:
                    self._alone = None
            return TaskFailure("the process that decoded it died")

    def restart(self, generation: int) -> None:
        """Replace the processes, unless those of `generation` have been replaced already."""
        with self._lock:
            if generation == self._generation and self._executor is not None and not self._closed:
                self._executor.shutdown(wait=False, cancel_futures=True)
                self._executor = _start(self.workers)
                self._generation += 1


class Task:
    """A submitted function call."""

    def __init__(self, pool: WorkerPool, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.pool = pool
        self.again = function, arguments
        """Function and arguments to run after a crash, in a process of its own."""
        self.repeated = False
        """Whether its process crashed, so that it ran again."""
        self.future, self.generation = pool.run(function, arguments)

    def result(self) -> Any:
        """Wait for the function, and return its result or a `TaskFailure`."""
        try:
            return self.future.result()
        except (BrokenProcessPool, CancelledError):
            self.repeated = True
            self.pool.restart(self.generation)
            return self.pool.run_alone(*self.again)


def _start(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_init_worker)


def _guarded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except UserError as error:
        return TaskFailure(str(error))
    except Exception as error:  # decoders raise many types on damaged images
        return TaskFailure(f"{type(error).__name__}: {error}")


def _init_worker() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    follow_parent()
