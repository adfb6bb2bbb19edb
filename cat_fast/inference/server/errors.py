"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cat_fast.errors import UserError, one_line
from cat_fast.inference.engine.errors import DeadlineUnreachable, Draining, QueueFull

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


INTERNAL_ERROR = "internal_error"
REFUSAL = "refusal"
"""Name in a request's state: the code of the error, if the request was not accepted."""
ACCEPTED = "accepted"
"""Name in a request's state: True once its images are queued."""


class ApiError(Exception):
    """A refusal with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    def to_json(self) -> dict[str, Any]:
        """Return the body of the reply."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | self.details}

    def response(self) -> JSONResponse:
        """Return the reply."""
        return JSONResponse(self.to_json(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Return the refusal that an exception of the engine or of validation amounts to."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(
            429, str(error), code="queue_full", headers={"Retry-After": str(math.ceil(error.retry_after))}
        )
    if isinstance(error, DeadlineUnreachable):
        details = {"earliest_seconds": error.earliest}
        return ApiError(
            422, str(error), code="deadline_unreachable", param="deadline_seconds", details=details
        )
    if isinstance(error, Draining):
        return ApiError(503, str(error), code="draining", headers={"Retry-After": "60"})
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, f"the image could not be drawn ({one_line(error)})", code=INTERNAL_ERROR)


def install(app: FastAPI) -> None:
    """Answer refusals of an application in OpenAI's shape; `Limits` answers its other exceptions."""

    def answer(request: Request, error: ApiError) -> JSONResponse:
        setattr(request.state, REFUSAL, error.code)
        return error.response()

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, _of_validation(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
        code = codes.get(error.status_code, "invalid_request")
        found = ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        return answer(request, found)


def unknown_parameter(name: str | None) -> ApiError:
    """Return the refusal of a field that the route does not have."""
    return ApiError(400, f"unknown field {name!r}", code="unknown_parameter", param=name)


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query")]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json"
        )
    if first["type"] == "extra_forbidden":
        return unknown_parameter(param)
    given = json.dumps(first.get("input"), default=str)[:100]
    message = f"{param or 'body'}: {first['msg'].removeprefix('Value error, ')}, got {given}"
    return ApiError(400, message, code="invalid_value", param=param)
