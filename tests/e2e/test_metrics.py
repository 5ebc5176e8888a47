"""`/metrics` on a running ensemble: what it says of the weights is what the answers' traces say."""

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.test_exact import complete_all
from tests.helpers import Server, wait_until
from tests.queries import alerts, dashboard_queries, names_in
from tests.reference import Reference, prompt_texts

pytestmark = pytest.mark.engines

TOKENS = 24


async def test_metrics_of_the_weights_are_those_of_the_traces(duo_server: Server, duo: Reference) -> None:
    def values() -> dict[str, float]:
        names = [
            f"decar:{histogram}_{part}"
            for histogram in ("active_experts", "weights_entropy_nats")
            for part in ("count", "sum")
        ]
        return {name: sum(duo_server.metric(name)) for name in names}

    wait_until(duo_server.is_idle, 30, "nothing of other tests is counted below")
    before = values()
    weights = []
    prompts = [duo.encode(text) for text in prompt_texts(8)]
    for decar in ({"prune": 0.1}, {"weights": {"prose": 1}}, {"route": "prior"}):
        found = await complete_all(duo_server, duo.name, prompts, {**decar, "trace": True}, max_tokens=TOKENS)
        weights += [row for answer, _ in found for row in answer.weights]
    after = values()
    said = {name: after[name] - before[name] for name in before}
    assert said["decar:active_experts_count"] == said["decar:weights_entropy_nats_count"] == len(weights)
    assert said["decar:active_experts_sum"] == sum(w > 0 for row in weights for w in row)
    entropy = -sum(w * math.log(w) for row in weights for w in row if w)
    assert said["decar:weights_entropy_nats_sum"] == pytest.approx(entropy)


def test_counters_are_those_of_the_ensemble_and_vllms_are_still_there(duo_server: Server) -> None:
    wait_until(duo_server.is_idle, 30, "nothing counts on")
    lockstep = [expert["lockstep"] for expert in duo_server.ensemble()["experts"]]
    for name in ("mixed_tokens", "pruned", "handed_over"):
        assert duo_server.metric(f"decar:{name}_total") == [counters[name] for counters in lockstep]
    assert duo_server.metric("decar:expert_up") == [1, 1]
    assert len(duo_server.metric("vllm:generation_tokens_total")) == 2


def test_dashboard_and_alerts_ask_for_what_there_is(duo_server: Server) -> None:
    asked = {
        name
        for query in [*dashboard_queries(), *(alert["expr"] for alert in alerts())]
        for name in names_in(query)
    }
    answered = {
        sample.name
        for family in text_string_to_metric_families(duo_server.http.get("/metrics").text)
        for sample in family.samples
    }
    assert len(asked) >= 30
    assert not asked - answered


async def test_statistics_that_travel_now_and_then_lose_nothing(duo_server: Server, duo: Reference) -> None:
    wait_until(duo_server.is_idle, 30, "nothing of other tests is counted below")
    before = duo_server.metric("vllm:prefix_cache_queries_total")
    prompts = [duo.encode(text) for text in prompt_texts(8)]
    await complete_all(
        duo_server, duo.name, prompts, {"weights": dict.fromkeys(duo.experts, 0.5)}, max_tokens=TOKENS
    )
    wait_until(duo_server.is_idle, 30, "the last step tells what is left")
    after = duo_server.metric("vllm:prefix_cache_queries_total")
    asked = sum(map(len, prompts))  # each engine looks for each prompt once
    assert [new - old for new, old in zip(after, before, strict=True)] == [asked, asked]
