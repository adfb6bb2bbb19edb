"""`TokenBudgetPacker`: groups a stream of images into batches of at most `max_tokens` tokens.

packer = TokenBudgetPacker(max_tokens=16_384)
for keys in packer.pack((sample.key, tokens_of(sample)) for sample in stream):
    ...
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from cat_fast.errors import UserError
from cat_fast.packing.reference_packer import ReferenceBestFitPacker, parse_length

try:
    from cat_fast._bindings import BestFitPacker
except ImportError:  # not built; the reference packs the same batches, but slower
    BestFitPacker = ReferenceBestFitPacker

Item = TypeVar("Item", bound=Hashable)

NATIVE = BestFitPacker is not ReferenceBestFitPacker
"""True if the native core is available."""


@dataclass
class PackingStatistics:
    """Totals over all batches of a packer, for all ranks."""

    max_tokens: int
    batches: int = 0
    sequences: int = 0
    tokens: int = 0

    @property
    def fill(self) -> float:
        """Tokens divided by the token budget of all batches; 0 before the first batch."""
        return self.tokens / (self.batches * self.max_tokens) if self.batches else 0.0


class TokenBudgetPacker(Generic[Item]):
    """Best-fit packer of items with known lengths n; fills the batches of all ranks at once.

    The cost of a batch is about a * sum(n) + b * sum(n^2), and all ranks wait for the most expensive batch.
    Each step fills one batch per rank up to the budget, which equalizes sum(n), and balances sum(n^2) over
    the ranks. `ReferenceBestFitPacker` documents the algorithm. Every step includes the oldest pending item,
    so the waiting time is bounded; items are never truncated or dropped.

    The packer is deterministic: batches depend only on the order of arrival, so equal streams give equal
    batches on every machine. To change the order, permute the stream, as `PackedStream` does.

    Args:
        max_tokens: maximum number of tokens per batch.
        max_sequences: maximum number of items per batch; unlimited if None.
        window: number of pending items per rank that a step chooses from, which is also the maximum number
            held. For a good fill, use a few dozen more than max_tokens / (mean length).
        ranks: number of batches per step.

    Raises:
        UserError: an argument is below 1.
    """

    def __init__(
        self, max_tokens: int, max_sequences: int | None = None, window: int = 256, ranks: int = 1
    ) -> None:
        self._settings = {"max_tokens": max_tokens, "max_sequences": max_sequences, "window": window}
        try:
            # a batch cannot hold more sequences than tokens
            self._core = BestFitPacker(
                max_tokens, max_tokens if max_sequences is None else max_sequences, window * ranks, ranks
            )
        except ValueError as error:
            raise UserError(f"packer: {error}") from error
        self._capacity = window * ranks
        self._added = 0
        self._items: dict[int, Item] = {}  # pending items by the core's id
        self._lengths: dict[int, int] = {}
        self.statistics = PackingStatistics(max_tokens)

    def __len__(self) -> int:
        """Return the number of pending items."""
        return len(self._items)

    @property
    def missing(self) -> int:
        """Number of items to add before `next` returns batches."""
        return max(0, self._capacity - len(self))

    def add(self, item: Item, length: int) -> None:
        """Append an item of `length` tokens.

        Raises:
            UserError: the length is not an integer from 1 to max_tokens.
        """
        self.extend([item], [length])

    def extend(self, items: Iterable[Item], lengths: Iterable[int]) -> None:
        """Append items with their lengths; after an error, none is appended.

        Raises:
            UserError: a length is not an integer from 1 to max_tokens, or there is not one per item.
        """
        items, lengths = list(items), list(lengths)
        if len(items) != len(lengths):
            raise UserError(
                f"packer: expected one length per item, got {len(items)} items and {len(lengths)} lengths"
            )
        parsed = [self._parse(item, length) for item, length in zip(items, lengths, strict=True)]
        self._core.extend(parsed)
        ids = range(self._added, self._added + len(items))
        self._items.update(zip(ids, items, strict=True))
        self._lengths.update(zip(ids, parsed, strict=True))
        self._added += len(items)

    def next(self, *, flush: bool = False) -> list[list[Item]] | None:
        """Return one batch per rank, or None while items are `missing` (with `flush`: if none are pending).

        When the last items are flushed, some ranks may get an empty batch.
        """
        step = self._core.next(flush)
        if step is None:
            return None
        self.statistics.batches += len(step)
        self.statistics.sequences += sum(map(len, step))
        self.statistics.tokens += sum(sum(map(self._lengths.pop, ids)) for ids in step)
        return [list(map(self._items.pop, ids)) for ids in step]

    def pack(self, items: Iterable[tuple[Item, int]]) -> Iterator[list[Item]]:
        """Yield the batches of pending items and of a stream of (item, length), rank by rank.

        Reads ahead by at most the window. Flushes at the end, skipping empty batches. `state_dict` includes
        items that were read but not yet packed, so saving it between two steps loses nothing.
        """
        for item, length in items:
            self.add(item, length)
            while (batches := self.next()) is not None:
                yield from batches
        while (batches := self.next(flush=True)) is not None:
            yield from filter(None, batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume, as plain data; JSON-serializable if the items are."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that builds the current `state_dict` later.

        A snapshot is cheap enough to keep for every step when few of them are saved.
        """
        items, lengths = dict(self._items), dict(self._lengths)
        added, statistics = self._added, asdict(self.statistics)
        return lambda: {
            "settings": dict(self._settings),
            "added": added,
            "pending": [[id_, lengths[id_], item] for id_, item in items.items()],
            "statistics": statistics,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, repack: bool = False) -> None:
        """Resume from `state_dict()`, with any number of ranks.

        Args:
            repack: accept a state saved with other settings. Its pending items come first, in their order, so
                none is lost or repeated, and the statistics start again; batches follow the new settings.

        Raises:
            UserError: the state is damaged, or was saved with other settings and `repack` is False, so the
                batches would differ; or a pending item is longer than `max_tokens`. The packer is then
                unchanged.
        """
        same, limit = state["settings"] == self._settings, self.statistics.max_tokens
        if not (same or repack):
            raise UserError(
                f"packer: expected a state saved with {self._settings}, got one with {state['settings']}"
            )
        for _, length, item in state["pending"]:
            if isinstance(length, int) and length > limit:
                raise UserError(f"{item}: {length} pending tokens exceed max_tokens={limit}; raise it")
        pending = [(id_, self._parse(item, length)) for id_, length, item in state["pending"]]
        try:
            statistics = PackingStatistics(**state["statistics"]) if same else PackingStatistics(limit)
            self._core.restore({"next_id": state["added"], "pending": pending})
        except (TypeError, ValueError) as error:
            raise UserError(f"packer: the saved state is damaged ({error})") from error
        self._added = state["added"]
        self._items = {id_: item for id_, _, item in state["pending"]}
        self._lengths = dict(pending)
        self.statistics = statistics

    def _parse(self, item: Item, length: Any) -> int:
        try:
            return parse_length(length, self.statistics.max_tokens)
        except ValueError as error:
            raise UserError(f"{item}: {error}") from error
