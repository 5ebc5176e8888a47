"""Experts on hosts that share no memory: the same answers, and the same end.

`make soak` asks of two hosts what is asked of one (DECAR_HOSTS in tests/helpers.py).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.e2e.conftest import LOADED, leaving_nothing, running
from tests.e2e.test_active import (
    PENALTIES,
    check_pruned,
    check_seeded,
    check_what_depends_on_the_answer_so_far,
    clear,
)
from tests.e2e.test_exact import RULES, check, check_alone, clear_answers, complete_all, routed
from tests.e2e.test_loss import pid_of, wait_until_another
from tests.e2e.test_ranks import answers_under_way, check_whole
from tests.helpers import EXACT, Server, in_batches
from tests.reference import Reference, Rule, logits_of, prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

SOME = 8


@pytest.fixture(scope="module")
def server(trio: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """K=3, each on a host of its own; the gateway is on the first one's."""
    flags = (*LOADED, "--simulated-hosts", "3")
    with leaving_nothing(trio, tmp_path_factory.mktemp("logs") / "hosts.log", flags) as server:
        yield server


def mirrors_of(server: Server) -> list[psutil.Process]:
    engines = {expert["pid"] for expert in server.ensemble()["experts"]}
    children = psutil.Process(server.process.pid).children()
    return [
        child
        for child in children
        if child.pid not in engines
        and not re.search("resource_tracker|forkserver", " ".join(child.cmdline()))
    ]


@pytest.mark.parametrize("rule", RULES)
async def test_answers_are_the_mixtures(server: Server, trio: Reference, rule: Rule) -> None:
    await check(server, trio, routed("posterior"), rule, SOME)


async def test_also_where_experts_leave_and_hand_over(server: Server, trio: Reference) -> None:
    await check_pruned(server, trio, clear(trio, 0.1), 0.1)
    await check_what_depends_on_the_answer_so_far(server, trio, clear(trio, 0.1, **PENALTIES))
    await check_seeded(server, trio, [one.prompt for one in clear(trio, 0.1)])


async def test_an_expert_alone(server: Server, trio: Reference) -> None:
    for name in trio.experts:
        await check_alone(server, trio.alone(name), SOME)


async def test_mirrors_that_are_killed_are_back_and_nothing_is_lost(server: Server, trio: Reference) -> None:
    expected = clear_answers(trio, {}, SOME)
    for mirror in mirrors_of(server):
        async with answers_under_way(server, trio, [one.prompt for one in expected]) as under_way:
            os.kill(mirror.pid, signal.SIGKILL)
        for answer, summary in await under_way:
            assert len(answer.tokens) == 200
            assert summary["degraded"] == []
    assert len(mirrors_of(server)) == 3
    await check(server, trio, routed("posterior"), "velocity", SOME)


@pytest.mark.parametrize(
    "which", [pytest.param(0, marks=pytest.mark.soak), 1, pytest.param(2, marks=pytest.mark.soak)]
)
async def test_an_engine_that_is_killed_is_back(server: Server, trio: Reference, which: int) -> None:
    await check_killed(server, trio, trio.experts[which])


async def check_killed(server: Server, reference: Reference, lost: str) -> None:
    """Nothing is lost but one expert's share, and that for a while."""
    before = pid_of(server, lost)
    prompts = [one.prompt for one in clear_answers(reference, {}, SOME)]
    async with answers_under_way(server, reference, prompts) as under_way:
        os.kill(before, signal.SIGKILL)
    await check_whole(under_way, [lost])
    await asyncio.to_thread(wait_until_another, server, lost, before)
    await check(server, reference, routed("posterior"), "velocity", SOME)


# --- rows that go in part ---------------------------------------------------------------------------------


@pytest.mark.soak  # one more start
async def test_a_mixture_of_rows_in_part_is_no_further_off_than_it_says(
    trio: Reference, tmp_path: Path
) -> None:
    """Every token's whole distribution, of 200 prompts' first tokens and, where weights are given, of later ones."""
    prompts = [trio.encode(text) for text in prompt_texts(200)]
    wire_rows, size = 32, trio.vocab_size
    flags = (*EXACT, "--simulated-hosts", "3", "--wire-rows", str(wire_rows), "--max-logprobs", str(size))
    weights = {"maths": 0.2, "code": 0.5, "prose": 0.3}
    with running(trio, tmp_path / "wire.log", flags) as server:
        off, bounds = [], []
        for some in in_batches(prompts, 25):
            answers = await complete_all(
                server, trio.name, some, {"weights": weights}, max_tokens=2, logprobs=size
            )
            for prompt, (answer, summary) in zip(some, answers, strict=True):
                apart = [
                    total_variation(trio, list(weights.values()), [*prompt, *answer.tokens[:i]], top)
                    for i, top in enumerate(answer.top)
                ]
                wire = summary["wire"]
                assert wire["rows"] == wire_rows
                assert max(apart) <= wire["token"] + 1e-5
                assert sum(apart) <= wire["answer"] + 1e-5
                off.append(max(apart))
                bounds.append(wire["token"])
        print(f"\ntotal variation {max(off):.3f} at most, {max(bounds):.3f} said; mean {np.mean(off):.3f}")
        assert max(off) > 1e-3, "rows went in part"
        for case in ({"rule": "logit", "weights": weights}, {"weights": {"code": 1.0}}):
            [(_, summary)] = await complete_all(server, trio.name, prompts[:1], case)
            assert summary["wire"] == {"rows": wire_rows, "token": 0.0, "answer": 0.0}
        async with server.async_openai() as client:
            said = [
                chunk.model_extra["decar"]["wire"]
                async for chunk in await client.completions.create(
                    model=trio.name, prompt=prompts[0], max_tokens=9, stream=True, temperature=0
                )
                if "decar" in chunk.model_extra
            ]
        assert len(said) == 2, "at the beginning and at the end"
        assert said[-1]["answer"] > said[-1]["token"] > 0


def total_variation(
    reference: Reference, weights: list[float], text: list[int], said: dict[int, float]
) -> float:
    """Between a token's distribution, as its log-probabilities ``said`` say it, and the mixture of all experts."""
    rows = [logits_of(model, [text], reference.vocab_size)[0, -1].softmax(-1) for model in reference.models]
    mixture = sum(weight * row for weight, row in zip(weights, rows, strict=True))
    served = np.zeros(reference.vocab_size)
    served[list(said)] = np.exp(list(said.values()))
    return float(0.5 * np.abs(served - np.asarray(mixture)).sum())
