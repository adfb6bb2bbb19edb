"""What the scorer is told about an image: a caption and the answers to two perception questions."""

from dataclasses import dataclass

from cat_fast.data.text_files import valid_text
from cat_fast.errors import UserError


@dataclass(frozen=True)
class Description:
    """All that decides an image's complexity score; the pixels themselves are never looked at.

    Raises:
        UserError: the caption is not a string or is blank, or a flag is not a bool.
    """

    caption: str
    """What is in the image, in any number of sentences; a user's prompt in text-to-image generation. Lone
    surrogates, which files and models cannot hold, are replaced (`valid_text`)."""
    has_text: bool = False
    """Is there text or a number in the image?"""
    has_faces: bool = False
    """Is there a face in the image?"""

    def __post_init__(self) -> None:
        if not isinstance(self.caption, str) or not self.caption.strip():
            raise UserError(
                f"a caption must be non-empty text, got {self.caption!r}: say what is in the image"
            )
        for flag in ("has_text", "has_faces"):
            if not isinstance(getattr(self, flag), bool):
                raise UserError(f"{flag} must be true or false, got {getattr(self, flag)!r}")
        object.__setattr__(self, "caption", valid_text(self.caption))

    @classmethod
    def from_label(cls, label: str, has_text: bool = False, has_faces: bool = False) -> "Description":
        """Description of a class of images, in the wording that class-conditional generation uses."""
        if not label.strip():
            raise UserError("a label must be non-empty text, such as 'golden retriever'")
        return cls(f"this is an image of {label.strip()}", has_text, has_faces)
