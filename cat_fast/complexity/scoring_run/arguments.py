"""Positional arguments of `cat-fast score`: each is a caption or a file, never a guess."""

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

from cat_fast.data.images.io import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from cat_fast.data.streams.formats.base import ARCHIVE_SUFFIXES
from cat_fast.errors import UserError

Kind = Literal["json lines", "text", "parquet", "archive", "image"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "json lines",
    ".txt": "text",
    ".parquet": "parquet",
    **dict.fromkeys(ARCHIVE_SUFFIXES, "archive"),
    **dict.fromkeys(sorted(IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES), "image"),
}
ACCEPTED = ".jsonl, .txt, .parquet, .tar, an image with a caption next to it, or a folder of these"
_SPELLINGS = "to score the words themselves use --caption TEXT, to read a file use --file PATH"
_SHOWN = 60
"""Maximum length of a quoted argument, in characters."""


class Arguments(NamedTuple):
    """Positional arguments; one of the lists is empty."""

    captions: list[str]
    files: list[str]


def kind_by_ending(path: str) -> Kind | None:
    """Return the kind of a file by the ending of its name, in upper or lower case; None if it is unknown."""
    lower = path.lower()
    return next((kind for ending, kind in _KINDS.items() if lower.endswith(ending)), None)


def split_arguments(arguments: Sequence[str]) -> Arguments:
    """Return the captions and the files among positional arguments.

    An existing path with a known ending, or an existing folder, is a file. A text that is not a path and does
    not end like one is a caption.

    Raises:
        UserError: a file is missing, an existing file has another ending, or files are mixed with captions.
            The message names the options --caption TEXT and --file PATH, which are unambiguous.
    """
    captions: list[str] = []
    files: list[str] = []
    for argument in arguments:
        (files if _is_file(argument) else captions).append(argument)
    if captions and files:
        raise UserError(
            f"files are mixed with captions: {shorten(files[0])!r} is a file, {shorten(captions[0])!r} is"
            f" not; {_SPELLINGS}"
        )
    return Arguments(captions, files)


def shorten(text: str) -> str:
    """Return a text, truncated if it is long."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _is_file(argument: str) -> bool:
    known = kind_by_ending(argument) is not None or argument.endswith(os.sep)
    if not os.path.lexists(argument):
        if known:
            raise UserError(f"{shorten(argument)!r} ends like a file, but does not exist; {_SPELLINGS}")
        return False
    if not known and not os.path.isdir(argument):
        raise UserError(
            f"{shorten(argument)!r} is the name of an existing file without a known ending (.jsonl, .txt,"
            f" .parquet, .tar or of an image); {_SPELLINGS}"
        )
    return True
