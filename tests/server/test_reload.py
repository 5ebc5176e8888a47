"""The order in which a reload goes, over engines without a model: what is exchanged, what stays, and what is said."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from decar.router import Ensemble, EnsembleError, Reading
from decar.router.manifest import Mixing
from decar.server.gateway import supervisor as supervisor_module
from decar.server.gateway.reload import Reloader, ReloadRunning
from decar.server.gateway.seats import Seats
from decar.server.gateway.supervisor import Supervisor

from .fake_engine import FakeEngine, FakeServer, fake_ensemble
from .test_ensemble import PROMPT, Asked, assert_nothing_is_left, settle
from .test_middleware import app_of, client_of

A, B = 0, 1


def reading(ensemble: Ensemble, *versions: int) -> Reading:
    """Experts whose files are told apart by a version."""
    files = tuple(frozenset({("weights", version, 0, 0)}) for version in versions)
    return Reading(ensemble, files, frozenset(), {})


class Served:
    """Two experts, a directory that a test rewrites, and engines that start as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patience_s: float = 0.0, places: int = 2):
        self.server = FakeServer(1, 1, places=places)
        self.client = self.server.client
        self.now = reading(self.client.ensemble, 1, 1)
        self.plans: list[Any] = ["a1", "b1", *[None] * (places - 2)]
        self.works = {"a1", "b1", "a2", "b2", "c2"}
        self.started: list[str] = []
        self.told: list[list[str]] = []
        self.read_error: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        monkeypatch.setattr(supervisor_module, "LOOK_FOR_END_S", 0.001)
        monkeypatch.setattr(supervisor_module, "SHORTEST_WAIT_S", 0.0)
        self.supervisor = Supervisor(self.client, self._start, self._warm_up, 30)
        self.client.health.watch()
        self.supervisor.watch()
        self.reloader = Reloader(
            self.client,
            self.supervisor,
            self.now,
            read=self._read,
            plan=self._plan,
            plans=self.plans,
            tell=lambda ensemble: self.told.append(ensemble.expert_names),
            patience_s=patience_s,
        )

    def _read(self) -> Reading:
        if self.read_error is not None:
            raise self.read_error
        return self.now

    def _plan(self, ensemble: Ensemble, seats: Seats) -> list[str]:
        """Of expert "a", "a1" or "a2" by the version of its files."""
        versions = [next(iter(files))[1] for files in self.now.experts]
        return [f"{name}{version}" for name, version in zip(ensemble.expert_names, versions, strict=True)]

    async def _start(self, expert: int) -> FakeEngine:
        plan = self.plans[expert]
        self.started.append(plan)
        await self.may_start.wait()
        if plan not in self.works:
            raise RuntimeError("no memory")
        engine = FakeEngine(expert, self.server.plane)
        self.server.engines[expert : expert + 1] = [engine]
        return engine

    async def _warm_up(self, expert: int) -> None:
        assert not self.client.experts[expert].up

    @property
    def up(self) -> list[bool]:
        return [expert.up for expert in self.client.experts]


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


async def test_changed_experts_go_one_at_a_time(served: Served) -> None:
    before = list(served.server.engines)
    served.now = reading(fake_ensemble(3, 1), 2, 2)
    served.may_start.clear()
    task = asyncio.create_task(served.reloader.reload())
    while not served.started:
        await asyncio.sleep(0.001)
    assert served.up == [False, True]
    assert [engine.errored for engine in before] == [True, False]
    with pytest.raises(ReloadRunning):
        await served.reloader.reload()
    served.may_start.set()
    reloaded = await task
    assert (reloaded.exchanged, reloaded.failed) == (["a", "b"], None)
    assert served.started == served.plans == ["a2", "b2"]
    assert served.up == [True, True]
    assert all(expert.engine not in before for expert in served.client.experts)
    assert served.client.ensemble is served.now.ensemble
    assert served.reloader.served is served.now
    assert str(await served.reloader.reload()) == "nothing has changed"


