"""Emoji of Noto Color Emoji, named by the Unicode Common Locale Data Repository."""

import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from cat_fast.data.corpus.sources.base import CorpusImage, Problem, Source
from cat_fast.errors import UserError

SIDE = 128
"""Side of a rendered emoji in pixels, that of the font's bitmaps."""
_STRIKE = 109
"""The only size that the font's bitmaps have."""
_JOINER, _VARIATION = "\u200d", "\ufe0f"
_IGNORED = {_JOINER, _VARIATION, "♀", "♂"} | {chr(c) for c in range(0x1F3FB, 0x1F400)}
"""Code points that vary an emoji: joiners, genders, skin tones."""
_PERSONS = {"👨": "🧑", "👩": "🧑"}


def _images(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    if not features.check("raqm"):
        raise UserError("emoji sequences need Pillow with libraqm; install Pillow's own wheel from PyPI")
    font = ImageFont.truetype(next(folder.rglob("NotoColorEmoji.ttf")), _STRIKE)
    missing = _render("\U0010ffff", font)
    for text, name in sorted(_names(folder).items()):
        image = _render(text, font)
        if image is None or (missing is not None and ImageChops.difference(image, missing).getbbox() is None):
            continue  # a character or sequence that this version of the font lacks
        code = "-".join(f"{ord(c):x}" for c in text)
        yield CorpusImage(code, image, f"{name}, emoji", group_of(text), category="emoji")


def _names(folder: Path) -> dict[str, str]:
    """Return the English name of each emoji, by its text; of single characters without one, Unicode's."""
    names: dict[str, str] = {}
    for file in sorted(folder.rglob("annotations*/en.xml")):
        for annotation in ET.parse(file).iter("annotation"):
            if annotation.get("type") == "tts" and annotation.text:
                text = annotation.get("cp", "").replace(_VARIATION, "")
                names[text] = annotation.text.strip().replace("flag:", "flag of").replace(":", "")
    for code in (*range(0x2190, 0x2C00), *range(0x1F000, 0x1FB00)):
        character = chr(code)
        if character not in names and (name := unicodedata.name(character, "")):
            names[character] = name.lower()
    return {text: name for text, name in names.items() if text and text[0] not in _IGNORED}


def group_of(text: str) -> str:
    """Return the base of an emoji sequence: without skin tones and genders."""
    if len(text) == 1 or all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in text):  # a flag is a pair of letters
        return _PERSONS.get(text, text)
    base = "".join(_PERSONS.get(c, c) for c in text if c not in _IGNORED)
    return base or text


def _render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Draw an emoji on white, SIDE x SIDE px; return None if the font draws it as several or not at all."""
    try:
        length = font.getlength(text)
    except OSError:
        return None
    if not 0 < length < 1.5 * SIDE:
        return None
    width = round(length)
    canvas = Image.new("RGB", (width, 2 * SIDE), "white")
    ImageDraw.Draw(canvas).text((0, SIDE // 2), text, font=font, embedded_color=True, fill="black")
    box = ImageChops.difference(canvas, Image.new("RGB", canvas.size, "white")).getbbox()
    if box is None:
        return None
    left, top = (box[0] + box[2] - SIDE) // 2, (box[1] + box[3] - SIDE) // 2
    drawn = Image.new("RGB", (SIDE, SIDE), "white")
    drawn.paste(canvas, (-left, -top))
    return drawn


EMOJI = Source(
    name="emoji",
    packages=("fonts-noto-color-emoji", "unicode-cldr-core"),
    patterns=("usr/share/fonts/*NotoColorEmoji.ttf", "usr/share/unicode/cldr/common/annotations*/en.xml"),
    images=_images,
    licence="Apache-2.0 (images of Noto Emoji), Unicode licence (names)",
    shown=True,
    lossless=True,
    disk=80_000_000,
)
