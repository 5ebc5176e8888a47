"""Errors over HTTP, in the form of OpenAI's API. Knows neither requests nor engines."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


def error_body(
    message: str, status: int, param: str | None = None, kind: str = "BadRequestError"
) -> dict[str, Any]:
    """An error as OpenAI's API gives it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


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


async def http_error(_: Request, error: Exception) -> JSONResponse:
    """Unknown routes, wrong methods and unreadable bodies in the form of every other error."""
    assert isinstance(error, HTTPException)
    kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
    response = error_response(str(error.detail), error.status_code, None, kind)
    response.headers.update(error.headers or {})
    return response
