"""Planes of several hosts, kept alike over real connections: engines are threads; memory, protocol, sockets are real.

What is decided on hosts apart has to be what is decided on one: the same rows are mixed, the same tokens kept by all,
and the gateway reads the same weights, whatever the links between them do.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from decar.router import moved_on
from decar.server.gateway.weights import WeightsReader
from decar.server.protocol import links
from decar.server.protocol.links import Mirror, NotOfUs, accept_peer, introduce, make_bell
from decar.server.protocol.lockstep import HELD, Lockstep, Observer, Turns
from decar.server.protocol.member import Member
from decar.server.protocol.mirror import (
    GATEWAY,
    LENGTH,
    Hosts,
    Incoming,
    Outgoing,
    OutgoingHeader,
    WireError,
    longest_message,
)
from decar.server.protocol.plane import NOTHING, Plane, stamp_of
from decar.server.protocol.transport import HostTransport
from tests.helpers import wait_until

VOCABULARY, SLOTS, POSITIONS = 40, 4, 600
KEY = b"k" * 32


class Relay:
    """Carries a connection's bytes to ``target``, as the link that it stands for would."""

    def __init__(self, target: tuple[str, int]):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.delay_s = 0.0
        self.stalls = False
        self.open = threading.Event()
        self.open.set()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        chance = random.Random(0)
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                self.open.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                if self.stalls and chance.random() < 0.02:
                    time.sleep(0.5)
                sink.sendall(data)

    def reset(self) -> None:
        """End the connections that there are, in the midst of whatever is under way."""
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def close(self) -> None:
        self._listener.close()
        self.reset()


@dataclass
class Cluster:
    """A plane and a mirror on each host."""

    hosts: Hosts
    planes: dict[int, Plane]
    mirrors: dict[int, Mirror]
    relays: dict[tuple[int, int], Relay]

    def plane_of(self, expert: int) -> Plane:
        return self.planes[self.hosts.of[expert]]

    @property
    def gateway(self) -> Plane:
        return self.planes[GATEWAY]

    def connected(self) -> bool:
        """Whether the gateway hears all experts."""
        return all(self.gateway.mirrored > 0)


@contextlib.contextmanager
def cluster(folder: Path, *of: int, wire_rows: int = 0) -> Iterator[Cluster]:
    hosts = Hosts(of)
    planes: dict[int, Plane] = {}
    mirrors: dict[int, Mirror] = {}
    relays: dict[tuple[int, int], Relay] = {}
    listeners = {host: socket.create_server(("127.0.0.1", 0)) for host in hosts.all}
    try:
        for host in hosts.all:
            bell = make_bell(folder, f"bell-{host}")
            planes[host] = Plane.create(len(of), SLOTS, VOCABULARY, POSITIONS, bell=bell, wire_rows=wire_rows)
            planes[host].mirrored[[k for k, its in enumerate(of) if its != host]] = 0.0
            for below in (other for other in hosts.all if other < host):
                relays[host, below] = Relay(listeners[below].getsockname())
            addresses = {below: relays[at, below].address for at, below in relays if at == host}
            mirrors[host] = Mirror(planes[host], host, hosts, KEY, listeners[host], addresses)
        for mirror in mirrors.values():
            mirror.start()
        made = Cluster(hosts, planes, mirrors, relays)
        wait_until(made.connected, 20, "all hosts are connected")
        yield made
    finally:
        for mirror in mirrors.values():
            mirror.close()
        for relay in relays.values():
            relay.close()
        for plane in planes.values():
            plane.unlink()


def row_of(expert: int, slot: int, position: int) -> torch.Tensor:
    """What an expert's model says there, [V]."""
    generator = torch.Generator().manual_seed(1 + expert + 100 * slot + 10_000 * position)
    return 3 * torch.randn(VOCABULARY, generator=generator)


