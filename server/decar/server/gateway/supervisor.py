"""Brings engines back that have died, and ends those that are stuck. Knows when an engine is, not what it computes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from decar.router.errors import StartError
from decar.server.gateway.engine import Engine
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.gateway.flow import FlowEnsemble

logger = logging.getLogger("decar")

SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Between an engine's death and its next start. It doubles while they go on dying, and an engine that has lived for
longer than the longest begins anew."""
COMPILES_FOR = 10
"""Times as long as users' requests may an engine's warm-up stand still: it is there to have compiled what they need."""
LOOK_S = 1.0
LOOK_FOR_END_S = 0.1


class Supervisor:
    """Keeps the engines of ``client`` alive.

    Args:
        start: gives an expert a new engine.
        warm: warms an expert's new engine.
        stuck_after_s: an engine with work that does not get on for so long is ended. Without an end, everybody who
            waits for its rows would wait as well. One that warms up, for which nobody waits, has `COMPILES_FOR` times
            as long.
    """

    def __init__(
        self,
        client: EnsembleClient | FlowEnsemble,
        start: Callable[[int], Awaitable[Engine]],
        warm: Callable[[int], Awaitable[None]],
        stuck_after_s: float,
    ):
        self._client, self._start, self._warm = client, start, warm
        self._looks = max(round(stuck_after_s / LOOK_S), 1)
        self._waits = [SHORTEST_WAIT_S] * len(client.experts)
        self._up_since = [time.monotonic()] * len(client.experts)
        self._one_at_a_time = [asyncio.Lock() for _ in client.experts]
        self._coming_back: set[int] = set()
        self._warming_up: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self) -> None:
        """Begin. Call once, inside the event loop, when all engines are warm."""
        self._client.health.then = self._dead
        self._run(self._look_for_stuck())

    def stop(self) -> None:
        """Leave engines as they are from now on."""
        self._client.health.then = lambda expert: None
        for task in self._tasks:
            task.cancel()

    async def exchange(
        self, expert: int, patience_s: float, versions: Iterable[Callable[[], object]]
    ) -> list[StartError]:
        """End the engine in an expert's place and start another one, the others answering meanwhile.

        Args:
            patience_s: for the requests that it has; then the others go on without it.
            versions: each has the engine of one version started from now on. It is the first that works; where none
                does, and an expert has the place, the last is tried on, as for an engine that has died.

        Returns:
            why those before it did not work.
        """
        client, failed = self._client, list[StartError]()
        async with self._one_at_a_time[expert]:
            client.health.leaves(expert)
            engine, waited_s = client.experts[expert].engine, 0.0
            while client.busy(expert) and not engine.client.errored and waited_s < patience_s:
                await asyncio.sleep(LOOK_FOR_END_S)
                waited_s += LOOK_FOR_END_S
            engine.end()
            await client.health.gone(expert)
            for use in versions:
                use()
                try:
                    await self._bring_up(expert)
                except StartError as error:
                    failed.append(error)
                else:
                    return failed
            if client.experts[expert].seated:
                self._dead(expert)
        return failed

    def _run(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _dead(self, expert: int) -> None:
        if expert not in self._coming_back:
            self._coming_back.add(expert)
            self._run(self._bring_back(expert))

    async def _bring_up(self, expert: int) -> None:
        """Start an expert's engine, warm it, and only then give it users' requests.

        Raises:
            StartError: it does not start, or cannot be warmed up.
        """
        client = self._client
        try:
            engine = await self._start(expert)
        except Exception as error:
            raise StartError(str(error)) from error
        client.give_engine(expert, engine)
        self._warming_up.add(expert)
        try:
            await self._warm(expert)
        except Exception as error:
            client.health.dead(expert)
            engine.end()
            await client.health.gone(expert)
            raise StartError(f"its new engine cannot be warmed up: {error!r}") from error
        finally:
            self._warming_up.discard(expert)
        client.rejoin(expert)
        self._up_since[expert] = time.monotonic()

    async def _bring_back(self, expert: int) -> None:
        try:
            if time.monotonic() - self._up_since[expert] > LONGEST_WAIT_S:
                self._waits[expert] = SHORTEST_WAIT_S
            while self._needs_engine(expert):
                wait_s = self._waits[expert]
                self._waits[expert] = min(2 * wait_s, LONGEST_WAIT_S)
                name = self._client.experts[expert].name
                logger.error("the engine of expert %r has died: it is started again in %.0f s", name, wait_s)
                await asyncio.sleep(wait_s)
                async with self._one_at_a_time[expert]:
                    if not self._needs_engine(expert):
                        return  # it has been exchanged or removed meanwhile
                    try:
                        await self._bring_up(expert)
                    except Exception as error:
                        logger.error("expert %r: %s", name, error)
                    else:
                        logger.info("expert %r is back", name)
        finally:
            self._coming_back.discard(expert)

    def _needs_engine(self, expert: int) -> bool:
        found = self._client.experts[expert]
        return found.seated and not found.lives

    async def _look_for_stuck(self) -> None:
        """By how often it was looked, not by the clock: where all has stood still, nobody is stuck."""
        blocks = self._client.plane.blocks
        seen = [(-1, 0)] * len(blocks)  # how many beats, and how often they have been so many
        while True:
            await asyncio.sleep(LOOK_S)
            for k, expert in enumerate(self._client.experts):
                beats, looks = seen[k]
                now = int(blocks[k].beats[0])
                if beats != now or expert.engine.client.errored or not expert.engine.has_work():
                    seen[k] = now, 0
                    continue
                looks += 1
                if looks >= self._looks * (COMPILES_FOR if k in self._warming_up else 1):
                    logger.error("the engine of expert %r does not get on: it is ended", expert.name)
                    expert.engine.end()
                    looks = 0
                seen[k] = now, looks
