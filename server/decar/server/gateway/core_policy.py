"""Which core the gateway's thread computes on, where engines compute on all of them, and whom it tells first.

Knows engines' cores and who leads how much; how a thread gives way is `decar.server.protocol.cores`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from decar.server.gateway.engine import Engine, ExpertEngine
from decar.server.gateway.leaders import Leaders
from decar.server.protocol.cores import GatewayThread, current_core, start_threads


def start_all_threads(engines: Sequence[Engine]) -> None:
    """Start the threads that share this process with the gateway's own, before that one keeps anywhere. To be called
    on the event loop, which gets its default pool here."""
    others = ThreadPoolExecutor(thread_name_prefix="decar")
    asyncio.get_running_loop().set_default_executor(others)
    for pool in (others, *(pool for engine in engines for pool in engine.thread_pools())):
        start_threads(pool)


class CorePolicy:
    """Keeps ``thread`` where it is in the way of no leader of ``leaders``."""

    def __init__(self, experts: Sequence[ExpertEngine], leaders: Leaders, thread: GatewayThread):
        self._experts, self._leaders, self._thread = experts, leaders, thread

    def share_cores(self) -> None:
        """Find the thread its place, when a request has begun or ended.

        While requests run that their experts decode together to the end, it is beside the engine that leads least.
        Where experts are released, engines decode apart, and Linux finds it the core that is least busy.
        """
        leads = self._leaders.counts()
        living = [k for k, expert in enumerate(self._experts) if expert.up]
        least = min(living, key=lambda k: (leads[k], -k), default=None)
        self._thread.keep_beside(least if self._leaders.some_stay else None)

    def in_order(self, active: Sequence[int], leader: int) -> list[int]:
        """Followers first: they have nothing to do for the leader that it could not do meanwhile. But last whoever
        shares the core that this process runs on: waking, that engine takes it, and the others would not be told."""
        here = current_core()
        return sorted(active, key=lambda k: (here in self._experts[k].engine.cores, k == leader))
