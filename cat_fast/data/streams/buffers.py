"""Shuffled samples of one ratio on one rank, read from its shards in runs.

A run is a buffer of encoded images that is filled, shuffled and emptied. A thread fills the next run while
the current one is used, so at most two runs per ratio are held in memory. Each ratio reads the shards
independently of the others. A ratio drawn rarely stops reading at its position; one drawn often continues
into its next epoch. No image is dropped for lack of space, and none is repeated. The cost: ratios at
different positions open the same shard more than once.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from cat_fast.data.streams.formats.base import Entry
from cat_fast.data.streams.open_shards import OpenShards
from cat_fast.data.streams.shard_assignment import ShardAssignment
from cat_fast.errors import UserError

T = TypeVar("T")
MAX_EMPTY_SHARDS = 1000
"""Give up after this many shards without a sample, but not before two epochs: a rank's part of one epoch
may lack a rare ratio."""


@dataclass(frozen=True)
class Position:
    """Start of a run, and the number of its samples already used."""

    epoch: int = 0
    shard: int = 0
    """Index into the rank's shards of the epoch."""
    number: int = 0
    """Sample within the shard."""
    run: int = 0
    """Number of earlier runs in this epoch."""
    taken: int = 0


class Sample(NamedTuple):
    """An encoded image, and the position of its ratio after it."""

    shard: str
    number: int
    """Index within the shard."""
    key: str
    data: bytes
    allow_flip: bool
    epoch: int
    after: Position
    caption: str = ""
    skipped: int = 0
    """Number of samples without an image or a ratio that were skipped before this one."""


class RatioReader:
    """Infinite sequence of samples of one ratio, starting at a position.

    Args:
        accepts: predicate for the samples of this ratio.
        counts_unrated: report and count samples without a ratio here; True for exactly one ratio.
        max_images: number of images in a run.
        max_bytes: size in bytes at which a run ends early.
    """

    def __init__(
        self,
        ratio: int,
        rank: int,
        assignment: ShardAssignment,
        shards: OpenShards,
        accepts: Callable[[Entry], bool],
        counts_unrated: bool,
        max_images: int,
        max_bytes: int,
        position: Position,
    ) -> None:
        self.ratio, self.rank, self.assignment, self.shards = ratio, rank, assignment, shards
        self.accepts, self.counts_unrated = accepts, counts_unrated
        self.max_images, self.max_bytes = max_images, max_bytes
        self.position = position
        self._closed = threading.Event()
        self._run: _Run | None = None
        self._next: Future[_Run] | None = None

    def ready(self) -> bool:
        """Return whether `pick` would return without waiting."""
        return self._remaining() > 0 or self._next_run().done()

    def pick(self) -> Sample:
        """Return the next sample.

        Raises:
            UserError: the shards have no samples of this ratio.
        """
        run = self._run
        if run is None or self._remaining() == 0:
            run = self._start_run()
        sample = run.samples[self.position.taken]
        self.position = sample.after
        return sample

    def close(self) -> None:
        """Stop the background thread at its next sample."""
        self._closed.set()

    def _start_run(self) -> "_Run":
        """Move the position to the next run that has an unused sample, and return that run."""
        while True:
            self._run = run = self._next_run().result()
            self._next = run_in_background(partial(self._read, run.after))
            if replace(self.position, taken=0) != run.start:  # empty runs before it were skipped
                self.position = run.start
            if self.position.taken < len(run.samples):
                return run
            # Resumed, and a shard has disappeared: more samples were used than the run has now.
            self.position = run.after

    def _next_run(self) -> "Future[_Run]":
        """Return the next run. Reading starts at the first call: the reader may be replaced before."""
        if self._next is None:
            self._next = run_in_background(partial(self._read, replace(self.position, taken=0)))
        return self._next

    def _remaining(self) -> int:
        run = self._run
        if run is None or self.position == run.after:
            return 0
        return len(run.samples) - self.position.taken

    def _read(self, start: Position) -> "_Run":
        """Read the run at a position, or the next non-empty one. The result depends on the position only."""
        skipped = empty = 0
        first = start.epoch
        while empty < MAX_EMPTY_SHARDS or start.epoch < first + 2:
            run = self._read_within_epoch(start, skipped)
            if run.samples:
                return run
            empty += len(self.assignment.rank_shards(self.ratio, start.epoch, self.rank).shards)
            start, skipped = run.after, run.skipped
        raise UserError(
            f"rank {self.rank} found no image at {self.ratio}x in {empty} shards, and {skipped} unusable "
            "samples (see the warnings above); mix images of all ratios in each shard, or remove the ratio "
            "from sampler.shares"
        )

    def _read_within_epoch(self, start: Position, skipped: int) -> "_Run":
        rank_shards = self.assignment.rank_shards(self.ratio, start.epoch, self.rank)
        samples: list[Sample] = []
        size = 0
        for place in range(start.shard, len(rank_shards.shards)):
            first = start.number if place == start.shard else 0
            index = rank_shards.shards[place]
            rated = self.shards.samples(index, first, rank_shards)
            if rated is None:
                skipped += self.counts_unrated
                continue
            for entry in rated:
                if self._closed.is_set():
                    raise RuntimeError("the reader was closed")
                found = self._to_sample(index, entry, start)
                if found is None:
                    continue
                if isinstance(found, int):
                    skipped += found
                    continue
                samples.append(found)
                size += len(found.data)
                if len(samples) == self.max_images or size >= self.max_bytes:
                    after = Position(start.epoch, place, entry.number + 1, start.run + 1)
                    return self._shuffled(start, samples, after, skipped)
        return self._shuffled(start, samples, Position(start.epoch + 1), skipped)

    def _to_sample(self, index: int, entry: Entry, start: Position) -> Sample | int | None:
        """Return the sample; 1 if it is unusable and counted here; None if it is not of this ratio."""
        shard, problem = self.shards.shards.names[index], entry.damage
        unrated = entry.ratio is None and bool(problem)
        if not (self.counts_unrated if unrated else self.accepts(entry)):
            return None
        if not problem:
            try:
                return Sample(
                    shard=shard,
                    number=entry.number,
                    key=entry.key,
                    data=entry.read(),
                    allow_flip=not entry.labels.has_text,
                    epoch=start.epoch,
                    after=start,  # replaced when the run is shuffled
                    caption=entry.labels.caption,
                )
            except OSError as error:
                problem = str(error)
        self.shards.problems.report(f"{shard}: {entry.key}", problem)
        return 1

    def _shuffled(self, start: Position, samples: list[Sample], after: Position, skipped: int) -> "_Run":
        seed = [self.assignment.seed, self.rank, self.ratio, start.epoch, start.run, 4]
        order = np.random.default_rng(seed).permutation(len(samples))
        after_each = [replace(start, taken=taken) for taken in range(1, len(samples))] + [after]
        shuffled = [samples[i]._replace(after=place) for i, place in zip(order, after_each, strict=False)]
        shuffled[:1] = [sample._replace(skipped=skipped) for sample in shuffled[:1]]
        return _Run(start, shuffled, after, skipped)


class _Run(NamedTuple):
    start: Position
    samples: list[Sample]
    after: Position
    skipped: int


def run_in_background(work: Callable[[], T]) -> "Future[T]":
    """Return a future of work in a daemon thread, which unlike an executor's does not delay process exit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
