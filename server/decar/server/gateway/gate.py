"""Who is let in, and how the server stops: running requests finish, or are told. Knows HTTP, no engines."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decar.server.gateway.asgi import is_event_stream, path_of
from decar.server.gateway.errors import error_event, unavailable
from decar.server.gateway.queue import Queue, QueueFull

GENERATING = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations"}
)
FULL = "so many requests wait already that this one would not be answered soon: ask again in a moment"
STOPPING = "the server is shutting down: ask again in a moment, or another one"
_ENDS_WITHIN_S = 5.0
_STAYS_OPEN = frozenset({"/metrics"})


class Gate:
    """Counts the requests that are being answered. Closed, it lets in no more."""

    def __init__(self) -> None:
        self.closed = False
        self.running = 0
        self.ended = asyncio.Event()  # what still runs is to be told so
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        self.running += 1
        self._empty.clear()

    def leave(self) -> None:
        self.running -= 1
        if not self.running:
            self._empty.set()

    async def drain(self, timeout_s: float) -> None:
        """Let nobody in any more, and return when all have left: by themselves, or told so after ``timeout_s``."""
        self.closed = True
        if not await self._emptied(timeout_s):
            self.ended.set()
            await self._emptied(_ENDS_WITHIN_S)  # whoever does not read is not waited for

    async def _emptied(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class GateMiddleware:
    """Lets requests through a `Gate`. What it ends finds that its client has gone, and the client what has happened."""

    def __init__(self, app: ASGIApp, gate: Gate):
        self.app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _STAYS_OPEN:
            return await self.app(scope, receive, send)
        if self._gate.closed:
            return await _refuse(scope, receive, send)
        self._gate.enter()
        try:
            await self._answer(scope, receive, send)
        finally:
            self._gate.leave()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate = self._gate
        asked_whole = begun = streams = whole = False

        async def received() -> Message:
            nonlocal asked_whole
            if not asked_whole:
                message = await receive()
                asked_whole = not message.get("more_body")
                return message
            asked, ended = asyncio.ensure_future(receive()), asyncio.ensure_future(gate.ended.wait())
            try:
                await asyncio.wait((asked, ended), return_when=asyncio.FIRST_COMPLETED)
                return asked.result() if asked.done() else {"type": "http.disconnect"}
            finally:
                asked.cancel()
                ended.cancel()

        async def sent(message: Message) -> None:
            nonlocal begun, streams, whole
            if message["type"] == "http.response.start":
                if gate.ended.is_set():
                    return  # nobody answers a client that has gone
                begun = True
                streams = is_event_stream(message)
                if gate.closed:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            elif not begun:
                return
            whole = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, received, sent)
        except Exception:
            if not gate.ended.is_set():
                raise
        if whole or not gate.ended.is_set():
            return
        if not begun:
            await _refuse(scope, receive, send)
        elif streams:
            await send({"type": "http.response.body", "body": error_event(path_of(scope), STOPPING, 503)})


class FullMiddleware:
    """Refuses what would find the `Queue` full before anything of it is read: a thousand are refused in a second."""

    def __init__(self, app: ASGIApp, queue: Queue):
        self.app = app
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if _generates(scope):
                self._queue.check()
        except QueueFull:
            await _refuse_full(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class QueueMiddleware:
    """Has requests that generate wait in a `Queue`, or refuses them at once where it is full."""

    def __init__(self, app: ASGIApp, queue: Queue):
        self.app = app
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _generates(scope):
            return await self.app(scope, receive, send)
        with contextlib.ExitStack() as left:
            try:
                left.enter_context(self._queue.admitted())
            except QueueFull:
                await _refuse_full(scope, receive, send)
            else:
                await self.app(scope, receive, send)


def _generates(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST" and path_of(scope) in GENERATING


async def _refuse_full(scope: Scope, receive: Receive, send: Send) -> None:
    await unavailable(FULL, retry_after_s=1)(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    response = unavailable(STOPPING)
    response.headers["connection"] = "close"
    await response(scope, receive, send)
