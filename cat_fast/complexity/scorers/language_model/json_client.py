"""JSON over HTTP with retries, for servers of language models.

An API key comes from an environment variable only. It is read per request, is sent in a header, and is
removed from all messages.
"""

import json
import os
import random
import re
import threading
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from cat_fast.complexity.extras import import_extra
from cat_fast.errors import UserError, one_line

MAX_RESPONSE_BYTES = 4 << 20
MAX_WAIT_SECONDS = 60.0
"""Longest pause between attempts, also if the server asks for more."""
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_CONNECT_SECONDS = 10.0


class RequestFailed(UserError):
    """A request without a usable answer."""

    def __init__(self, message: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None if the server could not be reached or did not answer with JSON."""
        self.wait = wait
        """Seconds that the server asks to wait before the next attempt."""

    @property
    def transient(self) -> bool:
        """True if another attempt may succeed."""
        return self.status is None or self.status in _TRANSIENT


class JsonClient:
    """HTTP client that posts JSON and retries with exponential backoff; safe for concurrent use.

    Once a request has exhausted its attempts without an answer, later ones are attempted once, until the
    server answers again.

    Raises:
        UserError: the URL is not a plain HTTP one, the name of the variable, its key or a number is not
            valid, or the package requests is missing.
    """

    def __init__(
        self, url: str, *, api_key_env: str, timeout: float, retries: int, backoff: float = 0.5
    ) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"the URL of {parts.hostname} must not contain credentials or a query; pass the API key in an"
                " environment variable"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"expected a URL such as http://localhost:8000/v1, got {url!r}")
        if not _is_name(api_key_env):
            raise UserError("api_key_env must be the name of an environment variable, not a key itself")
        if timeout <= 0 or retries < 0:
            raise UserError(f"expected timeout > 0 and retries >= 0, got {timeout} and {retries}")
        self.url = url.rstrip("/")
        self._api_key_env = api_key_env
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._requests = import_extra("requests", "requests", "endpoint", f"requests to {parts.hostname}")
        self._local = threading.local()
        self._unreachable = False
        self._key()

    def __repr__(self) -> str:
        return f"JsonClient({self.url!r})"

    def request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Post `body`, or get without one, and return the JSON object in the answer.

        Raises:
            RequestFailed: there was no usable answer, also after all attempts.
        """
        attempt = 0
        while True:
            try:
                answer = self._attempt(path, body)
                self._unreachable = False
                return answer
            except RequestFailed as failure:
                if failure.status is not None:
                    self._unreachable = False
                if not failure.transient or self._unreachable or attempt == self._retries:
                    self._unreachable |= failure.status is None
                    raise
                wait = failure.wait
            if wait is None:
                wait = self._backoff * 2**attempt * random.uniform(0.5, 1.0)
            sleep(min(wait, MAX_WAIT_SECONDS))
            attempt += 1

    def _attempt(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        import urllib3  # of requests

        errors = (self._requests.RequestException, urllib3.exceptions.HTTPError, OSError)
        try:
            status, headers, content = self._exchange(path, body)
        except errors as error:
            raise RequestFailed(
                f"{self.url}{path}: no answer ({self._redact(one_line(_root_cause(error)))})"
            ) from None
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if status == 200 and isinstance(answer, dict):
            return answer
        if status == 200:
            raise RequestFailed(f"{self.url}{path}: the answer is not a JSON object")
        message = self._redact(_error_message(answer, content))
        hint = ""
        if status in (401, 403):
            hint = f"; set the API key in the environment variable {self._api_key_env}"
        raise RequestFailed(f"{self.url}{path}: status {status} ({message}){hint}", status, _seconds(headers))

    def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any, bytes]:
        """Return status, headers and content, all within the timeout."""
        deadline = monotonic() + self._timeout
        with self._session().request(
            "GET" if body is None else "POST",
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            auth=_bearer(self._key()),
            timeout=(min(_CONNECT_SECONDS, self._timeout), self._timeout),
            allow_redirects=False,
            stream=True,
        ) as response:
            content = bytearray()
            # One read of the socket at a time, so that the deadline also holds for a slow stream.
            while part := response.raw.read1(1 << 16, decode_content=True):
                content += part
                if len(content) > MAX_RESPONSE_BYTES:
                    raise OSError(f"more than {MAX_RESPONSE_BYTES >> 20} MB")
                if monotonic() > deadline:
                    raise OSError(f"incomplete after {self._timeout:g} s")
            return response.status_code, response.headers, bytes(content)

    def _session(self) -> Any:
        if not hasattr(self._local, "session"):
            self._local.session = self._requests.Session()
        return self._local.session

    def _redact(self, message: str) -> str:
        """Return the start of a message, without the API key."""
        key = self._key()
        return (message.replace(key, "***") if key else message)[:200]

    def _key(self) -> str:
        key = os.environ.get(self._api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(
                f"the API key in the environment variable {self._api_key_env} contains characters that HTTP"
                " headers do not accept; set it again"
            )
        return key


def _root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain: libraries wrap "connection refused" several times."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _bearer(key: str) -> Any:
    """Return an authentication that sets the header, or leaves it out: never that of a .netrc file."""

    def apply(request: Any) -> Any:
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    return apply


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is not None


def _error_message(answer: Any, content: bytes) -> str:
    """Return the message in an error's body: that of OpenAI's form, else the body's start."""
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else content[:2000].decode("utf-8", "replace")
    return " ".join(text.split()) or "no message"


def _seconds(headers: Any) -> float | None:
    """Return the seconds in the header Retry-After; None without one, or for a date."""
    try:
        return max(float(headers.get("Retry-After", "")), 0.0)
    except ValueError:
        return None
