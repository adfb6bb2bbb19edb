"""Words of captions as integers: a vocabulary, pairs of words, and many captions in one flat array."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SEPARATOR, UNKNOWN, FIRST_WORD = 0, 1, 2
"""Indices of the boundary between captions, of all words outside the vocabulary, and of its first word."""

_WORD = re.compile(r'\w+|[,.;:!?"]')


def split_words(caption: str) -> list[str]:
    """Split a caption into words in lower case and punctuation marks; other characters are ignored."""
    return _WORD.findall(caption.lower())


@dataclass(frozen=True)
class FlatWords:
    """Words of N captions, one after the other, with a separator before the first and after each caption."""

    words: np.ndarray
    """Index of each word, int64 (T,)."""
    pairs: np.ndarray
    """Index of the pair that begins at each word, 0 if the pair is unknown, int64 (T,)."""
    starts: np.ndarray
    """Position of each caption's first word, or of its separator if it has no words, int64 (N,)."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of words per caption, int64 (N,)."""
        return np.diff(self.starts, append=len(self.words)) - 1

    @property
    def captions(self) -> np.ndarray:
        """Caption of each position, int64 (T,); separators belong to the caption before them."""
        return np.maximum(np.searchsorted(self.starts, np.arange(len(self.words)), side="right") - 1, 0)


@dataclass(frozen=True)
class Vocabulary:
    """Known words and pairs of adjacent words."""

    words: tuple[str, ...]
    """Word of index FIRST_WORD + i."""
    pairs: np.ndarray
    """Code of pair i + 1: index of the first word times `size` plus index of the second, ascending, int64."""

    @classmethod
    def of(cls, words: Iterable[str], pairs: Iterable[tuple[str, str]]) -> "Vocabulary":
        """Return the vocabulary of distinct words and pairs of them."""
        vocabulary = cls(tuple(words), np.zeros(0, np.int64))
        index = vocabulary.index
        codes = sorted(index[first] * vocabulary.size + index[second] for first, second in pairs)
        return cls(vocabulary.words, np.array(codes, np.int64))

    @property
    def size(self) -> int:
        """Number of indices."""
        return FIRST_WORD + len(self.words)

    @cached_property
    def index(self) -> dict[str, int]:
        """Index of each word."""
        return {word: i for i, word in enumerate(self.words, FIRST_WORD)}

    def flatten(self, captions: Sequence[str]) -> FlatWords:
        """Return the indices of the words and pairs of captions."""
        find, indices, starts = self.index.get, [SEPARATOR], []
        for caption in captions:
            starts.append(len(indices))
            indices += [find(word, UNKNOWN) for word in split_words(caption)]
            indices.append(SEPARATOR)
        words = np.array(indices, np.int64)
        return FlatWords(words, self._pairs(words), np.array(starts, np.int64))

    def _pairs(self, words: np.ndarray) -> np.ndarray:
        found = np.zeros(len(words), np.int64)
        if len(self.pairs):
            codes = words[:-1] * self.size + words[1:]
            places = np.searchsorted(self.pairs, codes)
            known = self.pairs[np.minimum(places, len(self.pairs) - 1)] == codes
            found[:-1] = np.where(known, places + 1, 0)
        return found


PROPERTIES = ("and", "article", "the", "with", "comma", "mark", "number", "plural")
"""Properties of words that are counted per caption."""


def word_properties(words: Sequence[str]) -> np.ndarray:
    """Return which of `PROPERTIES` each index of a vocabulary has, bool (FIRST_WORD + len(words), 8)."""
    table = np.zeros((FIRST_WORD + len(words), len(PROPERTIES)), bool)
    for i, word in enumerate(words, FIRST_WORD):
        plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss")
        table[i] = (
            word == "and",
            word in ("a", "an"),
            word == "the",
            word == "with",
            word == ",",
            not word[0].isalnum(),
            word.isdigit(),
            plural,
        )
    return table
