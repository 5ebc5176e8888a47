"""Beams over engines without a model: each has the weights of an answer of its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams

from decar.router import log_prior, moved_on, restricted
from decar.server.gateway.request import Call, current_call, parse_call
from decar.server.protocol.member import Member

from .fake_engine import FakeServer
from .test_ensemble import assert_nothing_is_left, settle

PRIOR = (3.0, 2.0, 1.0)
OF_PROMPT = np.array([-3.0, -2.5, -3.5])
OF_TOKEN = {5: np.array([-1.0, -0.5, -2.0]), 6: np.array([-0.2, -2.0, -1.0])}


class Search:
    """One prompt's beams, asked for as vLLM does: by one task, all beams of one length at once."""

    def __init__(self, server: FakeServer, call: Call, prompt: Sequence[int], name: str):
        self.server, self.call, self.prompt, self.name = server, call, list(prompt), name
        self.steps: asyncio.Queue[list[tuple[int, ...]]] = asyncio.Queue()
        self.task = copy_context().run(asyncio.ensure_future, self._run())

    async def _run(self) -> None:
        current_call.set(self.call)
        while beams := await self.steps.get():
            outputs = []
            for beam in beams:
                prompt = {"prompt_token_ids": [*self.prompt, *beam]}
                params = SamplingParams(max_tokens=1, logprobs=2, temperature=0, detokenize=False)
                outputs.append(self.server.client.generate(prompt, params, self._id(beam)))
            await asyncio.gather(*(self._collect(output) for output in outputs))

    async def _collect(self, outputs: Any) -> None:
        async for _ in outputs:
            pass

    def _id(self, beam: Sequence[int]) -> str:
        return "-".join([self.name, *map(str, beam)])

    async def step(self, *beams: tuple[int, ...]) -> list[Member | None]:
        """Have these beams' next tokens said; each one's member, or None where one expert answers alone."""
        self.steps.put_nowait(list(beams))
        await settle()
        members = []
        for beam in beams:
            request = f"{self._id(beam)}-0"
            [leader, *_] = [e for e in self.server.engines if f"{request}@{e.expert}" in e.requests]
            member = Member.of(leader.latest(request).params)
            members.append(member)
            if member is None:
                leader.says(request, 7, finished=True, mixed=False)
                continue
            if member.scored is not None:
                said = OF_TOKEN[beam[-1]] if beam else OF_PROMPT
                for k in member.active:
                    self.server.plane.blocks[k].say_of_prompt(member.slot, member.generation, said[k])
            relayed = next(
                r
                for r in self.server.relay.begun
                if r.member is not None
                and r.member.slot == member.slot
                and r.member.generation == member.generation
            )
            relayed.on_tokens(1)
            self.server.engines[member.leader].says(request, 7, finished=True)
        await settle()
        return members

    async def end(self) -> None:
        self.steps.put_nowait([])
        await self.task


def beaming(server: FakeServer, decar: dict[str, Any]) -> Call:
    call = parse_call(server.client.ensemble, "fake", decar)
    call.beams = True
    return call


@pytest.mark.parametrize(
    "decar",
    [
        {"route": "posterior"},
        {"scope": "output"},
        {"top_k": 2},
        {"prune": 0.2},
        {"prune": 0.3, "top_k": 2},
        {"prune": 0.1, "scope": "output"},
    ],
    ids=str,
)
async def test_a_beams_tokens_move_its_weights_on_as_an_answers_do(decar: dict[str, Any]) -> None:
    server = FakeServer(*PRIOR, slots=4)
    search = Search(server, beaming(server, decar), [1, 2, 3], "r")
    of_prompt = np.zeros(3) if "scope" in decar else OF_PROMPT
    first = restricted(
        moved_on(log_prior(PRIOR), of_prompt), decar.get("top_k"), decar.get("prune", 0.0), None
    )
    weighed = {(): first}
    await search.step(())
    for beams in ([(5,), (6,)], [(5, 6), (5, 5)], [(5, 6, 5), (5, 5, 6)]):
        for beam, member in zip(beams, await search.step(*beams), strict=True):
            log_weights, budget = weighed[beam[:-1]]
            active = [k for k in range(3) if np.isfinite(log_weights[k])]
            if len(active) == 1:
                assert member is None
            else:
                assert member is not None
                assert np.exp(member.log_weights) == pytest.approx(np.exp(log_weights))
                assert member.prune == pytest.approx(budget)
                assert list(member.active) == active
                assert member.scored == [(2 + len(beam), 0.0)] * 3, "its last token alone"
            weighed[beam] = restricted(moved_on(log_weights, OF_TOKEN[beam[-1]]), None, budget, None)
    await search.end()
    assert_nothing_is_left(server)


async def test_each_prompt_of_a_request_has_beams_of_its_own() -> None:
    """Also where one of them goes on as another one's beam does."""
    server = FakeServer(*PRIOR, slots=4)
    call = beaming(server, {"scope": "output"})
    short, long = Search(server, call, [1, 2], "s"), Search(server, call, [1, 2, 5], "l")
    for search in (short, long):
        [member] = await search.step(())
        assert member is not None
        assert member.scored is None
    [of_short], [of_long] = await short.step((5,)), await long.step((6,))
    assert of_short is not None
    assert of_long is not None
    assert (of_short.scored, of_long.scored) == ([(2, 0.0)] * 3, [(3, 0.0)] * 3)
    for search in (short, long):
        await search.end()
    assert_nothing_is_left(server)


async def test_weights_that_do_not_move_are_the_prompts() -> None:
    server = FakeServer(*PRIOR, slots=4)
    call = beaming(server, {"route": "prior", "top_k": 2})
    call.router = "classifier"
    asked = []

    class Routers:
        async def log_weights(self, prompt: Any, kind: str) -> np.ndarray:
            asked.append(prompt["prompt_token_ids"])
            return log_prior([1.0, 2.0, 4.0])

    server.client.trained_routers = Routers()  # type: ignore[assignment]
    search = Search(server, call, [1, 2, 3], "r")
    for beams in ([()], [(5,), (6,)], [(5, 6), (5, 5)]):
        for member in await search.step(*beams):
            assert member is not None
            assert member.scored is None
            assert np.exp(member.log_weights) == pytest.approx([0, 1 / 3, 2 / 3])
    assert asked == [[1, 2, 3]], "a router looks at what the user asks, once"
    await search.end()


async def test_a_beam_goes_on_without_an_expert_that_dies() -> None:
    server = FakeServer(*PRIOR, slots=4)
    server.client.health.watch()
    search = Search(server, beaming(server, {"scope": "output"}), [1, 2, 3], "r")
    await search.step(())
    await search.step((5,))
    server.engines[0].die()
    await settle()
    [member] = await search.step((5, 6))
    assert member is not None
    assert np.exp(member.log_weights) == pytest.approx([0, 2 / 3, 1 / 3])
    assert member.scored == [(3, 0.0)] * 3, "all of its tokens are scored by those that live"
    assert search.call.summary()["degraded"] == ["a"]
    await search.end()
    assert_nothing_is_left(server)