async def test_what_is_no_experts_own_changes_without_an_engine(served: Served) -> None:
    engines = list(served.server.engines)
    ensemble = fake_ensemble(1, 3)
    ensemble.manifest = ensemble.manifest.model_copy(update={"mixing": Mixing(rule="logit")})
    served.now = reading(ensemble, 1, 1)
    reloaded = await served.reloader.reload()
    assert (reloaded.exchanged, reloaded.changed) == ([], ("the prior of 'b'", "mixing.rule"))
    assert served.started == []
    assert [expert.engine for expert in served.client.experts] == engines
    asked = Asked(served.server, "r")
    assert asked.call.rule == "logit"
    asked.task.cancel()


async def test_another_expert_in_the_place_of_one(served: Served) -> None:
    served.now = of_names("ac", [1, 2])
    assert str(await served.reloader.reload()).startswith("exchanged c")
    assert served.started == ["c2"]
    assert [expert.name for expert in served.client.experts] == ["a", "c"]
    assert served.told[-1] == ["a", "c"]


def of_names(names: str, versions: list[int], priors: list[float] | None = None) -> Reading:
    """A reading of the experts "a", "b", ... in this order."""
    fake = fake_ensemble(*(priors or [1] * len(names)))
    entries = tuple(
        entry.model_copy(update={"name": name})
        for entry, name in zip(fake.manifest.experts, names, strict=True)
    )
    for expert, name in zip(fake.experts, names, strict=True):
        expert.name, expert.path = name, Path("/somewhere", name)  # type: ignore[misc]  # a namespace
    fake.manifest = fake.manifest.model_copy(update={"experts": entries})
    return reading(fake, *versions)


async def test_experts_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are by place, whatever the manifest's order, and as clients see them in that order."""
    served = Served(monkeypatch, places=3)
    client = served.client
    served.now = of_names("cba", [2, 1, 1], [0.5, 0.3, 0.2])
    reloaded = await served.reloader.reload()
    assert str(reloaded) == ("added c; changed the prior of 'b', the prior of 'a', the order of experts")
    assert (served.started, served.plans) == (["c2"], ["a1", "b1", "c2"])
    assert client.seats.of == (2, 1, 0)
    call = client.call_of("fake", None)
    assert np.exp(call.log_weights) == pytest.approx([0.2, 0.3, 0.5])
    assert call.by_expert([[0.2, 0.3, 0.5]]) == [[0.5, 0.3, 0.2]]
    assert call.in_order(["a", "gone", "c"]) == ["c", "a", "gone"]
    assert client.call_of("fake/c", None).only_expert == 2
    asked = Asked(served.server, "r", {"route": "prior"})
    await settle()
    served.now = of_names("cb", [2, 1])
    old = served.server.engines[A]
    removed = asyncio.create_task(served.reloader.reload())
    while not old.errored:
        await asyncio.sleep(0.001)
    await settle()
    assert list(asked.call.degraded) == ["a"]
    assert (await removed).removed == ["a"]
    assert (served.started, served.plans) == (["c2"], [None, "b1", "c2"])
    assert served.up == [False, True, True]
    assert np.exp(client.call_of("fake", None).log_weights) == pytest.approx([0, 0.5, 0.5])
    asked.task.cancel()
    await settle()
    served.now = of_names("cba", [2, 1, 2])
    assert str(await served.reloader.reload()).startswith("added a")
    assert served.plans == ["a2", "b1", "c2"]
    assert client.seats.of == (2, 1, 0)
    assert served.told == [["a", "b", "c"], ["c", "b", "a"], ["c", "b"], ["c", "b", "a"], ["c", "b", "a"]]
    assert_nothing_is_left(served.server)


async def test_an_expert_that_cannot_be_added_leaves_its_place_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch, places=3)
    served.now = of_names("abc", [1, 1, 2])
    served.works.discard("c2")
    reloaded = await served.reloader.reload()
    assert reloaded.failed == "expert 'c' could not be added (no memory)"
    assert served.plans == ["a1", "b1", None]
    await settle()
    assert served.started == ["c2"], "nobody goes on trying"
    assert served.client.ensemble.expert_names == ["a", "b"]


