"""Experts on the nodes of a Ray cluster: the same answers, and the same end.

Nodes are machines of their own as far as that goes: namespaces that share neither network nor memory, where this
process may make such; else they are in one place, and what needs a network is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from decar.benchmarks.network import Switch, network, no_network
from decar.benchmarks.nodes import NAMES, RayCluster, ray_cluster
from decar.server.cluster.host import SHIPPED
from tests.e2e.conftest import LOADED
from tests.e2e.test_active import (
    PENALTIES,
    check_pruned,
    check_seeded,
    check_what_depends_on_the_answer_so_far,
    clear,
)
from tests.e2e.test_exact import RULES, check, check_alone, clear_answers, routed
from tests.e2e.test_hosts import check_killed
from tests.e2e.test_load import check_cancelled, check_under_load
from tests.e2e.test_loss import BACK_WITHIN_S, is_up, pid_of, wait_until_another
from tests.e2e.test_ranks import answers_under_way, check_scored, check_whole
from tests.helpers import Server, wait_until
from tests.reference import Reference, Rule

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
needs_network = pytest.mark.skipif(bool(no_network()), reason=no_network())

NODES = int(os.environ.get("DECAR_NODES", "2"))
SOME = 8
GONE_WITHIN_S = 30


@pytest.fixture(scope="module")
def switch() -> Iterator[Switch | None]:
    if no_network():
        yield None
        return
    with network(NAMES[:NODES]) as switch:
        yield switch


@pytest.fixture(scope="module")
def cluster(switch: Switch | None) -> Iterator[RayCluster]:
    with ray_cluster(NODES, switch) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def experts(duo: Reference, trio: Reference) -> Reference:
    return duo if NODES == 2 else trio


@pytest.fixture(scope="module")
def server(
    experts: Reference, cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "ray.log"
    wish = ",".join(
        f"{name}=node:{node.name}" for name, node in zip(experts.experts, cluster.nodes, strict=True)
    )
    flags = (*LOADED, "--ray", cluster.address, "--placement", wish)
    head = cluster.head
    server = Server.start(experts.directory, log, flags, cluster.environment, head.inside, head.address)
    try:
        yield server
        assert server.stop() == 0, server.log_tail()
        left = {node.name: node.shared_memory() for node in cluster.nodes}
        wait_until(lambda: not any(node.shared_memory() for node in cluster.nodes), 10, f"nothing of {left}")
    finally:
        server.kill()


@contextlib.contextmanager
def links(
    switch: Switch | None, delay_ms: float, stall_s: float = 0.0, stalls_per_s: float = 0.0
) -> Iterator[None]:
    assert switch is not None
    switch.be(delay_ms, stall_s, stalls_per_s)
    try:
        yield
    finally:
        switch.be()


def test_each_expert_is_on_its_node(server: Server, experts: Reference, cluster: RayCluster) -> None:
    for expert, node in zip(experts.experts, cluster.nodes, strict=True):
        assert psutil.Process(pid_of(server, expert)) in node.processes()


@pytest.mark.parametrize("rule", RULES)
async def test_answers_are_the_mixtures(server: Server, experts: Reference, rule: Rule) -> None:
    await check(server, experts, routed("posterior"), rule, SOME)


async def test_also_where_experts_leave_and_hand_over(server: Server, experts: Reference) -> None:
    await check_pruned(server, experts, clear(experts, 0.1), 0.1)
    await check_what_depends_on_the_answer_so_far(server, experts, clear(experts, 0.1, **PENALTIES))
    await check_seeded(server, experts, [one.prompt for one in clear(experts, 0.1)])


async def test_an_expert_alone(server: Server, experts: Reference) -> None:
    for name in experts.experts:
        await check_alone(server, experts.alone(name), SOME)


async def test_prompts_that_are_scored(server: Server, experts: Reference) -> None:
    """By rows of the whole mixture, which come from another host's memory."""
    await check_scored(server, experts)


