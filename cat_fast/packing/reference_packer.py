"""Best-fit packing in plain Python: reference and fallback of the native core."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def parse_length(length: Any, max_tokens: int) -> int:
    """Return a length, an integer of Python, numpy or torch, as an int.

    Raises:
        ValueError: it is not an integer, or outside 1 .. max_tokens.
    """
    value = _as_integer(length)
    if not 1 <= value <= max_tokens:
        raise ValueError(
            f"a sequence of {value} tokens does not fit a batch: lengths are 1 to {max_tokens} (max_tokens)"
        )
    return value


def _as_integer(value: Any) -> int:
    """Return an integer; conversion with int() would truncate 7.9, and read True as 1 and "5" as 5."""
    if type(value) is int:  # the usual case, for speed
        return value
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"expected an integer number of tokens, got {value!r}") from None


class ReferenceBestFitPacker:
    """Reference implementation of `cat_fast._bindings.BestFitPacker`, with the same methods.

    1. A step selects, in arrival order, as many of the oldest pending sequences as fit `ranks` budgets.
    2. The oldest is placed first, the others from longest to shortest. Each goes to the rank with the
       smallest sum of squared lengths among those with enough room.
    3. The remaining room is filled by best fit: the rank with the smallest sum of squares takes the longest
       pending sequence that fits, until none fits any rank.

    Ties of sums are broken by fewer tokens, then by the lower rank; ties of lengths by the older sequence.
    Only the first `window` pending sequences are considered.

    Raises:
        ValueError: an argument is below 1.
    """

    def __init__(self, max_tokens: int, max_sequences: int, window: int, ranks: int = 1) -> None:
        arguments = {"max_tokens": max_tokens, "max_sequences": max_sequences, "window": window}
        for name, value in {**arguments, "ranks": ranks}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1 is needed")
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._window = window
        self._ranks = ranks
        self._next_id = 0
        self._pending: list[tuple[int, int]] = []  # (id, length), oldest first

    def __len__(self) -> int:
        """Return the number of pending sequences."""
        return len(self._pending)

    def extend(self, lengths: Iterable[int]) -> None:
        """Append sequences; the id of a sequence is the number of sequences added before it.

        Raises:
            ValueError: a length is not an integer from 1 to max_tokens; then none is appended.
        """
        parsed = [parse_length(length, self._max_tokens) for length in lengths]
        self._pending += enumerate(parsed, self._next_id)
        self._next_id += len(parsed)

    def next(self, flush: bool = False) -> list[list[int]] | None:
        """Return the ids of one batch per rank; batches may be empty if too few sequences are pending.

        A batch lists the selected ids in arrival order, then those added by best fit. Return None if none are
        pending, or fewer than `window` without `flush`.
        """
        if not self._pending or (len(self._pending) < self._window and not flush):
            return None
        rest = self._pending[: self._window]
        batches = [_Batch(rank) for rank in range(self._ranks)]
        oldest, *others = rest[: self._within_budgets(rest)]
        batches[0].take(oldest, rest)
        for sequence in sorted(others, key=lambda sequence: -sequence[1]):
            roomy = [batch for batch in batches if sequence[1] <= self._room(batch)]
            if roomy:
                min(roomy, key=_Batch.load).take(sequence, rest)
        for batch in batches:
            batch.ids.sort()
        unfilled = list(batches)
        while unfilled:
            batch = min(unfilled, key=_Batch.load)
            fitting = [sequence for sequence in rest if sequence[1] <= self._room(batch)]
            if fitting:
                batch.take(max(fitting, key=lambda sequence: sequence[1]), rest)
            else:
                unfilled.remove(batch)
        self._pending = rest + self._pending[self._window :]
        return [batch.ids for batch in batches]

    def pending(self) -> list[tuple[int, int]]:
        """Return (id, length) of every pending sequence, oldest first."""
        return list(self._pending)

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`, as plain ints and lists."""
        return {"next_id": self._next_id, "pending": self.pending()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved `state`.

        Raises:
            ValueError: it is not the state of such a packer; then nothing changes.
        """
        next_id, expected = _as_integer(state["next_id"]), 0
        pending = []
        for id_, length in state["pending"]:
            pending.append((_as_integer(id_), parse_length(length, self._max_tokens)))
            if not expected <= pending[-1][0] < next_id:
                raise ValueError(
                    f"packer state: id {id_} is not in ascending order from 0 to below {next_id}"
                )
            expected = pending[-1][0] + 1
        self._next_id, self._pending = next_id, pending

    def _within_budgets(self, window: list[tuple[int, int]]) -> int:
        """Return the number of oldest sequences in the window that fit the combined budgets of all ranks."""
        room = self._ranks * self._max_tokens
        window = window[: self._ranks * self._max_sequences]
        for count, (_, length) in enumerate(window):
            if length > room:
                return count
            room -= length
        return len(window)

    def _room(self, batch: "_Batch") -> int:
        return self._max_tokens - batch.tokens if len(batch.ids) < self._max_sequences else 0


@dataclass(eq=False)
class _Batch:
    """Batch of one rank in one step."""

    rank: int
    tokens: int = 0
    squares: int = 0
    ids: list[int] = field(default_factory=list)

    def load(self) -> tuple[int, int, int]:
        return self.squares, self.tokens, self.rank

    def take(self, sequence: tuple[int, int], window: list[tuple[int, int]]) -> None:
        """Move a sequence from the window to this batch."""
        window.remove(sequence)
        id_, length = sequence
        self.ids.append(id_)
        self.tokens += length
        self.squares += length**2
