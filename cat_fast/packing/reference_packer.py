"""Best-fit packing in plain Python: what the native core must equal, and what serves where it is missing."""

from collections.abc import Mapping
from typing import Any


class ReferenceBestFitPacker:
    """The algorithm of `cat_fast._bindings.BestFitPacker`, method for method.

    A batch begins with the oldest pending sequence and takes more in arrival order while they fit. Once the
    next does not, the rest of the budget is filled by best fit: the largest length that still fits, the
    oldest among equals. Only the first `window` pending sequences are looked at.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, max_tokens: int, max_sequences: int, window: int) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_sequences", max_sequences), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1 is needed")
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._window = window
        self._next_id = 0
        self._pending: list[tuple[int, int]] = []  # (id, length), oldest first

    def __len__(self) -> int:
        """The number of pending sequences."""
        return len(self._pending)

    def add(self, length: int) -> None:
        """Append a sequence; its id is the number added before it.

        Raises:
            ValueError: a length outside 1 .. max_tokens.
        """
        if not 1 <= length <= self._max_tokens:
            raise ValueError(
                f"a sequence of {length} tokens does not fit a batch: "
                f"lengths are 1 to {self._max_tokens} (max_tokens)"
            )
        self._pending.append((self._next_id, length))
        self._next_id += 1

    def next(self, flush: bool = False) -> list[int] | None:
        """The ids of one batch, or None if none is pending or fewer than `window` are and not `flush`."""
        if not self._pending or (len(self._pending) < self._window and not flush):
            return None
        window = self._pending[: self._window]
        batch = self._take_in_order(window)
        room = self._max_tokens - sum(length for _, length in batch)
        rest = window[len(batch) :]
        while len(batch) < self._max_sequences:
            fitting = [sequence for sequence in rest if sequence[1] <= room]
            if not fitting:
                break
            best = max(fitting, key=lambda sequence: sequence[1])  # the first, so the oldest, among equals
            rest.remove(best)
            batch.append(best)
            room -= best[1]
        self._pending = rest + self._pending[self._window :]
        return [id_ for id_, _ in batch]

    def pending(self) -> list[tuple[int, int]]:
        """(id, length) of every pending sequence, oldest first."""
        return list(self._pending)

    def state(self) -> dict[str, Any]:
        """Plain ints and lists, for `restore`."""
        return {"next_id": self._next_id, "pending": self.pending()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved `state`."""
        self._next_id = int(state["next_id"])
        self._pending = [(int(id_), int(length)) for id_, length in state["pending"]]

    def _take_in_order(self, window: list[tuple[int, int]]) -> list[tuple[int, int]]:
        room = self._max_tokens
        for count, (_, length) in enumerate(window[: self._max_sequences]):
            if length > room:
                return window[:count]
            room -= length
        return window[: self._max_sequences]
