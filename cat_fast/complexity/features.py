"""Sparse features of a description: TF-IDF of word and character n-grams, the flags, a few counts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix, hstack

from cat_fast.complexity.description import Description

if TYPE_CHECKING:  # scikit-learn is slow to import (about 1 s); import it only when scoring
    from sklearn.feature_extraction.text import TfidfVectorizer

_WORD_GRAMS = {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
_CHAR_GRAMS = {"analyzer": "char_wb", "ngram_range": (3, 5)}


@dataclass(frozen=True)
class FeatureSpace:
    """Vocabulary of n-grams with their inverse document frequencies; other n-grams are ignored.

    Columns: word n-grams, character n-grams, then `COUNT_NAMES`.
    """

    words: np.ndarray
    """Word n-grams, unicode (W,)."""
    word_idf: np.ndarray
    """Inverse document frequencies, float64 (W,)."""
    chars: np.ndarray
    """Character n-grams within words, unicode (K,)."""
    char_idf: np.ndarray
    """Inverse document frequencies, float64 (K,)."""

    @classmethod
    def fit(cls, descriptions: Sequence[Description]) -> "FeatureSpace":
        """Collect the n-grams that occur in at least two captions."""
        captions = [description.caption for description in descriptions]
        arrays: list[np.ndarray] = []
        for grams in (_WORD_GRAMS, _CHAR_GRAMS):
            vectorizer = _vectorizer(grams, min_df=2).fit(captions)
            arrays += [vectorizer.get_feature_names_out().astype(str), vectorizer.idf_]
        return cls(*arrays)

    def names(self) -> list[str]:
        """Return a readable name per column, in column order."""
        return [*(f'word "{g}"' for g in self.words), *(f'letters "{g}"' for g in self.chars), *COUNT_NAMES]

    def matrix(self, descriptions: Sequence[Description]) -> csr_matrix:
        """Return the features of each description, float64 (len(descriptions), W + K + len(COUNT_NAMES))."""
        captions = [description.caption for description in descriptions]
        counts = csr_matrix([_counts(description) for description in descriptions], dtype=np.float64)
        return hstack([*(v.transform(captions) for v in self._vectorizers), counts], format="csr")

    @cached_property
    def _vectorizers(self) -> "list[TfidfVectorizer]":
        restored = []
        for grams, vocabulary, idf in (
            (_WORD_GRAMS, self.words, self.word_idf),
            (_CHAR_GRAMS, self.chars, self.char_idf),
        ):
            vectorizer = _vectorizer(grams, vocabulary=vocabulary.tolist())
            vectorizer.idf_ = idf
            restored.append(vectorizer)
        return restored


COUNT_NAMES = (
    "has text",
    "has faces",
    "has text and faces",
    "length (log of words)",
    "commas",
    "sentences",
    "ands",
    "single things (a, an)",
    "a number in digits",
    "plurals",
)


def _counts(description: Description) -> list[float]:
    caption = description.caption
    words = re.findall(r"\w+", caption.lower())
    return [
        bool(description.has_text),
        bool(description.has_faces),
        bool(description.has_text and description.has_faces),
        np.log1p(len(words)),
        caption.count(","),
        len(re.findall(r"[.!?](?:\s|$)", caption)),
        words.count("and"),
        words.count("a") + words.count("an"),
        any(word.isdigit() for word in words),
        sum(len(word) > 3 and word.endswith("s") and not word.endswith("ss") for word in words),
    ]


def _vectorizer(grams: dict, **options: object) -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, **grams, **options)
