"""Places in the plane, and who waits for one. Knows no requests and no engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Slots:
    """Places in the plane, handed out in the order of asking."""

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # last freed, first reused: its memory is warm
        self._generation = 0
        self._waiters: deque[asyncio.Future[int]] = deque()

    @property
    def in_use(self) -> int:
        return self.total - len(self._free)

    def next_generation(self) -> int:
        """A number for a slot's next tenant, which no other one has."""
        self._generation += 1
        return self._generation

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[int]:
        """A slot, for as long as the context lasts."""
        if self._free:
            slot = self._free.pop()
        else:
            waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                slot = await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._pass_on(waiter.result())
                raise
        try:
            yield slot
        finally:
            self._pass_on(slot)

    def _pass_on(self, slot: int) -> None:
        """Give ``slot`` to whoever has waited longest and still does."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(slot)
                return
        self._free.append(slot)