def reference(experts: tuple[int, ...], slot: int, count: int) -> tuple[list[int], np.ndarray]:
    """The greedy tokens of the mixture, and the weights that mixed each."""
    log_weights, tokens, weights = np.full(len(experts), -np.log(len(experts))), [], []
    for position in range(count):
        rows = torch.stack([row_of(k, slot, position) for k in experts]).double().log_softmax(-1)
        weights.append(np.exp(log_weights))
        tokens.append(int((rows + torch.from_numpy(log_weights)[:, None]).logsumexp(0).argmax()))
        log_weights = moved_on(log_weights[None], rows[:, tokens[-1]].numpy()[None])[0]
    return tokens, np.array(weights)


@dataclass
class Engine:
    """One expert's: a scheduler, which leaves held requests out, and a worker, which decides the others."""

    plane: Plane
    expert: int
    members: list[Member]
    count: int
    said: dict[int, list[int]] = field(default_factory=dict)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.lockstep = Lockstep(self.plane, self.expert, HostTransport(self.plane, self.expert))
        self._observer = Observer(self.plane, self.expert)
        self._held: set[int] = set()
        for member in self.members:
            self.lockstep.join(member)
            self.said[member.slot] = []
        self._by_slot = {member.slot: member for member in self.members}

    def run(self) -> None:
        try:
            while any(len(tokens) < self.count for tokens in self.said.values()):
                self._step()
        except BaseException as error:
            self.error = error

    def _due(self) -> list[int]:
        due = []
        for slot, tokens in self.said.items():
            member, position = self._by_slot[slot], len(tokens)
            if slot in self._held:
                if member.leader == self.expert:
                    if not self._observer.rows_may_come(member, position):
                        continue
                else:
                    token = self._observer.decided(member, position)
                    if token is None:
                        continue
                    tokens.append(token)
                    self.lockstep.learn(member)
                self._held.discard(slot)
            if len(tokens) < self.count:
                due.append(slot)
        return due

    def _step(self) -> None:
        self._observer.mine.beat()
        slots = np.array(self._due(), np.int64)
        if not len(slots):
            time.sleep(0.0005)
            return
        lockstep = self.lockstep
        turns = lockstep.turns(slots, lockstep.produced[slots])
        turns.rows = np.arange(len(slots))
        lockstep.announce(turns)
        rows = [
            row_of(self.expert, s, p) for s, p in zip(slots.tolist(), turns.positions.tolist(), strict=True)
        ]
        lockstep.post(turns, torch.stack(rows))
        ready = lockstep.wait_for_rows(turns.where(turns.leaders == self.expert))
        if len(ready):
            tokens = lockstep.mixed(ready).argmax(-1).numpy()
            lockstep.publish(ready, tokens)
            self._keep(ready.slots, tokens)
        followed = turns.where(turns.leaders != self.expert)
        adopted = lockstep.adopt(followed)
        self._keep(followed.slots, adopted)
        lockstep.finish(turns)
        done = {*ready.slots.tolist(), *followed.slots[adopted != HELD].tolist()}
        self._held |= {slot for slot in slots.tolist() if slot not in done}

    def _keep(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            if token != HELD:
                self.said[slot].append(token)


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Threads that look again and again leave the others little, here, where they are of one process."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    yield
    sys.setswitchinterval(before)


def members_of(experts: int, leaders: list[int]) -> list[Member]:
    return [
        Member(
            slot=slot,
            generation=slot + 1,
            leader=leader,
            active=tuple(range(experts)),
            rule="velocity",
            log_weights=[-float(np.log(experts))] * experts,
            posterior=True,
        )
        for slot, leader in enumerate(leaders)
    ]


def decide(made: Cluster, count: int, leaders: list[int], deadline_s: float = 120) -> Iterator[int]:
    """Have all experts decide ``count`` tokens of a request for each of ``leaders``, read by the gateway as they come.
    Gives how many are there, again and again, and checks them at the end."""
    experts = len(made.hosts.of)
    engines = [Engine(made.plane_of(k), k, members_of(experts, leaders), count) for k in range(experts)]
    readers = [
        WeightsReader(made.gateway, member, [str(k) for k in range(experts)])
        for member in members_of(experts, leaders)
    ]
    made.gateway.tell_others()
    threads = [threading.Thread(target=engine.run, daemon=True) for engine in engines]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    said = [
        (time.monotonic(), 0) for _ in leaders
    ]  # when, and how many tokens; this machine's clock is all hosts'
    while any(thread.is_alive() for thread in threads):
        assert time.monotonic() < end, [engine.said for engine in engines]
        for slot, leader in enumerate(leaders):
            when, there = said[slot]
            if made.gateway.mirrored[leader] >= when:
                readers[slot].keep_up(there)
                there = len(engines[leader].said[slot])
                said[slot] = time.monotonic(), there
        yield sum(len(tokens) for engine in engines for tokens in engine.said.values())
        time.sleep(0.001)
    assert [engine.error for engine in engines] == [None] * experts
    after = time.monotonic()
    for k in range(experts):
        made.plane_of(k).tell_others()
    wait_until(lambda: (made.gateway.mirrored >= after).all(), 20, "the gateway's host knows all")
    for slot, leader in enumerate(leaders):
        tokens, weights = reference(tuple(range(experts)), slot, count)
        assert all(engine.said[slot] == tokens for engine in engines), (slot, leader)
        np.testing.assert_allclose(readers[slot].between(0, count), weights, atol=1e-5)


@pytest.mark.parametrize(
    ("of", "count"),
    [((0, 1), 300), ((1, 2), 60), ((0, 1, 2), 60)],
    ids=["gateway-and-one-beyond-the-ring", "two", "three"],
)
def test_hosts_decide_what_one_would(tmp_path: Path, of: tuple[int, ...], count: int) -> None:
    with cluster(tmp_path, *of) as made:
        for _ in decide(made, count, [0, 1, len(of) - 1, 0] if count < 100 else [0, 1]):
            pass


def test_rows_go_to_their_leaders_host_alone(tmp_path: Path) -> None:
    with cluster(tmp_path, 0, 1, 2) as made:
        for _ in decide(made, 20, [1]):
            pass
        entry = stamp_of(1, 19) & 1
        rows = {host: plane.fields["rows"][:, entry].any(axis=1) for host, plane in made.planes.items()}
        assert rows[0].tolist() == [True, False, False]
        assert rows[1].tolist() == [True, True, True]
        assert rows[2].tolist() == [False, False, True]


def test_a_connection_that_is_reset_loses_nothing(tmp_path: Path) -> None:
    chance, resets = random.Random(0), 0
    with cluster(tmp_path, 0, 1, 2) as made:
        for step, _ in enumerate(decide(made, 150, [0, 1, 2])):
            if step % 40 == 39 and resets < 8:
                resets += 1
                chance.choice(list(made.relays.values())).reset()
    assert resets >= 3


def test_a_slow_link_that_stalls_changes_no_token(tmp_path: Path) -> None:
    with cluster(tmp_path, 0, 1) as made:
        relay = made.relays[1, 0]
        relay.delay_s, relay.stalls = 0.005, True
        for _ in decide(made, 40, [0, 1]):
            pass


def test_a_partition_is_noticed_and_outlived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SILENT_S", 0.5)
    with cluster(tmp_path, 0, 1) as made:
        relay, deciding = made.relays[1, 0], decide(made, 120, [0, 1])
        while next(deciding) < 100:
            pass
        relay.open.clear()
        wait_until(
            lambda: (
                not made.planes[0].fields["running"][1].any()
                and not made.planes[1].fields["running"][0].any()
            ),
            20,
            "neither host waits for the other",
            0.001,
        )
        relay.open.set()
        relay.reset()
        for _ in deciding:
            pass


def test_a_dead_expert_is_dead_everywhere(tmp_path: Path) -> None:
    with cluster(tmp_path, 0, 1, 2) as made:
        made.plane_of(1).blocks[1].running[0] = stamp_of(1, 0)
        made.plane_of(1).tell_others()
        wait_until(lambda: made.planes[2].blocks[1].running[0] == stamp_of(1, 0), 10, "it runs")
        made.gateway.alive[1] = 0
        made.gateway.tell_others()
        wait_until(
            lambda: not any(made.planes[host].alive[1] for host in (1, 2)), 10, "it is known to be dead"
        )
        wait_until(lambda: made.planes[2].blocks[1].running[0] == NOTHING, 10, "nobody waits for it")
        made.gateway.alive[1] = 1
        made.gateway.tell_others()
        wait_until(lambda: made.planes[2].alive[1] == 1, 10, "it is back")


def test_what_an_engine_runs_is_told_no_longer_than_its_row_is_missing() -> None:
    """And not withdrawn before: a leader would take it that there is none."""
    planes = [Plane.create(2, SLOTS, VOCABULARY, POSITIONS) for _ in range(2)]
    hosts, stamp = Hosts((0, 1)), stamp_of(1, 0)
    here, there = planes
    for plane in planes:
        plane.unlink()
    told, heard = Outgoing(there, 1, hosts, GATEWAY), Incoming(here, hosts, 1)
    mine, [entry] = there.blocks[1], [stamp & 1]

    def bring(message: bytes) -> None:
        heard.apply(memoryview(message)[LENGTH.size :])

    mine.running[0] = stamp
    message, rows = told.news(False)
    bring(message)
    assert (here.blocks[1].running[0], rows) == (stamp, [])
    there.fields["rows"][1, entry] = 7.0
    there.fields["row_for"][1, entry] = 0
    mine.say_of_prompt(0, 1, -3.0)
    mine.row_stamp[entry] = stamp
    mine.running[0] = NOTHING
    message, rows = told.news(False)
    bring(message)
    assert (here.blocks[1].running[0], rows) == (stamp, [entry])
    assert here.fields["prompt_sum"][1, 0] == -3.0, "which is there before the first row"
    assert here.fields["prompt_of"][1, 0] == 1
    assert not here.blocks[1].has_row(0, stamp)
    row = told.row(entry)
    assert row is not None
    bring(row)
    assert here.blocks[1].has_row(0, stamp)
    assert (here.fields["rows"][1, entry] == 7.0).all()
    message, rows = told.news(False)
    bring(message)
    assert (here.blocks[1].running[0], rows) == (NOTHING, [])


def test_many_tokens_at_once_bring_the_weights_of_all() -> None:
    planes = [Plane.create(2, SLOTS, VOCABULARY, POSITIONS) for _ in range(2)]
    for plane in planes:
        plane.unlink()
    here, there = planes
    hosts, ring = Hosts((0, 1)), here.spec.ring
    told, heard = Outgoing(there, 1, hosts, GATEWAY), Incoming(here, hosts, 1)

    def decide_until(slot: int, generation: int, first: int, end: int) -> None:
        for position in range(first, end):
            stamp = stamp_of(generation, position)
            there.fields["log_weights"][1, slot, position % ring] = -position - generation / 8
            there.fields["token"][1, 2 * slot + (stamp & 1)] = position
            there.fields["token_stamp"][1, 2 * slot + (stamp & 1)] = stamp
        heard.apply(memoryview(told.news(False)[0])[LENGTH.size :])
        weights = there.fields["log_weights"][1, slot]
        np.testing.assert_array_equal(here.fields["log_weights"][1, slot], weights)
        assert here.blocks[1].published(slot, stamp_of(generation, end - 1)) == end - 1

    decide_until(0, 1, 0, 1)
    decide_until(0, 1, 1, 100)
    decide_until(1, 2, 0, ring)
    decide_until(0, 1, 100, ring + 90)
    decide_until(0, 3, 0, 5)


@pytest.mark.parametrize("other", ["key", "shape"])
def test_only_hosts_of_this_start_are_let_in(tmp_path: Path, other: str) -> None:
    with cluster(tmp_path, 0, 1) as made:
        key, spec = KEY, made.gateway.spec
        if other == "key":
            key = b"x" * 32
        else:
            spec = Plane.create(2, SLOTS + 1, VOCABULARY, POSITIONS).spec
            Plane.attach(spec).unlink()
        address = made.relays[1, 0]._target
        with socket.create_connection(address, 5) as sock, pytest.raises((NotOfUs, OSError)):
            introduce(sock, links.key_for(key, spec), 1)
        before = made.gateway.fields["running"].copy()
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, random.Random(1).randbytes(4096)):
            with socket.create_connection(address, 5) as sock:
                sock.settimeout(10)
                answer = b""
                with contextlib.suppress(OSError):  # it may have been sent away by any of these moments
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                    while more := sock.recv(4096):
                        answer += more
                assert len(answer) in (0, 64), "a challenge at most"
        np.testing.assert_array_equal(made.gateway.fields["running"], before)
        for _ in decide(made, 5, [0]):
            pass


