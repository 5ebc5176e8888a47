"""Errors of Anthropic's API: whoever raises them within, its clients get them in its form. Knows HTTP, no requests."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decar.server.gateway.asgi import path_of
from decar.server.gateway.errors import anthropic_error_body, is_anthropic


class AnthropicErrors:
    """Gives errors under /v1/messages the form of Anthropic's API: decar's own, and vLLM's in OpenAI's form.

    A client chooses by an error's type whether to ask again, and shows its message.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_anthropic(path_of(scope)):
            send = _Reshaped(send)
        await self.app(scope, receive, send)


class _Reshaped:
    """A `send` that holds an error back until it is whole."""

    def __init__(self, send: Send):
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error(self._start)
        else:
            await self._send(message)

    async def _send_error(self, start: Message) -> None:
        body = json.dumps(anthropic_error_body(_said(self._body), start["status"])).encode()
        changed = {b"content-length": str(len(body)).encode(), b"content-type": b"application/json"}
        kept = [(name, value) for name, value in start.get("headers", ()) if name.lower() not in changed]
        await self._send({**start, "headers": [*kept, *changed.items()]})
        await self._send({"type": "http.response.body", "body": body})


def _said(body: bytes) -> str:
    """The message of an error in OpenAI's form or in Anthropic's, or the text that it is."""
    try:
        error: Any = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
