"""Requests that are ended by their ids, wherever they are on their way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind

from .fake_engine import FakeServer
from .test_ensemble import EQUAL, A, Asked, B, assert_nothing_is_left, settle


async def aborted(server: FakeServer, *asked: Asked, ids: Any) -> list[list[tuple[int, str | None]]]:
    """Index and finish reason of what each request has ended with."""
    await server.client.abort(ids)
    await asyncio.wait_for(asyncio.gather(*(one.task for one in asked)), 5)
    assert_nothing_is_left(server)
    for engine in server.engines:
        assert not engine.running
    return [
        [
            (choice.index, choice.finish_reason)
            for output in one.outputs
            for choice in output.outputs
            if choice.finish_reason
        ]
        for one in asked
    ]


@pytest.mark.parametrize("model", ["fake", "fake/a"])
@pytest.mark.parametrize("decar", [EQUAL, {"route": "prior", "top_k": 1}, {"route": "posterior"}], ids=str)
async def test_what_engines_have_ends_with_what_it_has_said(model: str, decar: Any) -> None:
    server = FakeServer(0.6, 0.4)
    asked = Asked(server, "chatcmpl-r", decar if model == "fake" else None, model)
    await settle()
    alone = model == "fake/a" or "top_k" in decar
    name = "chatcmpl-r" if model == "fake/a" else "chatcmpl-r-0"
    server.engines[A].says(name, 5, mixed=not alone)
    await settle()
    assert await aborted(server, asked, ids=["chatcmpl-r"]) == [[(0, "abort")]]
    assert asked.tokens == [5]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
async def test_every_choice_ends_also_those_that_wait_for_a_slot(kind: RequestOutputKind) -> None:
    server = FakeServer(0.5, 0.5, slots=2)
    asked = Asked(server, "r", EQUAL, n=4, output_kind=kind)
    await settle()
    assert len(server.engines[A].running) == 2
    [ended] = await aborted(server, asked, ids="r")
    assert sorted(ended) == [(index, "abort") for index in range(4)]


async def test_all_prompts_of_a_request_end_and_nobody_elses() -> None:
    server = FakeServer(0.5, 0.5, slots=4)
    first, second, other = (Asked(server, name, EQUAL) for name in ("cmpl-r-0", "cmpl-r-1", "cmpl-rr-0"))
    await settle()
    await server.client.abort(["cmpl-r", "cmpl", "cmpl-r-2", "", "nobody's", 3, None, ["cmpl-rr"]])
    await asyncio.gather(first.task, second.task)
    assert not other.task.done()
    assert await aborted(server, other, ids=("cmpl-rr-0",)) == [[(0, "abort")]]


async def test_who_waits_for_another_to_score_the_same_prompt_is_woken() -> None:
    server = FakeServer(0.5, 0.5)
    first, second = (Asked(server, name, {"route": "posterior"}) for name in ("first", "second"))
    await settle()
    assert len(server.engines[A].running) == 1
    await server.client.abort("second")
    await second.task
    assert await aborted(server, first, ids="first") == [[(0, "abort")]]


async def test_prompt_log_probabilities_are_not_waited_for() -> None:
    server = FakeServer(0.5, 0.5)
    asked = Asked(server, "r", EQUAL, prompt_logprobs=1, logprobs=1, n=2)
    await settle()
    await server.client.abort("r")
    await asked.task
    [output] = asked.outputs
    assert [(choice.index, choice.finish_reason, choice.logprobs) for choice in output.outputs] == [
        (0, "abort", []),
        (1, "abort", []),
    ]


async def test_what_is_being_given_to_engines_ends_when_they_have_it() -> None:
    server = FakeServer(0.5, 0.5)
    server.engines[B].busy.clear()
    asked = Asked(server, "r", EQUAL)
    await settle()
    await server.client.abort("r")
    await settle()
    server.engines[B].busy.set()
    assert await aborted(server, asked, ids="r") == [[(0, "abort")]]


async def test_whoever_is_cancelled_is_not_aborted() -> None:
    server = FakeServer(0.5, 0.5, slots=1)
    first, waits = (Asked(server, name, EQUAL) for name in ("first", "waits"))
    await settle()
    waits.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits.task
    both = Asked(server, "both", EQUAL)
    await settle()
    both.task.cancel()
    await server.client.abort("both")
    with pytest.raises(asyncio.CancelledError):
        await both.task
    assert await aborted(server, first, ids="first") == [[(0, "abort")]]
