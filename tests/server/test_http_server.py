"""The HTTP server's bounds, on a server that listens: what never comes whole costs little, and is ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from decar.server.gateway import http_server
from decar.server.gateway.body import read_body
from decar.server.gateway.http_server import BoundedHttpProtocol

PIECE = 2**15
WITHIN_S = 20
"""Longer than any deadline here: whoever waits this long waits for ever."""


class Impatient(BoundedHttpProtocol):
    timeout_s = 0.3


class Hasty(BoundedHttpProtocol):
    timeout_s = 0.5
    max_unread_bytes = 2**23


@dataclass
class App:
    """Answers with a request's path, once it may; reads its body first, unless that is /early. /stream and /whole
    answer with as many bytes as the query says, in pieces or not."""

    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # by the client, or all is sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.asked.append(scope["path"])
        if scope["path"] != "/early":
            await read_body(receive, 2**30)
        if scope["path"] == "/slow":
            await self.may_answer.wait()
        if scope["path"] == "/stream":
            return await self._stream(int(scope["query_string"]), receive, send)
        body = scope["path"].encode()
        if scope["path"] == "/whole":
            body = bytes(int(scope["query_string"]))
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, size_bytes: int, receive: Receive, send: Send) -> None:
        leaves = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while self.sent_bytes < size_bytes and not leaves.done():
            await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": True})
            self.sent_bytes += PIECE
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})
        leaves.cancel()
        self.left.set()


@dataclass
class Running:
    app: App
    port: int
    connections: set[object]

    async def connect(self) -> Connection:
        return Connection(*await asyncio.open_connection("127.0.0.1", self.port))

    @property
    def kept_bytes(self) -> int:
        return sum(connection._kept_bytes for connection in self.connections)  # type: ignore[attr-defined]


@dataclass
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        """The next answer's status and body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WITHIN_S)
        [length] = [
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        ]
        return int(head.split()[1]), await asyncio.wait_for(self.reader.readexactly(length), WITHIN_S)

    async def error(self) -> tuple[int, str]:
        """The next answer, which is an error, and with which the connection ends."""
        status, body = await self.answer()
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        assert await self.rest() == b""
        return status, error["message"]

    async def rest(self) -> bytes:
        """What comes until the connection ends, by whose unread part the system may call it reset."""
        with contextlib.suppress(ConnectionResetError):
            return await asyncio.wait_for(self.reader.read(), WITHIN_S)
        return b""


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    app = App()
    config = uvicorn.Config(
        app, port=0, http=getattr(request, "param", BoundedHttpProtocol), lifespan="off", log_level="critical"
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Running(app, port, server.server_state.connections)
    app.may_answer.set()
    await server.shutdown()


GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"
IMPATIENT = pytest.mark.parametrize("server", [Impatient], indirect=True)


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"GET /", id="path"),
        pytest.param(GET + b"x: ", id="header"),
        pytest.param(GET + b"x", id="name of a header"),
        pytest.param(
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx: ",
            id="header behind a body",
        ),
    ],
)
async def test_what_has_no_end_is_refused(server: Running, start: bytes) -> None:
    connection = await server.connect()
    connection.send(start)
    sent = 0
    while not connection.reader.at_eof() and sent < 100:
        connection.send(b"x" * 2**16)
        sent += 1
        try:
            await connection.writer.drain()
        except ConnectionError:
            break
        assert server.kept_bytes <= 2**20
    assert sent < 100, "it was read on and on"
    assert "/" not in server.app.asked or b"POST" in start


async def test_many_small_headers_are_refused(server: Running) -> None:
    connection = await server.connect()
    connection.send(GET + b"x: y\r\n" * 300 + b"\r\n")
    status, message = await connection.error()
    assert status == 431
    assert "256" in message
    assert server.app.asked == []


async def test_a_large_head_in_one_piece_is_refused(server: Running) -> None:
    connection = await server.connect()
    connection.send(GET + b"x: " + b"y" * 70_000 + b"\r\n\r\n")
    status, message = await connection.error()
    assert status == 431
    assert "65536" in message
    assert server.app.asked == []


