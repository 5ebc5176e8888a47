"""The middleware alone: what it takes from a request, and what it adds to a response."""

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
from starlette.types import Message, Receive, Scope, Send

from decar.router import Ensemble
from decar.server.gateway import api
from decar.server.gateway.body import MAX_DEPTH
from decar.server.gateway.request import ChoiceTrace, asks_for_counts, current_call, parse_call

from .test_routing import ensemble

__all__ = ["ensemble"]  # the fixture

Answer = Callable[[Request], Any]


def client_of(ensemble: Ensemble, answer: Answer) -> httpx.AsyncClient:
    app = FastAPI(
        middleware=[
            Middleware(api.DecarMiddleware, served=SimpleNamespace(call_of=partial(parse_call, ensemble)))
        ]
    )

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(request)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def echo(request: Request) -> JSONResponse:
    call = current_call.get()
    assert call is not None
    call.choices[0] = ChoiceTrace(["code", "prose"], "prose", [[0.1, 0.9], [0.2, 0.8]], ["prose", "prose"])
    return JSONResponse({"got": await request.json(), "choices": [{"index": 0, "text": "hi"}]})


async def stream(request: Request) -> StreamingResponse:
    call = current_call.get()
    assert call is not None

    shown = (await request.json()).get("shown", False)

    async def events() -> AsyncIterator[str]:
        trace = ChoiceTrace(["code", "prose"], "prose")
        call.choices[0] = trace
        counted = asks_for_counts(shown)
        assert counted is (shown or call.trace)
        trace.weights += [[i / 10, 1 - i / 10] for i in range(4)]  # the engines are ahead of whoever reads
        trace.leaders += list("abcd")
        for count in (0, 1, 1, 3):
            chunk: dict[str, Any] = {"choices": [{"index": 0, "text": "x"}]}
            yield f"data: {json.dumps(chunk | ({'usage': {'completion_tokens': count}} if counted else {}))}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 3}})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def test_decar_is_taken_out_and_a_summary_put_in(ensemble: Ensemble) -> None:
    async with client_of(ensemble, echo) as client:
        response = await client.post("/v1/completions", json={"prompt": "é", "decar": {"rule": "logit"}})
    body = response.json()
    assert body["got"] == {"prompt": "é"}
    assert body["decar"] == {"experts": ["code", "prose"], "leader": "prose", "degraded": []}
    assert "decar" not in body["choices"][0]
    assert int(response.headers["content-length"]) == len(response.content)


async def test_a_trace_is_put_on_the_choice(ensemble: Ensemble) -> None:
    async with client_of(ensemble, echo) as client:
        body = (await client.post("/v1/completions", json={"decar": {"trace": True}})).json()
    assert body["choices"][0]["decar"] == {
        "weights": [[0.1, 0.9], [0.2, 0.8]],
        "leaders": ["prose", "prose"],
        "active": ["code", "prose"],
    }


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("shown", [True, False])
async def test_a_stream_says_it_once_and_each_chunk_has_the_weights_of_its_tokens(
    ensemble: Ensemble, trace: bool, shown: bool
) -> None:
    async with client_of(ensemble, stream) as client:
        body = {"decar": {"trace": trace}, "shown": shown}
        text = (await client.post("/v1/completions", json=body)).text
    *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    chunks = [json.loads(event) for event in events]
    assert done == "[DONE]"
    assert [chunk.get("decar", {}).get("leader") for chunk in chunks] == ["prose", *[None] * 4]
    assert ["usage" in chunk for chunk in chunks] == [*[shown] * 4, True]
    *chunks, _ = chunks
    traced = [chunk["choices"][0].get("decar", {}).get("weights") for chunk in chunks]
    assert traced == ([[], [[0.0, 1.0]], [], [[0.1, 0.9], [0.2, 0.8]]] if trace else [None] * 4)
    leaders = [chunk["choices"][0].get("decar", {}).get("leaders") for chunk in chunks]
    assert leaders == ([[], ["a"], [], ["b", "c"]] if trace else [None] * 4)


