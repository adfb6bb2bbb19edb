"""Interface of vision-language models: replies to a prompt on an image."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from cat_fast.complexity.scorers.language_model.replies import ModelReply
from cat_fast.errors import UserError


class VisionModel(Protocol):
    """A vision-language model, in this process or behind an endpoint."""

    @property
    def name(self) -> str:
        """Name of the model, stored with its descriptions."""
        ...

    @property
    def identity(self) -> str:
        """Text that differs if the replies may."""
        ...

    @property
    def concurrent(self) -> bool:
        """True if several threads may use it at a time."""
        ...

    def reply_many(
        self, requests: Sequence[tuple[Image.Image, str]], max_new_tokens: int, pattern: str | None = None
    ) -> list[ModelReply | UserError]:
        """Return the greedy reply to each image and prompt, in order, or why there is none.

        Args:
            requests: RGB images, each with a prompt.
            max_new_tokens: longest reply.
            pattern: regular expression of the reply, which models without structured output ignore.

        Raises:
            UserError: the reason concerns all requests.
        """
        ...
