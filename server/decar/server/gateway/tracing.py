"""OpenTelemetry: a span for each request that generates, and one in it for each engine that takes part.

Knows requests and experts by name. Where no spans are wanted nothing here runs: `current_trace` is None.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from decar.server.gateway.asgi import path_of
from decar.server.gateway.gate import GENERATING
from decar.server.gateway.request import Call
from decar.server.gateway.request_id import current_request_id

_W3C = TraceContextTextMapPropagator()
OPERATIONS = {"/v1/completions": "text_completion"}
"""gen_ai.operation.name by path; all others are "chat"."""


class EngineSpan:
    """One expert's part in a request: in all choices of it, from when its engine was given the first to the end of the
    last."""

    def __init__(self, span: Span, context: Context):
        self.headers: dict[str, str] = {}  # the engine's own spans go below this one
        _W3C.inject(self.headers, set_span_in_context(span, context))
        self.lost = False
        self._span = span
        self._left_ns: int | None = None
        self._tokens, self._weight, self._leads = 0, 0.0, False

    def leaves(self, tokens: int, weight: float, leads: bool) -> None:
        """It has had a part in ``tokens`` tokens of a choice, with ``weight`` in all."""
        self._tokens, self._weight, self._leads = (
            self._tokens + tokens,
            self._weight + weight,
            self._leads or leads,
        )
        self._left_ns = time.time_ns()

    def end(self, request_tokens: int) -> None:
        self._span.set_attributes({"decar.leads": self._leads, "decar.mixed_tokens": self._tokens})
        if request_tokens:
            self._span.set_attribute("decar.weight", self._weight / request_tokens)
        if self.lost:
            self._span.set_status(Status(StatusCode.ERROR, "the expert's engine has died"))
        self._span.end(end_time=self._left_ns)


class RequestTrace:
    """The span of one HTTP request, and those of the engines that take part in it.

    Args:
        operation: gen_ai's name for what is asked.
    """

    def __init__(self, tracer: Tracer, operation: str, path: str, headers: Mapping[str, str]):
        self._tracer, self._operation = tracer, operation
        parent = _W3C.extract(headers)
        self.span = tracer.start_span(operation, parent, SpanKind.SERVER)
        self._context = set_span_in_context(self.span, parent)
        self.headers: dict[str, str] = {}
        _W3C.inject(self.headers, self._context)
        self._call: Call | None = None
        self._engines: dict[str, EngineSpan] = {}
        self._finish_reasons: list[str] = []
        self._prompt_tokens = self._tokens = 0
        self._entropy_nats = 0.0
        self.span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "decar",
                "http.request.method": "POST",
                "url.path": path,
                "decar.request_id": current_request_id.get() or "",
            }
        )

    def asked(self, call: Call, model: str | None) -> None:
        """What is asked for, and the model id that it is asked of."""
        self._call = call
        if model is not None:
            self.span.set_attribute("gen_ai.request.model", model)
            self.span.update_name(f"{self._operation} {model}")

    def generates(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """An answer to ``prompt`` [T] begins; there may be several in a request, or, of beams, many."""
        call = self._call
        if call is None or not call.beams or not self._prompt_tokens:
            self._prompt_tokens += len(prompt)
        asked = {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        }
        self.span.set_attributes({name: value for name, value in asked.items() if value is not None})

    def joins(self, expert: str) -> dict[str, str]:
        """An expert's engine is about to be given a part: ``trace_headers`` for it."""
        engine = self._engines.get(expert)
        if engine is None:
            name, attributes = f"engine {expert}", {"decar.expert": expert}
            span = self._tracer.start_span(name, self._context, SpanKind.CLIENT, attributes)
            engine = self._engines[expert] = EngineSpan(span, self._context)
        return engine.headers

    def loses(self, expert: str) -> None:
        """Its engine has died."""
        if expert in self._engines:
            self._engines[expert].lost = True

    def mixed(
        self, experts: Sequence[str], weights: np.ndarray, leaders: Sequence[int], entropy_nats: float
    ) -> None:
        """Several engines' parts in one choice have ended.

        Args:
            experts: names [K].
            weights: [T, K] that mixed its tokens; 0 for an expert that was not active.
            leaders: who has led, by index.
            entropy_nats: of these weights, the sum.
        """
        self._tokens += len(weights)
        self._entropy_nats += entropy_nats
        for k, name in enumerate(experts):
            if name in self._engines:
                tokens, weight = np.count_nonzero(weights[:, k]), weights[:, k].sum()
                self._engines[name].leaves(int(tokens), float(weight), k in leaders)

    def spoke(self, expert: str, tokens: int) -> None:
        """One engine has given so many tokens of a choice alone, and its part in it has ended."""
        self._tokens += tokens
        if expert in self._engines:
            self._engines[expert].leaves(tokens, float(tokens), leads=True)

    def heard(self, output: RequestOutput) -> None:
        self._finish_reasons += [choice.finish_reason for choice in output.outputs if choice.finish_reason]

    def failed(self, error: BaseException) -> None:
        self.span.record_exception(error)
        self.span.set_attribute("error.type", type(error).__name__)
        self.span.set_status(Status(StatusCode.ERROR, str(error)))

    def end(self, status: int | None) -> None:
        """
        Args:
            status: HTTP's, if anything was answered.
        """
        for engine in self._engines.values():
            engine.end(self._tokens)
        found: dict[str, Any] = {
            "gen_ai.usage.input_tokens": self._prompt_tokens,
            "gen_ai.usage.output_tokens": self._tokens,
            "gen_ai.response.finish_reasons": self._finish_reasons,
        }
        if status is not None:
            found["http.response.status_code"] = status
            if status >= 500:
                self.span.set_attribute("error.type", str(status))
                self.span.set_status(Status(StatusCode.ERROR))
        if self._tokens:
            found["decar.weights_entropy_nats"] = self._entropy_nats / self._tokens
        if self._call is not None:
            summary = self._call.summary()
            found["decar.experts"], found["decar.degraded"] = summary["experts"], summary["degraded"]
            found["decar.rule"] = self._call.rule
            if summary["leader"] is not None:
                found["decar.leader"] = summary["leader"]
        self.span.set_attributes(found)
        self.span.end()


current_trace: ContextVar[RequestTrace | None] = ContextVar("decar_trace", default=None)


class TracingMiddleware:
    """Opens a span for every request that generates, below the one that its ``traceparent`` names.

    Args:
        tracer: OpenTelemetry's.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer):
        self.app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) not in GENERATING:
            return await self.app(scope, receive, send)
        status: int | None = None

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._tracing(scope) as trace:
            try:
                await self.app(scope, receive, sent)
            finally:
                trace.end(status)

    @contextlib.contextmanager
    def _tracing(self, scope: Scope) -> Iterator[RequestTrace]:
        path = path_of(scope)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        trace = RequestTrace(self._tracer, OPERATIONS.get(path, "chat"), path, headers)
        before = current_trace.set(trace)
        try:
            yield trace
        finally:
            current_trace.reset(before)
