"""Encoding of latent shards in several processes of one machine, each with its own tokenizer.

When the command is interrupted or killed, each process finishes the shard that it is writing, if that takes
less than a minute (`cat_fast.processes`); complete shards are kept.
"""

import os
import pickle
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from cat_fast.errors import UserError
from cat_fast.hardware import run_device_type
from cat_fast.inference.encoding.latent_shards import ShardEncoder
from cat_fast.inference.encoding.shard_plan import (
    EncodeShardsSettings,
    EncodingSummary,
    OnProgress,
    WorkUnit,
    open_images,
)
from cat_fast.models.device import find_device
from cat_fast.models.execution import find_dtype
from cat_fast.models.load import load_tokenizer
from cat_fast.processes.ending import end_processes, still_running
from cat_fast.processes.signals import deferred
from cat_fast.processes.worker import initialize, is_stopping, saving

_POLL_SECONDS = 0.2


def encode_in_processes(
    settings: EncodeShardsSettings,
    checkpoint: Path,
    device: str,
    class_names: Sequence[str],
    units: Sequence[WorkUnit],
    workers: int,
    on_progress: OnProgress,
) -> EncodingSummary:
    """Write the missing shards of `units`; the next free process takes the next unit.

    Args:
        checkpoint: folder of the tokenizer.
        device: as for `load_tokenizer`; with "auto", processes are assigned to the machine's GPUs
            round-robin.

    Raises:
        UserError: a process could not start, died, or could not write. Finished shards are kept.
    """
    summary = EncodingSummary()
    # A fork would copy the locks of torch's and CUDA's threads in an undefined state.
    context = get_context("spawn")
    progress: Any = context.Queue()
    errors: Any = context.SimpleQueue()
    slots: Any = context.Queue()
    for slot in range(workers):
        slots.put(slot)
    earlier = set(active_children())
    call = pickle.dumps((_start, (settings, checkpoint, device, list(class_names), workers)))
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=initialize,
        initargs=(call, slots, progress, errors),
    )
    try:
        with deferred():  # submitting starts the processes
            pending = {pool.submit(_run, unit) for unit in units}
        while pending:
            done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            _forward_progress(progress, on_progress)
            for future in done:
                summary.merge(future.result())
    except BrokenProcessPool as error:
        if not errors.empty():
            raise UserError(f"an encoding process could not start: {errors.get()}") from error
        raise UserError(
            "an encoding process died, possibly out of memory; complete shards are kept; "
            "run the same command again with fewer --workers or a smaller --batch-size"
        ) from error
    except BaseException as error:  # interrupted, or a shard cannot be written
        if isinstance(error, KeyboardInterrupt):
            error.add_note("complete shards are kept; run the same command again to write the others")
        pool.shutdown(wait=False, cancel_futures=True)
        processes = [process.pid for process in set(active_children()) - earlier if process.pid]
        end_processes(lambda: still_running(processes))
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    _forward_progress(progress, on_progress)
    return summary


_worker: Any = None
"""In a worker process: its encoder and its progress queue."""


def _start(
    settings: EncodeShardsSettings,
    checkpoint: Path,
    device: str,
    class_names: list[str],
    workers: int,
    slots: Any,
    progress: Any,
    errors: Any,
) -> None:
    global _worker  # noqa: PLW0603 # set once, by the pool's initializer
    torch.set_num_threads(_num_threads(workers))
    slot = slots.get()
    try:
        gpus = torch.cuda.device_count() if run_device_type() == "cuda" else 0
        own = f"cuda:{slot % gpus}" if device == "auto" and gpus else device
        tokenizer = load_tokenizer(checkpoint, own, find_dtype(settings.dtype, find_device(own)))
        images = open_images(settings.source, settings.image)
        _worker = ShardEncoder(settings, images, tokenizer, class_names), progress
    except Exception as error:  # file errors, GPU errors
        errors.put(_format_error(error))
        os._exit(1)  # the pool would log the full traceback without passing the error to the parent


def _num_threads(workers: int) -> int:
    """Return a worker's share of the CPUs available to this process."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _format_error(error: Exception) -> str:
    """Format an error on one line, short enough for a single pipe write."""
    if isinstance(error, UserError):
        return str(error)[:500]
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{reason}; if it ran out of memory, use fewer --workers"


def _run(unit: WorkUnit) -> EncodingSummary:
    encoder, progress = _worker
    with saving():
        return encoder.run(unit, lambda kind, images: progress.put((kind, images)), is_stopping)


def _forward_progress(progress: Any, on_progress: OnProgress) -> None:
    while True:
        try:
            on_progress(*progress.get_nowait())
        except Empty:
            return
