"""vLLM's OpenTelemetry, on with --otlp-traces-endpoint: its engines' own spans, and who makes decar's."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from opentelemetry.trace import Tracer, get_tracer


def tracer_of(args: Namespace) -> Tracer | None:
    """What makes decar's spans, sent where vLLM sends its own; None: without --otlp-traces-endpoint.

    vLLM has set that up once an engine is there.
    """
    return get_tracer("decar") if args.otlp_traces_endpoint else None


def keep_tracing(processor: Any) -> None:
    """Have an output processor leave out the span of a request of which there are no statistics, and of one that is
    only a step of an answer, as all are that a flow ensemble's engines have: nothing of it becomes text.

    Without statistics it would end with an AssertionError, and the engine's answers with it: under --disable-log-stats,
    and where the relay ends a request with an error. Without the time of its scheduling, durations would be those since
    the machine's start.
    """
    trace = processor.do_tracing

    def do_tracing(engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        known = req_state.stats is not None and req_state.stats.scheduled_ts and iteration_stats is not None
        if known and req_state.detokenizer is not None:
            trace(engine_core_output, req_state, iteration_stats)

    processor.do_tracing = do_tracing
