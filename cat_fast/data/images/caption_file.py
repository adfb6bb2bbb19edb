"""Caption files next to images."""

from pathlib import Path

from cat_fast.errors import UserError


def read_caption(photo: Path) -> str:
    """Return the text of PHOTO.txt or PHOTO.jpg.txt next to PHOTO.jpg, on one line; empty if neither exists.

    Raises:
        UserError: the file cannot be read as UTF-8.
    """
    for file in (photo.with_suffix(".txt"), photo.with_name(photo.name + ".txt")):
        try:
            return " ".join(file.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{photo}: its caption file {file.name} cannot be read ({error})") from error
    return ""
