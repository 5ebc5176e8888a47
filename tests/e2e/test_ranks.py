"""An expert whose weights two processes hold together, beside one of one process: the same answers, and the same end.

`make soak` asks of experts that all have two what is asked of those that have one (DECAR_RANKS in tests/helpers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import LOADED, leaving_nothing
from tests.e2e.test_active import (
    PENALTIES,
    check_pruned,
    check_seeded,
    check_what_depends_on_the_answer_so_far,
    clear,
)
from tests.e2e.test_exact import RULES, check, check_alone, clear_answers, complete_all, routed
from tests.e2e.test_loss import pid_of, wait_until_another
from tests.helpers import SHARED_MEMORY, Answer, Server, wait_until
from tests.reference import Reference, Rule
from tests.router.test_manifest import edit_json

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

SOME = 8


@pytest.fixture(scope="module")
def mixed(duo: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The duo, of which one expert has two ranks."""
    directory = tmp_path_factory.mktemp("ranks") / duo.name
    shutil.copytree(duo.directory, directory)
    options = {"tensor_parallel_size": 2}
    edit_json(directory / "ensemble.json", lambda manifest: manifest["experts"][0].update(options=options))
    return replace(duo, directory=directory)


@pytest.fixture(scope="module")
def server(mixed: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with leaving_nothing(mixed, tmp_path_factory.mktemp("logs") / "ranks.log", LOADED) as server:
        yield server


def ranks_of(server: Server, expert: str) -> list[psutil.Process]:
    """The processes of an expert's engine that compute."""
    return [
        child
        for child in psutil.Process(pid_of(server, expert)).children()
        if expert in " ".join(child.cmdline())
    ]


def lives(process: psutil.Process) -> bool:
    """Nobody may have asked yet how it ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_each_rank_has_its_core_and_says_whose_it_is(server: Server, mixed: Reference) -> None:
    first, second = mixed.experts
    assert len(ranks_of(server, first)) == 2
    assert ranks_of(server, second) == []
    log = server.log.read_text()
    assert f"({first}_TP0 pid=" in log
    assert f"({first}_TP1 pid=" in log
    cores = [set(rank.cpu_affinity()) for rank in ranks_of(server, first)]
    if (os.cpu_count() or 1) > 1:
        assert not cores[0] & cores[1]


@pytest.mark.parametrize("rule", RULES)
async def test_answers_are_the_mixtures(server: Server, mixed: Reference, rule: Rule) -> None:
    await check(server, mixed, routed("posterior"), rule, SOME)


async def test_also_where_experts_leave_and_hand_over(server: Server, mixed: Reference) -> None:
    await check_pruned(server, mixed, clear(mixed, 0.1), 0.1)
    await check_what_depends_on_the_answer_so_far(server, mixed, clear(mixed, 0.1, **PENALTIES))
    await check_seeded(server, mixed, [one.prompt for one in clear(mixed, 0.1)])


async def test_the_expert_alone(server: Server, mixed: Reference) -> None:
    alone = mixed.alone(mixed.experts[0])
    prompts = await check_alone(server, alone, SOME)
    sampled = [
        [a.tokens for a, _ in await complete_all(server, alone.name, prompts, None, temperature=1.0, seed=7)]
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]


async def test_prompts_that_are_scored(server: Server, mixed: Reference) -> None:
    """By rows of the whole mixture, which one rank of each engine writes out."""
    await check_scored(server, mixed)


async def check_scored(server: Server, reference: Reference) -> None:
    [one] = clear_answers(reference, {}, SOME)[:1]
    async with server.async_openai() as client:
        asked = {"model": reference.name, "prompt": one.prompt, "max_tokens": 1, "temperature": 0}
        answer = await client.completions.create(**asked, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs) == len(one.prompt) + 1


@contextlib.asynccontextmanager
async def answers_under_way(
    server: Server, reference: Reference, prompts: list[list[int]]
) -> AsyncIterator[asyncio.Task[list[tuple[Answer, dict[str, Any]]]]]:
    """Answers of 200 tokens that have begun, and get on once the context is left."""
    asked = complete_all(server, reference.name, prompts, {"route": "prior"}, max_tokens=200, logprobs=None)
    with server.standing_still() as move:
        running = asyncio.create_task(asked)

        def begun() -> bool:
            return bool(server.ensemble()["slots"]["in_use"] == len(prompts))

        # While engines move, the first may be whole before the last has begun.
        await asyncio.to_thread(wait_until, begun, 30, lambda: f"answers are under way: {server.ensemble()}")
        await asyncio.to_thread(move, 0.02)
        yield running


async def check_whole(
    under_way: asyncio.Task[list[tuple[Answer, dict[str, Any]]]], degraded: list[str]
) -> None:
    """Answers of `answers_under_way` end as they should, and say whom they have lost."""
    for answer, summary in await under_way:
        assert len(answer.tokens) == 200
        assert summary["degraded"] == degraded


async def lose_rank(server: Server, mixed: Reference, which: int, prompts: list[list[int]]) -> None:
    lost = mixed.experts[0]
    before, ranks = pid_of(server, lost), ranks_of(server, lost)
    async with answers_under_way(server, mixed, prompts) as running:
        os.kill(ranks[which].pid, signal.SIGKILL)
    for answer, _ in await running:
        assert len(answer.tokens) == 200

    await asyncio.to_thread(wait_until_another, server, lost, before)
    assert not any(map(lives, ranks))


async def test_one_rank_is_killed(server: Server, mixed: Reference) -> None:
    """Its engine goes with it, the other expert answers on, and all of it comes back."""
    prompts = [one.prompt for one in clear_answers(mixed, {}, SOME)]
    for which in (1, 0):
        await lose_rank(server, mixed, which, prompts)
    await check(server, mixed, routed("posterior"), "velocity", SOME)


@pytest.mark.soak  # one more start
def test_a_gateway_that_is_killed_takes_all_ranks_along(mixed: Reference, tmp_path: Path) -> None:
    left = {path.name for path in SHARED_MEMORY.iterdir()}
    server = Server.start(mixed.directory, tmp_path / "server.log", LOADED)
    try:
        ranks = ranks_of(server, mixed.experts[0])
        server.process.kill()
        server.ended("when it is killed")
        assert not any(map(lives, ranks))
        assert {path.name for path in SHARED_MEMORY.iterdir()} <= left
    finally:
        server.kill()


@pytest.mark.soak  # one more start
async def test_a_signal_to_all_of_its_processes_lets_answers_finish(mixed: Reference, tmp_path: Path) -> None:
    """As a terminal's Ctrl-C, or systemd, sends it."""
    server = Server.start(mixed.directory, tmp_path / "server.log", LOADED)
    try:
        prompts = [one.prompt for one in clear_answers(mixed, {}, SOME)]
        async with answers_under_way(server, mixed, prompts) as running:
            os.killpg(server.process.pid, signal.SIGTERM)
        for answer, summary in await running:
            assert len(answer.tokens) == 200
            assert summary["degraded"] == []
        assert await asyncio.to_thread(server.ended, "when it is told to stop") == 0
    finally:
        server.kill()
