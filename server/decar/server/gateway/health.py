"""Which engines live, and what becomes of the requests of one that dies. Knows engines, and who takes part in what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from decar.server.gateway.engine import ExpertEngine, OutputQueue
from decar.server.protocol.lockstep import follow_membership
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Plane


class Health:
    """Watches the engines of ``experts``; those in ``plane`` who wait for a dead one learn of it there."""

    def __init__(self, experts: Sequence[ExpertEngine], plane: Plane):
        self._experts = experts
        self._plane = plane
        self._heard: dict[int, tuple[Member, OutputQueue]] = {}  # by slot
        self._watches: list[asyncio.Task[None]] = []

    def watch(self) -> None:
        """Start noticing engines that die. Call once, inside the event loop."""
        self._watches = [asyncio.create_task(self._watch(k)) for k in range(len(self._experts))]

    async def _watch(self, expert: int) -> None:
        await self._experts[expert].engine.died()
        self._experts[expert].up = False
        self._plane.alive[expert] = 0
        for member, queue in list(self._heard.values()):
            follow_membership(self._plane.blocks, member)  # those that had released it go on
            if expert in member.active:
                queue.put(self.dead_error())

    def hear(self, member: Member, queue: OutputQueue) -> None:
        """From now on, a request whose leader answers in ``queue`` ends there when an engine dies that takes part.

        Raises:
            Exception: as `dead_error` makes it, if one of them is dead already.
        """
        if not all(self._experts[k].up for k in member.active):
            raise self.dead_error()
        self._heard[member.slot] = (member, queue)

    def forget(self, member: Member) -> None:
        self._heard.pop(member.slot, None)

    def dead_error(self) -> Exception:
        """What vLLM's app knows as the death of an engine."""
        return self._experts[0].engine.dead_error()

    def check(self) -> None:
        """
        Raises:
            Exception: as `dead_error` makes it, if not every engine lives.
        """
        if not all(expert.up for expert in self._experts):
            raise self.dead_error()

    @property
    def none_left(self) -> bool:
        return all(expert.engine.client.errored for expert in self._experts)
