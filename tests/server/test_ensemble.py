"""The path of a request through the gateway, over engines without a model: what it leaves behind, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from decar.server.gateway.engine import ExpertDown
from decar.server.gateway.request import Call, current_call
from decar.server.protocol.member import Member, spoken_tokens

from .fake_engine import EngineDied, FakeEngine, FakeServer

A, B, C = 0, 1, 2
PROMPT = {"prompt_token_ids": [1, 2, 3]}


class Asked:
    """One request on its way; its outputs are read by a task, as vLLM's app does."""

    def __init__(self, server: FakeServer, name: str, decar: Any = None, model: str = "fake", **params: Any):
        self.call: Call = server.client.call_of(model, decar)
        self.outputs: list[RequestOutput] = []
        params = {"max_tokens": 4, "output_kind": RequestOutputKind.DELTA, **params}

        async def read() -> None:
            current_call.set(self.call)
            stream = server.client.generate(PROMPT, SamplingParams(**params), name)
            try:
                async for output in stream:
                    self.outputs.append(output)
            finally:
                await stream.aclose()

        self.task = copy_context().run(asyncio.ensure_future, read())

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.outputs[0].token_ids]


async def settle() -> None:
    """Let everybody do what there is to do."""
    for _ in range(20):
        await asyncio.sleep(0)


def assert_nothing_is_left(server: FakeServer) -> None:
    assert server.client.slots.in_use == 0
    assert server.client.leaders.counts() == [0] * len(server.engines)
    assert not server.client.health._heard
    assert not server.client.thread._urgent
    assert not server.client._scorer._under_way


EQUAL = {"weights": {"a": 1, "b": 1}}


async def test_all_experts_are_given_the_request_and_the_leader_answers() -> None:
    server = FakeServer(0.3, 0.7)
    asked = Asked(server, "r", {"route": "prior", "trace": True}, temperature=0.5, seed=3)
    await settle()
    a, b = (engine.requests[f"r-0@{k}"] for k, engine in enumerate(server.engines))
    assert a.member == b.member
    assert (a.member.leader, a.member.active, a.member.prune) == (B, (A, B), 0.0)
    assert (b.params.temperature, b.params.seed) == (0.5, 3)
    assert (a.params.temperature, a.params.output_kind) == (0.0, RequestOutputKind.FINAL_ONLY)
    assert a.arrival_time == b.arrival_time is not None
    assert server.client.slots.in_use == 1
    assert server.client.leaders.counts() == [0, 1]
    server.engines[B].says("r-0", 5)
    server.engines[B].says("r-0", 6, start=1, finished=True)
    await asked.task
    assert asked.tokens == [5, 6]
    assert [output.request_id for output in asked.outputs] == ["r", "r"]
    trace = asked.call.choices[0]
    assert trace.leaders == ["b", "b"]
    assert trace.weights == [pytest.approx([0.3, 0.7])] * 2
    assert server.engines[A].cancelled == ["r-0@0"]
    assert server.engines[B].cancelled == [], "it has ended the request itself"
    assert_nothing_is_left(server)


async def test_equal_experts_share_a_leader_and_times_of_arrival_differ() -> None:
    server = FakeServer(1, 1)
    requests = [Asked(server, name, EQUAL) for name in "rs"]
    await settle()
    r, s = (server.engines[A].requests[f"{name}-0@0"] for name in "rs")
    assert r.member.leader == s.member.leader == A
    assert r.arrival_time is not None
    assert s.arrival_time is not None
    assert r.arrival_time < s.arrival_time
    for asked in requests:
        asked.task.cancel()
    await settle()
    assert_nothing_is_left(server)


Break = Callable[[FakeServer, Asked], None]


def leaves(server: FakeServer, asked: Asked) -> None:
    asked.task.cancel()


def dies(expert: int) -> Break:
    return lambda server, asked: server.engines[expert].die()


def refuses(expert: int) -> Break:
    def let(server: FakeServer, asked: Asked) -> None:
        server.engines[expert].refuses = VLLMValidationError("no", parameter="prompt")
        server.engines[expert].busy.set()

    return let


