"""Places for what runs at once, and one fair queue of the requests that wait. Knows neither HTTP nor engines.

A *place* is one choice's, or one prompt's. They are given to requests in turn, so that a request with thousands of
choices holds up nobody who asks for one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

SHARE = 3
"""How many places a request may have for each that is free, so that whoever comes next finds one. Of 128, 96."""


class QueueFull(Exception):
    """So many requests wait already that another one would not be answered soon."""


class Asking:
    """A request that asks for places."""


_asking: ContextVar[Asking | None] = ContextVar("decar_asking", default=None)


@dataclass(eq=False)
class _Turn:
    """What one request has, and what waits of it."""

    asking: Asking
    held: int = 0
    waiters: deque[asyncio.Future[None]] = field(default_factory=deque)


class Places:
    """So many places, for those that ask in turn."""

    def __init__(self, total: int):
        self.total = self.free = total
        self._turns: dict[Asking, _Turn] = {}
        self._next: deque[_Turn] = deque()  # whose turn it is; those with waiters

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """A place for the current request (see `Queue.admitted`), for as long as the context lasts."""
        asking = _asking.get() or Asking()
        turn = self._turns.setdefault(asking, _Turn(asking))
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not turn.waiters:
            self._next.append(turn)
        turn.waiters.append(waiter)
        self._give()
        try:
            await waiter
            yield
        finally:
            if waiter.done() and not waiter.cancelled():
                turn.held -= 1
                self.free += 1
            elif waiter in turn.waiters:
                turn.waiters.remove(waiter)
                if not turn.waiters:
                    self._next.remove(turn)
            if not turn.held and not turn.waiters:
                self._turns.pop(asking, None)
            self._give()

    def _give(self) -> None:
        """Give free places to whoever's turn it is; one that has many already is passed over while few are free."""
        while turn := next((turn for turn in self._next if turn.held < SHARE * self.free), None):
            self._next.remove(turn)
            waiter = turn.waiters.popleft()
            if turn.waiters:
                self._next.append(turn)
            if not waiter.done():  # it is when whoever waited is cancelled
                turn.held += 1
                self.free -= 1
                self._given(turn.asking)
                waiter.set_result(None)

    def _given(self, asking: Asking) -> None:
        """A request has got a place."""


class Queue(Places):
    """Places, and a bound on how many requests wait for their first one.

    Args:
        length: that bound; where places are free, as many more are let in.

    Attributes:
        rejected: how many have found it full.
    """

    def __init__(self, total: int, length: int):
        super().__init__(total)
        self.length = length
        self.rejected = 0
        self._waiting: set[Asking] = set()

    @property
    def waiting(self) -> int:
        """Requests that have not had a place yet."""
        return len(self._waiting)

    def check(self) -> None:
        """
        Raises:
            QueueFull: a request that comes now cannot wait.
        """
        if self.waiting >= self.length + self.free:
            self.rejected += 1
            raise QueueFull

    def _given(self, asking: Asking) -> None:
        self._waiting.discard(asking)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """What the current task does inside, and what it starts there, is one request.

        Raises:
            QueueFull: it cannot wait.
        """
        self.check()
        asking = Asking()
        self._waiting.add(asking)
        token = _asking.set(asking)
        try:
            yield
        finally:
            _asking.reset(token)
            self._waiting.discard(asking)
