"""Slots: every one comes back, whatever happens to who held it or waited for it."""

import asyncio

import pytest

from decar.server.gateway.slots import Slots


async def test_slots_are_given_in_the_order_of_asking_with_new_generations() -> None:
    slots = Slots(1)
    order: list[tuple[int, int, int]] = []
    release = asyncio.Event()

    async def hold(name: int) -> None:
        async with slots.take() as slot:
            order.append((name, slot, slots.next_generation()))
            await release.wait()

    tasks = [asyncio.create_task(hold(name)) for name in range(4)]
    await asyncio.sleep(0)
    assert slots.in_use == 1
    release.set()
    await asyncio.gather(*tasks)
    assert order == [(0, 0, 1), (1, 0, 2), (2, 0, 3), (3, 0, 4)]
    assert slots.in_use == 0


@pytest.mark.parametrize("woken_first", [True, False])
async def test_a_cancelled_waiter_does_not_swallow_a_slot(woken_first: bool) -> None:
    slots = Slots(1)
    holder = slots.take()
    await holder.__aenter__()

    async def wait() -> None:
        async with slots.take():
            pass

    cancelled, next_one = asyncio.create_task(wait()), asyncio.create_task(wait())
    await asyncio.sleep(0)
    if woken_first:
        await holder.__aexit__(None, None, None)
    cancelled.cancel()
    if not woken_first:
        await holder.__aexit__(None, None, None)
    await asyncio.wait_for(next_one, timeout=5)
    assert cancelled.cancelled() or cancelled.done()
    assert slots.in_use == 0
