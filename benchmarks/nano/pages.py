"""Legibility of reconstructed pages: character error rate of Tesseract."""

import re

from PIL import Image

from cat_fast.evaluation.tokenizers.text import edit_distance

READABLE = 0.05
"""Error rate below which Tesseract reads an original well enough to judge its reconstructions."""
MIN_CHARACTERS = 40
"""Pages with fewer characters are left out."""


def read_text(image: Image.Image, scale: int = 2) -> str:
    """Return the text of an image as one block, lines joined and spaces normalized.

    Args:
        scale: enlargement before reading; Tesseract expects capitals of 20 to 40 px.
    """
    import pytesseract

    size = scale * image.width, scale * image.height
    enlarged = image.convert("L").resize(size, Image.Resampling.BICUBIC)
    return re.sub(r"\s+", " ", pytesseract.image_to_string(enlarged, config="--psm 6")).strip()


def character_error_rate(text: str, expected: str) -> float:
    """Return the edit distance between texts per character of the expected one, at most 1."""
    if not expected:
        return float(bool(text))
    return min(1.0, edit_distance(text, expected) / len(expected))
