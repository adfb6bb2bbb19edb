"""Detection of repeated keys among any number of samples, in eight bytes each."""

import hashlib

import numpy as np

_RECENT = 1 << 20


class KeysSeen:
    """Hashes of the keys seen so far: recent ones in a set, the others in a few sorted arrays.

    The probability that any of n different keys counts as repeated is n² / 2⁶⁵: 3e-8 for a million.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, key: str) -> bool:
        """Add a key; return whether it was seen before."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        value = int.from_bytes(digest, "little")
        if value in self._recent or any(_contains(array, value) for array in self._sorted):
            return True
        self._recent.add(value)
        if len(self._recent) == _RECENT:
            self._store_recent()
        return False

    def _store_recent(self) -> None:
        array = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
        self._recent = set()
        # Arrays at least double in size from the last to the first, so that their number is logarithmic.
        while self._sorted and len(self._sorted[-1]) <= len(array):
            array = np.sort(np.concatenate([self._sorted.pop(), array]))
        self._sorted.append(array)


def _contains(array: np.ndarray, value: int) -> bool:
    position = int(np.searchsorted(array, np.uint64(value)))
    return position < len(array) and int(array[position]) == value