def test_a_listener_without_the_key_learns_nothing_of_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard: list[bytes] = []

        def pretend() -> None:
            sock, _ = listener.accept()
            with sock:
                heard.append(sock.recv(64))
                sock.sendall(bytes(64))
                heard.append(sock.recv(64))

        thread = threading.Thread(target=pretend)
        thread.start()
        with socket.create_connection(listener.getsockname(), 5) as sock, pytest.raises(NotOfUs):
            introduce(sock, KEY, 1)
        thread.join(10)
        assert KEY not in b"".join(heard)
        assert heard[1] == b"", "it says nothing more"


def test_a_proof_is_no_use_another_time() -> None:
    """Whoever has listened to a connection cannot repeat it."""
    left, right = socket.socketpair()
    recorded: list[bytes] = []
    with left, right:
        accepted: list[tuple[int, str]] = []
        thread = threading.Thread(target=lambda: accepted.append(accept_peer(right, KEY)))
        thread.start()
        real = left.sendall

        class Recorder:
            def sendall(self, data: bytes) -> None:
                recorded.append(data)
                real(data)

            recv, settimeout = left.recv, left.settimeout

        introduce(Recorder(), KEY, 3)  # type: ignore[arg-type]
        thread.join(10)
        assert accepted == [(3, "")]
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"".join(recorded))
        with pytest.raises(NotOfUs):
            accept_peer(right, KEY)