@needs_network
async def test_links_that_take_ten_milliseconds(
    server: Server, experts: Reference, switch: Switch | None
) -> None:
    with links(switch, 10):
        await check(server, experts, routed("posterior"), "velocity", SOME)
        await check_pruned(server, experts, clear(experts, 0.1), 0.1)


@needs_network
async def test_links_that_are_slow_and_stall(
    server: Server, experts: Reference, switch: Switch | None
) -> None:
    with links(switch, 50, stall_s=0.5, stalls_per_s=0.5):
        await check(server, experts, routed("posterior"), "velocity", SOME)


@needs_network
async def test_a_slow_link_holds_nobody_up_who_does_not_need_it(
    server: Server, experts: Reference, switch: Switch | None
) -> None:
    """Answers of 24 tokens by one expert take as many steps; those that need the link get on by a token or two."""

    def mixed() -> int:
        return sum(expert["lockstep"]["mixed_tokens"] for expert in server.ensemble()["experts"])

    prompts = [one.prompt for one in clear_answers(experts, {}, SOME)]
    async with answers_under_way(server, experts, prompts) as under_way:
        assert switch is not None
        switch.be(delay_ms=500)
    before = mixed()
    await check_alone(server, experts.alone(experts.experts[0]), SOME)
    assert mixed() - before < SOME * 24 // 4
    assert not under_way.done()
    switch.be()
    await check_whole(under_way, [])


@needs_network
async def test_a_partition_of_five_seconds_changes_no_answer(
    server: Server, experts: Reference, switch: Switch | None, cluster: RayCluster
) -> None:
    assert switch is not None
    prompts = [one.prompt for one in clear_answers(experts, {}, SOME)]
    async with answers_under_way(server, experts, prompts) as under_way:
        switch.be(cut=cluster.nodes[-1].name)
    await asyncio.sleep(5)
    assert not under_way.done()
    switch.be()
    await check_whole(under_way, [])
    await check(server, experts, routed("posterior"), "velocity", SOME)


@needs_network
async def test_connections_that_are_reset_take_an_expert_away(
    server: Server, experts: Reference, cluster: RayCluster
) -> None:
    """What is lost of what an engine says is not said again: it is started anew. Rows and weights lose nothing."""
    lost, node = experts.experts[-1], cluster.nodes[-1]
    before = pid_of(server, lost)
    prompts = [one.prompt for one in clear_answers(experts, {}, SOME)]
    async with answers_under_way(server, experts, prompts) as under_way:
        port = cluster.links_port(server.process.pid)
        reset = ["ss", "--kill", "--no-header", "dst", cluster.head.address, "dport", "=", str(port)]
        done = subprocess.run([*node.inside, *reset], capture_output=True, text=True, check=False)
        assert len(done.stdout.splitlines()) == 3, "one of the hosts, two of the engine and its client"
    await check_whole(under_way, [lost])
    await asyncio.to_thread(wait_until_another, server, lost, before)
    await check(server, experts, routed("posterior"), "velocity", SOME)


@pytest.mark.soak
@needs_network
@pytest.mark.parametrize("delay_ms", [0, 10])
async def test_many_at_once_and_some_that_leave(
    server: Server, experts: Reference, switch: Switch | None, delay_ms: float
) -> None:
    with links(switch, delay_ms):
        leaders, _, _ = await check_under_load(server, experts)
        assert len(leaders) > 1
        await check_cancelled(server, experts)


@pytest.mark.soak
@needs_network
async def test_a_partition_of_a_minute_takes_an_expert_away(
    server: Server, experts: Reference, switch: Switch | None, cluster: RayCluster
) -> None:
    assert switch is not None
    lost = experts.experts[-1]
    before = pid_of(server, lost)
    prompts = [one.prompt for one in clear_answers(experts, {}, SOME)]
    async with answers_under_way(server, experts, prompts) as under_way:
        switch.be(cut=cluster.nodes[-1].name)
    for answer, summary in await asyncio.wait_for(under_way, GONE_WITHIN_S + 30):
        assert len(answer.tokens) == 200
        assert summary["degraded"] == [lost]
    await asyncio.sleep(60 - GONE_WITHIN_S)
    switch.be()
    await asyncio.to_thread(wait_until_another, server, lost, before)
    await check(server, experts, routed("posterior"), "velocity", SOME)


