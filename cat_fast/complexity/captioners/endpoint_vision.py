"""Vision-language model behind an OpenAI-compatible chat endpoint, such as vLLM's or SGLang's."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from cat_fast.complexity.captioners.base import shrink
from cat_fast.complexity.scorers.language_model.chat_endpoint import ChatEndpoint
from cat_fast.complexity.scorers.language_model.replies import ModelReply
from cat_fast.complexity.scorers.language_model.request_pool import RequestPool
from cat_fast.errors import UserError

_QUALITY = 90


class EndpointVision:
    """Vision-language model at an endpoint; images are sent as data URLs, within the request.

    The image comes before the prompt, so that a server with a prefix cache encodes it once for all questions.
    The API key is read from the environment per request; it is stored nowhere and appears in no message.
    """

    concurrent = True

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        concurrency: int = 16,
        retries: int = 4,
        max_side: int = 1024,
    ) -> None:
        """Check the arguments; the first request is sent by `reply_many`.

        Args:
            model: name of the model at the endpoint.
            base_url: URL up to and including the version, such as http://localhost:8000/v1.
            api_key_env: environment variable with the API key; without one, requests carry none.
            timeout: seconds per attempt.
            concurrency: number of requests at a time.
            retries: further attempts after a timeout, a dropped connection or status 429 or 5xx, with
                exponential backoff.
            max_side: larger images are scaled down to this number of pixels before they are sent.

        Raises:
            UserError: an argument is not valid, or the package requests is missing.
        """
        if max_side < 1:
            raise UserError(f"max_side must be a positive number of pixels, got {max_side}")
        self._endpoint = ChatEndpoint(
            model, base_url, api_key_env=api_key_env, timeout=timeout, retries=retries
        )
        self._pool = RequestPool(concurrency)
        self._max_side = max_side
        self.name = f"endpoint:{model}"
        self.identity = f"endpoint\0{model}\0{max_side}"

    def reply_many(
        self, requests: Sequence[tuple[Image.Image, str]], max_new_tokens: int, pattern: str | None = None
    ) -> list[ModelReply | UserError]:
        """Return the reply to each image and prompt, in order, or why there is none.

        Raises:
            UserError: no request was answered so far, and this one failed for a reason that concerns all.
        """

        def ask(request: tuple[Image.Image, str]) -> ModelReply:
            image, prompt = request
            url = data_url(image, self._max_side)
            shown: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
            content = [shown, {"type": "text", "text": prompt}]
            return self._endpoint.reply(content, max_new_tokens, pattern)

        return self._pool.run(ask, requests)


def data_url(image: Image.Image, max_side: int) -> str:
    """Return an RGB image as a data URL of a JPEG, scaled down to at most `max_side` pixels per side."""
    file = io.BytesIO()
    shrink(image, max_side).save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
