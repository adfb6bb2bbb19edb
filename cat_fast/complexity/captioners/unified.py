"""Description and score of an image in one reply of a vision-language model: the unified pipeline."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from cat_fast.complexity.captioners.base import MAX_SIDE, shrink
from cat_fast.complexity.captioners.questions import parse_answer, read_caption, without_thoughts
from cat_fast.complexity.captioners.vision_model import VisionModel
from cat_fast.complexity.description import Description
from cat_fast.complexity.image_score import GivenLabels, ImageScore
from cat_fast.complexity.rubric import unified_text
from cat_fast.complexity.score import ScoringFailure
from cat_fast.complexity.scorers.language_model.replies import ModelReply, read_score
from cat_fast.errors import UserError, one_line

MIN_NEW_TOKENS = 48
"""Tokens that the shortest useful reply needs."""
_LINE = r"^[\s*_#-]*{name}[\s*_]*:[\s*_]*(.*?)(?=^[\s*_#-]*(?:Text|Faces|Score)[\s*_]*:|\Z)"
_FIELDS = {
    name: re.compile(_LINE.format(name=name), re.IGNORECASE | re.MULTILINE | re.DOTALL)
    for name in ("Caption", "Text", "Faces")
}
_REMINDER = "The last reply had another form. Reply with the four lines Caption, Text, Faces and Score."


class UnifiedScorer:
    """Vision-language model that describes and scores in one call, at about half the cost of two models.

    A reply that is not of the required form is asked for once more; after that, the image has a recorded
    failure.
    """

    def __init__(
        self, model: VisionModel, *, prompt: str | None = None, scale: int = 9, max_new_tokens: int = 128
    ) -> None:
        """Combine a model, such as `TransformersVision` or `EndpointVision`, with a prompt.

        Args:
            model: answers the prompt.
            prompt: must ask for the reply of `unified_text`, the default.
            scale: highest score of the prompt, 9 or 10.
            max_new_tokens: longest reply.

        Raises:
            UserError: an argument is not valid.
        """
        default = unified_text(scale)
        self.prompt = default if prompt is None else prompt
        missing = [name for name in (*_FIELDS, "Score") if f"{name.lower()}:" not in self.prompt.lower()]
        if missing:
            raise UserError(f"the prompt must ask for lines with {', '.join(f'{name}:' for name in missing)}")
        if max_new_tokens < MIN_NEW_TOKENS:
            raise UserError(f"max_new_tokens must be at least {MIN_NEW_TOKENS}, got {max_new_tokens}")
        self.model = model
        self.scale = scale
        self.max_new_tokens = max_new_tokens
        self.name = f"unified:{model.name}"
        parts = (model.identity, self.prompt, str(scale), str(max_new_tokens))
        self.version = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return the image scaled down to what models use."""
        return shrink(image, MAX_SIDE)

    def score_images(
        self, images: Sequence[Image.Image], given: Sequence[GivenLabels] = ()
    ) -> list[ImageScore | ScoringFailure]:
        """Describe and score each RGB image, in order; `given` is ignored, the model describes all of them.

        Raises:
            UserError: the model cannot be used at all.
        """
        results = self._attempt(images, self.prompt)
        again = [i for i, result in enumerate(results) if isinstance(result, _InvalidReply)]
        second = self._attempt([images[i] for i in again], f"{self.prompt}\n{_REMINDER}") if again else []
        for i, result in zip(again, second, strict=True):
            results[i] = ScoringFailure(result.error) if isinstance(result, _InvalidReply) else result
        return results

    def _attempt(self, images: Sequence[Image.Image], prompt: str) -> list[ImageScore | ScoringFailure]:
        replies = self.model.reply_many(
            [(image, prompt) for image in images], self.max_new_tokens, unified_pattern(self.scale)
        )
        return [self._read(reply) for reply in replies]

    def _read(self, reply: ModelReply | UserError) -> ImageScore | ScoringFailure:
        if isinstance(reply, UserError):
            return ScoringFailure(one_line(reply))
        try:
            description = parse_description(reply)
            score = replace(read_score(reply, self.scale), reasons="")
        except UserError as error:
            return _InvalidReply(one_line(error))
        return ImageScore(score, description)


class _InvalidReply(ScoringFailure):
    """A reply that another attempt may improve."""


def parse_description(reply: ModelReply) -> Description:
    """Return the description in a reply with the lines Caption, Text and Faces.

    Raises:
        UserError: a line is missing or not valid.
    """
    text = without_thoughts(reply.text)
    found: dict[str, str] = {}
    for name, pattern in _FIELDS.items():
        match = pattern.search(text)
        if not match:
            raise UserError(f"the reply has no line {name!r}: {' '.join(text.split())[:80]!r}")
        found[name] = match[1]
    return Description(
        read_caption(ModelReply(found["Caption"])),
        has_text=parse_answer(ModelReply(found["Text"])),
        has_faces=parse_answer(ModelReply(found["Faces"])),
    )


def unified_pattern(scale: int) -> str:
    """Return the regular expression of a reply, for endpoints with structured output."""
    digits = "[1-9]" if scale == 9 else "(10|[1-9])"
    return rf"Caption: [^\n]+\nText: (yes|no)\nFaces: (yes|no)\nScore: {digits} out of {scale}"
