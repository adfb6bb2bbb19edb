"""Rewordings of captions that keep their meaning, to measure how much a score depends on wording."""

import re
from collections.abc import Callable

_SYNONYMS = {
    "big": "large",
    "large": "big",
    "small": "little",
    "little": "small",
    "picture": "image",
    "photo": "photograph",
    "photograph": "photo",
    "road": "street",
    "street": "road",
    "sofa": "couch",
    "couch": "sofa",
    "several": "some",
    "next to": "beside",
    "on top of": "on",
    "kid": "child",
    "kids": "children",
    "bike": "bicycle",
    "motorbike": "motorcycle",
    "airplane": "plane",
    "plane": "airplane",
}


def _replace_synonyms(caption: str) -> str:
    pattern = rf"\b({'|'.join(sorted(_SYNONYMS, key=len, reverse=True))})\b"
    return re.sub(pattern, lambda found: _SYNONYMS[found[0]], caption.lower())


def _prefix(words: str) -> Callable[[str], str]:
    return lambda caption: f"{words} {caption[:1].lower()}{caption[1:]}"


def _toggle_period(caption: str) -> str:
    return caption[:-1] if caption.endswith(".") else f"{caption}."


PARAPHRASES: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "period added or removed": _toggle_period,
    "prefix: a photo of": _prefix("a photo of"),
    "prefix: the image shows": _prefix("the image shows"),
    "synonyms": _replace_synonyms,
}
"""Functions from a caption to a paraphrase, by name."""
