"""Spans that a real server sends to a collector: the request's, its engines', and vLLM's own below those."""

from __future__ import annotations

import secrets
from typing import Any

import httpx
import pytest

from tests.e2e.collector import Collector, ReceivedSpan
from tests.helpers import Server, wait_until
from tests.reference import Reference, prompt_texts

pytestmark = pytest.mark.engines

VLLMS = "llm_request"


class Traced:
    """Requests of a server, and their spans."""

    def __init__(self, server: Server, collector: Collector):
        self.server, self.collector = server, collector
        self.trace, self.parent = secrets.token_hex(16), secrets.token_hex(8)
        self.request_id = f"test-{self.trace}"

    def ask(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        headers = {"traceparent": f"00-{self.trace}-{self.parent}-01", "x-request-id": self.request_id}
        return self.server.http.post(path, json=body, headers=headers)

    def spans(self, own: int) -> tuple[ReceivedSpan, dict[str, ReceivedSpan], list[ReceivedSpan]]:
        """The request's span, its engines' by expert, and ``own`` of vLLM's, once all have come."""

        def come() -> list[ReceivedSpan] | None:
            found = self.collector.of(self.trace)
            vllms = [span for span in found if span.name == VLLMS]
            return found if len(vllms) == own and self._of_the_request(found) else None

        found = wait_until(come, 30, lambda: f"all spans have come: {self.collector.of(self.trace)}")
        [request] = self._of_the_request(found)
        engines = {span.attributes["decar.expert"]: span for span in found if span.name.startswith("engine ")}
        assert all(engine.parent == request.span for engine in engines.values())
        assert {span.service for span in found} == {"decar"}
        vllms = [span for span in found if span.name == VLLMS]
        assert len(found) == 1 + len(engines) + len(vllms)
        return request, engines, vllms

    def _of_the_request(self, found: list[ReceivedSpan]) -> list[ReceivedSpan]:
        return [span for span in found if span.parent == self.parent]


@pytest.fixture
def traced(trio_server: Server, collector: Collector) -> Traced:
    return Traced(trio_server, collector)


def test_all_experts_take_part_in_a_mixture(traced: Traced, trio: Reference) -> None:
    weights = {"code": 0.5, "prose": 0.3, "maths": 0.2}
    body = {"model": trio.name, "prompt": "import os", "max_tokens": 5, "ignore_eos": True}
    response = traced.ask(**body, temperature=0, decar={"weights": weights})
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"] == traced.request_id
    assert traced.request_id in response.json()["id"]
    request, engines, [leaders] = traced.spans(own=1)
    assert request.name == f"text_completion {trio.name}"
    usage = response.json()["usage"]
    assert request.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert request.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 5
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert request.attributes["decar.request_id"] == traced.request_id
    assert request.attributes["decar.experts"] == response.json()["decar"]["experts"]
    assert request.attributes["decar.leader"] == "code"
    assert request.attributes["decar.weights_entropy_nats"] == pytest.approx(1.0297, abs=1e-3)
    assert {name: span.attributes["decar.weight"] for name, span in engines.items()} == pytest.approx(weights)
    assert [name for name, span in engines.items() if span.attributes["decar.leads"]] == ["code"]
    assert leaders.parent == engines["code"].span
    assert leaders.attributes["gen_ai.usage.completion_tokens"] == 5


def test_an_expert_that_is_asked_for_alone_is_the_only_one(traced: Traced, trio: Reference) -> None:
    response = traced.ask(model=f"{trio.name}/prose", prompt="import os", max_tokens=3, ignore_eos=True)
    assert response.status_code == 200, response.text
    request, engines, [vllms] = traced.spans(own=1)
    assert request.name == f"text_completion {trio.name}/prose"
    assert list(engines) == ["prose"]
    assert vllms.parent == engines["prose"].span


def test_a_leader_that_hands_over_is_a_leader_too(
    trio_server: Server, collector: Collector, trio: Reference
) -> None:
    """Whoever leads at the end sends vLLM's span, whose state came from the one before."""
    handed_over = 0
    for prompt in prompt_texts(8):
        traced = Traced(trio_server, collector)
        asked = {"model": trio.name, "prompt": prompt, "max_tokens": 40, "ignore_eos": True, "temperature": 0}
        response = traced.ask(**asked, decar={"prune": 0.1, "trace": True})
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        leaders, weights = choice["decar"]["leaders"], choice["decar"]["weights"]
        request, engines, [vllms] = traced.spans(own=1)
        assert set(leaders) <= {name for name, span in engines.items() if span.attributes["decar.leads"]}
        assert vllms.parent == engines[leaders[-1]].span
        mixed = {name: sum(row[k] > 0 for row in weights) for k, name in enumerate(trio.experts)}
        for name, tokens in mixed.items():  # who is released by the prompt alone may have had no part
            assert name in engines or tokens == 0
            assert name not in engines or engines[name].attributes["decar.mixed_tokens"] == tokens
        assert request.attributes["gen_ai.usage.output_tokens"] == 40
        handed_over += len(set(leaders)) > 1
    assert handed_over > 0


def test_a_stream_of_chats_with_several_choices(traced: Traced, trio: Reference) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 3, "max_tokens": 4, "ignore_eos": True}
    response = traced.ask("/v1/chat/completions", model=trio.name, stream=True, **body)
    assert response.text.endswith("data: [DONE]\n\n")
    request, engines, vllms = traced.spans(own=3)
    assert request.name == f"chat {trio.name}"
    assert request.attributes["gen_ai.usage.output_tokens"] == 12
    assert set(engines) == set(trio.experts)
    assert {span.parent for span in vllms} <= {engine.span for engine in engines.values()}


def test_what_is_refused_has_no_engines(traced: Traced, trio: Reference) -> None:
    response = traced.ask(model=trio.name, prompt="a", max_tokens=-1)
    assert response.status_code == 400
    request, engines, _ = traced.spans(own=0)
    assert request.attributes["http.response.status_code"] == 400
    assert not engines
