"""decar's part of a host in a cluster, and what begins it anew: with processes of its own, and no Ray."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from decar.router.errors import StartError
from decar.server.cluster import actors, hosts
from decar.server.cluster.host import Host, listen_at
from decar.server.cluster.hosts import ClusterHosts, HostGone, wrong_with
from decar.server.cluster.nodes import Held, Node, Plan
from decar.server.protocol.plane import Plane
from decar.server.protocol.runtime import DIRECTORY
from decar.server.vllm_adapter.actor import ActorManager, ActorProcess
from tests.helpers import SHARED_MEMORY, wait_until

SHAPE = {"experts": 3, "slots": 2, "vocab_size": 8, "positions": 16}
NODES = tuple(Node(str(i), name, "127.0.0.1", 2) for i, name in enumerate(("ada", "grace", "mary")))


@pytest.fixture
def host() -> Iterator[Host]:
    before = set(SHARED_MEMORY.iterdir())
    host = Host()
    yield host
    host.close()
    assert set(SHARED_MEMORY.iterdir()) <= before


def engine() -> subprocess.Popen[bytes]:
    """What stands for one: a process that has a child."""
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    return subprocess.Popen([sys.executable, "-c", f"import subprocess, sys, time; {child} time.sleep(600)"])


def test_an_engine_ends_with_all_that_it_has_started(host: Host) -> None:
    with engine() as process:
        host.started(1, process.pid)
        wait_until(lambda: psutil.Process(process.pid).children(), 10, "it has a child")
        [child] = psutil.Process(process.pid).children()
        host.end(1, process.pid + 1)
        assert process.poll() is None, "that is another one"
        host.end(0)
        assert process.poll() is None, "that is another's"
        host.end(1, process.pid)
        assert process.poll() is not None
        wait_until(
            lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10, "its child ends too"
        )


def test_who_has_got_the_number_of_an_engine_that_has_ended_lives(host: Host) -> None:
    with engine() as process:
        host.started(1, process.pid)
        host._engines[1]._ident = (process.pid, 1.0)  # its number is another's by now
        host.end(1)
        assert process.poll() is None
        for other in [*psutil.Process(process.pid).children(), process]:
            other.kill()


def test_one_before_ends_before_another_has_its_channels(host: Host) -> None:
    with engine() as process:
        first = host.open(1, 1)
        host.started(1, process.pid)
        second = host.open(1, 2)
        assert process.poll() is not None
    assert set(first).isdisjoint(second)
    there = [Path(path.removeprefix("ipc://")).exists() for path in (*first, *second)]
    assert there == [False, False, True, True]
    host.end(1, process.pid)
    assert all(Path(path.removeprefix("ipc://")).exists() for path in second), "they are another engine's"


def test_a_break_that_is_heard_late_ends_nobody_else(host: Host) -> None:
    with engine() as process:
        host.open(1, 1)
        host.open(1, 2)
        host.started(1, process.pid)
        host._lost(1, 1)
        assert process.poll() is None
        host._lost(1, 2)
        assert process.poll() is not None


def test_rows_of_a_prompt(host: Host) -> None:
    name = host.make_rows(4096)
    (DIRECTORY / name).write_bytes(bytes(range(256)) * 16)
    assert host.take_rows(name).tobytes() == bytes(range(256)) * 16
    host.drop_rows(name)
    assert not (DIRECTORY / name).exists()
    host.drop_rows(name)


class Elsewhere:
    """A host whose files lie elsewhere."""

    def __init__(self, host: Host):
        self._wrong = host.wrong

    def wrong(self, directory: str, files: Any) -> str | None:
        return self._wrong(f"/elsewhere{directory}", files)


def test_a_checkpoint_has_to_be_the_same(host: Host, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    facts = host.facts()
    assert wrong_with(NODES[1], host, facts, facts, [tmp_path]) == []
    assert host.wrong(str(tmp_path), {config.name: (3, 0)}) == f"{config} has 2 bytes, and 3 at the gateway"
    [missing] = wrong_with(NODES[1], Elsewhere(host), facts, facts, [tmp_path])  # type: ignore[arg-type]
    assert missing.startswith(
        f"node 'grace': there is no /elsewhere{config}; weights have to be at the same path"
    )
    other = SimpleNamespace(versions={**facts.versions, "vLLM": "0.1"})
    build = SimpleNamespace(versions={**facts.versions, "vLLM for": "GPUs"})
    [said] = wrong_with(NODES[1], host, facts, build)  # type: ignore[arg-type]
    assert said == "node 'grace' has vLLM for CPUs, and the gateway GPUs: install the same there"
    [said] = wrong_with(NODES[1], host, facts, other)  # type: ignore[arg-type]
    assert "node 'grace' has vLLM" in said
    assert "and the gateway 0.1: install the same there" in said


def test_an_address_that_is_another_machines_is_told() -> None:
    with pytest.raises(StartError, match=r"192\.0\.2\.77, which Ray has as this node's address"):
        listen_at("192.0.2.77")


def test_what_an_actor_has_made_goes_however_it_ends() -> None:
    script = (
        "from decar.server.cluster.host import Host; host = Host(guarded=True); "
        "print(host.facts().folder, flush=True); import time; time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.kill()
    wait_until(lambda: not folder.exists(), 10, "it is removed")


# --- hosts that are lost ----------------------------------------------------------------------------------


class FakeHost(Host):
    """One that may not answer, or be gone."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: Exception | None = None
        self.told: list[tuple[int, tuple[str, int]]] = []

    def facts(self) -> Any:
        if self.fails is not None:
            raise self.fails
        return super().facts()

    def moved(self, peer: int, address: tuple[str, int]) -> None:
        self.facts()
        self.told.append((peer, address))