def test_what_is_no_message_is_refused() -> None:
    plane = Plane.create(3, SLOTS, VOCABULARY, POSITIONS)
    plane.unlink()
    hosts = Hosts((0, 1, 2))
    plane.blocks[1].running[2] = stamp_of(4, 2)
    good = memoryview(Outgoing(plane, 1, hosts, GATEWAY).news(True)[0])[LENGTH.size :]
    header = memoryview(OutgoingHeader(plane).news(True))[LENGTH.size :]
    Incoming(plane, hosts, 1).apply(good)
    with pytest.raises(WireError):
        Incoming(plane, hosts, 2).apply(good)  # another host's expert
    with pytest.raises(WireError):
        Incoming(plane, hosts, 1).apply(header)  # which is the gateway's to write
    Incoming(plane, hosts, GATEWAY).apply(header)
    for size in range(len(good)):
        with pytest.raises(WireError):
            Incoming(plane, hosts, 1).apply(good[:size])
    with pytest.raises(WireError):
        Incoming(plane, hosts, 1).apply(memoryview(bytes(good) + b"x"))
    chance, before = random.Random(0), plane.alive.copy()
    for _ in range(3_000):
        changed = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        with contextlib.suppress(WireError):
            Incoming(plane, hosts, 1).apply(memoryview(changed))
    np.testing.assert_array_equal(plane.alive, before)
    assert len(good) < longest_message(plane.spec)