@pytest.mark.soak
@pytest.mark.parametrize("which", [0, NODES - 1])
async def test_an_engine_that_is_killed_is_back(server: Server, experts: Reference, which: int) -> None:
    await check_killed(server, experts, experts.experts[which])


@pytest.mark.soak  # Ray takes its time to believe it
async def test_a_node_that_dies_and_comes_back(
    server: Server, experts: Reference, cluster: RayCluster
) -> None:
    lost, node = experts.experts[-1], cluster.nodes[-1]
    prompts = [one.prompt for one in clear_answers(experts, {}, SOME)]
    async with answers_under_way(server, experts, prompts) as under_way:
        node.kill()
    await check_whole(under_way, [lost])
    assert not is_up(server, lost)
    await asyncio.to_thread(cluster.start, node.machine)
    await asyncio.to_thread(wait_until, lambda: is_up(server, lost), 2 * BACK_WITHIN_S, server.log_tail)
    await check(server, experts, routed("posterior"), "velocity", SOME)


def test_inspect_shows_what_would_be_where_and_what_is_missing(
    experts: Reference, cluster: RayCluster, server: Server
) -> None:
    """``server`` has its part of the cluster by then."""

    def shown(directory: Path, node: str) -> subprocess.CompletedProcess[str]:
        options = ["--ray", cluster.address, "--placement", f"{experts.experts[0]}=node:{node}"]
        return subprocess.run(
            [*cluster.head.inside, sys.executable, "-m", "decar.server", "inspect", str(directory), *options],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    ensemble, last = experts.directory, cluster.nodes[-1]
    found = shown(ensemble, last.name)
    assert found.returncode == 0, found.stderr
    rows = [line.split() for line in found.stdout.splitlines() if f" {last.name} " in line]
    assert rows[0][:3] == [experts.experts[0], last.name, last.address]
    wrong = shown(ensemble, "nowhere")
    assert wrong.returncode == 1
    assert "there is no node 'nowhere'" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    if last.machine.inside:  # each has a /dev/shm of its own
        here = Path("/dev/shm/ensemble")
        subprocess.run([*cluster.head.inside, "cp", "-r", str(ensemble), str(here)], check=True)
        missing = shown(here, last.name)
        subprocess.run([*cluster.head.inside, "rm", "-r", str(here)], check=True)
        assert missing.returncode == 1
        assert (
            f"problem: node {last.name!r}: there is no {here}/experts/{experts.experts[0]}/" in missing.stderr
        )


@pytest.mark.soak
@needs_network
async def test_weights_that_a_node_lacks_are_brought_there(
    experts: Reference, cluster: RayCluster, server: Server, tmp_path: Path
) -> None:
    """Only the gateway's machine has them; ``server`` is there, and has no part in it."""
    here, last = Path("/dev/shm/ensemble"), cluster.nodes[-1]
    subprocess.run([*cluster.head.inside, "cp", "-r", str(experts.directory), str(here)], check=True)
    wish = ",".join(f"{name}=node:{last.name}" for name in experts.experts)
    flags = (*LOADED, "--ray", cluster.address, "--placement", wish, "--ship-weights")
    log, head = tmp_path / "ship.log", cluster.head
    shipping = await asyncio.to_thread(
        Server.start, here, log, flags, cluster.environment, head.inside, head.address
    )
    try:
        await check(shipping, experts, routed("posterior"), "velocity", SOME)
        assert shipping.stop() == 0, shipping.log_tail()
    finally:
        shipping.kill()
    for machine in (head, last):
        same = ("diff", "-r", f"--exclude={SHIPPED}", f"{here}/experts", f"{experts.directory}/experts")
        subprocess.run([*machine.inside, *same], check=True)
        subprocess.run([*machine.inside, "rm", "-r", str(here)], check=True)
