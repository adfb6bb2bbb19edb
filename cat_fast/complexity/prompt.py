"""Prompts for language models: the rubric, or a template from a file, with the description in it."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from cat_fast.complexity.description import Description
from cat_fast.complexity.rubric import check_scale, flag_sentence, rubric_text
from cat_fast.data.text_files import read_text
from cat_fast.errors import UserError

PLACEHOLDER = "{description}"
"""Place of the description in a template."""

_ANGLES = str.maketrans("<>", "‹›")
# Control tokens of chat templates in square brackets, such as [INST] and [/INST].
_BRACKETS = re.compile(r"\[(/?[A-Z][A-Z_]*)\]")
_SCORE = re.compile(r"\bscore\s*:", re.IGNORECASE)
_OUT_OF = re.compile(r"\bout of (\d+)")


@dataclass(frozen=True)
class Prompt:
    """Prompt template of a language model.

    The caption should come last, so that servers and `TransformersScorer` compute everything before it once.

    Raises:
        UserError: the template is blank, contains `PLACEHOLDER` twice, or does not ask for "Score: N".
    """

    template: str
    """Text with `PLACEHOLDER` where the description belongs; without one, the description is appended."""

    def __post_init__(self) -> None:
        if not self.template.strip():
            raise UserError("the prompt is empty; expected a rubric for complexity scores")
        if self.template.count(PLACEHOLDER) > 1:
            raise UserError(f"the prompt contains {PLACEHOLDER} more than once; keep one")
        if not _SCORE.search(self.template):
            raise UserError('the prompt must ask for the reply form "Score: N out of 9"; add that sentence')

    @classmethod
    def default(cls, scale: int = 9) -> "Prompt":
        """Return the project's rubric for scores from 1 to `scale`, 9 or 10."""
        return cls(f"{rubric_text(scale)}\n\n{PLACEHOLDER}\n")

    @classmethod
    def read(cls, path: Path) -> "Prompt":
        """Read a prompt from a text file in UTF-8.

        Raises:
            UserError: the file cannot be read, or its content is not a valid prompt.
        """
        try:
            return cls(read_text(path))
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    def render(self, description: Description) -> str:
        """Return the prompt for a description; its caption is quoted as data."""
        block = (
            f"<caption>{quote_caption(description.caption)}</caption>\n"
            f"{flag_sentence(description.has_text, description.has_faces)}"
        )
        before, placeholder, after = self.template.partition(PLACEHOLDER)
        return before + block + after if placeholder else f"{before.rstrip()}\n\n{block}\n"

    def check_scale(self, scale: int) -> None:
        """Raise UserError if the prompt asks for scores out of another number than `scale`, 9 or 10."""
        check_scale(scale)
        named = {int(number) for number in _OUT_OF.findall(self.template)}
        if named and scale not in named:
            raise UserError(
                f"the prompt asks for scores out of {min(named)}, but the scale is {scale}; change one"
            )

    @property
    def hash(self) -> str:
        """Hash of all that the prompt adds to a caption, stored with the scores."""
        flags = (False, True, None)
        rendered = [self.render(Description("-", *pair)) for pair in product(flags, flags)]
        return hashlib.sha256("\0".join(rendered).encode()).hexdigest()[:12]


def quote_caption(caption: str) -> str:
    """Return a caption on one line that can neither close its quotation nor form a control token.

    Angle brackets, which delimit the caption and most control tokens, become single quotation marks, and
    control tokens in square brackets get round ones.
    """
    spaced = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in caption)
    return _BRACKETS.sub(r"(\1)", " ".join(spaced.split()).translate(_ANGLES))
