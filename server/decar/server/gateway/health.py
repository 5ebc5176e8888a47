"""Which engines live, and what becomes of the requests of one that dies. Knows engines, and who takes part in what."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vllm.outputs import RequestOutput

from decar.server.gateway.engine import ExpertEngine, ExpertLost, OutputQueue
from decar.server.protocol.plane import NOTHING, Plane


@dataclass(eq=False)
class Heard:
    """A request whose output is read.

    Attributes:
        takes_part: whether the request is lost without an expert.
        lost: the first expert that it was lost by.
    """

    queue: OutputQueue
    takes_part: Callable[[int], bool]
    lost: int | None = None

    async def next(self) -> RequestOutput:
        """
        Raises:
            ExpertLost: an expert that takes part is lost, and all that came before has been read.
        """
        output = self.queue.get_nowait()
        if output is None and self.lost is not None:
            raise ExpertLost(self.lost)
        return output or await self.queue.get()

    def lose(self, expert: int) -> None:
        """Have whoever reads learn that ``expert`` is lost, after what has come already."""
        if self.lost is not None:
            return
        self.lost = expert
        try:
            unread = self.queue.get_nowait()
        except Exception as error:  # it ends with that
            self.queue.put(error)
        else:
            self.queue.put(ExpertLost(expert) if unread is None else unread)


class Health:
    """Watches the engines of ``experts``; those in ``plane`` who wait for a dead one learn of it there.

    Args:
        fewest: how many have to live for the ensemble to be served.
    """

    def __init__(self, experts: Sequence[ExpertEngine], plane: Plane, fewest: int = 1):
        self._experts = experts
        self._plane = plane
        self.fewest = fewest
        self._heard: set[Heard] = set()
        self._watches: list[asyncio.Task[None]] = []
        self.then: Callable[[int], object] = lambda expert: None  # is told of those that have died

    def watch(self) -> None:
        """Start noticing engines that die. Call once, inside the event loop."""
        self._watches = [asyncio.create_task(self._watch(k)) for k in range(len(self._experts))]

    def begins(self, expert: int) -> None:
        """An expert has a new engine: others wait for its rows from now on, and requests end if it dies."""
        self._plane.alive[expert] = 1
        self._plane.tell_others()
        self._watches[expert] = asyncio.create_task(self._watch(expert))

    def back(self, expert: int) -> None:
        """Requests may be given to an expert's new engine."""
        self._experts[expert].up = True

    def leaves(self, expert: int) -> None:
        """An expert's engine is about to be ended: no more requests are given to it, and nobody is told (`then`)."""
        self._experts[expert].up = False

    async def gone(self, expert: int) -> None:
        """Return when everybody has learned that an expert's engine is dead."""
        await asyncio.wait([self._watches[expert]])

    async def _watch(self, expert: int) -> None:
        await self._experts[expert].engine.died()
        was_up = self._experts[expert].up
        self.dead(expert)
        if was_up:  # else whoever warms or ends it hears of it
            self.then(expert)

    def dead(self, expert: int) -> None:
        """An expert's engine is dead: every request that it takes part in learns of it."""
        self._experts[expert].up = False
        self._plane.alive[expert] = 0
        self._plane.fields["running"][expert] = NOTHING
        self._plane.tell_others()
        for heard in list(self._heard):
            if heard.takes_part(expert):
                heard.lose(expert)

    @contextlib.contextmanager
    def hearing(self, queue: OutputQueue, takes_part: Callable[[int], bool]) -> Iterator[Heard]:
        """Read a request's output.

        Raises:
            ExpertLost: one of those that take part is dead already.
        """
        for k, expert in enumerate(self._experts):
            if expert.engine.client.errored and takes_part(k):
                raise ExpertLost(k)
        heard = Heard(queue, takes_part)
        self._heard.add(heard)
        try:
            yield heard
        finally:
            self._heard.discard(heard)

    @property
    def enough(self) -> bool:
        """Whether the ensemble can be served."""
        return sum(expert.up for expert in self._experts) >= self.fewest

    def dead_error(self) -> Exception:
        """What vLLM's app knows as the death of an engine."""
        return self._experts[0].engine.dead_error()

    def check(self) -> None:
        """
        Raises:
            Exception: as `dead_error` makes it, if too few engines live.
        """
        if not self.enough:
            raise self.dead_error()