async def test_what_is_below_the_bounds_is_answered(server: Running) -> None:
    connection = await server.connect()
    for _ in range(3):
        connection.send(GET + b"".join(b"x%d: %s\r\n" % (i, b"y" * 300) for i in range(200)) + b"\r\n")
        assert await connection.answer() == (200, b"/")
    # A body is not bounded here, in one piece or in many.
    connection.send(b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + b"z" * 1_000_000)
    assert await connection.answer() == (200, b"/a")
    connection.send(b"POST /b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(100_000):
        connection.send(b"1\r\nz\r\n")
    connection.send(b"0\r\n\r\n")
    assert await connection.answer() == (200, b"/b")


async def test_no_request_is_refused_behind_one_that_is_answered(server: Running) -> None:
    """Its answer is not cut, and nothing is written into it."""
    for nonsense in (b"nonsense\r\n\r\n", GET + b"x: " + b"y" * 2**17):
        server.app.may_answer.clear()
        connection = await server.connect()
        connection.send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + nonsense)
        other = await server.connect()
        other.send(GET + b"\r\n")  # by its answer, the other has been read
        assert await other.answer() == (200, b"/")
        server.app.may_answer.set()
        assert await connection.answer() == (200, b"/slow")
        assert await connection.rest() == b""


async def test_nonsense_is_an_error_in_the_usual_form(server: Running) -> None:
    connection = await server.connect()
    connection.send(b"nonsense\r\n\r\n")
    assert (await connection.error())[0] == 400


async def test_requests_one_behind_the_other_are_answered_in_order(server: Running) -> None:
    connection = await server.connect()
    paths = [b"/%d" % i for i in range(20)]
    connection.send(b"".join(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path for path in paths))
    assert [await connection.answer() for _ in paths] == [(200, path) for path in paths]


# ---------------------------------------------------------------------------------------------- deadlines


@IMPATIENT
@pytest.mark.parametrize("part", [b"G", GET, GET + b"x: y"])
async def test_half_a_head_is_not_waited_for(server: Running, part: bytes) -> None:
    connection = await server.connect()
    connection.send(part)
    status, message = await connection.error()
    assert status == 408
    assert "head" in message


@IMPATIENT
async def test_a_connection_that_says_nothing_is_closed(server: Running) -> None:
    for start in (b"", b"\r\n\r\n"):
        connection = await server.connect()
        connection.send(start)
        assert await connection.rest() == b""


@IMPATIENT
async def test_a_head_that_drips_is_not_waited_for(server: Running) -> None:
    connection = await server.connect()
    connection.send(GET + b"x: ")
    dripping = asyncio.create_task(drip(connection))
    assert (await connection.error())[0] == 408
    await dripping


