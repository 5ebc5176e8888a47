"""The `decar:*` Prometheus metrics. Knows the plane, and nothing about vLLM.

Shapes: K experts, C places for them, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from decar.server.protocol.plane import Plane

COUNTED = {
    "holds": (("leader_holds", "follower_holds"), "Steps in which a request's row was not decided yet."),
    "mixed_tokens": (("mixed_tokens",), "Tokens that this expert mixed as a leader."),
    "scored_tokens": (("scored_tokens",), "Prompt tokens whose log-likelihood this expert computed."),
    "pruned": (("pruned",), "Experts that this one, as a leader, released from a request."),
    "handed_over": (("handed_over",), "Requests whose lead this expert passed on."),
}
"""Name of a metric -> the plane's counters it adds up, and its description."""
ASKED = {
    "requests": "Requests that were given to experts.",
    "prompt_tokens": "Tokens of their prompts.",
    "generated_tokens": "Tokens that were generated for them.",
}
"""Name of a metric by model id, and its description."""
ENTROPY_BOUNDS = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0, 1.5, 2.0)
"""In nats. One expert alone has 0, two equal ones ln 2 = 0.69."""


class Tally:
    """A histogram that takes many values at a time: prometheus_client's own takes one, per token too slow.

    Args:
        bounds: upper bounds of its buckets, ascending; one more takes what is above them.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]):
        self._name, self._documentation, self._bounds = name, documentation, bounds
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        self._counts += np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        self._sum += float(values.sum())

    def add_same(self, value: float, count: int) -> None:
        """``value``, ``count`` times."""
        self._counts[np.searchsorted(self._bounds, value)] += count
        self._sum += value * count

    def family(self) -> Metric:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True))
        return HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class EnsembleMetrics(Collector):
    """The `decar:*` metrics: what engines count in the plane, and the weights that mixed each token.

    Args:
        plane: read whenever the metrics are asked for.
        registry: where they are registered; one server has one.
    """

    def __init__(self, plane: Plane, registry: CollectorRegistry = REGISTRY):
        self._plane, places = plane, plane.spec.experts
        self._active = Tally(
            "decar:active_experts", "Experts that mixed a token.", [float(k + 1) for k in range(places)]
        )
        self._entropy = Tally(
            "decar:weights_entropy_nats", "Entropy of the weights that mixed a token.", ENTROPY_BOUNDS
        )
        self._experts: Sequence[Any] = ()
        self._queue: Any = None
        self._name = ""
        self._asked: dict[str, dict[str, int]] = {}  # by model id, which the gateway bounds
        self._failovers = np.zeros(places, np.int64)
        self._restarts = np.zeros(places, np.int64)
        registry.register(self)

    def watch(self, experts: Sequence[Any], queue: Any, name: str) -> None:
        """Report of these, by place: those that are ``seated`` by ``name`` (the label ``expert``), and whether each is
        ``up``; and how many wait in ``queue`` or have found it full.

        Args:
            name: of the ensemble.
        """
        self._experts, self._queue, self._name = experts, queue, name

    def asked(self, model: str | None, requests: int = 0, prompt_tokens: int = 0, generated: int = 0) -> None:
        """Count what was asked of the model of this id; None: it was not a user who asked."""
        if model is None:
            return
        counted = self._asked.setdefault(model, dict.fromkeys(ASKED, 0))
        counted["requests"] += requests
        counted["prompt_tokens"] += prompt_tokens
        counted["generated_tokens"] += generated

    def failed_over(self, expert: int) -> None:
        """A request has lost this expert."""
        self._failovers[expert] += 1

    def restarted(self, expert: int) -> None:
        """This expert has a new engine."""
        self._restarts[expert] += 1

    def observe(self, weights: np.ndarray) -> float:
        """Take in the weights [T, K] that mixed a request's tokens; 0 for an expert that was not active. Gives the sum
        of their entropies."""
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        self._active.add((weights > 0).sum(axis=1))
        entropy = np.maximum(-(weights * logs).sum(axis=1), 0.0)  # rounding may leave -1e-17
        self._entropy.add(entropy)
        return float(entropy.sum())

    def observe_alone(self, tokens: int) -> None:
        """The same of a request that one expert answers."""
        self._active.add_same(1.0, tokens)
        self._entropy.add_same(0.0, tokens)

    def collect(self) -> Iterator[Metric]:
        yield from self._of_answers()
        counted = [block.counted() for block in self._plane.blocks]
        for name, (counters, documentation) in COUNTED.items():
            sums = [sum(counts[counter] for counter in counters) for counts in counted]
            yield self._by_expert(CounterMetricFamily, name, documentation, sums)
        for family, name, documentation, values in (
            (
                CounterMetricFamily,
                "mixing_seconds",
                "Time spent on mixing rows.",
                [counts["mix_ns"] / 1e9 for counts in counted],
            ),
            (
                GaugeMetricFamily,
                "expert_up",
                "1 while the expert answers.",
                [expert.up for expert in self._experts],
            ),
            (
                CounterMetricFamily,
                "failovers",
                "Requests that lost this expert on their way.",
                self._failovers.tolist(),
            ),
            (
                CounterMetricFamily,
                "restarts",
                "How often this expert was given a new engine.",
                self._restarts.tolist(),
            ),
        ):
            yield self._by_expert(family, name, documentation, values)
        if self._queue is not None:
            yield GaugeMetricFamily("decar:queued", "Requests that wait for a place.", self._queue.waiting)
            yield CounterMetricFamily(
                "decar:rejected", "Requests that found the queue full.", self._queue.rejected
            )
        yield self._active.family()
        yield self._entropy.family()
        for name, documentation in ASKED.items():
            by_model = CounterMetricFamily(f"decar:{name}", documentation, labels=["model"])
            for model, counts_of in self._asked.items():
                by_model.add_metric([model], counts_of[name])
            yield by_model
        yield self._engines()

    def _of_answers(self) -> Iterator[Metric]:
        """What only ensembles of one kind have: here, nothing."""
        yield from ()

    def _engines(self) -> Metric:
        """Whose engine it is that vLLM's metrics have as ``engine``."""
        info = InfoMetricFamily(
            "decar:engine", "The expert of each engine.", labels=["engine", "expert", "model"]
        )
        for engine, expert in enumerate(self._experts):
            if expert.seated:
                info.add_metric([str(engine), expert.name, f"{self._name}/{expert.name}"], {})
        return info

    def _by_expert(self, family: type[Any], name: str, documentation: str, values: Sequence[float]) -> Metric:
        """``values`` [C] of places, as a family of metrics of the experts there."""
        made = family(f"decar:{name}", documentation, labels=["expert"])
        for expert, value in zip(self._experts, values, strict=False):  # nobody is watched yet
            if expert.seated:
                made.add_metric([expert.name], float(value))
        return made


FLOW = {
    "flow_rounds": "Calls of the kernel, each of which mixes and samples the rows of all answers under way.",
    "flow_rows": "Rows that were mixed in them, one for each masked position.",
    "flow_steps": "Steps of answers, in each of which some tokens are revealed.",
    "flow_tokens": "Tokens that were revealed.",
}
"""Name of a flow ensemble's own metric, and its description."""


class FlowMetrics(EnsembleMetrics):
    """The same of a flow ensemble, and how its answers are revealed."""

    def __init__(self, plane: Plane, registry: CollectorRegistry = REGISTRY):
        self._revealed = dict.fromkeys(FLOW, 0)
        super().__init__(plane, registry)

    def round(self, rows: int) -> None:
        """So many rows have been mixed in one call."""
        self._revealed["flow_rounds"] += 1
        self._revealed["flow_rows"] += rows

    def stepped(self, answers: int, tokens: int) -> None:
        """So many answers have ended a step, which has revealed so many tokens."""
        self._revealed["flow_steps"] += answers
        self._revealed["flow_tokens"] += tokens

    def _of_answers(self) -> Iterator[Metric]:
        for name, documentation in FLOW.items():
            yield CounterMetricFamily(f"decar:{name}", documentation, self._revealed[name])
