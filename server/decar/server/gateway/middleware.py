"""What stands around vLLM's app: keys, and an answer to whatever goes wrong within. Knows HTTP, no requests."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decar.server.gateway.asgi import path_of
from decar.server.gateway.errors import error_response
from decar.server.protocol.cores import GatewayThread

logger = logging.getLogger("decar")

BEGUN = "decar_begun"  # in a request's state

ErrorHandler = Callable[[Request, Any], Response | Awaitable[Response]]


class GuardMiddleware:
    """Answers whatever is raised within, so that no connection ends in doubt.

    An exception that reaches the HTTP server makes it close the connection unannounced, also behind an answer that is
    whole: a client that keeps its connections, such as a proxy, would lose the next request.

    Args:
        handler: answers an exception; None, or what it raises in turn, is an answer with status 500.
    """

    def __init__(self, app: ASGIApp, handler: ErrorHandler | None = None):
        self.app = app
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        whole = False
        state = scope.setdefault("state", {})
        state[BEGUN] = False

        async def watched(message: Message) -> None:
            nonlocal whole
            state[BEGUN] = True
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            status = 500
            if not has_begun(scope):
                response = await self._response(Request(scope), error)
                status = response.status_code
                await response(scope, receive, watched)
            if status >= 500:
                logger.error("%s %s has failed", scope["method"], scope["path"], exc_info=error)
            if not whole:  # the server closes the connection, and so a client sees that its answer is cut
                raise

    async def _response(self, request: Request, error: Exception) -> Response:
        with contextlib.suppress(Exception):
            if self._handler is not None:
                response = self._handler(request, error)
                return await response if isinstance(response, Awaitable) else response
        return error_response(
            "the server could not answer this request; its log has the reason",
            500,
            None,
            "InternalServerError",
        )


def has_begun(scope: Scope) -> bool:
    """Whether something of a request's answer has been sent: then no other answer can be given any more."""
    return bool(scope.get("state", {}).get(BEGUN))


class KeyMiddleware:
    """Asks for a key everywhere but at /health and ``public`` paths, and notes who has given the admin's (`is_admin`).

    A browser asks without one whether it may ask at all: CORS's middleware, around this one, answers that by itself.

    Args:
        tokens: one of them, or ``admin``, has to be given; none: nobody is asked.
        admin: shows paths and processes to whoever gives it; None: nobody sees them.
        public: the paths of a page that asks its user for the key.
    """

    def __init__(
        self, app: ASGIApp, tokens: Sequence[str], admin: str | None = None, public: Iterable[str] = ()
    ):
        self.app = app
        self._open = frozenset({"/health", *public})
        self._digests = [_digest(token) for token in tokens]
        self._admin = _digest(admin) if admin else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        scope = _with_bearer(scope)
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(token if scheme.lower() == "bearer" else "")
        # All are compared, and digests of one length: how long it takes says nothing of any.
        known = [secrets.compare_digest(given, digest) for digest in self._digests]
        admin = self._admin is not None and secrets.compare_digest(given, self._admin)
        scope.setdefault("state", {})["decar_admin"] = admin
        if any(known) or admin or not self._digests or path_of(scope) in self._open:
            return await self.app(scope, receive, send)
        message = "give a valid API key: Authorization: Bearer KEY, or x-api-key: KEY"
        await error_response(message, 401, None, "AuthenticationError")(scope, receive, send)


def _with_bearer(scope: Scope) -> Scope:
    """``scope`` of a request whose key is where OpenAI's clients give it; Anthropic's have a header of their own.

    vLLM's app, which asks for the key once more, looks there alone.
    """
    headers = Headers(scope=scope)
    if "authorization" in headers or "x-api-key" not in headers:
        return scope
    bearer = (b"authorization", f"Bearer {headers['x-api-key']}".encode("latin-1"))
    return {**scope, "headers": [*scope["headers"], bearer]}


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def is_admin(scope: Scope) -> bool:
    """Whether a request has brought the admin's key."""
    return bool(scope["state"]["decar_admin"])


class ArrivalMiddleware:
    """While the gateway gives way to engines: has it see to an HTTP request at once, when its headers are read."""

    def __init__(self, app: ASGIApp, thread: GatewayThread):
        self.app = app
        self.thread = thread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.thread.arriving() if scope["type"] == "http" else contextlib.nullcontext():
            await self.app(scope, receive, send)
