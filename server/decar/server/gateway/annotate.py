"""What decar adds to answers: the `decar` object, in the form of each API. Knows HTTP and JSON, no engines.

Without a trace the object is spliced in front of the first brace, so that nothing is parsed on the way out.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Message, Send

from decar.server.gateway.asgi import is_event_stream
from decar.server.gateway.errors import error_event
from decar.server.gateway.request import Call

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
FAILED = "the answer could not be finished; the server's log has the reason"


class Annotated:
    """A `send` that adds `decar` to a successful response: JSON or server-sent events.

    Answers with choices have the weights of each token on the choice, in a stream on the chunk that brings the token.
    Anthropic's and OpenAI's newer API have no choices: all is in the answer's own `decar`, in a stream in the event
    that ends it.

    Args:
        path: of the request, as routes have it.
    """

    def __init__(self, path: str, call: Call, send: Send):
        self._path = path
        self._call = call
        self._send = send
        self._start: Message | None = None  # of a JSON body, held back until its length is known
        self._stream = False
        self._ended = False
        self._summary_sent = False
        self._degraded = 0  # experts whose loss the client knows of

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self._ended = not message.get("more_body")
        if message["type"] == "http.response.body" and self._stream:
            body = message.get("body", b"")
            event = self._event(body)
            if event is not body:
                message = {**message, "body": event}
        elif message["type"] == "http.response.start":
            self._start = None
            answers = message["status"] == 200
            self._stream = answers and is_event_stream(message)
            if answers and not self._stream:  # a stream's client reads the headers while the engines compute
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._start is not None:
            start, self._start = self._start, None
            body = self._object(message.get("body", b""))
            message = {**message, "body": body}
            start["headers"] = [
                (name, str(len(body)).encode() if name == b"content-length" else value)
                for name, value in start["headers"]
            ]
            await self._send(start)
        await self._send(message)

    async def ended_with(self, message: str, status: int) -> bool:
        """End a stream of which no end has been sent with an event that tells of an error.

        vLLM does so by itself in its other streams, and lets one of OpenAI's newer API break off.

        Returns:
            whether it has been ended so.
        """
        if not self._stream or self._ended or self._path != RESPONSES:
            return False
        self._ended = True
        await self._send({"type": "http.response.body", "body": error_event(self._path, message, status)})
        return True

    # --- whole answers ------------------------------------------------------------------------------------

    def _object(self, body: bytes) -> bytes:
        if not body.startswith(b"{"):
            return body
        if self._path in (MESSAGES, RESPONSES):
            return self._spliced(body, self._call.whole())
        if not self._call.trace:
            return self._spliced(body, self._call.summary())
        return json.dumps(self._traced(json.loads(body), None, once=True)).encode()

    def _spliced(self, body: bytes, decar: dict[str, Any]) -> bytes:
        return b'{"decar":' + json.dumps(decar).encode() + b"," + body[1:]

    # --- streams ------------------------------------------------------------------------------------------

    def _event(self, body: bytes) -> bytes:
        if self._path == MESSAGES:
            return self._message_event(body)
        if self._path == RESPONSES:
            return self._response_event(body)
        if not body.startswith(b"data: {") or body.startswith(b'data: {"error"'):
            return body
        ends = self._call.wire_rows and b'"finish_reason":"' in body  # with what is known of the whole answer
        known = self._summary_sent and self._degraded == len(self._call.degraded) and not ends
        self._summary_sent, self._degraded = True, len(self._call.degraded)
        if self._call.trace:
            data = json.loads(body.removeprefix(b"data: "))
            data = self._traced(data, self._counted(data), once=not known)
            return b"data: " + json.dumps(data).encode() + b"\n\n"
        if known:
            return body
        return b"data: " + self._spliced(body.removeprefix(b"data: "), self._call.summary())

    def _message_event(self, body: bytes) -> bytes:
        """Clients keep of a message what its first event has, and what the last one says of it."""
        name, data = _parts(body, (b"message_start", b"message_delta"))
        if data is None:
            return body
        if name == b"message_start":
            data["message"]["decar"] = self._call.summary()
        else:
            data["decar"] = self._call.whole()
        return _joined(name, data)

    def _response_event(self, body: bytes) -> bytes:
        ends = (b"response.completed", b"response.incomplete", b"response.failed")
        name, data = _parts(body, ends)
        if data is None:
            return body
        data["response"]["decar"] = self._call.whole()
        return _joined(name, data)

    def _counted(self, data: dict[str, Any]) -> int:
        """How many tokens a chunk's choice has by now; vLLM says so for us, unless the client wants to know too."""
        usage = data.get("usage") or {}
        if data.get("choices") and not self._call.counts_shown:
            data.pop("usage", None)
        return int(usage.get("completion_tokens", 0))

    def _traced(self, data: dict[str, Any], count: int | None, once: bool) -> dict[str, Any]:
        """``data`` with the weights of tokens that no earlier chunk has carried.

        Args:
            count: tokens that the choice of a chunk has by now; None: all.
        """
        for choice in data.get("choices") or []:
            trace = self._call.choices.get(choice.get("index"))
            delta = choice.get("delta") or {}
            announces = "role" in delta and not delta.get("content") and not choice.get("finish_reason")
            if trace is not None and not announces:  # a stream's first chunk names the role, and has no token
                new = slice(trace.sent, count)
                choice["decar"] = self._call.told(trace, new)
                trace.sent = max(trace.sent, count or 0)
        return {**data, "decar": self._call.summary()} if once else data


def _parts(event: bytes, names: tuple[bytes, ...]) -> tuple[bytes, dict[str, Any] | None]:
    """An event's name and data, if it has one of ``names``; else no data."""
    head, _, rest = event.partition(b"\n")
    name = head.removeprefix(b"event: ")
    if name not in names or not rest.startswith(b"data: "):
        return name, None
    data: dict[str, Any] = json.loads(rest.removeprefix(b"data: "))
    return name, data


def _joined(name: bytes, data: dict[str, Any]) -> bytes:
    return b"event: " + name + b"\ndata: " + json.dumps(data).encode() + b"\n\n"
