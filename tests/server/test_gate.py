"""The gate: who is let in, and how those who are inside leave."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from decar.server.gateway.gate import FullMiddleware, Gate, GateMiddleware
from decar.server.gateway.queue import Queue


class App:
    """Answers once it may; a path that ends in "stream" begins at once. One that its client has left is cancelled."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        if scope["path"].endswith("stream") or "stream" in scope["query_string"].decode():
            await StreamingResponse(self._events(), media_type="text/event-stream")(scope, receive, send)
            return
        waits = asyncio.create_task(self.may_answer.wait())
        leaves = asyncio.create_task(self._left(receive))
        await asyncio.wait((waits, leaves), return_when=asyncio.FIRST_COMPLETED)
        waits.cancel()
        leaves.cancel()
        if "raise" in scope["path"]:
            raise KeyError("the client has gone")
        await JSONResponse(None)(scope, receive, send)  # as FastAPI does for a handler that was cancelled

    async def _left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _events(self) -> Any:
        yield "data: {}\n\n"
        await self.may_answer.wait()
        yield "data: [DONE]\n\n"


class Client:
    """One request, whose messages are kept."""

    def __init__(self, app: Any, path: str, query: str = ""):
        self.sent: list[Message] = []
        self.begun = asyncio.Event()
        scope = {
            **{"type": "http", "method": "POST", "path": path, "query_string": query.encode(), "headers": []},
            "asgi": {"spec_version": "2.3"},
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))
        self._asked = False

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        self.begun.set()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def app(gate: Gate) -> Any:
    inner = App()
    outer = GateMiddleware(inner, gate)
    outer.inner = inner  # type: ignore[attr-defined]
    return outer


async def begun(client: Client) -> None:
    await asyncio.wait_for(client.begun.wait(), 5)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_runs_finishes_and_nothing_new_begins(gate: Gate, app: Any) -> None:
    whole, stream = Client(app, "/v1/completions"), Client(app, "/v1/completions", "stream")
    await begun(stream)
    drained = asyncio.create_task(gate.drain(60))
    await settled()
    late = Client(app, "/health")
    await late.task
    assert late.status == 503
    assert late.headers[b"connection"] == b"close"
    assert int(late.headers[b"retry-after"]) > 0
    assert app.inner.asked == 2
    assert not drained.done()
    app.inner.may_answer.set()
    await asyncio.wait_for(drained, 5)
    assert whole.status == 200
    assert whole.headers[b"connection"] == b"close"
    assert stream.body.endswith(b"[DONE]\n\n")
    assert gate.running == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/raise"])
async def test_what_does_not_finish_is_answered(gate: Gate, app: Any, path: str) -> None:
    client = Client(app, path)
    await settled()
    await gate.drain(0)
    await asyncio.wait_for(client.task, 5)
    assert client.status == 503
    assert b"shutting down" in client.body
    assert sum(message["type"] == "http.response.start" for message in client.sent) == 1


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/v1/completions", b"data: [DONE]\n\n"),
        ("/v1/messages", b"event: error"),
        ("/v1/responses", b"event: error"),
    ],
)
async def test_a_stream_that_does_not_finish_ends_with_an_error(
    gate: Gate, app: Any, path: str, end: bytes
) -> None:
    client = Client(app, path, "stream")
    await begun(client)
    await gate.drain(0)
    await asyncio.wait_for(client.task, 5)
    assert client.status == 200
    assert end in client.body
    assert b"shutting down" in client.body
    assert not client.sent[-1].get("more_body")


async def test_who_does_not_leave_is_not_waited_for(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decar.server.gateway.gate._ENDS_WITHIN_S", 0.01)

    async def stays(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    client = Client(GateMiddleware(stays, gate), "/v1/completions")
    await settled()
    await asyncio.wait_for(gate.drain(0), 5)
    assert gate.running == 1
    client.task.cancel()


async def test_an_error_is_an_error_while_the_gate_is_open(gate: Gate) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await Client(GateMiddleware(fails, gate), "/").task
    assert gate.running == 0


async def test_metrics_are_shown_to_the_end(gate: Gate) -> None:
    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(await Request(scope, receive).json())(scope, receive, send)

    await gate.drain(0)
    transport = httpx.ASGITransport(GateMiddleware(answers, gate))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post("/metrics", json=1)).status_code == 200
        assert (await client.post("/", json=1)).status_code == 503


async def test_what_a_full_queue_refuses_is_not_read() -> None:
    queue = Queue(total=1, length=0)
    app = App()
    app.may_answer.set()
    asked = FullMiddleware(app, queue)
    with queue.admitted():  # and has not got its place yet
        refused = Client(asked, "/v1/completions")
        await refused.task
        assert refused.status == 503
        assert not refused._asked
        assert queue.rejected == 1
        shown = Client(asked, "/v1/tokenize")  # generates nothing, and does not wait
        await shown.task
        assert shown.status == 200
    late = Client(asked, "/v1/completions")
    await late.task
    assert (late.status, queue.rejected) == (200, 1)