@IMPATIENT
@pytest.mark.parametrize("path", [b"/", b"/early"])
async def test_a_body_that_drips_is_not_waited_for(server: Running, path: bytes) -> None:
    connection = await server.connect()
    connection.send(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" % path)
    dripping = asyncio.create_task(drip(connection))
    if path == b"/early":  # has been answered before its body came
        assert await connection.answer() == (200, path)
        await connection.rest()
    else:
        status, message = await connection.error()
        assert status == 408
        assert "body" in message
    await dripping


async def drip(connection: Connection) -> None:
    """A byte now and then, until nobody listens any more."""
    while not connection.reader.at_eof():
        connection.send(b"x")
        try:
            await connection.writer.drain()
        except ConnectionError:
            return
        await asyncio.sleep(0.02)


@IMPATIENT
async def test_anthropics_clients_are_told_in_their_form(server: Running) -> None:
    begun = b"POST /v1/messages?beta=true HTTP/1.1\r\nhost: x\r\n"
    for sent, status, kind in (
        (begun + b"content-length: 9\r\n\r\n{", 408, "timeout_error"),
        (begun + b"x: y\r\n" * 300 + b"\r\n", 431, "invalid_request_error"),
    ):
        connection = await server.connect()
        connection.send(sent)
        answered, body = await connection.answer()
        told = json.loads(body)
        assert answered == status
        assert told.keys() == {"type", "error"}
        assert told["error"]["type"] == kind


@IMPATIENT
async def test_half_a_request_on_a_kept_connection_is_not_waited_for(server: Running) -> None:
    connection = await server.connect()
    connection.send(POST + b"hello" + GET + b"\r\n")
    assert await connection.answer() == (200, b"/")
    assert await connection.answer() == (200, b"/")
    connection.send(POST + b"hel")
    assert (await connection.error())[0] == 408


@IMPATIENT
async def test_an_answer_may_take_longer_than_a_request(server: Running) -> None:
    connection = await server.connect()
    connection.send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
    behind = await server.connect()  # half a request behind one that is being answered
    behind.send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + POST + b"hel")
    for _ in range(4):
        silent = await server.connect()  # each lasts as long as the deadline
        assert await silent.rest() == b""
    server.app.may_answer.set()
    assert await connection.answer() == (200, b"/slow")
    assert await behind.answer() == (200, b"/slow")
    behind.send(b"lo")
    assert await behind.answer() == (200, b"/")


@IMPATIENT
async def test_a_body_that_comes_steadily_may_take_its_time(server: Running) -> None:
    connection = await server.connect()
    connection.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 40960\r\n\r\n")
    for _ in range(4):
        connection.send(b"x" * 10_240)
        silent = await server.connect()
        assert await silent.rest() == b""
    assert await connection.answer() == (200, b"/")


async def test_httpx_keeps_its_connection(server: Running) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        for path in ("/a", "/b", "/early"):
            assert (await client.post(path, content=b"x" * 200_000)).text == path
        assert len(server.connections) == 1


# ---------------------------------------------------------------------------------------------- what is not read


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LOOK_S", 0.05)


HASTY = pytest.mark.parametrize("server", [Hasty], indirect=True)
ENDLESS = 2**40


async def unread(server: Running, path: str) -> asyncio.StreamWriter:
    """A connection whose answer stays where it is, as soon as some of it has come."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    await asyncio.wait_for(reader.readexactly(15), WITHIN_S)
    return writer


@HASTY
async def test_a_stream_that_is_not_read_ends_when_too_much_is_kept(
    server: Running, looks_often: None
) -> None:
    writer = await unread(server, f"/stream?{ENDLESS}")
    await asyncio.wait_for(server.app.left.wait(), WITHIN_S)
    assert server.app.sent_bytes > Hasty.max_unread_bytes
    assert not server.connections
    writer.close()


async def test_a_stream_that_is_not_read_does_not_wait(server: Running) -> None:
    """What it holds is free when all is said."""
    size_bytes = BoundedHttpProtocol.max_unread_bytes
    writer = await unread(server, f"/stream?{size_bytes}")
    await asyncio.wait_for(server.app.left.wait(), WITHIN_S)
    assert server.app.sent_bytes == size_bytes
    assert len(server.connections) == 1
    writer.close()


@HASTY
@pytest.mark.parametrize("path", ["/stream", "/whole"])
async def test_nothing_is_kept_for_long_for_who_does_not_read(
    server: Running, looks_often: None, path: str
) -> None:
    writer = await unread(server, f"{path}?{3 * 2**21}")  # more than the system keeps
    while server.connections:
        await asyncio.sleep(0.01)
    writer.close()


@HASTY
async def test_who_reads_slowly_gets_all_of_a_whole_answer(server: Running, looks_often: None) -> None:
    size_bytes = 2**24
    connection = await server.connect()
    connection.send(f"GET /whole?{size_bytes} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    await connection.reader.readuntil(b"\r\n\r\n")
    left = size_bytes
    while left:
        left -= len(await connection.reader.readexactly(min(2**19, left)))
        await asyncio.sleep(0.05)
    connection.writer.close()
