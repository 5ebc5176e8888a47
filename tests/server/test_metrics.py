"""The `decar:*` metrics: what Prometheus reads is what was counted and observed."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from decar.server.metrics import EnsembleMetrics
from decar.server.protocol.plane import Plane


@pytest.fixture
def plane() -> Iterator[Plane]:
    plane = Plane.create(experts=2, slots=1, vocab_size=8, positions=4)
    yield plane
    plane.unlink()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(plane: Plane, registry: CollectorRegistry) -> EnsembleMetrics:
    return EnsembleMetrics(plane, registry)


def test_engines_counters_are_labelled_by_expert(
    plane: Plane, metrics: EnsembleMetrics, registry: CollectorRegistry
) -> None:
    code, prose = plane.blocks
    code.count("mixed_tokens", 7)
    code.count("leader_holds", 2)
    code.count("follower_holds", 3)
    prose.count("pruned")
    prose.count("handed_over", 4)
    prose.count("mix_ns", 2_500_000_000)
    experts = [
        SimpleNamespace(name="code", up=True, seated=True),
        SimpleNamespace(name="prose", up=False, seated=True),
    ]
    metrics.watch(experts, SimpleNamespace(waiting=3, rejected=5), "demo")
    metrics.failed_over(1)
    metrics.failed_over(1)
    metrics.restarted(0)

    def by_expert(name: str) -> list[float | None]:
        return [registry.get_sample_value(name, {"expert": expert}) for expert in ("code", "prose")]

    assert by_expert("decar:mixed_tokens_total") == [7, 0]
    assert by_expert("decar:holds_total") == [5, 0]
    assert by_expert("decar:pruned_total") == [0, 1]
    assert by_expert("decar:handed_over_total") == [0, 4]
    assert by_expert("decar:mixing_seconds_total") == [0, 2.5]
    assert by_expert("decar:expert_up") == [1, 0]
    assert by_expert("decar:failovers_total") == [0, 2]
    assert by_expert("decar:restarts_total") == [1, 0]
    assert registry.get_sample_value("decar:queued") == 3
    assert registry.get_sample_value("decar:rejected_total") == 5


def test_an_info_metric_says_whose_engine_each_is(
    metrics: EnsembleMetrics, registry: CollectorRegistry
) -> None:
    """The label `engine` of vLLM's metrics is the place, which after a reload need not be the manifest's."""
    experts = [
        SimpleNamespace(name="", up=False, seated=False),
        SimpleNamespace(name="prose", up=True, seated=True),
        SimpleNamespace(name="code", up=False, seated=True),
    ]
    metrics.watch(experts, None, "demo")
    [family] = [family for family in registry.collect() if family.name == "decar:engine"]
    assert [(sample.name, sample.labels, sample.value) for sample in family.samples] == [
        ("decar:engine_info", {"engine": "1", "expert": "prose", "model": "demo/prose"}, 1),
        ("decar:engine_info", {"engine": "2", "expert": "code", "model": "demo/code"}, 1),
    ]


def test_what_is_asked_is_counted_by_model_id(metrics: EnsembleMetrics, registry: CollectorRegistry) -> None:
    metrics.asked("demo", requests=1, prompt_tokens=7)
    metrics.asked("demo/code", requests=1, prompt_tokens=2)
    metrics.asked("demo", generated=3)
    metrics.asked("demo", requests=1, prompt_tokens=1)
    metrics.asked(None, requests=1, prompt_tokens=9, generated=9)  # a warm-up

    def of(model: str) -> list[float | None]:
        names = ("requests", "prompt_tokens", "generated_tokens")
        return [registry.get_sample_value(f"decar:{name}_total", {"model": model}) for name in names]

    assert of("demo") == [2, 8, 3]
    assert of("demo/code") == [1, 2, 0]
    [family] = [family for family in registry.collect() if family.name == "decar:requests"]
    assert {sample.labels["model"] for sample in family.samples} == {"demo", "demo/code"}


def test_weights_become_histograms_per_token(metrics: EnsembleMetrics, registry: CollectorRegistry) -> None:
    metrics.observe(np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]))
    metrics.observe(np.zeros((0, 2)))  # a request that ended before its first token
    metrics.observe_alone(5)
    value = registry.get_sample_value
    assert value("decar:active_experts_count") == 8
    assert value("decar:active_experts_sum") == 2 + 2 + 1 + 5
    assert value("decar:active_experts_bucket", {"le": "1.0"}) == 6
    assert value("decar:active_experts_bucket", {"le": "2.0"}) == 8
    assert value("decar:weights_entropy_nats_count") == 8
    entropy = math.log(2) - 0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert value("decar:weights_entropy_nats_sum") == pytest.approx(entropy)
    assert value("decar:weights_entropy_nats_bucket", {"le": "0.001"}) == 6  # one expert alone
    assert value("decar:weights_entropy_nats_bucket", {"le": "0.6"}) == 7
    assert value("decar:weights_entropy_nats_bucket", {"le": "0.7"}) == 8  # ln 2 = 0.693
    assert value("decar:weights_entropy_nats_bucket", {"le": "+Inf"}) == 8


def test_prometheus_can_read_them(metrics: EnsembleMetrics, registry: CollectorRegistry) -> None:
    text = generate_latest(registry).decode()
    assert "# TYPE decar:active_experts histogram" in text
    assert "# TYPE decar:holds_total counter" in text
