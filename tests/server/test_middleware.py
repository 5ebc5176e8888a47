"""What stands around an app like vLLM's: keys, CORS, routes, and an answer to whatever is raised."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from decar.server.gateway.api import extend
from decar.server.gateway.gate import Gate
from decar.server.gateway.http_server import BoundedHttpProtocol
from decar.server.gateway.request import current_call
from decar.server.gateway.routes import OFFERED, REFUSED

from .fake_engine import FakeServer

ORIGIN = {"origin": "https://a.page"}
BEARER = {"authorization": "Bearer user"}
ADMIN = {"authorization": "Bearer admin"}


class Broken:
    """A middleware that raises where the request's header ``raises`` says."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raises = dict(scope.get("headers", ())).get(b"raises", b"")
        if raises == b"before":
            raise TypeError("unhashable type: 'list'")
        if raises == b"halfway":
            headers = [(b"content-length", b"100")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
            raise KeyError("halfway")
        await self.app(scope, receive, send)
        if raises == b"after":
            raise KeyError("after")


def app_of(
    *keys: str,
    admin: str | None = None,
    server: FakeServer | None = None,
    gate: Gate | None = None,
    reloader: Any = None,
) -> FastAPI:
    """An app as vLLM makes it, extended."""
    app = FastAPI()

    @app.exception_handler(Exception)
    async def handler(_: Request, error: Exception) -> JSONResponse:
        status = 400 if isinstance(error, TypeError) else 500
        return JSONResponse(
            {"error": {"message": str(error), "type": "", "param": None, "code": status}}, status
        )

    app.add_middleware(Broken)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["*"],
        allow_headers=["*"],
    )

    @app.get("/health")
    @app.get("/metrics")
    @app.get("/tokenizer_info")
    @app.post("/scale_elastic_ep")
    @app.post("/of/a/newer/version")
    async def answers() -> dict[str, bool]:
        return {"ok": True}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        if "raise" in body:
            call = current_call.get()
            assert call is not None
            call.prompts += 1  # has been given to engines
            raise KeyError(body["raise"])
        if "stream" in body:
            return StreamingResponse(broken_stream(), media_type="text/event-stream")
        return body

    async def show() -> Any:
        card = SimpleNamespace(model_dump=lambda: {"id": "fake", "root": "/somewhere"})
        return SimpleNamespace(data=[card])

    app.state.openai_serving_models = SimpleNamespace(show_available_models=show)
    client = (server or FakeServer(0.5, 0.5)).client
    extend(app, client, gate or Gate(), reloader, list(keys), admin)
    return app


async def broken_stream() -> AsyncIterator[str]:
    yield "data: {}\n\n"
    raise KeyError("in a stream")


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


# ---------------------------------------------------------------------------------------------- keys


async def test_with_a_key_only_health_is_open() -> None:
    async with client_of(app_of("right", "also")) as client:
        assert (await client.get("/health")).status_code == 200
        for method, path in (
            ("GET", "/metrics"),
            ("POST", "/metrics"),
            ("OPTIONS", "/metrics"),
            ("OPTIONS", "/v1/completions"),
            ("GET", "/v1/ensemble"),
            ("GET", "/openapi.json"),
            ("GET", "/no-such-route"),
        ):
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "right"},
                {"authorization": "Bearer "},
                {"authorization": "Basic right"},
            ):
                refused = await client.request(method, path, headers={**headers, **ORIGIN})
                assert refused.status_code == 401, (method, path, headers)
                assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
                assert refused.headers["access-control-allow-origin"] == "*"
        for key in ("right", "also"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await client.get("/metrics", headers=headers)).status_code == 200


async def test_a_browser_asks_without_a_key_whether_it_may_ask() -> None:
    async with client_of(app_of("user")) as client:
        for path in ("/v1/completions", "/metrics"):
            asked = {**ORIGIN, "access-control-request-method": "POST"}
            response = await client.options(path, headers=asked)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == "*"
            assert response.text == "OK"  # the route has not been asked
            # Each alone is no such question.
            for header in asked:
                response = await client.options(path, headers={header: asked[header]})
                assert response.status_code == 401


async def test_a_page_of_another_origin_may_read_when_to_ask_again() -> None:
    """Of a refusal as well, which has the header."""
    async with client_of(app_of("user")) as client:
        for path, headers in (("/health", BEARER), ("/metrics", {})):
            response = await client.get(path, headers={**headers, **ORIGIN})
            assert response.headers["access-control-expose-headers"] == "Retry-After, X-Request-Id"


@pytest.mark.parametrize("keys", [(), ("user",)])
async def test_only_the_admin_sees_paths_and_processes(keys: tuple[str, ...]) -> None:
    async with client_of(app_of(*keys, admin="admin")) as client:
        for path in ("/v1/models", "/v1/models/fake", "/v1/ensemble"):
            text = (await client.get(path, headers=BEARER)).text
            assert "somewhere" not in text
            assert "pid" not in text
            assert "somewhere" in (await client.get(path, headers=ADMIN)).text
        experts = (await client.get("/v1/ensemble", headers=ADMIN)).json()["experts"]
        assert [expert["pid"] for expert in experts] == [1000, 1001]
        assert (await client.get("/metrics", headers=ADMIN)).status_code == 200


