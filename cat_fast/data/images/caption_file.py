"""Caption files next to images."""

from pathlib import Path

from cat_fast.data.text_files import read_text
from cat_fast.errors import UserError


def read_caption(photo: Path) -> str:
    """Return the text of PHOTO.txt or PHOTO.jpg.txt next to PHOTO.jpg, on one line; empty if neither exists.

    Raises:
        UserError: the file cannot be read as UTF-8.
    """
    for file in (photo.with_suffix(".txt"), photo.with_name(photo.name + ".txt")):
        if file.exists():
            try:
                return " ".join(read_text(file).split())
            except UserError as error:
                raise UserError(f"{photo}: its caption file cannot be read: {error}") from error
    return ""
