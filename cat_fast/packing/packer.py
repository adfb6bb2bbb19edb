"""`TokenBudgetPacker`: a stream of images in, batches of at most `max_tokens` tokens out.

packer = TokenBudgetPacker(max_tokens=16_384)
for keys in packer.pack((sample.key, tokens_of(sample)) for sample in stream):
    ...
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from cat_fast.errors import UserError
from cat_fast.packing.reference_packer import ReferenceBestFitPacker

try:
    from cat_fast._bindings import BestFitPacker
except ImportError:  # not built: the twin packs the same batches, slower
    BestFitPacker = ReferenceBestFitPacker

Item = TypeVar("Item", bound=Hashable)

NATIVE = BestFitPacker is not ReferenceBestFitPacker
"""Whether the native core packs."""


@dataclass
class PackingStatistics:
    """What a packer has put out so far, over all ranks."""

    max_tokens: int
    batches: int = 0
    sequences: int = 0
    tokens: int = 0

    @property
    def fill(self) -> float:
        """Tokens as a fraction of the budget of all batches; 0 before the first."""
        return self.tokens / (self.batches * self.max_tokens) if self.batches else 0.0


class TokenBudgetPacker(Generic[Item]):
    """Packs items of known lengths n into batches, best fit among the oldest pending, for all ranks at once.

    A batch costs a transformer some a * sum(n) + b * sum(n^2), and ranks wait for the dearest. So a step's
    batches, one a rank, are all filled to the budget, which makes sum(n) equal, and sequences are dealt so
    that sum(n^2) nearly is (`ReferenceBestFitPacker` says how). Every step takes the oldest pending item, so
    nothing waits forever; nothing is truncated or dropped.

    There is no seed, as nothing is drawn: batches depend on the order of arrival alone, so equal streams give
    equal batches on every machine. Who wants another order permutes the stream, as `PackedStream` does.

    Args:
        max_tokens: most tokens in a batch.
        max_sequences: most items in a batch; unlimited if None.
        window: how many pending items a step may choose from, for each rank, which is also the most that are
            held: keep it above max_tokens / (mean length), by a few dozen for a good fill.
        ranks: batches a step.

    Raises:
        UserError: an argument below 1.
    """

    def __init__(
        self, max_tokens: int, max_sequences: int | None = None, window: int = 256, ranks: int = 1
    ) -> None:
        self._settings = {"max_tokens": max_tokens, "max_sequences": max_sequences, "window": window}
        try:
            # no batch can hold more sequences than tokens
            self._core = BestFitPacker(
                max_tokens, max_tokens if max_sequences is None else max_sequences, window * ranks, ranks
            )
        except ValueError as error:
            raise UserError(f"packer: {error}") from error
        self._capacity = window * ranks
        self._added = 0
        self._items: dict[int, Item] = {}  # the pending, by the core's number for each
        self._lengths: dict[int, int] = {}
        self.statistics = PackingStatistics(max_tokens)

    def __len__(self) -> int:
        """The number of pending items."""
        return len(self._items)

    @property
    def missing(self) -> int:
        """How many items `next` waits for."""
        return max(0, self._capacity - len(self))

    def add(self, item: Item, length: int) -> None:
        """Append an item of `length` tokens.

        Raises:
            UserError: a length outside 1 .. max_tokens.
        """
        self.extend([item], [length])

    def extend(self, items: Sequence[Item], lengths: Sequence[int]) -> None:
        """Append items, each with its length; all of them or, where one is refused, none.

        Raises:
            UserError: a length outside 1 .. max_tokens.
        """
        try:
            self._core.extend(lengths)
        except ValueError as error:
            most = self.statistics.max_tokens
            item = next(item for item, n in zip(items, lengths, strict=True) if not 1 <= n <= most)
            raise UserError(f"{item}: {error}") from error
        ids = range(self._added, self._added + len(items))
        self._items.update(zip(ids, items, strict=True))
        self._lengths.update(zip(ids, lengths, strict=True))
        self._added += len(items)

    def next(self, *, flush: bool = False) -> list[list[Item]] | None:
        """One batch for each rank; None while items are `missing` (with `flush`: if none is pending).

        Flushing the last items may leave ranks with an empty batch.
        """
        step = self._core.next(flush)
        if step is None:
            return None
        self.statistics.batches += len(step)
        self.statistics.sequences += sum(map(len, step))
        self.statistics.tokens += sum(sum(map(self._lengths.pop, ids)) for ids in step)
        return [list(map(self._items.pop, ids)) for ids in step]

    def pack(self, items: Iterable[tuple[Item, int]]) -> Iterator[list[Item]]:
        """Batches of a stream of (item, length), and of what was pending before it, rank after rank.

        Reads no further ahead than the window, and flushes at the end, without empty batches. Saving
        `state_dict` between two steps loses nothing: what was read but not yet put out is in it.
        """
        for item, length in items:
            self.add(item, length)
            while (batches := self.next()) is not None:
                yield from batches
        while (batches := self.next(flush=True)) is not None:
            yield from filter(None, batches)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as plain data: JSON where the items are."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """What tells the `state_dict` of now later: cheap to keep of every step, where few are asked."""
        items, lengths = dict(self._items), dict(self._lengths)
        added, statistics = self._added, asdict(self.statistics)
        return lambda: {
            "settings": dict(self._settings),
            "added": added,
            "pending": [[id_, lengths[id_], item] for id_, item in items.items()],
            "statistics": statistics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, with any number of ranks.

        Raises:
            UserError: the state is of a packer with other settings, whose batches would not go on the same
                way.
        """
        if state["settings"] != self._settings:
            raise UserError(
                f"packer: the saved state is of {state['settings']}, this one has {self._settings}"
            )
        pending = [(id_, length) for id_, length, _ in state["pending"]]
        self._core.restore({"next_id": state["added"], "pending": pending})
        self._added = state["added"]
        self._items = {id_: item for id_, _, item in state["pending"]}
        self._lengths = dict(pending)
        self.statistics = PackingStatistics(**state["statistics"])
