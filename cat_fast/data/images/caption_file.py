"""The caption that lies beside an image as a text file."""

from pathlib import Path

from cat_fast.errors import UserError


def caption_beside(photo: Path) -> str:
    """The text in PHOTO.txt or PHOTO.jpg.txt beside PHOTO.jpg, on one line; empty where there is none.

    Raises:
        UserError: there is one, and it cannot be read as UTF-8.
    """
    for file in (photo.with_suffix(".txt"), photo.with_name(photo.name + ".txt")):
        try:
            return " ".join(file.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{photo}: its caption file {file.name} cannot be read ({error})") from error
    return ""
