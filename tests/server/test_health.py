"""An engine dies: who learns of it, and whose requests end."""

from __future__ import annotations

import asyncio

import pytest

from decar.server.gateway.engine import ExpertEngine
from decar.server.gateway.health import Health
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Plane, membership_word

from .fake_engine import EngineDied, FakeEngine, FakeQueue


class Three:
    """Three engines and their health."""

    def __init__(self) -> None:
        self.plane = Plane.create(experts=3, slots=4, vocab_size=4, positions=8)
        self.plane.unlink()
        self.engines = [FakeEngine(k, self.plane) for k in range(3)]
        self.experts = [ExpertEngine(name, engine) for name, engine in zip("abc", self.engines, strict=True)]
        self.health = Health(self.experts, self.plane)
        self.health.watch()

    def hear(self, slot: int, *active: int, prune: float = 0.0) -> tuple[Member, FakeQueue]:
        member = Member(
            slot=slot,
            generation=1,
            leader=active[0],
            active=active,
            rule="velocity",
            log_weights=[0.0, 0.0, 0.0],
            posterior=True,
            prune=prune,
        )
        queue = FakeQueue(f"r-{slot}")
        self.health.hear(member, queue)
        return member, queue

    async def dies(self, expert: int) -> None:
        self.engines[expert].die()
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def three() -> Three:
    return Three()


async def test_those_that_it_takes_part_in_end_and_no_others(three: Three) -> None:
    leads, follows, apart = three.hear(0, 1, 0), three.hear(1, 2, 1), three.hear(2, 0, 2)
    forgotten, late = three.hear(3, 0, 1)
    three.health.forget(forgotten)
    await three.dies(1)
    for _, queue in (leads, follows):
        with pytest.raises(EngineDied):
            queue.get_nowait()
    assert apart[1].get_nowait() is None
    assert late.get_nowait() is None
    assert [expert.up for expert in three.experts] == [True, False, True]
    assert list(three.plane.alive) == [1, 0, 1]


async def test_those_that_have_released_it_go_on(three: Three) -> None:
    member, queue = three.hear(0, 0, 1, 2, prune=0.5)
    block = three.plane.blocks[0]
    block.membership_from[0] = 3
    block.membership[0] = membership_word(member.generation, 0, (0, 2))
    await three.dies(1)
    assert queue.get_nowait() is None
    assert member.active == (0, 2)
    await three.dies(2)
    with pytest.raises(EngineDied):
        queue.get_nowait()


async def test_a_request_that_comes_after_is_told_at_once(three: Three) -> None:
    await three.dies(2)
    with pytest.raises(EngineDied):
        three.hear(0, 0, 2)
    _, queue = three.hear(1, 0, 1)
    await three.dies(0)
    with pytest.raises(EngineDied):
        queue.get_nowait()


async def test_health_is_everybodys_and_vllm_stops_only_without_any(three: Three) -> None:
    three.health.check()
    await three.dies(0)
    with pytest.raises(EngineDied):
        three.health.check()
    assert not three.health.none_left
    await three.dies(1)
    await three.dies(2)
    assert three.health.none_left
