"""The images of one ratio in a rank's order: read from its shards in runs, each run shuffled.

A run is a buffer of encoded images that is filled, shuffled and emptied. While it is emptied the next is
filled in a thread, and no more: so at most two are held a ratio, whatever the other ratios do. Each ratio
reads the shards by itself. If it is drawn too seldom to keep up it waits at its own place, if too often it
reads on, into its next epoch; no image is passed over for want of room, and none comes twice.
The price is that ratios which have drifted apart open a shard more than once.
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
from cat_fast.data.streams.shard_assignment import Dealing
from cat_fast.errors import UserError

T = TypeVar("T")
MOST_BARREN_SHARDS = 1000
"""A part of an epoch may hold no image of a rare ratio; so many shards without one, and no fewer than
two epochs, are a mistake."""


@dataclass(frozen=True)
class Position:
    """Where a run begins, and how much of it has been taken."""

    epoch: int = 0
    shard: int = 0
    """Place in the rank's hand."""
    number: int = 0
    """Sample within the shard."""
    run: int = 0
    """Runs of this epoch before it."""
    taken: int = 0


class Sample(NamedTuple):
    """An encoded image, and the position of its ratio once it is used."""

    shard: str
    number: int
    """Its place in the shard."""
    key: str
    data: bytes
    mirrored: bool
    epoch: int
    after: Position
    skipped: int = 0
    """Samples passed over since the one before, which had no image or no ratio."""


class RatioReader:
    """Endless samples of one ratio, from a position on.

    Args:
        takes: whether a sample belongs to this ratio.
        counts: whether a sample that belongs to no ratio is told and counted here (by one ratio of all).
    """

    def __init__(
        self,
        ratio: int,
        rank: int,
        dealing: Dealing,
        shards: OpenShards,
        takes: Callable[[Entry], bool],
        counts: bool,
        most_images: int,
        most_bytes: int,
        position: Position,
    ) -> None:
        self.ratio, self.rank, self.dealing, self.shards = ratio, rank, dealing, shards
        self.takes, self.counts = takes, counts
        self.most_images, self.most_bytes = most_images, most_bytes
        self.position = position
        self._closed = threading.Event()
        self._run: _Run | None = None
        self._next: Future[_Run] | None = None

    def ready(self) -> bool:
        """Whether the next pick needs no waiting."""
        return self._left() > 0 or self._coming().done()

    def pick(self) -> Sample:
        """Return the next sample.

        Raises:
            UserError: there is nothing to read.
        """
        run = self._run
        if run is None or self._left() == 0:
            run = self._begin_run()
        sample = run.samples[self.position.taken]
        self.position = sample.after
        return sample

    def close(self) -> None:
        self._closed.set()

    def _begin_run(self) -> "_Run":
        """The next run with an image that was not taken yet; moves the position into it."""
        while True:
            self._run = run = self._coming().result()
            self._next = in_background(partial(self._read, run.after))
            if replace(self.position, taken=0) != run.start:  # nothing came before it
                self.position = run.start
            if self.position.taken < len(run.samples):
                return run
            # Resumed where more was taken than can be read now, as a shard has gone since.
            self.position = run.after

    def _coming(self) -> "Future[_Run]":
        """The next run. Reading begins when first asked: before, a source may be told to go on elsewhere."""
        if self._next is None:
            self._next = in_background(partial(self._read, replace(self.position, taken=0)))
        return self._next

    def _left(self) -> int:
        run = self._run
        if run is None or self.position == run.after:
            return 0
        return len(run.samples) - self.position.taken

    def _read(self, start: Position) -> "_Run":
        """The run that begins at a position, or the next one that holds an image; a function of it alone."""
        skipped = barren = 0
        first = start.epoch
        while barren < MOST_BARREN_SHARDS or start.epoch < first + 2:
            run = self._read_within_epoch(start, skipped)
            if run.samples:
                return run
            barren += len(self.dealing.hand(self.ratio, start.epoch, self.rank).shards)
            start, skipped = run.after, run.skipped
        raise UserError(
            f"rank {self.rank} found no image at {self.ratio}x in {barren} shards, and {skipped} samples "
            "that cannot be used: see the warnings above, mix images of all ratios in each shard, or take "
            "the ratio from sampler.shares"
        )

    def _read_within_epoch(self, start: Position, skipped: int) -> "_Run":
        hand = self.dealing.hand(self.ratio, start.epoch, self.rank)
        samples: list[Sample] = []
        size = 0
        for place in range(start.shard, len(hand.shards)):
            first = start.number if place == start.shard else 0
            index = hand.shards[place]
            rated = self.shards.samples(index, first, hand)
            if rated is None:
                skipped += self.counts
                continue
            for entry in rated:
                if self._closed.is_set():
                    raise RuntimeError("the reader was closed")
                found = self._use(index, entry, start)
                if found is None:
                    continue
                if isinstance(found, int):
                    skipped += found
                    continue
                samples.append(found)
                size += len(found.data)
                if len(samples) == self.most_images or size >= self.most_bytes:
                    after = Position(start.epoch, place, entry.number + 1, start.run + 1)
                    return self._shuffled(start, samples, after, skipped)
        return self._shuffled(start, samples, Position(start.epoch + 1), skipped)

    def _use(self, index: int, entry: Entry, start: Position) -> Sample | int | None:
        """The sample; 1 if it is unusable and ours to count; None if it is none of ours."""
        shard, problem = self.shards.shards.names[index], entry.damage
        unrated = entry.ratio is None and bool(problem)
        if not (self.counts if unrated else self.takes(entry)):
            return None
        if not problem:
            try:
                return Sample(
                    shard=shard,
                    number=entry.number,
                    key=entry.key,
                    data=entry.read(),
                    mirrored=not entry.labels.has_text,
                    epoch=start.epoch,
                    after=start,  # until its run is shuffled
                )
            except OSError as error:
                problem = str(error)
        self.shards.problems.report(f"{shard}: {entry.key}", problem)
        return 1

    def _shuffled(self, start: Position, samples: list[Sample], after: Position, skipped: int) -> "_Run":
        seed = [self.dealing.seed, self.rank, self.ratio, start.epoch, start.run, 4]
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


def in_background(work: Callable[[], T]) -> "Future[T]":
    """A future of work in a thread that ends with the process, unlike those of an executor."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
