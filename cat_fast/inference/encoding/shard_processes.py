"""`LatentCache` in several processes of this machine, each with a tokenizer of its own."""

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from cat_fast.data.streams.pool import end_with_parent
from cat_fast.errors import UserError
from cat_fast.inference.encoding.latent_shards import LatentCache
from cat_fast.inference.encoding.shard_plan import CacheSettings, Tally, Tell, Unit
from cat_fast.models.load import load_tokenizer

_POLL_SECONDS = 0.2


def run_units(
    settings: CacheSettings,
    checkpoint: Path,
    device: str,
    class_names: Sequence[str],
    units: Sequence[Unit],
    workers: int,
    tell: Tell,
) -> Tally:
    """Write all that is missing of `units`; whoever is free takes the next one.

    Args:
        checkpoint: folder of the tokenizer.
        device: as for `load_tokenizer`; with "auto" the processes take the GPUs of the machine in turn.

    Raises:
        UserError: a process could not start, died, or could not write. What is finished is kept.
    """
    tally = Tally()
    # A fork would copy the locks of torch's and CUDA's threads, in whatever state they are.
    context = get_context("spawn")
    told: Any = context.Queue()
    failed: Any = context.SimpleQueue()
    slots: Any = context.Queue()
    for slot in range(workers):
        slots.put(slot)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start,
        initargs=(settings, checkpoint, device, list(class_names), workers, slots, told, failed),
    )
    try:
        pending = {pool.submit(_run, unit) for unit in units}
        while pending:
            done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            _pass_on(told, tell)
            for future in done:
                tally.join(future.result())
    except BrokenProcessPool as error:
        if not failed.empty():
            raise UserError(f"a process that was to encode could not start: {failed.get()}") from error
        raise UserError(
            "a process that encoded died, perhaps for want of memory: the shards that are whole are kept; "
            "run the same command again, with fewer --workers or a smaller --batch-size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    _pass_on(told, tell)
    return tally


_mine: Any = None
"""In a worker: its cache, and whom to tell."""


def _start(
    settings: CacheSettings,
    checkpoint: Path,
    device: str,
    class_names: list[str],
    workers: int,
    slots: Any,
    told: Any,
    failed: Any,
) -> None:
    global _mine  # noqa: PLW0603 # set once, by the pool's initializer
    end_with_parent()
    torch.set_num_threads(_threads(workers))
    slot = slots.get()
    try:
        gpus = torch.cuda.device_count()
        tokenizer = load_tokenizer(checkpoint, f"cuda:{slot % gpus}" if device == "auto" and gpus else device)
        _mine = LatentCache(settings, tokenizer, class_names), told
    except Exception as error:  # of files, of the GPU
        failed.put(_told(error))
        os._exit(1)  # the pool would log the exception with all its lines, and keep it from the parent


def _threads(workers: int) -> int:
    """A process's share of the CPUs that this one may use."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _told(error: Exception) -> str:
    """In one line, short enough for a pipe to take it at once."""
    if isinstance(error, UserError):
        return str(error)[:500]
    why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{why}; if it lacks memory, try fewer --workers"


def _run(unit: Unit) -> Tally:
    cache, told = _mine
    return cache.run(unit, lambda kind, images: told.put((kind, images)))


def _pass_on(told: Any, tell: Tell) -> None:
    while True:
        try:
            tell(*told.get_nowait())
        except Empty:
            return
