"""Captioner that asks a vision-language model for a caption, and questions with the answer yes or no."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from PIL import Image

from cat_fast.complexity.captioners.base import DescriptionFailure, known_captions
from cat_fast.complexity.captioners.questions import (
    ANSWER_PATTERN,
    YES_OR_NO,
    QuestionSet,
    parse_answer,
    read_caption,
)
from cat_fast.complexity.captioners.vision_model import VisionModel
from cat_fast.complexity.description import Description
from cat_fast.complexity.scorers.language_model.replies import ModelReply
from cat_fast.errors import UserError, one_line

_Value = TypeVar("_Value")
_ANSWER_TOKENS = 16
_REMINDER = f"{YES_OR_NO} Use one word only."


class ModelCaptioner:
    """Vision-language model as a captioner.

    A reply without a valid answer is asked for once more; after that, the image has a recorded failure. No
    answer is ever assumed.
    """

    writes_captions = True

    def __init__(self, model: VisionModel, questions: QuestionSet | None = None) -> None:
        """Combine a model, such as `TransformersVision` or `EndpointVision`, with prompts.

        Args:
            model: answers the prompts.
            questions: by default a short caption, and the questions on text and faces.
        """
        self.model = model
        self.questions = questions if questions is not None else QuestionSet()
        self.name = model.name
        parts = f"{model.identity}\0{self.questions.hash}"
        self.version = hashlib.sha256(parts.encode()).hexdigest()[:12]

    @property
    def concurrent(self) -> bool:
        """True if several threads may use it at a time."""
        return self.model.concurrent

    def describe_many(
        self, images: Sequence[Image.Image], captions: Sequence[str | None] | None = None
    ) -> list[Description | DescriptionFailure]:
        """Describe each image, in order; images with a known caption are asked the questions only.

        Raises:
            UserError: the model cannot be used at all, or there is not one caption per image.
        """
        known = known_captions(images, captions)
        failures: dict[int, DescriptionFailure] = {}
        texts = {i: caption for i, caption in enumerate(known) if caption is not None}
        unknown = {i: image for i, image in enumerate(images) if known[i] is None}
        texts |= self._ask(
            unknown,
            self.questions.caption,
            read_caption,
            failures,
            self.questions.max_caption_tokens,
        )
        flags: dict[int, dict[str, bool]] = {i: {} for i in texts}
        for question in self.questions.questions:
            left = {i: image for i, image in enumerate(images) if i in texts and i not in failures}
            answers = self._ask(left, question.prompt, parse_answer, failures, _ANSWER_TOKENS, ANSWER_PATTERN)
            for i, answer in answers.items():
                if question.flag:
                    flags[i][question.flag] = answer
                if sentence := question.if_yes if answer else question.if_no:
                    texts[i] = _join(texts[i], sentence)
        return [failures[i] if i in failures else _describe(texts[i], flags[i]) for i in range(len(images))]

    def _ask(
        self,
        images: Mapping[int, Image.Image],
        prompt: str,
        parse: Callable[[ModelReply], _Value],
        failures: dict[int, DescriptionFailure],
        max_new_tokens: int,
        pattern: str | None = None,
    ) -> dict[int, _Value]:
        """Return the parsed replies of a prompt; add an image without one to `failures`."""
        found: dict[int, _Value] = {}
        texts = dict.fromkeys(images, prompt)
        for last in (pattern is None, True):  # a greedy reply to the same caption prompt would be the same
            requests = [(images[i], text) for i, text in texts.items()]
            replies = self.model.reply_many(requests, max_new_tokens, pattern) if requests else []
            again: dict[int, str] = {}
            for i, reply in zip(texts, replies, strict=True):
                if isinstance(reply, UserError):
                    failures[i] = DescriptionFailure(one_line(reply))
                    continue
                try:
                    found[i] = parse(reply)
                except UserError as error:
                    if last:
                        failures[i] = DescriptionFailure(f"{prompt} {one_line(error)}")
                    else:
                        again[i] = f"{prompt} {_REMINDER}"
            texts = again
        return found


def _describe(caption: str, flags: Mapping[str, bool]) -> Description | DescriptionFailure:
    try:
        return Description(caption, **flags)
    except UserError as error:
        return DescriptionFailure(one_line(error))


def _join(caption: str, sentence: str) -> str:
    caption, sentence = caption.rstrip(), sentence.strip()
    stop = "" if caption.endswith((".", "!", "?")) else "."
    return f"{caption}{stop} {sentence}"
