"""Exchanging experts while the others answer: one ensemble directory, read again. Knows the order of it, no files.

Experts are trained apart, so they are exchanged apart: one at a time, each as its engine has started and is warm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from decar.router import Ensemble, Reading, changes
from decar.router.errors import DecarError
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.gateway.supervisor import Supervisor

logger = logging.getLogger("decar")


class ReloadRunning(Exception):
    """One reload at a time."""

    def __init__(self) -> None:
        super().__init__("a reload is running already: ask again when it is done")


@dataclass
class Reloaded:
    """What came of a reload.

    Attributes:
        exchanged: names of the experts that have new engines.
        changed: what else is other than before, in words.
        failed: why the next expert could not be exchanged, and what answers in its place; None: all is done.
    """

    exchanged: list[str] = field(default_factory=list)
    changed: tuple[str, ...] = ()
    failed: str | None = None

    def __str__(self) -> str:
        done = [f"exchanged {', '.join(self.exchanged)}"] if self.exchanged else []
        if self.failed is not None:
            done += [self.failed, "nothing else is changed: mend it, and reload again"]
        elif self.changed:
            done.append(f"changed {', '.join(self.changed)}")
        return "; ".join(done) or "nothing has changed"


@dataclass
class Reloader:
    """Brings what ``client`` serves up to date with the ensemble's directory.

    Args:
        served: as it was read when the engines were started.
        read: reads it anew; raises a `DecarError` where it cannot be served.
        plan: what engines of an ensemble, as it was read, are to be started with, one per expert; raises a
            `DecarError` where they could not take the place of those that run.
        plans: what they are started with.
        tell: is told what is served from now on.
        patience_s: for the requests of an engine that is to be ended.
    """

    client: EnsembleClient
    supervisor: Supervisor
    served: Reading
    read: Callable[[], Reading]
    plan: Callable[[Ensemble], Sequence[Any]]
    plans: list[Any]
    tell: Callable[[Ensemble], object]
    patience_s: float
    _task: asyncio.Task[Reloaded] | None = None

    async def reload(self) -> Reloaded:
        """Read the directory, check it, and exchange what has changed. It goes on where whoever asked is gone.

        Raises:
            ReloadRunning: another one does so already.
            DecarError: it cannot be served, or not without a new start; nothing is changed.
        """
        if self._task is not None and not self._task.done():
            raise ReloadRunning
        self._task = asyncio.create_task(self._reload())
        return await asyncio.shield(self._task)

    def reload_soon(self) -> None:
        """The same for want of somebody who waits: the log has what comes of it."""
        logger.info("reloading %s", self.served.ensemble.directory)
        asyncio.ensure_future(self._reload_and_log()).add_done_callback(_log_failure)

    async def _reload_and_log(self) -> None:
        try:
            await self.reload()
        except ReloadRunning as error:
            logger.error("%s", error)
        except DecarError:
            pass  # which `_reload` has logged

    async def _reload(self) -> Reloaded:
        try:
            new = await asyncio.to_thread(self.read)
            found = changes(self.served, new)
            if not found:
                logger.info("reloaded: nothing has changed")
                return Reloaded()
            plans = await asyncio.to_thread(self.plan, new.ensemble)
            routers = await asyncio.to_thread(self.client.trained_routers.of, new.ensemble)
        except DecarError as error:
            logger.error("the reload is refused, and nothing is changed: %s", error)
            raise
        reloaded = Reloaded()
        for expert in found.experts:
            reloaded.failed = await self._exchange(expert, new, plans[expert])
            if reloaded.failed is not None:
                logger.error("the reload has ended early: %s", reloaded)
                return reloaded
            reloaded.exchanged.append(new.ensemble.expert_names[expert])
        self.plans[:] = plans
        self.served = new
        self.client.serve(new.ensemble, routers)
        self.tell(new.ensemble)
        reloaded.changed = found.rest
        logger.info("reloaded: %s", reloaded)
        return reloaded

    async def _exchange(self, expert: int, new: Reading, plan: Any) -> str | None:
        """Have one expert answer as it is in ``new``; else as before, and then the reason."""
        client = self.client
        old_name, name = client.experts[expert].name, new.ensemble.expert_names[expert]
        logger.info("expert %r is exchanged", name)

        def use(plan: Any) -> None:
            self.plans[expert] = plan
            client.forget(expert)

        versions = [partial(use, plan), partial(use, self.plans[expert])]
        failed = await self.supervisor.exchange(expert, self.patience_s, versions)
        if failed:
            now = "is tried again and again" if len(failed) == len(versions) else "answers on"
            return (
                f"expert {name!r} could not be exchanged ({failed[0]}): {old_name!r} as it was before {now}"
            )
        self.served = self.served.with_expert_of(new, expert)
        client.serve(self.served.ensemble)
        self.tell(self.served.ensemble)
        logger.info("expert %r is exchanged", name)
        return None


def _log_failure(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("the reload has failed", exc_info=task.exception())
