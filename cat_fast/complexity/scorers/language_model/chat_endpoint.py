"""OpenAI-compatible chat endpoint, such as vLLM's or SGLang's."""

from typing import Any

from cat_fast import console
from cat_fast.complexity.scorers.language_model.json_client import JsonClient, RequestFailed
from cat_fast.complexity.scorers.language_model.replies import ModelReply, chat_reply
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


class ChatEndpoint:
    """A model behind an endpoint; safe for concurrent use.

    Replies are constrained by a regular expression where the server supports it, and have token probabilities
    where it returns them. A server that refuses these fields is asked without them, which one line reports.

    Raises:
        UserError: an argument is not valid, or the package requests is missing.
    """

    def __init__(self, model: str, base_url: str, *, api_key_env: str, timeout: float, retries: int) -> None:
        if not model:
            raise UserError("the model's name at the endpoint is missing; see the endpoint's /models")
        self._client = JsonClient(base_url, api_key_env=api_key_env, timeout=timeout, retries=retries)
        self._model = model
        self._form = 0
        self._form_known = False

    def reply(
        self, content: str | list[dict[str, Any]], max_new_tokens: int, pattern: str | None = None
    ) -> ModelReply:
        """Return the greedy reply to a user's message.

        Args:
            content: text, or OpenAI's parts of a message, such as text and images.
            max_new_tokens: longest reply.
            pattern: regular expression of the reply.

        Raises:
            RequestFailed: the server gave no usable answer.
            UserError: the answer contains no reply.
        """
        form = self._form
        while True:
            try:
                body = self._body(content, max_new_tokens, pattern, form)
                reply = chat_reply(self._client.request("/chat/completions", body))
            except RequestFailed as failure:
                # Once a form has been accepted, a refusal concerns the message, such as its length.
                if failure.status not in _NOT_ACCEPTED or self._form_known or form + 1 == len(_FORMS):
                    raise
                form += 1
                continue
            if form != self._form:
                self._form = form
                console.err.print(f"{self._client.url}: the server accepts {_FORMS[form]}", markup=False)
            self._form_known = True
            return reply

    def _body(
        self, content: str | list[dict[str, Any]], max_new_tokens: int, pattern: str | None, form: int
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": [{"role": "user", "content": content}]}
        if form == 3:  # reasoning models of OpenAI
            return body | {"max_completion_tokens": max_new_tokens}
        body |= {"temperature": 0, "seed": 0, "max_tokens": max_new_tokens}
        if form < 2:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if form < 1:
            # The switch of vLLM and SGLang for templates with a thinking mode.
            body |= {"chat_template_kwargs": {"enable_thinking": False}}
            if pattern is not None:  # vLLM's field and SGLang's field
                body |= {"structured_outputs": {"regex": pattern}, "regex": pattern}
        return body
