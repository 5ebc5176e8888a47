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

from decar.router import Changes, Ensemble, Reading, changes
from decar.router.errors import DecarError, EnsembleError
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.gateway.flow import FlowEnsemble
from decar.server.gateway.seats import Seats
from decar.server.gateway.supervisor import Supervisor
from decar.server.gateway.trained_routers import TrainedRouters

logger = logging.getLogger("decar")


class ReloadRunning(Exception):
    """One reload at a time."""

    def __init__(self) -> None:
        super().__init__("a reload is running already: ask again when it is done")


@dataclass
class Reloaded:
    """What came of a reload.

    Attributes:
        exchanged, added, removed: names of experts.
        changed: what else is other than before, in words.
        failed: why the next expert could not be exchanged or added, and what answers in its place; None: all is done.
    """

    exchanged: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: tuple[str, ...] = ()
    failed: str | None = None

    def __str__(self) -> str:
        lists = {"exchanged": self.exchanged, "added": self.added, "removed": self.removed}
        done = [f"{what} {', '.join(names)}" for what, names in lists.items() if names]
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
        plan: what the engines of an ensemble's experts are to be started with, in manifest order, at these places;
            raises a `DecarError` where they could not be there.
        plans: what they are started with, by place; None where there is no expert.
        tell: is told what is served from now on.
        patience_s: for the requests of an engine that is to be ended.
    """

    client: EnsembleClient | FlowEnsemble
    supervisor: Supervisor
    served: Reading
    read: Callable[[], Reading]
    plan: Callable[[Ensemble, Seats], Sequence[Any]]
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
            seats = self._seats(new.ensemble, found)
            if len(seats.of) < self.client.health.fewest:
                raise EnsembleError(
                    f"the manifest has {len(seats.of)} experts, and --min-experts is {self.client.health.fewest}: "
                    "start the server anew"
                )
            plans = await asyncio.to_thread(self.plan, new.ensemble, seats)
            routers = await asyncio.to_thread(self.client.trained_routers.of, new.ensemble, seats)
        except DecarError as error:
            logger.error("the reload is refused, and nothing is changed: %s", error)
            raise
        reloaded = Reloaded()
        leave = {
            self.client.seats.of[expert]: self.served.ensemble.expert_names[expert]
            for expert in found.removed
        }
        for expert in found.experts:
            reloaded.failed = await self._exchange(seats.of[expert], new, expert, plans[expert])
            if reloaded.failed is not None:
                logger.error("the reload has ended early: %s", reloaded)
                return reloaded
            done = reloaded.added if found.places[expert] is None else reloaded.exchanged
            done.append(new.ensemble.expert_names[expert])
        for seat, plan in zip(seats.of, plans, strict=True):
            self.plans[seat] = plan
        self._serve(new, seats, routers)
        for seat, name in leave.items():
            await self.supervisor.exchange(seat, self.patience_s, ())
            self.plans[seat] = None
            reloaded.removed.append(name)
        reloaded.changed = found.rest
        logger.info("reloaded: %s", reloaded)
        return reloaded

    def _seats(self, ensemble: Ensemble, found: Changes) -> Seats:
        """Where the experts now are to be: in their old places, or in free ones.

        Raises:
            EnsembleError: there are not enough.
        """
        seats = self.client.seats
        if len(found.places) > seats.total:
            raise EnsembleError(
                f"the manifest has {len(found.places)} experts, and there is room for {seats.total}: start the "
                f"server anew (with --max-experts, it keeps room for more)"
            )
        taken: list[int] = []
        for place in found.places:
            taken.append(seats.free(taken) if place is None else seats.of[place])
        return Seats(tuple(ensemble.expert_names), tuple(taken), seats.total)

    async def _exchange(self, seat: int, new: Reading, expert: int, plan: Any) -> str | None:
        """Have an expert of ``new`` answer at ``seat``; else whoever did before, and then the reason."""
        client, name = self.client, new.ensemble.expert_names[expert]
        before = client.experts[seat].name if client.experts[seat].seated else None
        logger.info("expert %r is started in the place of %r", name, before)

        def use(plan: Any) -> None:
            self.plans[seat] = plan
            client.forget(seat)

        versions = [plan] if before is None else [plan, self.plans[seat]]
        failed = await self.supervisor.exchange(
            seat, self.patience_s, [partial(use, version) for version in versions]
        )
        if failed and before is None:
            self.plans[seat] = None
            return f"expert {name!r} could not be added ({failed[0]})"
        if failed:
            now = "answers on" if len(failed) < len(versions) else "is tried again and again"
            return f"expert {name!r} could not be exchanged ({failed[0]}): {before!r} as it was before {now}"
        answering = {old: (self.served, k) for k, old in enumerate(client.seats.of)}
        answering[seat] = (new, expert)
        served = self.served.of_experts(list(answering.values()))
        names = tuple(served.ensemble.expert_names)
        self._serve(served, Seats(names, tuple(answering), client.seats.total))
        return None

    def _serve(self, reading: Reading, seats: Seats, routers: TrainedRouters | None = None) -> None:
        self.served = reading
        self.client.serve(reading.ensemble, seats, routers)
        self.tell(reading.ensemble)


def _log_failure(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("the reload has failed", exc_info=task.exception())