def answers(server: FakeServer, asked: Asked) -> None:
    server.engines[A].says("r-0", 5)


@pytest.mark.parametrize("decar", [EQUAL, {"route": "posterior"}, {"prune": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("busy", "before", "breaks", "error"),
    [
        (B, None, leaves, asyncio.CancelledError),  # while the follower is told
        (A, None, leaves, asyncio.CancelledError),  # while the leader is
        (B, None, refuses(B), VLLMValidationError),
        (A, None, refuses(A), VLLMValidationError),
        (None, None, leaves, asyncio.CancelledError),  # before the first token
        (None, answers, leaves, asyncio.CancelledError),  # in the middle
    ],
    ids=[
        *("leaves-at-follower", "leaves-at-leader", "follower-refuses", "leader-refuses"),
        *("leaves-waiting", "leaves-midway"),
    ],
)
async def test_a_slot_comes_back_whatever_happens(
    busy: int | None, before: Break | None, breaks: Break, error: type[BaseException], decar: dict[str, Any]
) -> None:
    server = FakeServer(1, 1, slots=1)
    server.client.health.watch()
    if busy is not None:
        server.engines[busy].busy.clear()
    asked = Asked(server, "r", decar)
    await settle()
    assert server.client.slots.in_use == 1
    if before is not None:
        before(server, asked)
        await settle()
        assert asked.tokens == [5]
    breaks(server, asked)
    with pytest.raises(error):
        await asked.task
    await settle()
    assert_nothing_is_left(server)
    for engine in server.engines:
        assert engine.errored or not engine.running, "it was told to end what it was given"


async def test_whoever_waits_for_a_slot_may_leave_and_the_next_gets_it() -> None:
    server = FakeServer(1, 1, slots=1)
    first, second, third = (Asked(server, name, EQUAL) for name in "rst")
    await settle()
    second.task.cancel()
    await settle()
    assert set(server.engines[A].requests) == {"r-0@0"}
    server.engines[A].says("r-0", 5, finished=True)
    await first.task
    await settle()
    assert set(server.engines[A].requests) == {"r-0@0", "t-0@0"}
    assert server.engines[A].requests["t-0@0"].member.generation == 2
    server.engines[A].says("t-0", 5, finished=True)
    await third.task
    assert_nothing_is_left(server)


@pytest.mark.parametrize("dead", [A, B], ids=["leader", "follower"])
@pytest.mark.parametrize("said", [(), (5,), (5, 6)], ids=len)
@pytest.mark.parametrize("decar", [{"weights": {"a": 3, "b": 2, "c": 1}}, {"route": "posterior"}], ids=str)
async def test_the_others_go_on_where_an_answer_was_broken_off(
    said: tuple[int, ...], dead: int, decar: dict[str, Any]
) -> None:
    server = FakeServer(3, 2, 1, slots=1)
    server.client.health.watch()
    asked = Asked(server, "r", {**decar, "trace": True})
    await settle()
    first = server.engines[A].latest("r-0")
    if said:
        server.engines[A].says("r-0", *said)
        server.relay.begun[-1].on_tokens(len(said))
    await settle()
    server.engines[dead].die()
    await settle()
    assert asked.tokens == [*said]
    [leader, other] = [k for k in (A, B, C) if k != dead]
    given = server.engines[leader].latest("r-0")
    assert given.member.active == (leader, other)
    assert given.member.generation > first.member.generation
    assert given.member.slot == first.member.slot
    prior = np.array([3.0, 2.0, 1.0])
    prior[dead] = 0
    assert np.exp(given.member.log_weights) == pytest.approx(prior / prior.sum())
    assert spoken_tokens(given.params) == spoken_tokens(server.engines[other].latest("r-0").params) == [*said]
    assert given.params.max_tokens == first.params.max_tokens
    if decar == {"route": "posterior"}:
        assert given.member.scored is not None, "what was said is evidence too"
    assert server.engines[other].cancelled == [f"r-0@{other}"], "the old attempt is over"
    server.engines[leader].says("r-0", 7, start=len(said), finished=True)
    await asked.task
    assert asked.tokens == [*said, 7]
    assert len(asked.call.choices[0].weights) == len(said) + 1
    assert asked.call.choices[0].leaders[-1] == "abc"[leader]
    assert asked.call.summary()["degraded"] == ["abc"[dead]]
    assert_nothing_is_left(server)


async def test_two_engines_die_and_the_last_one_answers_alone() -> None:
    server = FakeServer(3, 2, 1, slots=1)
    server.client.health.watch()
    asked = Asked(server, "r", {"route": "prior", "trace": True})
    await settle()
    server.engines[A].says("r-0", 5)
    await settle()
    server.engines[A].die()
    await settle()
    server.engines[B].says("r-0", 6, start=1)
    await settle()
    server.engines[B].die()
    await settle()
    given = server.engines[C].latest("r-0")
    assert Member.of(given.params) is None
    assert spoken_tokens(given.params) == [5, 6]
    server.engines[C].says("r-0", 7, finished=True, mixed=False)
    await asked.task
    assert asked.tokens == [5, 6, 7]
    assert asked.call.choices[0].leaders == ["a", "b", "c"]
    assert asked.call.summary()["degraded"] == ["a", "b"]
    assert_nothing_is_left(server)


async def test_what_was_not_read_yet_is_read_before_the_others_go_on() -> None:
    server = FakeServer(3, 2, slots=1)
    server.client.health.watch()
    asked = Asked(server, "r", {"route": "prior"})
    await settle()
    server.engines[A].says("r-0", 5)
    server.engines[A].die()  # before anybody has had time to read
    await settle()
    assert asked.tokens == [5]
    server.engines[B].says("r-0", 6, finished=True, mixed=False)
    await asked.task
    assert asked.tokens == [5, 6]
    assert_nothing_is_left(server)


async def test_an_answer_that_wants_nobody_missing_ends() -> None:
    server = FakeServer(3, 2, slots=1)
    server.client.health.watch()
    asked = Asked(server, "r", {"route": "prior", "on_expert_loss": "fail"})
    await settle()
    server.engines[B].die()
    with pytest.raises(ExpertDown, match="'b'"):
        await asked.task
    assert_nothing_is_left(server)
    again = Asked(server, "again", {"route": "prior", "on_expert_loss": "fail"})
    with pytest.raises(ExpertDown, match="'b'"):
        await again.task


async def test_a_dead_engine_concerns_exactly_its_requests() -> None:
    server = FakeServer(1, 1, 1, slots=4)
    server.client.health.watch()
    without = Asked(server, "without", {"weights": {"b": 2, "c": 1}})
    alone, named = Asked(server, "alone", model="fake/c"), Asked(server, "named", model="fake/a")
    weighed = Asked(server, "weighed", {"weights": {"a": 1}})
    await settle()
    server.engines[A].die()
    for queue in [given.queue for given in server.engines[A].requests.values()]:
        queue.put(EngineDied())  # as vLLM tells those that it knows of
    for asked in (named, weighed):
        with pytest.raises(ExpertDown, match="'a'"):
            await asked.task
    server.engines[B].says("without-0", 5, finished=True)
    server.engines[C].says("alone", 6, finished=True, mixed=False)
    await asyncio.gather(without.task, alone.task)
    assert (without.tokens, alone.tokens) == ([5], [6])
    await server.client.check_health()
    assert not server.client.errored, "the others go on serving"
    after = Asked(server, "after", {"weights": {"a": 5, "b": 2, "c": 1}})
    await settle()
    server.engines[B].says("after-0", 7, finished=True)
    await after.task
    assert after.tokens == [7]
    assert after.call.summary()["degraded"] == ["a"]
    assert_nothing_is_left(server)


async def test_a_new_engine_is_warmed_before_requests_are_given_to_it() -> None:
    server = FakeServer(2, 1, slots=4)
    client = server.client
    client.health.watch()
    server.engines[A].die()
    await settle()
    server.engines[A] = FakeEngine(A, server.plane)
    client.give_engine(A, server.engines[A])
    meanwhile = Asked(server, "meanwhile", {"route": "prior"})
    warming = Asked(server, "warming", {"route": "prior"})
    await settle()
    assert not server.engines[A].requests
    for asked in (meanwhile, warming):
        asked.task.cancel()
    client.rejoin(A)
    after = Asked(server, "after", {"route": "prior"})
    await settle()
    assert server.engines[A].latest("after-0").member.leader == A
    after.task.cancel()
    await settle()
    assert_nothing_is_left(server)


async def test_several_choices_are_one_answer() -> None:
    server = FakeServer(1, 1)
    asked = Asked(server, "r", EQUAL, n=2, temperature=1.0, seed=7)
    await settle()
    given = server.engines[A].requests
    assert [given[f"r-{i}@0"].params.seed for i in range(2)] == [7, 8]
    server.engines[A].says("r-1", 6, finished=True)
    await settle()
    assert not asked.outputs[0].finished
    server.engines[A].says("r-0", 5, finished=True)
    await asked.task
    assert [(output.outputs[0].index, output.finished) for output in asked.outputs] == [(1, False), (0, True)]
    assert_nothing_is_left(server)


async def test_one_choice_that_fails_ends_the_others() -> None:
    server = FakeServer(1, 1)
    server.engines[B].busy.clear()
    asked = Asked(server, "r", EQUAL, n=2, temperature=1.0)
    await settle()
    refuses(B)(server, asked)
    with pytest.raises(VLLMValidationError):
        await asked.task
    await settle()
    assert_nothing_is_left(server)


async def test_what_is_refused_reaches_no_engine() -> None:
    server = FakeServer(1, 1)
    for prompt in ([1, 8], [-1]):
        with pytest.raises(VLLMValidationError) as error:
            server.client.generate({"prompt_token_ids": prompt}, SamplingParams(), "r")
        assert error.value.parameter == "prompt"
    assert not any(engine.requests for engine in server.engines)
    assert_nothing_is_left(server)


async def test_a_prompt_that_nobody_has_scored_is_scored_once_and_known_to_the_next() -> None:
    server = FakeServer(1, 1)
    first, second = (Asked(server, name, {"route": "posterior"}) for name in "rs")
    await settle()
    [(request_id, given)] = server.engines[A].requests.items()
    assert given.member.scored == [(1, 0.0), (1, 0.0)]
    assert (A, request_id) in server.relay.followed, "the first token of the leader is news"
    for block, said in zip(server.plane.blocks, (-3.0, -1.0), strict=True):
        block.say_of_prompt(given.member.slot, given.member.generation, said)
    [relayed] = server.relay.begun
    relayed.on_tokens(1)
    await settle()
    other = server.engines[B].requests["s-0@1"].member
    assert other.scored is None
    assert other.leader == B, "the prompt says so"
    for asked in (first, second):
        asked.task.cancel()
    await settle()
    assert_nothing_is_left(server)


async def test_what_an_expert_on_another_host_says_of_a_prompt_may_come_late() -> None:
    """Until then, what lies in its place is an earlier request's."""
    server = FakeServer(1, 1)
    first, second = (Asked(server, name, {"route": "posterior"}) for name in "rs")
    await settle()
    [(_, given)] = server.engines[A].requests.items()
    here, there = server.plane.blocks
    there.say_of_prompt(given.member.slot, given.member.generation - 1, 100.0)
    here.say_of_prompt(given.member.slot, given.member.generation, -1.0)
    [relayed] = server.relay.begun
    assert relayed.on_tokens(1) == 2, "it is looked again with the next token"
    await settle()
    assert "s-0@1" not in server.engines[B].requests
    there.say_of_prompt(given.member.slot, given.member.generation, -3.0)
    relayed.on_tokens(2)
    await settle()
    assert server.engines[A].requests["s-0@0"].member.leader == A, "the prompt says so"
    for asked in (first, second):
        asked.task.cancel()
    await settle()
    assert_nothing_is_left(server)