async def test_a_stream_begins_before_its_first_event(ensemble: Ensemble) -> None:
    sent: list[Message] = []

    async def stream_later(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        assert [message["type"] for message in sent] == ["http.response.start"]
        await send({"type": "http.response.body", "body": b'data: {"choices":[]}\n\n'})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await api.DecarMiddleware(stream_later, SimpleNamespace(call_of=partial(parse_call, ensemble)))(
        scope, receive, send
    )
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert b'"decar"' in sent[1]["body"]


async def test_a_bad_decar_is_refused_before_the_app_sees_it(ensemble: Ensemble) -> None:
    async def never(request: Request) -> Any:
        raise AssertionError("the app was called")

    async with client_of(ensemble, never) as client:
        response = await client.post("/v1/completions", json={"decar": {"weights": {"code": -1}}})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "decar.weights"
    assert error["code"] == 400
    assert "zero or more" in error["message"]


@pytest.mark.parametrize(
    ("decar", "param"), [({"trace": True}, "decar.trace"), ({"sampling": "draw"}, "decar.sampling")]
)
@pytest.mark.parametrize("asked", [True, "true", 1])
async def test_what_no_beam_search_can_have_is_refused(
    ensemble: Ensemble, decar: dict[str, Any], param: str, asked: Any
) -> None:
    async with client_of(ensemble, echo) as client:
        response = await client.post("/v1/completions", json={"decar": decar, "use_beam_search": asked})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        for value in (False, "false", None, [1], "x"):
            response = await client.post("/v1/completions", json={"decar": decar, "use_beam_search": value})
            assert response.status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[1]", b"", b'"text"', b"[" * 100])
async def test_what_is_no_json_object_is_left_to_the_app(ensemble: Ensemble, body: bytes) -> None:
    async def raw(request: Request) -> JSONResponse:
        return JSONResponse({"length": len(await request.body())})

    async with client_of(ensemble, raw) as client:
        response = await client.post("/v1/completions", content=body)
    assert response.json() == {"length": len(body)}


@pytest.mark.parametrize("model", [None, "", "test", True, 3, 1.5, ["test"], {"test": "test"}, [[]], {}])
async def test_a_model_of_any_type_is_left_to_the_app(ensemble: Ensemble, model: Any) -> None:
    """Which answers whom it answers: what it has generated says by whom."""
    async with client_of(ensemble, echo) as client:
        response = await client.post("/v1/completions", json={"model": model})
    assert response.status_code == 200
    assert response.json()["got"] == {"model": model}
    assert response.json()["decar"]["leader"] == "prose"


def nested(depth: int, kind: str) -> str:
    return "[" * depth + "]" * depth if kind == "lists" else '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("kind", ["lists", "objects"])
@pytest.mark.parametrize("form", ["%s", '{"prompt": %s}', '{"decar": %s}', '["[[[", %s]'])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 990, 1_000, 5_000, 100_000])
async def test_what_is_nested_too_deep_is_refused(
    ensemble: Ensemble, kind: str, form: str, depth: int
) -> None:
    async def never(request: Request) -> Any:
        raise AssertionError("the app was called")

    async with client_of(ensemble, never) as client:
        response = await client.post("/v1/completions", content=form % nested(depth, kind))
    assert response.status_code == 400
    assert str(MAX_DEPTH) in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["lists", "objects"])
async def test_what_is_nested_less_is_not(ensemble: Ensemble, kind: str) -> None:
    many = "[" * 500 + "{" * 500  # in a text
    body = f'{{"x": {nested(MAX_DEPTH - 1, kind)}, "y": {json.dumps(many)}}}'
    async with client_of(ensemble, echo) as client:
        response = await client.post("/v1/completions", content=body)
    assert response.json()["got"]["y"] == many


async def test_what_the_app_trips_over_before_it_generates_is_the_requests_fault(ensemble: Ensemble) -> None:
    async def trips(request: Request) -> Any:
        call = current_call.get()
        body = await request.json()
        if call is not None and body.get("generated"):
            call.prompts += 1
        return body["structured_outputs"].get("json")

    async with client_of(ensemble, trips) as client:
        for body in ({}, {"structured_outputs": "x"}, {"structured_outputs": None}):
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 400
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            with pytest.raises((AttributeError, KeyError)):
                await client.post("/v1/completions", json={**body, "generated": True})


async def test_a_client_that_goes_away_while_it_sends_is_not_served(ensemble: Ensemble) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("the app was called, or an answer sent")

    received: list[Message] = [
        {"type": "http.request", "body": b"{}", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return received.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await api.DecarMiddleware(never, SimpleNamespace(call_of=partial(parse_call, ensemble)))(
        scope, receive, never
    )


async def test_a_body_without_end_is_cut_off(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_BODY_BYTES", 1000)
    async with client_of(ensemble, echo) as client:
        response = await client.post("/v1/completions", content=b"x" * 1001)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "BadRequestError"
    assert response.headers["connection"] == "close"  # the rest is not read
