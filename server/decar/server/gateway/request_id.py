"""An id for every HTTP request: the client's X-Request-Id or a new one, in the answer and in what is logged of it."""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_TAKEN = re.compile(r"[\w.:/@+=~-]{1,128}", re.ASCII)  # nothing that could end a line of a log

current_request_id: ContextVar[str | None] = ContextVar("decar_request_id", default=None)


class RequestIdMiddleware:
    """Gives every request an id, which all within find in its headers, and its client in those of the answer.

    What a client sends as X-Request-Id is taken if it is at most 128 letters, digits and ``_.:/@+=~-``; vLLM makes its
    ids of it ("cmpl-ID"). Else the request has a new one.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = MutableHeaders(raw=list(scope["headers"]))
        given = headers.getlist(HEADER)
        request_id = given[0] if len(given) == 1 and _TAKEN.fullmatch(given[0]) else uuid.uuid4().hex
        del headers[HEADER]
        headers[HEADER] = request_id
        scope["headers"] = headers.raw  # in place: who has given the scope logs the id too

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        before = current_request_id.set(request_id)
        try:
            await self.app(scope, receive, sent)
        finally:
            current_request_id.reset(before)


@contextlib.contextmanager
def logged_for(cycle: Any) -> Iterator[None]:
    """What is logged within is of the request that uvicorn's ``cycle`` answers; of none, if None."""
    request_id = None if cycle is None else Headers(scope=cycle.scope).get(HEADER)
    before = current_request_id.set(request_id)
    try:
        yield
    finally:
        current_request_id.reset(before)


def add_request_ids(logger: logging.Logger) -> None:
    """From now on, what ``logger`` says while a request is answered ends with the request's id."""
    if _with_id not in logger.filters:
        logger.addFilter(_with_id)


def _with_id(record: logging.LogRecord) -> bool:
    request_id = current_request_id.get()
    if request_id is not None:
        record.msg, record.args = f"{record.getMessage()} [request {request_id}]", None
    return True
