"""LRU cache of a rank's open shards, shared by the readers of all ratios; assigns ratios to samples."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from cat_fast.data.streams.formats.base import Entry, Rating, Shard, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.pool import TaskFailure, WorkerPool
from cat_fast.data.streams.shard_assignment import RankShards
from cat_fast.errors import UserError

_RATING_BATCH = 32
MAX_CONSECUTIVE_UNREADABLE = 5
"""More unreadable shards in a row indicate a general problem, such as no network or expired credentials."""


class OpenShards:
    """Cache of open shards and of the ratios of their samples.

    Args:
        rating: None if every image is used at every ratio.
        capacity: number of shards kept open; readers that are farther apart open a shard again.
        stop_at_unreadable: raise UserError for an unreadable shard instead of skipping it.
    """

    def __init__(
        self,
        shards: ShardSet,
        rating: Rating | None,
        pool: WorkerPool,
        problems: ProblemLog,
        capacity: int,
        stop_at_unreadable: bool,
    ) -> None:
        self.shards, self.rating, self.pool, self.problems = shards, rating, pool, problems
        self.capacity, self.stop_at_unreadable = capacity, stop_at_unreadable
        self._consecutive_unreadable = 0
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Slot] = OrderedDict()

    def samples(self, index: int, first: int, rank_shards: RankShards) -> Iterator[Entry] | None:
        """Return a rank's samples of a shard, with ratios, from number `first`; None if it cannot be opened.

        Raises:
            UserError: it cannot be opened, and `stop_at_unreadable` is set or too many before it failed.
        """
        slot = self._slot(index)
        with slot.lock:  # other readers wait instead of fetching the same shard
            if slot.shard is None and not slot.failed:
                slot.shard = self._open_shard(index)
                slot.failed = slot.shard is None
            shard = slot.shard
        if shard is None:
            return None
        mine = (entry for entry in shard.entries(first) if rank_shards.includes(index, entry.number))
        return self._with_ratios(slot, mine)

    def _open_shard(self, index: int) -> Shard | None:
        try:
            shard = self.shards.open(index)
        except UnreadableShard as error:
            name = self.shards.names[index]
            with self._lock:
                self._consecutive_unreadable += 1
            message = f"shard {name} cannot be opened ({error})"
            if self.stop_at_unreadable:
                raise UserError(f"{message}; data.stream.unreadable=skip skips it") from error
            limit = min(MAX_CONSECUTIVE_UNREADABLE, len(self.shards.names) - 1)
            if self._consecutive_unreadable > limit:
                raise UserError(
                    f"{message}, like the {limit} before it; check that the storage is available"
                ) from error
            self.problems.report(f"shard {name}", str(error))
            return None
        with self._lock:
            self._consecutive_unreadable = 0
        return shard

    def _slot(self, index: int) -> "_Slot":
        with self._lock:
            slot = self._open.pop(index, None) or _Slot()
            self._open[index] = slot
            while len(self._open) > self.capacity:
                self._open.popitem(last=False)  # readers that still use it keep it alive
            return slot

    def _with_ratios(self, slot: "_Slot", entries: Iterator[Entry]) -> Iterator[Entry]:
        while run := list(islice(entries, _RATING_BATCH)):
            ratios = self._rate_by_bytes(slot, run)
            for entry in run:
                yield self._with_ratio(entry, ratios)

    def _with_ratio(self, entry: Entry, by_bytes: dict[int, "int | str"]) -> Entry:
        if self.rating is None:
            return entry
        ratio = self.rating.by_labels(entry.labels)
        if ratio is not None or entry.damage:
            return replace(entry, ratio=ratio)
        result = by_bytes.get(entry.number, "it has neither score nor ratio")
        return replace(entry, damage=result) if isinstance(result, str) else replace(entry, ratio=result)

    def _rate_by_bytes(self, slot: "_Slot", entries: list[Entry]) -> "dict[int, int | str]":
        """Return the ratio or an error message of each image without a labelled ratio; computed once."""
        if self.rating is None or self.rating.by_bytes is None:
            return {}
        with slot.lock:
            tasks = {}
            for entry in entries:
                if (
                    entry.number in slot.rated
                    or entry.damage
                    or self.rating.by_labels(entry.labels) is not None
                ):
                    continue
                try:
                    tasks[entry.number] = self.pool.submit(self.rating.by_bytes, entry.read())
                except OSError as error:
                    slot.rated[entry.number] = str(error)
            for number, task in tasks.items():
                result = task.result()
                slot.rated[number] = result.reason if isinstance(result, TaskFailure) else result
        return slot.rated


class _Slot:
    """A shard that is open or being opened."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.shard: Shard | None = None
        self.failed = False
        self.rated: dict[int, int | str] = {}
