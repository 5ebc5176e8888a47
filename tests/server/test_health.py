"""An engine dies: who learns of it, and whose requests lose it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from decar.server.gateway.engine import ExpertEngine, ExpertLost
from decar.server.gateway.health import Health, Heard
from decar.server.protocol.plane import Plane

from .fake_engine import EngineDied, FakeEngine, FakeQueue


class Three:
    """Three engines and their health."""

    def __init__(self, fewest: int = 1) -> None:
        self.plane = Plane.create(experts=3, slots=4, vocab_size=4, positions=8)
        self.plane.unlink()
        self.engines = [FakeEngine(k, self.plane) for k in range(3)]
        self.experts = [ExpertEngine(name, engine) for name, engine in zip("abc", self.engines, strict=True)]
        self.health = Health(self.experts, self.plane, fewest)
        self.told: list[int] = []
        self.health.then = self.told.append
        self.health.watch()
        self.kept = contextlib.ExitStack()

    def hear(self, *active: int) -> Heard:
        queue = FakeQueue("r")
        return self.kept.enter_context(self.health.hearing(queue, lambda k: k in active))

    async def dies(self, expert: int) -> None:
        self.engines[expert].die()
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def three() -> Three:
    return Three()


async def test_those_that_it_takes_part_in_lose_it_and_no_others(three: Three) -> None:
    leads, follows, apart = three.hear(1, 0), three.hear(2, 1), three.hear(0, 2)
    forgotten = three.hear(0, 1)
    three.health._heard.remove(forgotten)
    await three.dies(1)
    for heard in (leads, follows):
        with pytest.raises(ExpertLost) as lost:
            await heard.next()
        assert lost.value.expert == 1
    assert apart.queue.get_nowait() is None
    assert forgotten.queue.get_nowait() is None
    assert [expert.up for expert in three.experts] == [True, False, True]
    assert [expert.lives for expert in three.experts] == [True, False, True]
    assert list(three.plane.alive) == [1, 0, 1]
    assert three.told == [1]


async def test_who_waits_is_woken_and_what_came_before_is_read_first(three: Three) -> None:
    waiting, late = three.hear(0, 1), three.hear(1)
    reader = asyncio.create_task(waiting.next())
    said: Any = object()
    late.queue.put(said)
    await three.dies(1)
    with pytest.raises(ExpertLost):
        await reader
    assert await late.next() is said
    with pytest.raises(ExpertLost):
        await late.next()


async def test_an_error_that_came_before_is_what_the_request_ends_with(three: Three) -> None:
    heard = three.hear(1)
    heard.queue.put(ValueError("this"))
    await three.dies(1)
    with pytest.raises(ValueError, match="this"):
        await heard.next()


async def test_the_first_loss_counts(three: Three) -> None:
    heard = three.hear(0, 1)
    await three.dies(1)
    await three.dies(0)
    with pytest.raises(ExpertLost) as lost:
        await heard.next()
    assert lost.value.expert == 1


async def test_a_request_that_comes_after_is_told_at_once(three: Three) -> None:
    three.engines[2].die()  # nobody has noticed yet
    with pytest.raises(ExpertLost):
        three.hear(0, 2)
    three.hear(0, 1)


@pytest.mark.parametrize("fewest", [1, 2, 3])
async def test_health_asks_for_so_many(fewest: int) -> None:
    three = Three(fewest)
    for died in range(4):
        assert three.health.enough == (3 - died >= fewest)
        if three.health.enough:
            three.health.check()
        else:
            with pytest.raises(EngineDied):
                three.health.check()
        if died < 3:
            await three.dies(died)


async def test_an_expert_with_a_new_engine_is_watched_again(three: Three) -> None:
    await three.dies(1)
    three.engines[1] = three.experts[1].engine = FakeEngine(1, three.plane)  # type: ignore[assignment]
    three.health.begins(1)
    assert three.plane.alive[1] == 1
    assert not three.experts[1].lives, "it is still to be warmed up"
    three.health.back(1)
    assert three.experts[1].lives
    await three.dies(1)
    assert three.told == [1, 1]


async def test_an_engine_that_dies_before_it_is_back_is_whoevers_who_warms_it(three: Three) -> None:
    await three.dies(1)
    three.engines[1] = three.experts[1].engine = FakeEngine(1, three.plane)  # type: ignore[assignment]
    three.health.begins(1)
    heard = three.hear(1)
    await three.dies(1)
    with pytest.raises(ExpertLost):
        await heard.next()
    assert three.told == [1]