async def test_there_is_only_so_much_room(served: Served) -> None:
    served.now = of_names("abc", [1, 1, 2])
    with pytest.raises(EnsembleError, match=r"has 3 experts, and there is room for 2: .* --max-experts"):
        await served.reloader.reload()
    served.client.health.fewest = 2
    served.now = of_names("a", [1])
    with pytest.raises(EnsembleError, match="--min-experts is 2"):
        await served.reloader.reload()


@pytest.mark.parametrize("refuses", ["read", "plan", "fixed"])
async def test_a_refusal_changes_nothing_and_says_why(served: Served, refuses: str) -> None:
    served.now = reading(fake_ensemble(3, 1), 2, 2)
    if refuses == "read":
        served.read_error = EnsembleError("weights are missing")
    elif refuses == "fixed":
        served.now = replace(served.now, fixed={"weights are missing,": 1})
        served.reloader.served = replace(served.reloader.served, fixed={"weights are missing,": 0})
    else:

        def plan(ensemble: Ensemble, seats: Seats) -> list[Any]:
            raise EnsembleError("weights are missing")

        served.reloader.plan = plan
    with pytest.raises(EnsembleError, match="weights are missing"):
        await served.reloader.reload()
    assert served.started == []
    assert served.plans == ["a1", "b1"]
    assert served.up == [True, True]
    assert [expert.prior for expert in served.client.ensemble.experts] == [1, 1]


async def test_a_version_that_does_not_start_costs_no_expert(served: Served) -> None:
    served.now = reading(fake_ensemble(3, 2), 2, 2)
    served.works.discard("b2")
    reloaded = await served.reloader.reload()
    assert reloaded.exchanged == ["a"]
    assert reloaded.failed == "expert 'b' could not be exchanged (no memory): 'b' as it was before answers on"
    assert served.started == ["a2", "b2", "b1"]
    assert served.plans == ["a2", "b1"]
    assert served.up == [True, True]
    assert [expert.prior for expert in served.client.ensemble.experts] == [3, 1]
    served.works.add("b2")
    again = await served.reloader.reload()
    assert (again.exchanged, again.failed) == (["b"], None)
    assert served.started == ["a2", "b2", "b1", "b2"]
    assert served.client.ensemble is served.now.ensemble


async def test_where_neither_version_starts_it_is_tried_on(served: Served) -> None:
    served.now = reading(fake_ensemble(1, 1), 1, 2)
    served.works -= {"b1", "b2"}
    reloaded = await served.reloader.reload()
    assert reloaded.failed is not None
    assert "'b' as it was before is tried again and again" in reloaded.failed
    served.works.add("b1")
    while not served.up[B]:
        await asyncio.sleep(0.001)
    assert served.plans == ["a1", "b1"]


async def test_an_expert_that_is_down_is_exchanged_too(served: Served) -> None:
    """And whoever was to bring the old one back leaves it at that."""
    served.works.discard("b1")
    served.server.engines[B].die()
    while not served.started:
        await asyncio.sleep(0)
    served.now = reading(fake_ensemble(1, 1), 1, 2)
    reloaded = await served.reloader.reload()
    assert reloaded.exchanged == ["b"]
    assert served.up == [True, True]
    engine = served.server.engines[B]
    await settle()
    assert served.client.experts[B].engine is engine
    assert not engine.errored


async def test_requests_end_on_the_version_that_they_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch, patience_s=60)
    old = list(served.server.engines)
    asked = Asked(served.server, "r", {"weights": {"a": 1, "b": 1}})
    await settle()
    served.now = reading(fake_ensemble(1, 1), 1, 2)
    task = asyncio.create_task(served.reloader.reload())
    while served.up[B]:
        await asyncio.sleep(0.001)
    newcomer = Asked(served.server, "s", {"weights": {"a": 1, "b": 1}})
    await settle()
    assert list(newcomer.call.degraded) == ["b"]
    assert not old[B].errored
    old[A].says("r-0", 5, 6, finished=True)
    await asked.task
    assert asked.call.degraded == {}
    await task
    assert old[B].errored
    old[A].says("s-0", 5, finished=True, mixed=False)
    await newcomer.task
    assert_nothing_is_left(served.server)


