"""Spans of requests over engines without a model: who took part, below whose span, and what they say."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from vllm.sampling_params import RequestOutputKind, SamplingParams

from decar.server.gateway.api import extend
from decar.server.gateway.gate import Gate
from decar.server.vllm_adapter.tracing import keep_tracing

from .fake_engine import FakeServer
from .test_ensemble import PROMPT, settle

A, B = 0, 1
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}


class Traced:
    """An app over `FakeServer`, and the spans that have ended."""

    def __init__(self, *priors: float, tracing: bool = True):
        self.server = FakeServer(*priors)
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        tracer = provider.get_tracer("decar") if tracing else None
        app = FastAPI()

        @app.post("/v1/completions")
        async def completions(request: Request) -> Any:
            body = await request.json()
            params = SamplingParams(max_tokens=4, output_kind=RequestOutputKind.DELTA, **body["params"])

            async def events() -> AsyncIterator[str]:
                async for output in self.server.client.generate(PROMPT, params, "r"):
                    yield f"data: {list(output.outputs[0].token_ids)}\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

        @app.get("/health")
        async def health() -> None: ...

        extend(app, self.server.client, Gate(), None, [], None, tracer)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def ask(
        self, decar: Any = None, headers: dict[str, str] | None = None, model: str = "fake", **params: Any
    ) -> asyncio.Task[httpx.Response]:
        body = {"model": model, "decar": decar, "params": params}
        task = asyncio.ensure_future(self.http.post("/v1/completions", json=body, headers=headers))
        await settle()
        return task

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        found = self._exporter.get_finished_spans()
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}


def ids(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def traceparent_of(span: ReadableSpan) -> str:
    return "00-{}-{}-{:02x}".format(*ids(span), span.get_span_context().trace_flags)


async def test_one_span_of_the_request_and_one_of_each_engine() -> None:
    traced = Traced(0.25, 0.75)
    headers = {**TRACEPARENT, "x-request-id": "mine"}
    answer = await traced.ask({"route": "prior"}, headers, temperature=0.5, seed=3)
    a, b = (engine.requests[f"r-0@{k}"] for k, engine in enumerate(traced.server.engines))
    traced.server.engines[B].says("r-0", 5)
    traced.server.engines[B].says("r-0", 6, start=1, finished=True)
    assert (await answer).status_code == 200

    spans = traced.spans
    assert set(spans) == {"text_completion fake", "engine a", "engine b"}
    request = spans["text_completion fake"]
    assert (ids(request)[0], parent_of(request), request.kind) == (TRACE, PARENT, SpanKind.SERVER)
    found = dict(request.attributes or {})
    assert found.pop("decar.weights_entropy_nats") == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "decar",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "decar.request_id": "mine",
        "decar.experts": ("a", "b"),
        "decar.leader": "b",
        "decar.degraded": (),
        "decar.rule": "velocity",
    }
    for name, given, leads, weight in (("engine a", a, False, 0.25), ("engine b", b, True, 0.75)):
        span = spans[name]
        assert (ids(span)[0], parent_of(span), span.kind) == (TRACE, ids(request)[1], SpanKind.CLIENT)
        assert given.trace_headers == {"traceparent": traceparent_of(span)}, "its own spans go below this one"
        found = dict(span.attributes or {})
        assert found.pop("decar.weight") == pytest.approx(weight)
        assert found == {"decar.expert": name[-1], "decar.leads": leads, "decar.mixed_tokens": 2}


async def test_one_expert_alone_is_one_engine() -> None:
    traced = Traced(1, 1)
    answer = await traced.ask(model="fake/b")
    traced.server.engines[B].says("r", 5, finished=True, mixed=False)
    await answer
    assert set(traced.spans) == {"text_completion fake/b", "engine b"}
    request, engine = traced.spans["text_completion fake/b"], traced.spans["engine b"]
    assert request.parent is None
    assert (request.attributes or {})["decar.weights_entropy_nats"] == 0
    assert (engine.attributes or {})["decar.weight"] == 1
    assert traced.server.engines[B].requests["r@1"].trace_headers == {"traceparent": traceparent_of(engine)}


async def test_choices_share_their_engines_spans() -> None:
    traced = Traced(1, 1)
    answer = await traced.ask({"route": "prior"}, n=2)
    for choice in ("r-0", "r-1"):
        [member] = {e.requests[f"{choice}@{e.expert}"].member.leader for e in traced.server.engines}
        traced.server.engines[member].says(choice, 5, finished=True)
        await settle()
    await answer
    spans = traced.spans
    assert set(spans) == {"text_completion fake", "engine a", "engine b"}
    found = spans["text_completion fake"].attributes or {}
    assert found["gen_ai.request.choice.count"] == 2
    assert found["gen_ai.usage.output_tokens"] == 2
    assert found["gen_ai.usage.input_tokens"] == 3
    assert found["gen_ai.response.finish_reasons"] == ("length", "length")
    for name in ("engine a", "engine b"):
        assert (spans[name].attributes or {})["decar.mixed_tokens"] == 2
        assert (spans[name].attributes or {})["decar.weight"] == pytest.approx(0.5)


async def test_an_engine_that_dies_is_an_error_and_the_answer_degraded() -> None:
    traced = Traced(0.25, 0.75)
    traced.server.client.health.watch()
    answer = await traced.ask({"route": "prior"})
    traced.server.engines[A].die()
    await settle()
    traced.server.engines[B].says("r-0", 6, finished=True, mixed=False)
    assert (await answer).status_code == 200
    request, a, b = (traced.spans[name] for name in ("text_completion fake", "engine a", "engine b"))
    assert (request.attributes or {})["decar.degraded"] == ("a",)
    assert (a.status.status_code, b.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)


async def test_an_answer_that_fails_says_why() -> None:
    traced = Traced(0.25, 0.75)
    traced.server.client.health.watch()
    answer = await traced.ask({"route": "prior", "on_expert_loss": "fail"})
    traced.server.engines[A].die()
    await settle()
    await asyncio.gather(answer, return_exceptions=True)
    request = traced.spans["text_completion fake"]
    assert request.status.status_code == StatusCode.ERROR
    assert (request.attributes or {})["error.type"] == "ExpertDown"
    assert "expert 'a' is down" in (request.status.description or "")


async def test_what_is_refused_has_a_span_without_engines() -> None:
    traced = Traced(1, 1)
    answer = await (await traced.ask({"rule": "no such"}))
    assert answer.status_code == 400
    [span] = traced.spans.values()
    assert (span.attributes or {})["http.response.status_code"] == 400
    assert span.status.status_code == StatusCode.UNSET, "it is the client's fault"


@pytest.mark.parametrize("headers", [UNSAMPLED, {"traceparent": "nonsense"}], ids=["unsampled", "nonsense"])
async def test_a_traceparent_may_ask_for_none_or_be_nonsense(headers: dict[str, str]) -> None:
    traced = Traced(1, 1)
    answer = await traced.ask({"route": "prior"}, headers)
    given = traced.server.engines[A].requests["r-0@0"]
    traced.server.engines[A].says("r-0", 5, finished=True)
    await answer
    assert given.trace_headers is not None
    if headers is UNSAMPLED:
        assert not traced.spans
        assert given.trace_headers["traceparent"].endswith("-00")
    else:
        assert len(traced.spans) == 3


async def test_only_what_generates_is_traced_and_nothing_without_a_tracer() -> None:
    traced = Traced(1, 1)
    await traced.http.get("/health")
    assert not traced.spans
    without = Traced(1, 1, tracing=False)
    answer = await without.ask({"route": "prior"})
    given = without.server.engines[A].requests["r-0@0"]
    without.server.engines[A].says("r-0", 5, finished=True)
    await answer
    assert given.trace_headers is None
    assert not without.spans


def test_vllms_own_span_is_left_out_where_there_are_no_statistics() -> None:
    class Processor:
        def __init__(self) -> None:
            self.traced: list[Any] = []

        def do_tracing(self, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
            assert req_state.stats is not None
            assert iteration_stats is not None
            self.traced.append(engine_core_output)

    class State:
        def __init__(self, stats: Any, detokenizer: Any = "some"):
            self.stats, self.detokenizer = stats, detokenizer

    processor = Processor()
    keep_tracing(processor)
    processor.do_tracing("no statistics", State(None), "some")
    processor.do_tracing("ended by the relay", State(SimpleNamespace(scheduled_ts=1.0)), None)
    processor.do_tracing("not scheduled", State(SimpleNamespace(scheduled_ts=0.0)), "some")
    processor.do_tracing("a step of an answer", State(SimpleNamespace(scheduled_ts=1.0), None), "some")
    processor.do_tracing("as ever", State(SimpleNamespace(scheduled_ts=1.0)), "some")
    assert processor.traced == ["as ever"]