async def test_what_shows_paths_is_for_the_admin() -> None:
    async with client_of(app_of(admin="admin")) as client:
        response = await client.get("/tokenizer_info")
        assert response.status_code == 403
        assert "--admin-key" in response.json()["error"]["message"]
        assert (await client.get("/tokenizer_info", headers=ADMIN)).status_code == 200


@pytest.mark.parametrize("admin", [None, ""])
async def test_without_an_admin_key_nobody_does(admin: str | None) -> None:
    async with client_of(app_of(admin=admin)) as client:
        for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer None"}, ADMIN):
            for path in ("/v1/models", "/v1/models/fake", "/v1/ensemble"):
                response = await client.get(path, headers=headers)
                assert response.status_code == 200
                assert "somewhere" not in response.text
                assert "pid" not in response.text


async def test_models_have_roots_all_the_same() -> None:
    async with client_of(app_of()) as client:
        assert (await client.get("/v1/models")).json()["data"] == [{"id": "fake", "root": "fake"}]


# ---------------------------------------------------------------------------------------------- routes


async def test_what_is_not_offered_is_refused_clearly() -> None:
    async with client_of(app_of()) as client:
        for path, word in (("/scale_elastic_ep", "scaled"), ("/of/a/newer/version", "/openapi.json")):
            for method in ("GET", "POST", "OPTIONS"):
                response = await client.request(method, path)
                assert response.status_code == 404
                assert path in response.json()["error"]["message"]
                assert word in response.json()["error"]["message"]
        response = await client.get("/v1/completions")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert {"/v1/completions", "/v1/models/{model_id}", "/v1/ensemble"} <= set(paths)
        assert not any("scale" in path or "newer" in path for path in paths)


def test_every_route_of_this_vllm_is_decided_on() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    found = set(routes_in(Path(spec.origin).parent / "entrypoints"))
    assert {"/v1/chat/completions", "/v1/models", "/scale_elastic_ep"} <= found
    decided = {path for paths in REFUSED.values() for path in paths} | set(OFFERED)
    templates = {re.sub(r"\{.*\}", "{}", path) for path in decided}
    assert found - {"/static"} <= templates


def routes_in(folder: Path) -> Iterator[str]:
    """Paths that vLLM's source gives routes, with {} for what varies."""
    route = re.compile(r"(?:\.(?:get|post|put|delete|websocket|mount)|add_api_route)\(\s*\"(/[^\"]*)\"")
    for file in folder.rglob("*.py"):
        if "client" not in file.name:
            yield from (re.sub(r"\{.*?\}", "{}", path) for path in route.findall(file.read_text()))


def test_a_route_is_offered_or_refused() -> None:
    refused = [path for paths in REFUSED.values() for path in paths]
    assert len(refused) == len(set(refused))
    assert not set(refused) & set(OFFERED)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("raises", "status"), [("before", 400), ("after", 200)])
async def test_what_a_middleware_raises_is_answered(raises: str, status: int) -> None:
    async with client_of(app_of()) as client:
        response = await client.get("/health", headers={"raises": raises, **ORIGIN})
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == "*"


async def test_what_the_app_raises_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "decar"):
        async with client_of(app_of()) as client:
            response = await client.post("/v1/completions", json={"raise": "this"}, headers=ORIGIN)
    assert response.status_code == 500
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["access-control-allow-origin"] == "*"
    [record] = caplog.records
    assert record.exc_info
    assert "/v1/completions" in record.getMessage()


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[int]:
    """The port at which ``app`` is served."""
    config = uvicorn.Config(app, port=0, http=BoundedHttpProtocol, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        await server.shutdown()


def request(path: str, body: Any = None, *headers: str) -> bytes:
    """A request as it travels."""
    content = b"" if body is None else json.dumps(body).encode()
    head = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        "host: x",
        f"content-length: {len(content)}",
    ]
    return "\r\n".join([*head, "content-type: application/json", *headers, "", ""]).encode() + content


async def read_status(reader: asyncio.StreamReader) -> int:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    [length] = re.findall(rb"content-length: (\d+)", head)
    await asyncio.wait_for(reader.readexactly(int(length)), 20)
    return int(head.split()[1])


async def test_no_exception_costs_the_connection() -> None:
    """One request after the other, then all sent at once."""
    requests = {
        request("/health", None, "raises: before"): 400,
        request("/health", None, "raises: after"): 200,
        request("/v1/completions", {"raise": 1}): 500,
        request("/v1/completions", {"raise": 1}, "raises: after"): 500,
        request("/v1/completions", {"model": ["x"], "decar": {"rule": []}}): 400,
        request("/v1/completions", {"model": {"x": []}}): 200,
        request("/nowhere", {}): 404,
        request("/health"): 200,
    }
    async with listening(app_of()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for sent, status in requests.items():
            writer.write(sent)
            assert await read_status(reader) == status, sent
        writer.write(b"".join(requests))
        assert [await read_status(reader) for _ in requests] == list(requests.values())
        writer.close()


@pytest.mark.parametrize(
    "sent", [request("/health", None, "raises: halfway"), request("/v1/completions", {"stream": 1})]
)
async def test_an_answer_that_breaks_off_ends_with_the_connection(sent: bytes) -> None:
    async with listening(app_of()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        text = await asyncio.wait_for(reader.read(), 20)
        assert text.startswith(b"HTTP/1.1 200")
        assert not text.endswith(b"0\r\n\r\n"), "it looks whole"
        writer.close()
