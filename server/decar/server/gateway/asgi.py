"""What ASGI's scopes and messages say. Knows no routes."""

from __future__ import annotations

from starlette.types import Message, Scope


def path_of(scope: Scope) -> str:
    """A request's path, as routes have it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_event_stream(start: Message) -> bool:
    """Whether an answer that starts so is a stream of server-sent events."""
    kind: bytes = dict(start.get("headers", ())).get(b"content-type", b"")
    return kind.startswith(b"text/event-stream")
