"""Legibility of reconstructed pages: character error rate of tesseract."""

import re
import shutil
import subprocess
from pathlib import Path

from PIL import Image

from cat_fast.errors import UserError

READABLE = 0.05
"""Error rate below which tesseract reads an original well enough to judge its reconstructions."""
MIN_CHARACTERS = 40
"""Pages with fewer characters are left out."""


def require_tesseract() -> None:
    """Raise UserError if tesseract is not installed."""
    if shutil.which("tesseract") is None:
        raise UserError(
            "tesseract is missing; install the Debian packages tesseract-ocr and tesseract-ocr-eng"
        )


def read_text(image: Image.Image, folder: Path, scale: int = 2) -> str:
    """Return the text of an image by tesseract, lines joined and spaces normalized.

    Args:
        folder: for a temporary file.
        scale: enlargement before reading; tesseract expects capitals of 20 to 40 px.
    """
    enlarged = image.convert("L").resize(
        (scale * image.width, scale * image.height), Image.Resampling.BICUBIC
    )
    path = folder / "page.png"
    enlarged.save(path)
    command = ["tesseract", str(path), "-", "--psm", "6", "-l", "eng"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return re.sub(r"\s+", " ", found.stdout).strip()


def character_error_rate(text: str, expected: str) -> float:
    """Return the edit distance between texts per character of the expected one, at most 1."""
    if not expected:
        return float(bool(text))
    previous = list(range(len(expected) + 1))
    for i, character in enumerate(text, 1):
        current = [i]
        for j, other in enumerate(expected, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (character != other)))
        previous = current
    return min(1.0, previous[-1] / len(expected))
