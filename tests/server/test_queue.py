"""The queue: places go to requests in turn, every one comes back, and only so many requests wait."""

from __future__ import annotations

import asyncio
import random

import pytest

from decar.server.gateway.queue import SHARE, Places, Queue, QueueFull


class Load:
    """Requests, each of which wants places; whoever has one keeps it until it is told to give it back."""

    def __init__(self, queue: Queue):
        self.queue = queue
        self.order: list[str] = []  # who got a place
        self._done: dict[str, list[asyncio.Event]] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, places: int = 1) -> None:
        self._done[name] = []
        self.tasks[name] = asyncio.create_task(self._request(name, places))
        await settled()

    async def _request(self, name: str, places: int) -> None:
        with self.queue.admitted():
            tasks = [asyncio.create_task(self._choice(name)) for _ in range(places)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _choice(self, name: str) -> None:
        async with self.queue.take():
            done = asyncio.Event()
            self.order.append(name)
            self._done[name].append(done)
            await done.wait()

    async def finish(self, name: str) -> None:
        """One of its choices."""
        self._done[name].pop().set()
        await settled()

    def held(self, name: str) -> int:
        return len(self._done[name])

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.gather(self.tasks[name], return_exceptions=True)


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_with_many_choices_leaves_a_place_for_the_next() -> None:
    load = Load(Queue(32, 8))
    await load.ask("many", 3000)
    assert load.held("many") == SHARE * load.queue.free == 24
    for i in range(load.queue.free):
        await load.ask(f"single {i}")
        assert load.held(f"single {i}") == 1
    for name in load.tasks:
        await load.cancel(name)


async def test_places_go_to_requests_in_turn() -> None:
    load = Load(Queue(1, 8))
    await load.ask("runs")
    await load.ask("many", 50)
    await load.ask("two", 2)
    await load.ask("one")
    running = "runs"
    for name in ("many", "two", "one", "many", "two", "many", "many"):
        await load.finish(running)
        assert load.order[-1] == name
        running = name
    for name in ("many", "two"):
        await load.cancel(name)


async def test_beyond_its_length_nobody_waits() -> None:
    load = Load(Queue(2, 3))
    for name in "abcde":  # two run, three wait
        await load.ask(name)
    assert load.queue.waiting == 3
    await load.ask("f")
    with pytest.raises(QueueFull):
        await load.tasks["f"]
    assert load.queue.rejected == 1
    await load.finish("a")
    await load.ask("g")
    assert not load.tasks["g"].done()
    assert load.queue.waiting == 3
    for name in "bcdeg":
        await load.cancel(name)


async def test_who_comes_at_once_is_let_in_as_far_as_there_is_room() -> None:
    """Also before anybody has asked for a place: what comes before that takes time."""
    load = Load(Queue(2, 3))
    results = await asyncio.gather(*(asyncio.wait_for(admitted(load.queue), 5) for _ in range(9)))
    assert results.count(True) == 5
    assert load.queue.waiting == 0


async def admitted(queue: Queue) -> bool:
    try:
        with queue.admitted():
            await settled()
            return True
    except QueueFull:
        return False


async def test_without_a_length_only_free_places_let_in() -> None:
    load = Load(Queue(1, 0))
    await load.ask("runs")
    await load.ask("waits")
    with pytest.raises(QueueFull):
        await load.tasks["waits"]
    await load.cancel("runs")
    await load.ask("runs again")
    assert load.held("runs again") == 1
    await load.cancel("runs again")


async def test_a_place_elsewhere_is_none_here() -> None:
    """What a request waits for before, such as having its prompt scored, does not let in another one in its stead."""
    queue = Queue(1, 1)
    with queue.admitted():
        async with Places(1).take():
            assert queue.waiting == 1
        async with queue.take():
            assert queue.waiting == 0


async def test_outside_of_a_request_each_is_its_own() -> None:
    """The server's own, such as those that warm it up, which nobody refuses."""
    queue = Queue(1, 0)
    another = queue.take()
    async with queue.take():
        waits = asyncio.create_task(another.__aenter__())
        await settled()
        assert not waits.done()
        assert queue.waiting == 0
    await asyncio.wait_for(waits, 5)
    assert queue.free == 0
    await another.__aexit__(None, None, None)
    assert queue.free == 1


@pytest.mark.parametrize("woken_first", [True, False])
async def test_a_cancelled_waiter_does_not_swallow_a_place(woken_first: bool) -> None:
    places = Places(1)
    holder = places.take()
    await holder.__aenter__()

    async def wait() -> None:
        async with places.take():
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
    assert places.free == 1
    assert not places._turns
    assert not places._next


@pytest.mark.parametrize("seed", range(20))
async def test_every_place_comes_back(seed: int) -> None:
    """Whatever ends, and in whatever order."""
    rng, load = random.Random(seed), Load(Queue(5, 1000))
    for i in range(60):
        await load.ask(str(i), rng.randint(1, 9))
        alive = [name for name, task in load.tasks.items() if not task.done()]
        name = rng.choice(alive)
        if rng.random() < 0.3:
            load.tasks[name].cancel()
        elif load.held(name):
            await load.finish(name)
        assert 0 <= load.queue.free <= 5
    for name in load.tasks:
        await load.cancel(name)
    assert load.queue.free == 5
    assert load.queue.waiting == 0
    assert not load.queue._turns
    assert not load.queue._next
