"""Text in images: words by Tesseract, their confidence, and character errors of a reconstruction.

The authors report the mean confidence of pytesseract's words. A confident misreading counts as well as a
right one there, so character errors against the original's text are reported next to it.
"""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from cat_fast.errors import UserError

BINS = {256: (0.02, 0.03, 0.04, 1.0), 512: (0.01, 0.02, 0.03, 1.0), 1024: (0.005, 0.01, 0.02, 1.0)}
"""Edges of TokBench's bins of relative text size, by resolution."""
_MIN_OVERLAP = 0.3


class Word(NamedTuple):
    """A word of an image."""

    text: str
    confidence: float
    """In [0, 100]."""
    left: int
    top: int
    width: int
    height: int


def require_tesseract() -> str:
    """Return Tesseract's version.

    Raises:
        UserError: Tesseract or pytesseract is missing.
    """
    if importlib.util.find_spec("pytesseract") is None:
        raise UserError("OCR: run `pip install 'cat-fast[eval]'`, or leave OCR out with --no-ocr")
    if shutil.which("tesseract") is None:
        raise UserError("OCR: run `apt-get install tesseract-ocr`, or leave OCR out with --no-ocr")
    import pytesseract

    return str(pytesseract.get_tesseract_version())


def read_words(image: Image.Image) -> list[Word]:
    """Return the words that Tesseract reads in an image, in reading order."""
    import pytesseract

    found = pytesseract.image_to_data(image, output_type=pytesseract.Output.DICT)
    columns = (found[name] for name in ("text", "conf", "left", "top", "width", "height"))
    return [
        Word(text.strip(), float(confidence), *box)
        for text, confidence, *box in zip(*columns, strict=True)
        if text.strip() and float(confidence) >= 0
    ]


def mean_confidence(words: Sequence[Word]) -> float | None:
    """Return the mean confidence of a page's words; None for a page without words."""
    return float(np.mean([word.confidence for word in words])) if words else None


def character_errors(original: Sequence[Word], other: Sequence[Word]) -> tuple[int, int]:
    """Return the edit distance between the texts of two pages, and the length of the original's."""
    texts = [" ".join(word.text for word in words) for words in (original, other)]
    return edit_distance(*texts), len(texts[0])


def word_errors(original: Sequence[Word], other: Sequence[Word]) -> list[tuple[float, int, int]]:
    """Return per word of the original its height, its character errors and its number of characters.

    A word is compared with the words of the other page that overlap its box.
    """
    found = []
    for word in original:
        matches = [candidate for candidate in other if _overlap(word, candidate) >= _MIN_OVERLAP]
        text = " ".join(match.text for match in matches)
        errors = min(edit_distance(word.text, text), len(word.text))
        found.append((float(word.height), errors, len(word.text)))
    return found


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance of two strings."""
    if len(first) < len(second):
        first, second = second, first
    codes = np.array([ord(character) for character in second], dtype=np.int64)
    offsets = np.arange(len(second) + 1)
    row = offsets.copy()
    for number, character in enumerate(first, start=1):
        substituted = row[:-1] + (codes != ord(character))
        best = np.concatenate([[number], np.minimum(substituted, row[1:] + 1)])
        row = np.minimum.accumulate(best - offsets) + offsets  # insertions, along the row
    return int(row[-1])


def bin_edges(bins: Mapping[int, tuple[float, ...]], side: int) -> tuple[float, ...]:
    """Return the edges for a resolution: those of the nearest one that is defined."""
    return bins[min(bins, key=lambda known: abs(np.log(known / side)))]


def _overlap(first: Word, second: Word) -> float:
    """Return the intersection of two boxes over the smaller one."""
    width = min(first.left + first.width, second.left + second.width) - max(first.left, second.left)
    height = min(first.top + first.height, second.top + second.height) - max(first.top, second.top)
    smaller = min(first.width * first.height, second.width * second.height)
    return max(width, 0) * max(height, 0) / smaller if smaller else 0.0
