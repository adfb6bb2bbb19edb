"""The shards a rank has open, shared by the readers of its ratios; and the ratio of every sample in them."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from cat_fast.data.streams.formats.base import Entry, Rating, Shard, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.pool import Broken, WorkerPool
from cat_fast.data.streams.shard_assignment import Hand
from cat_fast.errors import UserError

_JUDGED_AT_ONCE = 32
MOST_UNREADABLE_IN_A_ROW = 5
"""More are no matter of single shards: the network is down, or a password has run out."""


class OpenShards:
    """Opens shards and rates their samples; keeps the last few open, as ratios read the same ones.

    Args:
        capacity: how many; readers that are farther apart open a shard again.
        rating: None if every image serves every ratio, and none needs its own.
    """

    def __init__(
        self,
        shards: ShardSet,
        rating: Rating | None,
        pool: WorkerPool,
        problems: Problems,
        capacity: int,
        stop_at_unreadable: bool,
    ) -> None:
        self.shards, self.rating, self.pool, self.problems = shards, rating, pool, problems
        self.capacity, self.stop_at_unreadable = capacity, stop_at_unreadable
        self._unreadable_in_a_row = 0
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Slot] = OrderedDict()

    def samples(self, index: int, first: int, hand: Hand) -> Iterator[Entry] | None:
        """Return the samples, rated, from number `first` on that a hand takes; None if the shard cannot open.

        Raises:
            UserError: it cannot be opened, and that is to end the run.
        """
        slot = self._slot(index)
        with slot.lock:  # the others wait instead of fetching the same shard
            if slot.shard is None and not slot.failed:
                slot.shard = self._opened(index)
                slot.failed = slot.shard is None
            shard = slot.shard
        if shard is None:
            return None
        mine = (entry for entry in shard.entries(first) if hand.takes(index, entry.number))
        return self._rated(shard, slot, mine)

    def _opened(self, index: int) -> Shard | None:
        try:
            shard = self.shards.open(index)
        except UnreadableShard as error:
            name = self.shards.names[index]
            with self._lock:
                self._unreadable_in_a_row += 1
            told = f"shard {name} cannot be opened ({error})"
            if self.stop_at_unreadable:
                raise UserError(f"{told}; data.stream.unreadable=skip goes on without it") from error
            most = min(MOST_UNREADABLE_IN_A_ROW, len(self.shards.names) - 1)
            if self._unreadable_in_a_row > most:
                raise UserError(f"{told}, nor could the {most} before it: is the storage there?") from error
            self.problems.report(f"shard {name}", str(error))
            return None
        with self._lock:
            self._unreadable_in_a_row = 0
        return shard

    def _slot(self, index: int) -> "_Slot":
        with self._lock:
            slot = self._open.pop(index, None) or _Slot()
            self._open[index] = slot
            while len(self._open) > self.capacity:
                self._open.popitem(last=False)  # whoever still reads it keeps it alive
            return slot

    def _rated(self, shard: Shard, slot: "_Slot", entries: Iterator[Entry]) -> Iterator[Entry]:
        while run := list(islice(entries, _JUDGED_AT_ONCE)):
            ratios = self._judge(shard, slot, run)
            for entry in run:
                yield self._one(entry, ratios)

    def _one(self, entry: Entry, judged: dict[int, "int | str"]) -> Entry:
        if self.rating is None:
            return entry
        ratio = self.rating.by_labels(entry.labels)
        if ratio is not None or entry.damage:
            return replace(entry, ratio=ratio)
        verdict = judged.get(entry.number, "it has neither score nor ratio")
        return replace(entry, damage=verdict) if isinstance(verdict, str) else replace(entry, ratio=verdict)

    def _judge(self, shard: Shard, slot: "_Slot", entries: list[Entry]) -> "dict[int, int | str]":
        """Ratios by the images' bytes where labels say none, or why there is none; once for all readers."""
        if self.rating is None or self.rating.by_bytes is None:
            return {}
        with slot.lock:
            tasks = {}
            for entry in entries:
                if (
                    entry.number in slot.judged
                    or entry.damage
                    or self.rating.by_labels(entry.labels) is not None
                ):
                    continue
                try:
                    tasks[entry.number] = self.pool.submit(self.rating.by_bytes, entry.read())
                except OSError as error:
                    slot.judged[entry.number] = str(error)
            for number, task in tasks.items():
                verdict = task.result()
                slot.judged[number] = verdict.reason if isinstance(verdict, Broken) else verdict
        return slot.judged


class _Slot:
    """A shard that is open, or about to be."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.shard: Shard | None = None
        self.failed = False
        self.judged: dict[int, int | str] = {}
