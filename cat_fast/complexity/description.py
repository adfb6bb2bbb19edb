"""The scorer's input: an image caption and two perception flags."""

from dataclasses import dataclass

from cat_fast.data.text_files import valid_text
from cat_fast.errors import UserError


@dataclass(frozen=True)
class Description:
    """A caption and two flags, which alone determine an image's complexity score; pixels are not used.

    Raises:
        UserError: the caption is not a string or is blank, or a flag is neither a bool nor None.
    """

    caption: str
    """Image content in any number of sentences; the user's prompt in text-to-image generation. Lone
    surrogates, which files and models do not support, are replaced (`valid_text`)."""
    has_text: bool | None = None
    """True if text or a number is visible in the image; None if unknown, so that scorers infer it."""
    has_faces: bool | None = None
    """True if a face is visible in the image; None if unknown."""

    def __post_init__(self) -> None:
        if not isinstance(self.caption, str) or not self.caption.strip():
            raise UserError(
                f"a caption must be non-empty text, got {self.caption!r}; describe the image's content"
            )
        for flag in ("has_text", "has_faces"):
            if not isinstance(getattr(self, flag), bool | None):
                raise UserError(f"{flag} must be true, false or null, got {getattr(self, flag)!r}")
        object.__setattr__(self, "caption", valid_text(self.caption))

    @classmethod
    def from_label(
        cls, label: str, has_text: bool | None = None, has_faces: bool | None = None
    ) -> "Description":
        """Return the description of an image class, worded as in class-conditional generation."""
        if not label.strip():
            raise UserError("a label must be non-empty text, such as 'golden retriever'")
        return cls(f"this is an image of {label.strip()}", has_text, has_faces)
