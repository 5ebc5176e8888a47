"""Engines that die are started again, warmed and given requests; those that stand still are ended."""

from __future__ import annotations

import asyncio

import pytest

from decar.server.gateway import supervisor
from decar.server.gateway.supervisor import Supervisor

from .fake_engine import FakeEngine, FakeServer

A, B = 0, 1


class Watched:
    """Two engines, what is waited for between starts, and what the next starts give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stuck_after_s: float = 1.5):
        self.server = FakeServer(1, 1)
        self.client = self.server.client
        self.waits: list[float] = []
        self.started: list[int] = []
        self.warmed: list[int] = []
        self.start_fails = 0
        self.warm_up_fails = 0
        self.compiled = asyncio.Event()
        self.compiled.set()
        self.ticks = asyncio.Semaphore(0)
        self.now = 1000.0
        monkeypatch.setattr(supervisor, "LOOK_S", 0.5)
        monkeypatch.setattr(supervisor.asyncio, "sleep", self._sleep)
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: self.now)
        self.supervisor = Supervisor(self.client, self._start, self._warm_up, stuck_after_s)
        self.client.health.watch()
        self.supervisor.watch()

    async def _sleep(self, seconds: float) -> None:
        if seconds == supervisor.LOOK_S:
            await self.ticks.acquire()
        else:
            self.waits.append(seconds)

    async def _start(self, expert: int) -> FakeEngine:
        self.started.append(expert)
        if self.start_fails:
            self.start_fails -= 1
            raise RuntimeError("no memory")
        self.server.engines[expert] = FakeEngine(expert, self.server.plane)
        return self.server.engines[expert]

    async def _warm_up(self, expert: int) -> None:
        assert not self.client.experts[expert].up, "nobody is given requests before"
        assert self.server.plane.alive[expert] == 1, "its rows are waited for"
        if self.warm_up_fails:
            self.warm_up_fails -= 1
            raise RuntimeError("it cannot compute")
        if not self.compiled.is_set():
            engine = self.server.engines[expert]
            await engine.submit("warm-up", None, None)  # type: ignore[arg-type]
            ended = asyncio.create_task(engine.died())
            done, _ = await asyncio.wait(
                (ended, asyncio.create_task(self.compiled.wait())), return_when=asyncio.FIRST_COMPLETED
            )
            if ended in done:
                raise engine.dead_error()
        self.warmed.append(expert)

    async def settle(self) -> None:
        for _ in range(30):
            await real_sleep(0)

    async def looks(self, times: int) -> None:
        for _ in range(times):
            self.ticks.release()
            await self.settle()


real_sleep = asyncio.sleep


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


async def test_a_dead_engine_is_started_again_and_warmed(watched: Watched) -> None:
    watched.server.engines[A].die()
    await watched.settle()
    assert (watched.waits, watched.started, watched.warmed) == ([1.0], [A], [A])
    assert watched.client.experts[A].lives
    assert watched.client.experts[A].engine is watched.server.engines[A]


@pytest.mark.parametrize("fails", ["start_fails", "warm_up_fails"])
async def test_it_is_tried_until_it_works_ever_more_rarely(watched: Watched, fails: str) -> None:
    setattr(watched, fails, 8)
    watched.server.engines[A].die()
    await watched.settle()
    await watched.settle()
    assert watched.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert watched.client.experts[A].lives


async def test_whoever_dies_soon_again_waits_longer_and_whoever_has_lived_does_not(watched: Watched) -> None:
    for lived_s, waits in ((1, [1]), (1, [1, 2]), (61, [1, 2, 1])):
        watched.now += lived_s
        watched.server.engines[B].die()
        await watched.settle()
        assert watched.waits == waits


async def test_an_engine_with_work_that_does_not_get_on_is_ended(watched: Watched) -> None:
    engine = watched.server.engines[A]
    await engine.submit("r", None, None)  # type: ignore[arg-type]
    await watched.looks(3)
    assert not engine.errored
    await watched.looks(1)
    assert engine.errored
    assert not watched.server.engines[B].errored, "it has no work"


@pytest.mark.parametrize(("looks", "back"), [(30, True), (31, False)])
async def test_an_engine_that_compiles_in_its_warm_up_has_ten_times_as_long(
    watched: Watched, looks: int, back: bool
) -> None:
    watched.compiled.clear()
    watched.server.engines[A].die()
    await watched.settle()
    compiling = watched.server.engines[A]
    await watched.looks(looks)
    assert compiling.errored != back
    watched.compiled.set()
    await watched.settle()
    assert (watched.client.experts[A].engine is compiling) == back
    assert watched.client.experts[A].lives, "the next one is warm at once"


@pytest.mark.parametrize("does", ["gets-on", "has-no-work"])
async def test_an_engine_that_gets_on_or_has_nothing_to_do_is_left_alone(watched: Watched, does: str) -> None:
    engine = watched.server.engines[A]
    if does == "gets-on":
        await engine.submit("r", None, None)  # type: ignore[arg-type]
    for _ in range(5):
        await watched.looks(2)
        if does == "gets-on":
            watched.server.plane.blocks[A].beat()
    assert not engine.errored


async def test_nobody_is_brought_back_when_the_server_stops(watched: Watched) -> None:
    watched.server.engines[A].die()
    watched.supervisor.stop()
    watched.server.engines[B].die()
    await watched.settle()
    assert watched.started == []
    assert not watched.client.experts[A].lives