async def test_requests_that_take_too_long_are_ridden_over(served: Served) -> None:
    asked = Asked(served.server, "r", {"weights": {"a": 1, "b": 1}})
    await settle()
    served.server.engines[A].says("r-0", 5)
    served.now = reading(fake_ensemble(1, 1), 1, 2)
    served.may_start.clear()
    task = asyncio.create_task(served.reloader.reload())
    while not served.started:
        await asyncio.sleep(0.001)
    await settle()
    assert list(asked.call.degraded) == ["b"]
    served.may_start.set()
    await task
    served.server.engines[A].says("r-0", 6, start=1, finished=True, mixed=False)
    await asked.task
    assert asked.tokens == [5, 6]
    assert_nothing_is_left(served.server)


async def test_who_waits_for_a_slot_is_weighed_by_the_new_version(served: Served) -> None:
    """What the old one said of the prompt is not what the new one would."""
    server, scorer = served.server, served.client._scorer
    holders = [Asked(server, name, {"weights": {"a": 1, "b": 1}}) for name in "xy"]
    await settle()
    assert server.client.slots.in_use == server.client.slots.total
    async with scorer.beginning(PROMPT, (A, B)) as beginning:
        beginning.learn(np.zeros((2, 1)), np.array([-1.0, -2.0]))
    asked = Asked(server, "r", {"route": "posterior"})
    await settle()
    served.now = reading(fake_ensemble(1, 1), 1, 2)
    await served.reloader.reload()
    await settle()
    for holder in holders:
        holder.task.cancel()
    await settle()
    begun = [server.engines[k].latest("r-0").member.scored for k in (A, B)]
    assert begun == [[(3, -1.0), (1, 0.0)]] * 2
    asked.task.cancel()
    await settle()


async def test_sighup_logs_what_comes_of_it(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "decar")
    served.read_error = EnsembleError("weights are missing")
    served.reloader.reload_soon()
    while "nothing is changed: weights are missing" not in caplog.text:
        await asyncio.sleep(0.001)
    served.read_error = None
    served.now = reading(fake_ensemble(1, 3), 1, 1)
    served.reloader.reload_soon()
    while "reloaded: changed the prior of 'b'" not in caplog.text:
        await asyncio.sleep(0.001)


async def test_over_http_only_the_admin_reloads(served: Served) -> None:
    app = app_of("user", admin="admin", server=served.server, reloader=served.reloader)
    async with client_of(app) as client:

        async def post(key: str) -> httpx.Response:
            return await client.post("/v1/ensemble/reload", headers={"authorization": f"Bearer {key}"})

        refused = await post("user")
        assert refused.status_code == 403
        assert "changes what is served" in refused.json()["error"]["message"]
        assert (
            await client.get("/v1/ensemble/reload", headers={"authorization": "Bearer admin"})
        ).status_code == 405
        done = await post("admin")
        assert done.json() == {
            "object": "ensemble.reload",
            **{what: [] for what in ("exchanged", "added", "removed")},
            "message": "nothing has changed",
        }
        served.read_error = EnsembleError("weights are missing")
        bad = await post("admin")
        assert (bad.status_code, bad.json()["error"]["message"]) == (
            400,
            "nothing is changed: weights are missing",
        )
        served.read_error = None
        served.now = reading(fake_ensemble(1, 1), 1, 2)
        served.works.discard("b2")
        failed = await post("admin")
        assert failed.status_code == 500
        assert "could not be exchanged (no memory)" in failed.json()["error"]["message"]
        served.may_start.clear()
        running = asyncio.create_task(served.reloader.reload())
        while len(served.started) < 3:
            await asyncio.sleep(0.001)
        assert (await post("admin")).status_code == 409
        served.may_start.set()
        await running
