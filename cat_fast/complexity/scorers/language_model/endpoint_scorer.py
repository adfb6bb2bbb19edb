"""Scorer that asks a language model over an OpenAI-compatible chat endpoint, such as vLLM's or SGLang's."""

from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.chat_endpoint import ChatEndpoint
from cat_fast.complexity.scorers.language_model.replies import ModelReply
from cat_fast.complexity.scorers.language_model.reply_scorer import ReplyScorer


class EndpointScorer(ReplyScorer):
    """Language model behind an OpenAI-compatible chat endpoint.

    The rubric comes first in every prompt, so that the server's prefix cache serves it. Replies are
    constrained by a regular expression where the server supports it, and scores are expectations where it
    returns token probabilities. A server that refuses these fields is asked without them, which one line
    reports.

    The API key is read from the environment per request; it is stored nowhere and appears in no message.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        prompt: Prompt | None = None,
        scale: int = 9,
        timeout: float = 60.0,
        concurrency: int = 16,
        retries: int = 4,
        max_new_tokens: int = 48,
        calibration: ScoreCalibration | None = None,
    ) -> None:
        """Check the arguments; the first request is sent by `score_many`.

        Args:
            model: name of the model at the endpoint.
            base_url: URL up to and including the version, such as http://localhost:8000/v1.
            api_key_env: environment variable with the API key; without one, requests carry none.
            prompt: by default the rubric for `scale`.
            scale: highest score of the prompt, 9 or 10.
            timeout: seconds per attempt.
            concurrency: number of requests at a time.
            retries: further attempts after a timeout, a dropped connection or status 429 or 5xx, with
                exponential backoff.
            max_new_tokens: length of a reply, score and reasons.
            calibration: fitted for this model, prompt and scale.

        Raises:
            UserError: an argument is not valid, or the package requests is missing.
        """
        self._endpoint = ChatEndpoint(
            model, base_url, api_key_env=api_key_env, timeout=timeout, retries=retries
        )
        super().__init__(
            f"endpoint:{model}",
            f"endpoint\0{model}",
            prompt=prompt,
            scale=scale,
            concurrency=concurrency,
            max_new_tokens=max_new_tokens,
            calibration=calibration,
        )

    def _reply(self, text: str) -> ModelReply:
        return self._endpoint.reply(text, self.max_new_tokens, reply_pattern(self.scale))


def reply_pattern(scale: int) -> str:
    """Return the regular expression of a reply: the score, then reasons on the same line."""
    digits = "[1-9]" if scale == 9 else "(10|[1-9])"
    return rf"Score: {digits} out of {scale}[^\n]*"