# --- rows that go in part ---------------------------------------------------------------------------------


def mixture(rows: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    """Probabilities [V] of log-probabilities [K, V]."""
    return (rows.double().exp() * torch.from_numpy(weights)[:, None]).sum(0).numpy()


@pytest.mark.parametrize("wire_rows", [1, 4, 16, VOCABULARY - 1])
def test_a_mixture_of_rows_in_part_is_no_further_off_than_it_says(tmp_path: Path, wire_rows: int) -> None:
    """By 200 prompts' first tokens, each of which mixes one row of another host."""
    weights = np.array([0.3, 0.7])
    with cluster(tmp_path, 0, 1, wire_rows=wire_rows) as made:
        here, there = (Lockstep(made.planes[k], k, HostTransport(made.planes[k], k)) for k in (0, 1))
        off, bounds = [], []
        for generation in range(1, 201):
            [member] = members_of(2, [0])
            member.generation, member.log_weights, member.posterior = (
                generation,
                np.log(weights).tolist(),
                False,
            )
            made.gateway.weights_read[0] = stamp_of(generation, 0)
            for engine in (here, there):
                engine.join(member)
            turns = [engine.turns(np.array([0]), np.array([0])) for engine in (here, there)]
            rows = torch.stack([row_of(k, 0, generation) for k in (0, 1)])
            for engine, turn, row in zip((there, here), turns[::-1], rows.flip(0), strict=True):
                turn.rows[:] = 0
                engine.announce(turn)
                engine.post(turn, row[None])
            stamp = stamp_of(generation, 0)
            wait_until(lambda: here.blocks[1].has_row(0, stamp), 10, "it is there", 0)  # noqa: B023
            ready = here.wait_for_rows(turns[0])
            assert len(ready) == 1
            mixed = here.mixed(ready)[0].double().softmax(-1).numpy()
            off.append(0.5 * np.abs(mixed - mixture(rows.log_softmax(-1), weights)).sum())
            bounds.append(float(made.gateway.blocks[0].tails[0, 0]))
            here.publish(ready, np.array([0]))
            for engine, turn in zip((here, there), turns, strict=True):
                engine.finish(turn)
    assert (np.array(off) <= np.array(bounds) + 1e-6).all()
    assert max(off) > 0.01 if wire_rows <= 4 else max(off) < 0.2
    assert max(bounds) < 0.7


def test_a_product_of_experts_has_its_rows_whole(tmp_path: Path) -> None:
    with cluster(tmp_path, 0, 1, wire_rows=2) as made:
        there = Lockstep(made.planes[1], 1, HostTransport(made.planes[1], 1))
        for slot, rule in enumerate(("velocity", "logit")):
            [member] = members_of(2, [0])
            member.slot, member.rule = slot, rule
            there.join(member)
        turns = there.turns(np.array([0, 1]), np.array([0, 0]))
        turns.rows = np.arange(2)
        rows = torch.stack([row_of(1, slot, 0) for slot in (0, 1)])
        there.announce(turns)
        there.post(turns, rows)
        blocks = made.gateway.blocks
        wait_until(lambda: all(blocks[1].has_row(s, stamp_of(1, 0)) for s in (0, 1)), 10, "both are there")
        [part, whole] = made.gateway.fields["rows"][1, turns.entries]
        np.testing.assert_array_equal(whole, rows[1].numpy())
        assert len(set(part.tolist())) == 3, "two logits, and one in place of all others"
        assert torch.from_numpy(part).logsumexp(0).item() == pytest.approx(
            rows[0].logsumexp(0).item(), abs=1e-5
        )


def posted_there(made: Cluster, row: torch.Tensor) -> Turns:
    """A request's first turn, of which the other host's expert has given its ``row`` [1, V], which is here."""
    there = Lockstep(made.planes[1], 1, HostTransport(made.planes[1], 1))
    there.join(members_of(2, [0])[0])
    turns = there.turns(np.array([0]), np.array([0]))
    turns.rows[:] = 0
    there.announce(turns)
    there.post(turns, row)
    wait_until(lambda: made.gateway.blocks[1].has_row(0, stamp_of(1, 0)), 10, "it is there")
    return turns


def test_no_token_is_impossible_for_being_outside_of_what_was_told(tmp_path: Path) -> None:
    """However sure an expert is of others: it would be lost for good if it were said."""
    with cluster(tmp_path, 0, 1, wire_rows=2) as made:
        sure = torch.zeros(1, VOCABULARY)
        sure[0, 3] = 40.0
        turns = posted_there(made, sure)
        here = HostTransport(made.gateway, 0)
        said = [here.log_likelihoods(turns.entries, np.array([token]))[0, 1] for token in range(VOCABULARY)]
        assert said == pytest.approx(sure[0].log_softmax(-1).tolist(), abs=1e-4)
        tail = made.gateway.fields["row_tail"][1, turns.entries[0]]
        assert tail == pytest.approx((VOCABULARY - 1) * math.exp(-40), rel=0.1)


def test_an_expert_without_a_distribution_is_told_as_it_is(tmp_path: Path) -> None:
    with cluster(tmp_path, 0, 1, wire_rows=2) as made:
        turns = posted_there(made, torch.full((1, VOCABULARY), torch.nan))
        assert np.isnan(made.gateway.fields["rows"][1, turns.entries]).all()
