"""ASGI middleware: request ids and logs, body size, bearer token, rate per client."""

import hmac
import json
import math
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cat_fast.inference.server.errors import ACCEPTED, INTERNAL_ERROR, REFUSAL, ApiError, as_api_error
from cat_fast.inference.server.settings import (
    GENERATIONS,
    MAX_BODY_BYTES,
    MAX_JSON_BYTES,
    RECONSTRUCTIONS,
    ServerSettings,
)

_MAX_CLIENTS = 10_000
_OPEN_PATHS = ("/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
_OPEN_FOLDER = "/docs/"


class Limits:
    """Refuses requests before they are read, answers errors that nothing else does, and logs every request.

    A request is one JSON line on standard error.

    Args:
        app: the application.
        settings: token and rate.
        observe: called with route, status and seconds of every request.
        refused: called with the code of every request for images that is not accepted.
        log: writes a line.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        observe: Callable[[str, int, float], None],
        refused: Callable[[str], None],
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._app, self._settings = app, settings
        self._observe, self._refused = observe, refused
        self._log = log or log_line
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        identity = Headers(scope=scope).get("x-request-id", "")[:64] or uuid.uuid4().hex
        if not identity.isascii() or not identity.isprintable():
            identity = uuid.uuid4().hex
        status, started = 500, False
        scope.setdefault("state", {})["request_id"] = identity

        async def send_with_id(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                MutableHeaders(scope=message)["X-Request-ID"] = identity
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, _counted(receive, _limit(scope)), send_with_id)
        except Exception as error:
            found = as_api_error(error)
            scope["state"][REFUSAL] = found.code
            is_answered = started
            if not is_answered:
                await found.response()(scope, receive, send_with_id)
            if is_answered or found.code == INTERNAL_ERROR:
                raise  # its traceback is logged outside of all middleware
        finally:
            code = None if scope["state"].get(ACCEPTED) else scope["state"].get(REFUSAL)
            if code is not None and scope["path"] == GENERATIONS:
                self._refused(code)
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "other")
            self._observe(route, status, seconds)
            client = scope.get("client") or ("", 0)
            self._log(
                {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "request_id": identity,
                    "client": client[0],
                    "user": scope["state"].get("user"),
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(seconds, 4),
                }
            )

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in _OPEN_PATHS and not scope["path"].startswith(_OPEN_FOLDER):
            self._check_token(headers)
            self._check_rate((scope.get("client") or ("", 0))[0])
        length, limit = headers.get("content-length", "0"), _limit(scope)
        if not length.isdecimal() or int(length) > limit:
            raise _too_large(limit)

    def _check_token(self, headers: Headers) -> None:
        expected = self._settings.token
        if expected is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), expected.encode()):
            raise ApiError(
                401,
                "missing or wrong token; send it as Authorization: Bearer TOKEN",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_rate(self, client: str) -> None:
        """Take one of the client's requests: a bucket of one minute's requests that refills evenly."""
        limit = self._settings.requests_per_minute
        if limit == 0:
            return
        now = time.monotonic()
        left, since = self._rates.pop(client, (float(limit), now))
        left = min(float(limit), left + (now - since) * limit / 60)
        self._rates[client] = (max(left - 1, 0.0), now) if left >= 1 else (left, now)
        if len(self._rates) > _MAX_CLIENTS:
            self._rates.popitem(last=False)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / limit)
            raise ApiError(
                429,
                f"more than {limit} requests per minute; retry in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )


def log_line(entry: dict[str, Any]) -> None:
    """Write an entry of the log as one JSON line."""
    sys.stderr.write(json.dumps(entry) + "\n")  # at once: several threads write
    sys.stderr.flush()


def _counted(receive: Receive, limit: int) -> Receive:
    """Refuse a body of unknown length once it exceeds the limit."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:  # FastAPI passes on nothing else while it reads a body
            raise HTTPException(413, _too_large(limit).message)
        return message

    return counted


def _limit(scope: Scope) -> int:
    """Return the largest body of a route in bytes."""
    return MAX_BODY_BYTES if scope["path"] == RECONSTRUCTIONS else MAX_JSON_BYTES


def _too_large(limit: int) -> ApiError:
    advice = "send a smaller image" if limit == MAX_BODY_BYTES else "send a shorter text"
    return ApiError(413, f"the body is larger than {limit / 1e6:.0f} MB; {advice}", code="body_too_large")
