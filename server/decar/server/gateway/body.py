"""A request's body: read whole and bounded, before anything works on it. Knows HTTP and JSON, no requests."""

from __future__ import annotations

from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

MAX_DEPTH = 128
"""Levels of lists and objects in a body. What is nested deeper fails in one library or another, each in its own way."""


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None if it has more than ``limit`` bytes.

    Raises:
        ClientDisconnect: the client goes away before it has sent all.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives ``body`` and then what is left: the client's disconnect."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def with_length(scope: Scope, length: int) -> Scope:
    """``scope`` of a request whose body has this length."""
    headers = [(n, v) for n, v in scope["headers"] if n not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def is_deeper(value: Any, body: bytes, depth: int = MAX_DEPTH) -> bool:
    """Whether ``value``, as JSON has it in ``body``, has more levels of lists and objects than ``depth``."""
    if body.count(b"[") + body.count(b"{") <= depth:
        return False
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(depth):
        children = (child for part in level for child in (part.values() if isinstance(part, dict) else part))
        level = [child for child in children if isinstance(child, list | dict)]
    return bool(level)
