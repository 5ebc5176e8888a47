"""The `decar` object in answers of APIs that have no choices: Anthropic's messages, OpenAI's responses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware import Middleware

from decar.router import Ensemble
from decar.server.gateway import api
from decar.server.gateway.engine import ExpertDown
from decar.server.gateway.middleware import GuardMiddleware
from decar.server.gateway.request import ChoiceTrace, current_call, parse_call

from .test_routing import ensemble

__all__ = ["ensemble"]  # the fixture

SUMMARY = {"experts": ["code", "prose"], "leader": "prose", "degraded": []}
TRACE = {
    "weights": [[0.1, 0.9], [0.2, 0.8], [0.5, 0.5]],
    "leaders": ["prose", "prose", "code"],
    "active": ["code", "prose"],
}
EVENTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "/v1/messages": [
        ("message_start", {"message": {"content": []}}),
        ("content_block_delta", {"delta": {"text": "message_delta"}}),
        ("message_delta", {"delta": {"stop_reason": "end_turn"}}),
        ("message_stop", {}),
    ],
    "/v1/responses": [
        ("response.created", {"response": {"status": "in_progress"}}),
        ("response.output_text.delta", {"delta": "response.completed"}),
        ("response.completed", {"response": {"status": "completed"}}),
    ],
}


def client_of(ensemble: Ensemble, answer: Callable[[Request], Any]) -> httpx.AsyncClient:
    served = SimpleNamespace(call_of=partial(parse_call, ensemble))
    app = FastAPI(middleware=[Middleware(GuardMiddleware), Middleware(api.DecarMiddleware, served=served)])
    paths = (*EVENTS, "/v1/completions", "/tokenize", "/detokenize", "/v1/messages/count_tokens")
    for path in paths:
        app.post(path, response_model=None)(answer)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def generate() -> None:
    """As an engine would: in two turns, between which a tool is called."""
    call = current_call.get()
    assert call is not None
    names = ["code", "prose"]
    call.choices[1] = ChoiceTrace(names, "code", TRACE["weights"][2:], TRACE["leaders"][2:])  # type: ignore[arg-type]
    call.choices[0] = ChoiceTrace(names, "prose", TRACE["weights"][:2], TRACE["leaders"][:2])  # type: ignore[arg-type]


async def whole(request: Request) -> JSONResponse:
    generate()
    return JSONResponse({"id": "x", "content": []})


def streaming(error: Exception | None = None) -> Callable[[Request], Any]:
    async def stream(request: Request) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            for name, data in EVENTS[request.url.path]:
                yield f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"
                generate()
                if error is not None:
                    raise error

        return StreamingResponse(events(), media_type="text/event-stream")

    return stream


def read(text: str) -> list[tuple[str, dict[str, Any]]]:
    parts = [part.split("\n") for part in text.split("\n\n") if part]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


@pytest.mark.parametrize("path", EVENTS)
async def test_a_whole_answer_has_its_trace(ensemble: Ensemble, path: str) -> None:
    async with client_of(ensemble, whole) as client:
        traced = await client.post(path, json={"decar": {"trace": True}})
        plain = await client.post(path, json={})
    assert traced.json()["decar"] == SUMMARY | TRACE
    assert plain.json()["decar"] == SUMMARY
    assert int(traced.headers["content-length"]) == len(traced.content)


@pytest.mark.parametrize("trace", [True, False])
async def test_a_stream_of_messages_has_its_trace_at_the_end(ensemble: Ensemble, trace: bool) -> None:
    async with client_of(ensemble, streaming()) as client:
        events = read((await client.post("/v1/messages", json={"decar": {"trace": trace}})).text)
    assert [name for name, _ in events] == [name for name, _ in EVENTS["/v1/messages"]]
    assert "decar" in events[0][1]["message"]  # where a client's own copy of the message begins
    assert events[2][1]["decar"] == SUMMARY | (TRACE if trace else {})
    assert events[1][1] == {"type": "content_block_delta", "delta": {"text": "message_delta"}}


@pytest.mark.parametrize("trace", [True, False])
async def test_a_stream_of_responses_has_its_trace_at_the_end(ensemble: Ensemble, trace: bool) -> None:
    async with client_of(ensemble, streaming()) as client:
        events = read((await client.post("/v1/responses", json={"decar": {"trace": trace}})).text)
    assert [name for name, _ in events] == [name for name, _ in EVENTS["/v1/responses"]]
    assert events[-1][1]["response"]["decar"] == SUMMARY | (TRACE if trace else {})
    assert "decar" not in events[0][1]["response"]  # nothing has been generated yet


@pytest.mark.parametrize(
    ("error", "code"), [(ExpertDown("expert 'code' is down"), "503"), (KeyError("secret"), "500")]
)
async def test_a_stream_of_responses_that_fails_says_so(
    ensemble: Ensemble, error: Exception, code: str
) -> None:
    async with client_of(ensemble, streaming(error)) as client:
        events = read((await client.post("/v1/responses", json={})).text)
    assert [name for name, _ in events] == ["response.created", "error"]
    told = events[-1][1]
    assert (told["type"], told["code"]) == ("error", code)
    assert ("expert 'code' is down" in told["message"]) == (code == "503")
    assert "secret" not in told["message"]


async def test_no_trace_of_what_is_fetched_later(ensemble: Ensemble) -> None:
    async with client_of(ensemble, whole) as client:
        body = {"background": True, "decar": {"trace": True}}
        response = await client.post("/v1/responses", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "decar.trace")
        for other in ({"background": False}, {"decar": None}, {"decar": {"rule": "logit"}}):
            assert (await client.post("/v1/responses", json={**body, **other})).status_code == 200


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
async def test_decar_is_refused_where_nothing_is_generated(ensemble: Ensemble, path: str) -> None:
    async with client_of(ensemble, whole) as client:
        for decar in ({"trace": True}, {"rule": "logit"}, {}, 3):
            response = await client.post(path, json={"decar": decar})
            assert response.status_code == 400
            assert path in response.json()["error"]["message"]
            assert response.json()["error"]["param"] == "decar"
        assert "decar" not in (await client.post(path, json={"decar": None})).json()
