"""Prompts for vision-language models: one for the caption, and questions that are answered by yes or no."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_fast.complexity.scorers.language_model.replies import THOUGHT, ModelReply
from cat_fast.data.text_files import parse_object, read_text, valid_text
from cat_fast.errors import UserError

SHORT_CAPTION = "Describe the image in one sentence."
LONG_CAPTION = (
    "Describe the image in detail: all objects and people, their number and colours, textures, the"
    " background, and any text."
)
YES_OR_NO = "Answer with yes or no."
ANSWER_PATTERN = "(Yes|No)"
"""Regular expression of an answer, for endpoints with structured output."""
_FLAGS = ("has_text", "has_faces")
_ANSWER = re.compile(r"\W*(?:the answer is\W+)?(?P<word>yes|no)\b", re.IGNORECASE)
_STATEMENT = re.compile(r"\W*there(?:'s| is| are)\s+(?P<no>no\b|not\b)?", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """A question on an image with the answer yes or no.

    Raises:
        UserError: the question is blank, the flag is unknown, or the answer would have no effect.
    """

    text: str
    flag: str | None = None
    """Flag of the description that the answer sets, has_text or has_faces; None for none."""
    if_yes: str = ""
    """Sentence that a positive answer adds to the caption."""
    if_no: str = ""
    """Sentence that a negative answer adds to the caption."""

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.text, self.if_yes, self.if_no)):
            raise UserError(f"a question and its sentences must be text, got {self.text!r}")
        if not self.text.strip():
            raise UserError("a question must not be blank")
        if self.flag not in (None, *_FLAGS):
            raise UserError(f"{self.text!r}: the flag must be {' or '.join(_FLAGS)}, got {self.flag!r}")
        if self.flag is None and not (self.if_yes.strip() or self.if_no.strip()):
            raise UserError(
                f"{self.text!r}: the answer has no effect; set flag, or a sentence if_yes or if_no"
            )

    @property
    def prompt(self) -> str:
        """The question with the form of its answer."""
        return f"{self.text.strip()} {YES_OR_NO}"


TEXT_QUESTION = Question("Is there any text or a number in the image?", "has_text")
FACES_QUESTION = Question("Are there any human faces in the image?", "has_faces")


@dataclass(frozen=True)
class QuestionSet:
    """The caption prompt and the questions; by default those of the published method, with a short caption.

    Raises:
        UserError: the caption prompt is blank, its length is not positive, or two questions set one flag.
    """

    caption: str = SHORT_CAPTION
    max_caption_tokens: int = 48
    """Longest caption; a longer one is cut after its last complete sentence."""
    questions: tuple[Question, ...] = (TEXT_QUESTION, FACES_QUESTION)

    def __post_init__(self) -> None:
        if not isinstance(self.caption, str) or not self.caption.strip():
            raise UserError("the caption prompt is empty; expected an instruction to describe the image")
        if type(self.max_caption_tokens) is not int or self.max_caption_tokens < 1:
            raise UserError(f"max_caption_tokens must be a positive integer, got {self.max_caption_tokens!r}")
        flags = [question.flag for question in self.questions if question.flag]
        if len(set(flags)) < len(flags):
            raise UserError(f"two questions set the same flag: {', '.join(flags)}; keep one per flag")

    @classmethod
    def long(cls) -> "QuestionSet":
        """Return the default questions with a prompt for a detailed caption."""
        return cls(LONG_CAPTION, 256)

    @classmethod
    def read(cls, path: Path) -> "QuestionSet":
        """Read a question set from a JSON object with these fields; missing ones keep their defaults.

        Raises:
            UserError: the file cannot be read, or is not a valid question set.
        """
        try:
            row = parse_object(read_text(path))
            rows = row.pop("questions", None)
            given: dict[str, Any] = {} if rows is None else {"questions": tuple(Question(**r) for r in rows)}
            return cls(**row, **given)
        except (TypeError, ValueError) as error:  # a UserError, too
            message = str(error) if str(path) in str(error) else f"{path}: not a question set ({error})"
            raise UserError(
                f"{message}; expected caption, max_caption_tokens, and questions with text, flag, if_yes and"
                " if_no"
            ) from error

    @property
    def hash(self) -> str:
        """Hash of all prompts, stored with the descriptions."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


def parse_answer(reply: ModelReply) -> bool:
    """Return the answer in a reply such as "Yes, there is a sign." or "There is no text."

    Raises:
        UserError: the reply does not begin with an answer.
    """
    text = _one_line(reply)
    if answer := _ANSWER.match(text):
        return answer["word"].lower() == "yes"
    if statement := _STATEMENT.match(text):
        return not statement["no"]
    raise UserError(f"expected yes or no, got the reply {text[:80]!r}")


def read_caption(reply: ModelReply) -> str:
    """Return the caption in a reply, on one line; a sentence that the length limit cut is left out.

    Raises:
        UserError: the reply is empty.
    """
    text = _one_line(reply).strip('"“”').strip()
    if not any(letter.isalnum() for letter in text):
        raise UserError("the model's caption is empty")
    if not reply.complete and (whole := re.match(r".+[.!?](?=\s)", text)):
        return whole[0]
    return text


def without_thoughts(text: str) -> str:
    """Return a reply without the thoughts of a reasoning model.

    Raises:
        UserError: they do not end.
    """
    opening, closing = THOUGHT
    text = text.rpartition(closing)[2]
    if opening in text:
        raise UserError("the model's thoughts did not end; allow longer replies, or another model")
    return text


def _one_line(reply: ModelReply) -> str:
    return " ".join(without_thoughts(valid_text(reply.text)).split())
