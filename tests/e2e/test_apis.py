"""What every API of the server has in common: the model's name, the trace, the form of its errors, its description."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.helpers import Server, wait_until
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

CHAT = {"messages": [{"role": "user", "content": "Sort a list."}], "max_tokens": 6}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "import os", "max_tokens": 6},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "Sort a list.", "max_output_tokens": 6},
    "/v1/messages": CHAT,
    "/invocations": CHAT,
}
GREEDY = {"temperature": 0, "ignore_eos": True}


def ask(server: Server, path: str, model: str | None, **more: Any) -> dict[str, Any]:
    response = server.http.post(path, json={"model": model, **BODIES[path], **GREEDY, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: Server, path: str, model: str, **more: Any) -> Iterator[dict[str, Any]]:
    body = {"model": model, **BODIES[path], **GREEDY, "stream": True, **more}
    with server.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def named(data: dict[str, Any]) -> set[str]:
    """Models that an answer, or an event, names."""
    inner = [data.get("message") or {}, data.get("response") or {}]
    return {part["model"] for part in (data, *inner) if "model" in part}


# ---------------------------------------------------------------------------------------------- the model's name


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("model", ["duo", "duo/code", "duo/prose"])
def test_answers_name_the_model_that_was_asked_for(duo_server: Server, path: str, model: str) -> None:
    assert named(ask(duo_server, path, model)) == {model}
    events = list(stream(duo_server, path, model))
    assert set().union(*map(named, events)) == {model}
    if path in ("/v1/completions", "/v1/chat/completions", "/invocations"):
        assert all(event["model"] == model for event in events)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_who_asks_for_no_model_is_told_whose_the_answer_is(duo_server: Server, path: str) -> None:
    assert named(ask(duo_server, path, None)) == {"duo"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_beams_and_choices_name_it_too(duo_server: Server, path: str) -> None:
    assert named(ask(duo_server, path, "duo/prose", use_beam_search=True, n=2)) == {"duo/prose"}
    assert named(ask(duo_server, path, "duo/prose", n=3, temperature=1)) == {"duo/prose"}


def test_metrics_count_by_the_model_that_was_asked_for(duo_server: Server, duo: Reference) -> None:
    def counted() -> dict[str, list[float]]:
        names = ("requests", "prompt_tokens", "generated_tokens")
        return {
            model: [duo_server.metric_of(f"decar:{name}_total", model=model) for name in names]
            for model in models
        }

    models = ["duo", "duo/code", "duo/prose"]
    prompt = duo.encode("import os")
    wait_until(duo_server.is_idle, 30, "nothing of other tests is counted below")
    before = counted()
    ask(duo_server, "/v1/completions", "duo", prompt=prompt, n=2, temperature=1)
    ask(duo_server, "/v1/completions", "duo/code", prompt=[prompt, prompt], max_tokens=5)
    list(stream(duo_server, "/v1/completions", "duo/code", prompt=prompt))
    duo_server.http.post("/v1/completions", json={"model": "duo/stranger", "prompt": prompt})
    after = counted()
    said = {m: [new - old for new, old in zip(after[m], before[m], strict=True)] for m in models}
    size = len(prompt)
    assert said == {"duo": [1, size, 12], "duo/code": [2, 3 * size, 16], "duo/prose": [0, 0, 0]}
    assert duo_server.metric_of("decar:requests_total", model="duo/stranger") == 0


def test_an_info_metric_says_whose_engine_each_is(duo_server: Server) -> None:
    """Who has asked the second expert alone finds it in the metrics of the engine that is named for it."""
    for engine, expert in (("0", "code"), ("1", "prose")):
        labels = {"engine": engine, "expert": expert, "model": f"duo/{expert}"}
        assert duo_server.metric_of("decar:engine_info", **labels) == 1
    wait_until(duo_server.is_idle, 30, "nothing counts on")
    before = [duo_server.metric_of("vllm:request_success_total", engine=engine) for engine in "01"]
    ask(duo_server, "/v1/completions", "duo/prose")
    wait_until(
        lambda: duo_server.metric_of("vllm:request_success_total", engine="1") == before[1] + 1,
        30,
        "it counts",
    )
    assert duo_server.metric_of("vllm:request_success_total", engine="0") == before[0]


# ---------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("model", ["duo", "duo/prose"])
def test_traces_of_apis_without_choices(duo_server: Server, path: str, model: str) -> None:
    """They are those of the same chat, whose trace the reference holds elsewhere."""
    decar = {"trace": True}
    [choice] = ask(duo_server, "/v1/chat/completions", model, decar=decar)["choices"]
    whole = ask(duo_server, path, model, decar=decar)["decar"]
    events = list(stream(duo_server, path, model, decar=decar))
    [last] = [event for event in events if event["type"] in ("message_delta", "response.completed")]
    streamed = last["decar"] if path == "/v1/messages" else last["response"]["decar"]
    for trace in (whole, streamed):
        assert trace["leaders"] == choice["decar"]["leaders"]
        assert trace["active"] == choice["decar"]["active"]
        assert len(trace["weights"]) == 6
        for ours, theirs in zip(trace["weights"], choice["decar"]["weights"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert set(trace) >= {"experts", "leader", "degraded"}
    plain = ask(duo_server, path, model)["decar"]
    assert set(plain) == {"experts", "leader", "degraded"}


def test_openais_client_finds_the_trace_of_a_response(duo_server: Server) -> None:
    client: openai.OpenAI = duo_server.openai()
    with client.responses.stream(
        model="duo",
        input="Sort a list.",
        max_output_tokens=4,
        extra_body={**GREEDY, "decar": {"trace": True}},
    ) as events:
        final = events.get_final_response()
    assert final.model == "duo"
    assert final.model_extra is not None
    assert len(final.model_extra["decar"]["weights"]) == 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
        ("/v1/responses", {**BODIES["/v1/responses"], "background": True}),
        ("/v1/completions", {**BODIES["/v1/completions"], "use_beam_search": True}),
        ("/v1/chat/completions/batch", {"messages": [CHAT["messages"]]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trace_is_given_or_refused(duo_server: Server, path: str, body: dict[str, Any]) -> None:
    response = duo_server.http.post(path, json={"model": "duo", **body, "decar": {"trace": True}})
    if path.endswith("/batch"):  # which is not offered
        assert response.status_code == 404
    else:
        assert response.status_code == 400
        assert "decar" in response.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "status", "kind", "word"),
    [
        ({"decar": {"weights": {"code": -1}}}, 400, "invalid_request_error", "decar.weights"),
        ({"model": "stranger"}, 404, "not_found_error", "stranger"),
        ({"messages": 3}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": 100_000}, 400, "invalid_request_error", "100000"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 4_000}]}, 400, "invalid_request_error", "512"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("streams", [False, True])
def test_errors_of_anthropics_api(
    duo_server: Server, body: dict[str, Any], status: int, kind: str, word: str, streams: bool
) -> None:
    response = duo_server.http.post("/v1/messages", json={"model": "duo", **CHAT, "stream": streams, **body})
    assert response.status_code == status, response.text
    told = response.json()
    assert told.keys() == {"type", "error"}
    assert told["type"] == "error"
    assert told["error"].keys() == {"type", "message"}
    assert told["error"]["type"] == kind
    assert word in told["error"]["message"]


def test_other_errors_of_anthropics_api(duo_server: Server) -> None:
    wrong: list[httpx.Response] = [
        duo_server.http.post("/v1/messages", content=b"{", headers={"content-type": "application/json"}),
        duo_server.http.post("/v1/messages", content=b"{}", headers={"content-type": "text/plain"}),
        duo_server.http.get("/v1/messages"),
        duo_server.http.post("/v1/messages/batches", json={}),
        duo_server.http.post(
            "/v1/messages/count_tokens", json={"model": "stranger", "messages": CHAT["messages"]}
        ),
    ]
    for response in wrong:
        assert 400 <= response.status_code < 500
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] in ("invalid_request_error", "not_found_error")


# ---------------------------------------------------------------------------------------------- the description


def test_the_description_knows_decar(duo_server: Server) -> None:
    schema = duo_server.http.get("/openapi.json").json()
    components = schema["components"]["schemas"]
    bodies = ["ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "AnthropicMessagesRequest"]
    for body in bodies:
        assert components[body]["properties"]["decar"]["anyOf"][0]["$ref"].endswith("/DecarOptions")
    assert "decar" not in components["AnthropicCountTokensRequest"]["properties"]
    assert "trace" in components["DecarOptions"]["properties"]
    answer = schema["paths"]["/v1/ensemble"]["get"]["responses"]["200"]["content"]["application/json"]
    assert answer["schema"]["$ref"].endswith("/EnsembleState")
    assert set(components["EnsembleState"]["properties"]) == set(duo_server.ensemble())


def test_no_page_of_another_origin_is_let_in_unless_it_is_named(duo_server: Server) -> None:
    asked = {"origin": "https://a.page", "access-control-request-method": "POST"}
    preflight = duo_server.http.options("/v1/chat/completions", headers=asked)
    answer = duo_server.http.get("/v1/models", headers={"origin": "https://a.page"})
    assert preflight.status_code == 400
    for response in (preflight, answer):
        assert "access-control-allow-origin" not in response.headers