class FakeCluster:
    def __init__(self) -> None:
        self.there = list(NODES)
        self.begun: list[FakeHost] = []
        self.ended: list[FakeHost] = []
        self.held: list[tuple[Node, int]] = []
        self.gives: tuple[str, ...] = ("0", "1")

    def nodes(self) -> list[Node]:
        return self.there

    def node(self, name: str) -> Node | None:
        return next((node for node in self.there if node.name == name), None)

    def begin(self, node: Node) -> FakeHost:
        self.begun.append(FakeHost())
        return self.begun[-1]

    def hold(self, node: Node, gpus: int) -> Held:
        self.held.append((node, gpus))
        return Held((), self.gives)

    def end(self, actor: FakeHost) -> None:
        self.ended.append(actor)
        Host.close(actor)


Three = tuple[ClusterHosts, FakeCluster]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[Three]:
    """A gateway's host and two others, each with an expert."""
    monkeypatch.setattr(hosts, "HostElsewhere", lambda actor, name: actor)
    cluster = FakeCluster()
    there = ClusterHosts(cluster, Plan(NODES, (0, 1, 2)), SHAPE, b"k" * 32)  # type: ignore[arg-type]
    plane = Plane.create(**SHAPE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there.begin(plane.spec, listener.getsockname()[:2])
        yield there, cluster
    there.close()
    plane.unlink()


def test_a_host_that_does_not_answer_just_now_is_not_begun_anew(three: Three) -> None:
    there, cluster = three
    first = there.ready(1).host
    cluster.begun[0].fails = StartError("it does not answer")
    with pytest.raises(StartError, match="does not answer"):
        there.ready(1)
    cluster.begun[0].fails = None
    assert there.ready(1).host is first
    assert len(cluster.begun) == 2
    assert cluster.ended == []


def test_a_host_that_is_gone_is_begun_anew_and_the_others_are_told(three: Three) -> None:
    there, cluster = three
    one, two = cluster.begun
    one.fails, two.fails = HostGone("it has ended"), StartError("it does not answer")
    back = there.ready(1)
    assert back.host is cluster.begun[2]
    assert cluster.ended == [one], "two must not have one number"
    assert two.told == []
    two.fails = None
    there.ready(1)
    assert two.told == [(1, there._addresses[1])]
    there.ready(2)
    assert len(two.told) == 1, "once is enough"
    assert there.ready(1) is back


def test_a_node_that_is_lost_is_waited_for(three: Three) -> None:
    there, cluster = three
    cluster.there.remove(NODES[1])
    with pytest.raises(StartError, match="its node 'grace' is not in the cluster"):
        there.ready(1)
    assert there.ready(2).node is NODES[2]
    again = Node("9", "grace", "127.0.0.1", 2)
    cluster.there.append(again)
    assert there.ready(1).node is again


def test_a_node_that_is_back_gives_its_gpus_again(three: Three) -> None:
    there, cluster = three
    there._given = [("0",), ("1", "0"), ()]
    again = Node("9", "grace", "127.0.0.1", 2, 2.0, 2)
    cluster.there[1] = again
    there.ready(1)
    assert cluster.held == [(again, 2)]
    cluster.begun[-1].fails = HostGone("it has ended")
    there.ready(1)
    assert len(cluster.held) == 1, "its node never went, nor did they"
    cluster.begun[1].fails = HostGone("it has ended")
    there.ready(2)
    assert len(cluster.held) == 1, "there are no engines on GPUs there"


def test_other_gpus_than_its_engines_use_are_refused_but_where_those_are_named(three: Three) -> None:
    there, cluster = three
    there._given = [("0",), ("1", "0"), ()]
    cluster.gives = ("1", "3")
    cluster.there[1] = Node("9", "grace", "127.0.0.1", 2, 2.0, 2)
    with pytest.raises(
        StartError, match="Ray has given GPU 1, 3 there, and its engines are to use 1, 0: end"
    ):
        there.ready(1)
    there._plan = replace(there._plan, wished={1: (0, 1)})
    there.ready(1)


def test_a_beginning_that_fails_half_way_is_begun_again(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, cluster = three
    cluster.begun[0].fails = HostGone("it has ended")
    connect = FakeHost.connect

    def fail(*_: Any) -> None:
        raise StartError("it does not answer")

    monkeypatch.setattr(FakeHost, "connect", fail)
    with pytest.raises(StartError, match="does not answer"):
        there.ready(1)
    monkeypatch.setattr(FakeHost, "connect", connect)
    assert there.ready(1).host is cluster.begun[3]
    assert cluster.ended == [cluster.begun[0], cluster.begun[2]]


def test_an_engine_without_a_free_cpu_is_not_waited_for(three: Three, tmp_path: Path) -> None:
    there, _ = three
    there.check(1, there.ready(1), tmp_path, 2)
    with pytest.raises(StartError, match="node 'grace' has 2 free CPUs of Ray's, and 3 are needed"):
        there.check(1, there.ready(1), tmp_path, 3)


# --- engines that are actors ------------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set: Ray says that an actor has ended."""
    ended = threading.Event()
    fake = SimpleNamespace(wait=lambda refs, timeout: (refs, []) if ended.wait(0.01) else ([], refs))
    monkeypatch.setitem(sys.modules, "ray", fake)
    return ended


@pytest.mark.parametrize("why", ["ended", "silent", "killed"])
def test_an_engine_is_given_up(ended: threading.Event, why: str) -> None:
    ends = threading.Event()
    now = iter(range(10_000))
    process = ActorProcess("code", 1, None, ends.set)
    heard: Callable[[], float] = (lambda: 5.0) if why == "silent" else (lambda: float(next(now)))
    manager = ActorManager(process, object(), heard, gone_s=5)
    watching = threading.Thread(target=manager.monitor_engine_liveness)
    watching.start()
    if why == "ended":
        ended.set()
    elif why == "killed":
        process.kill()
    watching.join(10)
    assert not watching.is_alive()
    assert ends.wait(10)
    assert not process.is_alive()


def test_engines_get_what_was_set_for_them_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"HOME": "/root", "PATH": "/bin", "VLLM_X": "1", "HF_TOKEN": "t", "RAY_A": "1"}
    now = {**before, "SET_SINCE": "1", "VLLM_API_KEY": "k", "VLLM_RPC_BASE_PATH": "/p", "RAY_B": "1"}
    monkeypatch.setattr(actors.os, "environ", now)
    assert actors._environment_for_actors(before) == {"VLLM_X": "1", "SET_SINCE": "1"}
