"""Errors over HTTP, in the form of OpenAI's API or of Anthropic's. Knows neither requests nor engines."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Status -> the type of an error in Anthropic's API; any other is invalid_request_error, from 500 on api_error."""


def error_body(
    message: str, status: int, param: str | None = None, kind: str = "BadRequestError"
) -> dict[str, Any]:
    """An error as OpenAI's API gives it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def anthropic_error_body(message: str, status: int) -> dict[str, Any]:
    """An error as Anthropic's API gives it."""
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def is_anthropic(path: str) -> bool:
    """Whether a path, as routes have it, belongs to Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_response(
    message: str, status: int, param: str | None, kind: str = "BadRequestError"
) -> JSONResponse:
    """An answer that is an `error_body`."""
    return JSONResponse(error_body(message, status, param, kind), status_code=status)


RETRY_AFTER_S = 10
"""When to ask again for what is being started: an engine takes about as long, and longer on a CPU."""


def unavailable(message: str, retry_after_s: int = RETRY_AFTER_S) -> JSONResponse:
    """An answer that says to ask again."""
    response = error_response(message, 503, None, "ServiceUnavailableError")
    response.headers["Retry-After"] = str(retry_after_s)
    return response


def anthropic_error_event(message: str, status: int) -> str:
    """The end of a stream of Anthropic's API that fails."""
    return f"event: error\ndata: {json.dumps(anthropic_error_body(message, status))}\n\n"


def error_event(path: str, message: str, status: int) -> bytes:
    """The end of a stream that fails, in the form of the API that ``path`` belongs to."""
    if is_anthropic(path):
        return anthropic_error_event(message, status).encode()
    if path == "/v1/responses":
        error = {"type": "error", "code": str(status), "message": message, "param": None}
        return f"event: error\ndata: {json.dumps(error)}\n\n".encode()
    kind = "ServiceUnavailableError" if status == 503 else "InternalServerError"
    error = error_body(message, status, None, kind)
    return f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode()


async def http_error(_: Request, error: Exception) -> JSONResponse:
    """Unknown routes, wrong methods and unreadable bodies in the form of every other error."""
    assert isinstance(error, HTTPException)
    kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
    response = error_response(str(error.detail), error.status_code, None, kind)
    response.headers.update(error.headers or {})
    return response
