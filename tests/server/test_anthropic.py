"""Errors under /v1/messages have the form of Anthropic's API, whoever raises them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from decar.server.gateway import api
from decar.server.gateway.gate import Gate

from .fake_engine import FakeServer
from .test_middleware import ORIGIN, app_of, client_of

TYPES = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "overloaded_error",
    "timeout_error",
    "api_error",
}


def app_with_messages(*keys: str, server: FakeServer | None = None, gate: Gate | None = None) -> FastAPI:
    """As `app_of` makes it, with routes of Anthropic's API that fail as vLLM's do."""
    app = app_of(*keys, server=server, gate=gate)

    @app.post("/v1/messages")
    @app.post("/v1/messages/count_tokens")
    async def messages(request: Request) -> Any:
        body = await request.json()
        if "raise" in body:
            raise KeyError(body["raise"])
        if "http" in body:
            raise HTTPException(body["http"], "a detail")
        if "vllm" in body:  # its error types in Anthropic's form
            error = {"type": "NotFoundError", "message": "The model `x` does not exist."}
            return JSONResponse({"type": "error", "error": error}, body["vllm"])
        return {"content": []}

    return app


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"type", "error"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] in TYPES
    assert body["error"]["message"]
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"decar": {"rule": 3}}, 400, "invalid_request_error"),
        ({"decar": 3}, 400, "invalid_request_error"),
        ({"vllm": 404}, 404, "not_found_error"),
        ({"http": 400}, 400, "invalid_request_error"),
        ({"http": 415}, 415, "invalid_request_error"),
        ({"http": 500}, 500, "api_error"),
    ],
)
async def test_decars_errors_and_vllms(body: dict[str, Any], status: int, kind: str) -> None:
    async with client_of(app_with_messages()) as client:
        response = await client.post("/v1/messages", json=body)
    assert response.status_code == status
    assert error_of(response)["type"] == kind
    assert not error_of(response)["message"].startswith("{")


async def test_a_field_is_named() -> None:
    async with client_of(app_with_messages()) as client:
        refused = await client.post("/v1/messages", json={"decar": {"rule": "x"}})
        assert "decar.rule" in error_of(refused)["message"]
        refused = await client.post("/v1/messages/count_tokens", json={"decar": {}})
        assert "decar" in error_of(refused)["message"]


async def test_no_key_and_anthropics_own_header() -> None:
    async with client_of(app_with_messages("user")) as client:
        for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": "user", "authorization": "Bearer wrong"}):
            refused = await client.post("/v1/messages", json={}, headers={**headers, **ORIGIN})
            assert refused.status_code == 401
            assert error_of(refused)["type"] == "authentication_error"
            assert refused.headers["access-control-allow-origin"] == "*"
        for headers in ({"x-api-key": "user"}, {"authorization": "Bearer user"}):
            assert (await client.post("/v1/messages", json={}, headers=headers)).status_code == 200
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_overload_and_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, server = Gate(), FakeServer(0.5, 0.5)
    async with client_of(app_with_messages(server=server, gate=gate)) as client:
        monkeypatch.setattr(server.client.queue, "length", 0)
        monkeypatch.setattr(server.client.queue, "free", 0)
        full = await client.post("/v1/messages", json={})
        gate.closed = True
        stopping = await client.post("/v1/messages", json={})
    for response in (full, stopping):
        assert response.status_code == 503
        assert error_of(response)["type"] == "overloaded_error"
        assert "retry-after" in response.headers


async def test_routes_that_are_not_there_and_bodies_that_are_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "MAX_BODY_BYTES", 100)
    async with client_of(app_with_messages()) as client:
        for path in ("/v1/messages/batches", "/v1/messages/render"):
            assert error_of(await client.post(path, json={}))["type"] == "not_found_error"
        assert error_of(await client.get("/v1/messages"))["type"] == "invalid_request_error"
        large = await client.post("/v1/messages", content=b"x" * 101)
        assert (large.status_code, error_of(large)["type"]) == (413, "request_too_large")


async def test_what_the_app_raises() -> None:
    async with client_of(app_with_messages()) as client:
        response = await client.post("/v1/messages", json={"raise": "this"})
    assert response.status_code == 400  # before anything has been generated
    assert error_of(response)["type"] == "invalid_request_error"


async def test_other_apis_keep_openais_form() -> None:
    async with client_of(app_with_messages("user")) as client:
        for path in ("/v1/completions", "/v1/messagesx", "/v1"):
            body = (await client.post(path, json={})).json()
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert "type" not in body
