"""Unigram and bigram counts of sequences: what a language model has to improve on."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

SMOOTHING = (0.001, 0.01, 0.1, 1.0)
"""Numbers that are added to counts; the best one for the evaluated sequences is used, to the model's
disadvantage."""


class Counts:
    """Counts of ids, and of pairs of successive ids.

    Args:
        sequences: training sequences of ids from 0.
        vocab_size: number of ids.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], vocab_size: int) -> None:
        self.size = vocab_size
        self.single = np.zeros(vocab_size)
        self.pairs: dict[tuple[int, int], int] = {}
        self.before = np.zeros(vocab_size)
        for sequence in sequences:
            for first, second in pairwise(sequence):
                self.single[second] += 1
                self.before[first] += 1
                self.pairs[first, second] = self.pairs.get((first, second), 0) + 1

    def unigram_bits(self, sequence: Sequence[int], smoothing: float) -> np.ndarray:
        """Return the bits of each id but the first, (n - 1,)."""
        counts = self.single[list(sequence[1:])] + smoothing
        return -np.log2(counts / (self.single.sum() + smoothing * self.size))

    def bigram_bits(self, sequence: Sequence[int], smoothing: float) -> np.ndarray:
        """Return the bits of each id but the first, given the one before it."""
        pairs = list(pairwise(sequence))
        counts = np.array([self.pairs.get(pair, 0) for pair in pairs]) + smoothing
        totals = self.before[[first for first, _ in pairs]] + smoothing * self.size
        return -np.log2(counts / totals)

    def best_bits(self, sequences: Sequence[Sequence[int]], kind: str) -> list[np.ndarray]:
        """Return the bits of the ids of each sequence under the best smoothing.

        Args:
            kind: `unigram` or `bigram`.
        """
        measure = self.unigram_bits if kind == "unigram" else self.bigram_bits
        tried = [[measure(sequence, smoothing) for sequence in sequences] for smoothing in SMOOTHING]
        return min(tried, key=lambda bits: sum(float(one.sum()) for one in bits))
