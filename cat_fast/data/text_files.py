"""Text and JSON from outside: one reader of captions, class names, image indices, sidecars and samples.

Text is UTF-8 and may start with a byte order mark, which is not part of it. Lines end at `\\n`, as JSON lines
require; other line separators of Unicode are part of a line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
_BOM = BYTE_ORDER_MARK.encode()
_SHOWN = 60
"""Maximum length of a quoted line in an error, in characters."""


def read_text(path: Path) -> str:
    """Return the content of a text file, decompressed if its name ends in `.gz`.

    Raises:
        UserError: the file cannot be read, is damaged, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
        return decode_text(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except ValueError as error:  # of the text, or of a path that is not a valid file name
        raise UserError(f"{path}: {error}") from error


def decode_text(content: bytes) -> str:
    """Return UTF-8 text without its byte order mark.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return content.decode().lstrip(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}); save it as UTF-8") from error


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and stripped text of each line that is not blank.

    Raises:
        UserError: see `read_text`.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if text := strip_text(line):
            yield number, text


def byte_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset in bytes and content of each line that is not blank; one line is in memory.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, start=1):
            if not is_blank(line):
                yield number, start, line
            start += len(line)


def is_blank(line: bytes) -> bool:
    """Return whether a line in UTF-8 contains nothing but white space and a byte order mark."""
    return not line.removeprefix(_BOM).strip()


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a line or file.

    Raises:
        ValueError: it is not valid JSON in UTF-8, or not an object.
    """
    text = strip_text(decode_text(line) if isinstance(line, bytes) else line)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text[:_SHOWN]}")
    return value


def strip_text(text: str) -> str:
    """Return text without white space and byte order marks around it."""
    return text.strip().strip(BYTE_ORDER_MARK).strip()


def valid_text(text: str) -> str:
    """Return text with each lone surrogate replaced by U+FFFD; surrogate pairs become their character.

    JSON and file names can contain surrogates, which no file in UTF-8 can.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def escape_text(text: str) -> str:
    """Return text with each lone surrogate escaped, such as `\\udce9`: different keys stay different."""
    return text.encode("utf-8", "backslashreplace").decode()
