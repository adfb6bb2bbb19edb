"""Scorer that asks a language model over an OpenAI-compatible chat endpoint, such as vLLM's or SGLang's."""

from typing import Any

from cat_fast import console
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.json_client import JsonClient, RequestFailed
from cat_fast.complexity.scorers.language_model.replies import ModelReply, chat_reply
from cat_fast.complexity.scorers.language_model.reply_scorer import ReplyScorer
from cat_fast.errors import UserError

TOP_LOGPROBS = 20
"""Alternatives per token: the most that OpenAI and, by default, vLLM accept."""
_NOT_ACCEPTED = (400, 422)
"""HTTP statuses with which servers refuse a field that they do not know."""
_FORMS = (
    "",
    "no structured output",
    "no structured output, no token probabilities",
    "no structured output, no token probabilities, no temperature",
)
"""Forms of a request, each accepted by more servers than the one before."""


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
        if not model:
            raise UserError("the model's name at the endpoint is missing; see the endpoint's /models")
        self._client = JsonClient(base_url, api_key_env=api_key_env, timeout=timeout, retries=retries)
        super().__init__(
            f"endpoint:{model}",
            f"endpoint\0{model}",
            prompt=prompt,
            scale=scale,
            concurrency=concurrency,
            max_new_tokens=max_new_tokens,
            calibration=calibration,
        )
        self._model = model
        self._form = 0
        self._form_known = False

    def _reply(self, text: str) -> ModelReply:
        form = self._form
        while True:
            try:
                reply = chat_reply(self._client.request("/chat/completions", self._body(text, form)))
            except RequestFailed as failure:
                # Once a form has been accepted, a refusal concerns the caption, such as its length.
                if failure.status not in _NOT_ACCEPTED or self._form_known or form + 1 == len(_FORMS):
                    raise
                form += 1
                continue
            if form != self._form:
                self._form = form
                console.err.print(f"{self._client.url}: the server accepts {_FORMS[form]}", markup=False)
            self._form_known = True
            return reply

    def _body(self, text: str, form: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": [{"role": "user", "content": text}]}
        if form == 3:  # reasoning models of OpenAI
            return body | {"max_completion_tokens": self.max_new_tokens}
        body |= {"temperature": 0, "seed": 0, "max_tokens": self.max_new_tokens}
        if form < 2:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if form < 1:
            pattern = reply_pattern(self.scale)
            # vLLM's field, SGLang's field, and the switch of both for templates with a thinking mode.
            body |= {"structured_outputs": {"regex": pattern}, "regex": pattern}
            body |= {"chat_template_kwargs": {"enable_thinking": False}}
        return body


def reply_pattern(scale: int) -> str:
    """Return the regular expression of a reply: the score, then reasons on the same line."""
    digits = "[1-9]" if scale == 9 else "(10|[1-9])"
    return rf"Score: {digits} out of {scale}[^\n]*"
