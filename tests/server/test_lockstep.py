"""The plane's rules, engine against engine: threads stand in for processes, memory and protocol are real.

All of it runs over all transports. A mapped file stands in for device memory: CUDA does not map memory into
the process that owns it. CUDA's own mapping has test_cuda_memory.py.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decar.kernels import Rule, mix_rows
from decar.kernels.reference import gumbel
from decar.router.errors import StartError
from decar.server.gateway.weights import WeightsReader
from decar.server.protocol import plane as plane_module
from decar.server.protocol.lockstep import HELD, RULES, Lockstep, Observer, Turns
from decar.server.protocol.member import Draw, Member
from decar.server.protocol.plane import Plane, stamp_of
from decar.server.protocol.runtime import DIRECTORY, remove_stale
from decar.server.protocol.transport import (
    DeviceTransport,
    HostTransport,
    StagedTransport,
    transport_of,
)

VOCABULARY = 12


class FileMemory:
    """`DeviceMemory` in files: mapped by name, as a GPU's is by handle."""

    device = torch.device("cpu")

    def __init__(self, directory: Path):
        self._directory = directory

    def allocate(self, size_bytes: int) -> tuple[torch.Tensor, bytes]:
        name = f"{len(list(self._directory.iterdir()))}"
        (self._directory / name).write_bytes(bytes(size_bytes))
        return self.open(name.encode(), size_bytes), name.encode()

    def open(self, handle: bytes, size_bytes: int) -> torch.Tensor:
        path = self._directory / handle.rstrip(bytes(1)).decode()
        assert path.stat().st_size == size_bytes
        return torch.from_file(str(path), shared=True, size=size_bytes, dtype=torch.uint8)

    def settle(self) -> None:
        """Files are visible at once."""

    def staging(self, count: int) -> torch.Tensor:
        return torch.full((count,), torch.nan)

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def download(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        return [values.clone().numpy() for values in tensors]


@pytest.fixture(params=["host", "device", "staged"])
def plane(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Plane]:
    dtype = "float32" if request.param == "device" else None
    made = Plane.create(experts=2, slots=4, vocab_size=VOCABULARY, positions=16, device_dtype=dtype)
    made.weights_read[:] = stamp_of(9, 0)  # as if the gateway had read all that these tests write
    try:
        yield made
    finally:
        made.unlink()


@pytest.fixture
def engines(request: pytest.FixtureRequest, plane: Plane, tmp_path: Path) -> tuple[Lockstep, Lockstep]:
    """Two engines attached to ``plane``, over the transport it was made for."""
    memory = None if request.node.callspec.params["plane"] == "host" else FileMemory(tmp_path)

    def engine(expert: int) -> Lockstep:
        attached = Plane.attach(plane.spec)
        return Lockstep(attached, expert, transport_of(attached, expert, memory))

    return engine(0), engine(1)


def member(slot: int = 0, generation: int = 1, leader: int = 0, posterior: bool = False) -> Member:
    return Member(
        slot=slot,
        generation=generation,
        leader=leader,
        active=(0, 1),
        rule="velocity",
        log_weights=np.log([0.25, 0.75]).tolist(),
        posterior=posterior,
    )


def begin(engine: Lockstep, member: Member, position: int = 0, row: int = 0) -> Turns:
    """``engine`` joins the request, and has ``position`` of it in ``row`` of its batch."""
    engine.join(member)
    turns = engine.turns(np.array([member.slot]), np.array([position]))
    turns.rows[:] = row
    return turns


def test_a_step_decides_one_token_that_both_engines_keep(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    leader, follower = engines
    rows = torch.randn(2, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    adopted: list[int] = []

    def follow() -> None:
        turn = begin(follower, member(posterior=True))
        follower.announce(turn)
        follower.post(turn, rows[1])
        adopted.extend(follower.adopt(turn).tolist())
        follower.finish(turn)

    turn = begin(leader, member(posterior=True))
    leader.announce(turn)
    thread = threading.Thread(target=follow)
    thread.start()
    # Both announce before either waits, as both engines' steps overlap.
    while not Observer(plane, 0).rows_may_come(member(), 0):
        pass
    leader.post(turn, rows[0])
    ready = leader.wait_for_rows(turn)
    assert ready.slots.tolist() == [0]
    mixed = leader.mixed(ready)
    token = int(mixed.argmax())
    leader.publish(ready, np.array([token]))
    thread.join(timeout=30)
    leader.finish(turn)
    log_probs = rows[:, 0].double().log_softmax(-1)
    expected = (log_probs + torch.tensor([0.25, 0.75]).double().log()[:, None]).logsumexp(0)
    torch.testing.assert_close(mixed[0].log_softmax(-1).double(), expected, atol=1e-5, rtol=0)
    assert adopted == [token]
    assert (leader.produced[0], follower.produced[0]) == (1, 1)
    posterior = np.array([0.25, 0.75]) * log_probs[:, token].exp().numpy()
    np.testing.assert_allclose(np.exp(leader.log_weights[0]), posterior / posterior.sum(), atol=1e-6)
    np.testing.assert_allclose(np.exp(plane.blocks[0].log_weights[0, 0]), [0.25, 0.75], atol=1e-6)


def test_what_nobody_is_computing_is_a_hold_at_once(plane: Plane, engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    scheduler = Observer(plane, 0)
    led, followed = begin(leader, member()), begin(follower, member())
    leader.announce(led)
    leader.post(led, torch.zeros(1, VOCABULARY))
    assert len(leader.wait_for_rows(led)) == 0
    assert not scheduler.rows_may_come(member(), 0)
    follower.announce(followed)
    assert scheduler.rows_may_come(member(), 0), "a row that is being computed is worth running for"
    follower.post(followed, torch.zeros(1, VOCABULARY))
    assert follower.adopt(followed).tolist() == [HELD], "the leader held, and runs nothing for this slot"
    assert follower.produced[0] == 0
    follower.finish(followed)
    assert scheduler.rows_may_come(member(), 0), "a posted row stays"


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[Lockstep, Lockstep]]:
    """Two engines on two hosts, as far as they know."""
    made = Plane.create(experts=2, slots=4, vocab_size=VOCABULARY, positions=16, hosts=(0, 1))
    made.weights_read[:] = stamp_of(9, 0)
    yield Lockstep(made, 0, HostTransport(made, 0)), Lockstep(made, 1, HostTransport(made, 1))
    made.unlink()


def test_another_host_is_not_waited_for_long_where_others_want_to_go_on(
    apart: tuple[Lockstep, Lockstep],
) -> None:
    """Its engine runs the very step, and what it gives does not come."""
    leader, follower = apart
    turns, theirs = begin(leader, member()), begin(follower, member())
    for engine, its in ((leader, turns), (follower, theirs)):
        engine.announce(its)
        engine.post(its, torch.zeros(1, VOCABULARY))
        engine.bound_waits(its, rows=2)
    follower.mine.row_stamp[int(turns.entries[0])] = 0  # still on its way
    assert not len(leader.wait_for_rows(turns)), "a hold"
    leader.announce(turns)
    assert follower.adopt(theirs).tolist() == [HELD]


def test_who_waits_for_another_host_by_way_of_an_engine_beside_it_is_as_patient(tmp_path: Path) -> None:
    """A leader on this host that waits for another host runs that step for as long as it waits."""
    plane = Plane.create(experts=3, slots=4, vocab_size=VOCABULARY, positions=16, hosts=(0, 0, 1))
    try:
        plane.weights_read[:] = stamp_of(9, 0)
        leader, beside = (Lockstep(plane, k, HostTransport(plane, k)) for k in range(2))
        of_three = replace(member(), active=(0, 1, 2), log_weights=np.log([0.2, 0.3, 0.5]).tolist())
        turns, theirs = begin(leader, of_three), begin(beside, of_three)
        leader.announce(turns)
        beside.announce(theirs)
        beside.bound_waits(theirs, rows=2)
        assert beside.adopt(theirs).tolist() == [HELD], "its other row goes on"
        assert Observer(plane, 1).needs_hosts(of_three)
    finally:
        plane.unlink()


def waits(leader: Lockstep, follower: Lockstep, turns: Turns, theirs: Turns, rows: int) -> bool:
    """Whether ``leader`` waits for a row that comes late, in steps of so many ``rows``."""
    for engine, its in ((leader, turns), (follower, theirs)):
        engine.announce(its)
        engine.bound_waits(its, rows)
    later = threading.Timer(0.2, lambda: follower.post(theirs, torch.zeros(1, VOCABULARY)))
    later.start()
    ready = leader.wait_for_rows(turns)
    later.join()
    return len(ready) == 1


def test_another_host_is_waited_for_where_all_need_it(apart: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = apart
    turns, theirs = begin(leader, member()), begin(follower, member())
    assert waits(leader, follower, turns, theirs, rows=1)


def test_an_engine_beside_is_waited_for_whatever_else_there_is(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    turns, theirs = begin(leader, member()), begin(follower, member())
    assert waits(leader, follower, turns, theirs, rows=2)


@pytest.mark.parametrize("hosts", [(0, 0), (0, 1)])
def test_what_is_held_runs_again_once_its_rows_are_there_or_worth_waiting_for(hosts: tuple[int, int]) -> None:
    plane = Plane.create(experts=2, slots=4, vocab_size=VOCABULARY, positions=16, hosts=hosts)
    try:
        plane.weights_read[:] = stamp_of(9, 0)
        observer, follower = Observer(plane, 0), Lockstep(plane, 1, HostTransport(plane, 1))
        far = hosts[1] == 1
        assert observer.needs_hosts(member()) is far
        assert observer.needs_hosts(member(leader=1)) is far
        assert not observer.rows_may_come(member(), 0)
        theirs = begin(follower, member())
        follower.announce(theirs)
        assert observer.rows_may_come(member(), 0)
        assert observer.rows_may_come(member(), 0, patient=False) is not far
        follower.post(theirs, torch.zeros(1, VOCABULARY))
        follower.finish(theirs)
        assert observer.rows_may_come(member(), 0, patient=False)
    finally:
        plane.unlink()


def test_of_many_turns_each_is_held_or_decided_by_itself(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    leader, follower = engines
    members = [member(slot, generation=slot + 1) for slot in range(4)]
    for engine in engines:
        for one in members:
            engine.join(one)
    slots = np.arange(4)
    led, followed = (engine.turns(slots, np.zeros(4, np.int64)) for engine in engines)
    led.rows, followed.rows = slots.copy(), slots[::-1].copy()
    leader.announce(led)
    leader.post(led, torch.zeros(4, VOCABULARY))
    rows = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    some = followed[np.array([1, 3])]
    follower.announce(some)
    follower.post(some, rows)
    ready = leader.wait_for_rows(led)
    assert ready.slots.tolist() == [1, 3]
    expected = rows[[2, 0]].double().log_softmax(-1) + math.log(0.75)
    expected = expected.logaddexp(torch.tensor(0.25 / VOCABULARY).double().log())
    torch.testing.assert_close(leader.mixed(ready).log_softmax(-1).double(), expected, atol=1e-5, rtol=0)
    leader.publish(ready, np.array([5, 6]))
    assert follower.adopt(followed).tolist() == [HELD, 5, HELD, 6]
    assert follower.produced.tolist() == leader.produced.tolist() == [0, 1, 0, 1]
    assert [block.counted()["leader_holds"] for block in plane.blocks] == [2, 0]
    assert [block.counted()["follower_holds"] for block in plane.blocks] == [0, 2]


def test_a_leader_does_not_overwrite_weights_that_the_gateway_has_not_read(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    leader, _ = engines
    scheduler, ring = Observer(plane, 0), plane.spec.ring
    reader = WeightsReader(plane, member(), "ab")
    written = []
    for position in range(2 * ring):
        turns = [begin(engine, member(posterior=True), position) for engine in engines]
        for engine, turn in zip(engines, turns, strict=True):
            engine.announce(turn)
            engine.post(turn, torch.randn(1, VOCABULARY))
        if position == ring:  # so far the gateway has read nothing
            assert len(leader.wait_for_rows(turns[0])) == 0
            assert not scheduler.rows_may_come(member(), position)
            leader.announce(turns[0])
        if position >= ring:
            reader.keep_up(position)
        assert scheduler.rows_may_come(member(), position)
        written.append(np.exp(leader.log_weights[0]))
        ready = leader.wait_for_rows(turns[0])
        leader.mixed(ready)
        leader.publish(ready, np.array([position % VOCABULARY]))
    np.testing.assert_allclose(reader.between(3, 2 * ring), written[3:], atol=1e-6)


def test_a_posted_row_is_never_rewritten(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    turn = begin(follower, member())
    follower.post(turn, torch.arange(VOCABULARY).float()[None])
    follower.post(turn, torch.zeros(1, VOCABULARY))
    assert leader.transport.rows.logits[1][turn.entries[0]].tolist() == list(range(VOCABULARY))


def test_a_dead_peer_is_not_waited_for(plane: Plane, engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    follower.announce(begin(follower, member()))
    turn = begin(leader, member())
    leader.post(turn, torch.zeros(1, VOCABULARY))
    plane.alive[1] = 0
    assert len(leader.wait_for_rows(turn)) == 0


def test_an_older_tenant_of_a_slot_is_silent(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    old, new = member(generation=1), member(generation=2)
    follower.join(old)
    assert follower.holds_slot(old)
    follower.join(new)
    assert not follower.holds_slot(old)
    assert follower.holds_slot(new)
    follower.join(old)  # its engine begins with it late: it has been aborted by now
    assert follower.holds_slot(new)
    follower.announce(begin(follower, new))
    assert leader.blocks[1].running[0] == stamp_of(2, 0)


def test_ids_beyond_the_shared_vocabulary_are_not_posted(engines: tuple[Lockstep, Lockstep]) -> None:
    _, follower = engines
    turn = begin(follower, member())
    wide = torch.zeros(1, VOCABULARY + 5)
    wide[0, VOCABULARY:] = 100.0
    follower.post(turn, wide)
    [entry] = turn.entries
    assert follower.transport.rows.log_normalisers[1][entry].item() == pytest.approx(np.log(VOCABULARY))


def test_segments_are_private_and_those_of_dead_gateways_are_removed(plane: Plane) -> None:
    path = DIRECTORY / plane.spec.name
    assert path.stat().st_mode & 0o077 == 0
    prefix = plane.spec.name.split("-")[:2]  # decar, and this pid namespace
    orphan = DIRECTORY / "-".join([*prefix, "4194305", "1", "abcd"])  # beyond the largest pid Linux gives out
    sockets = DIRECTORY / "-".join([*prefix, "4194305", "1", "ef01"])
    orphan.write_bytes(b"x")
    sockets.mkdir()
    (sockets / "socket").write_bytes(b"")
    assert {orphan.name, sockets.name} <= set(remove_stale())
    assert not orphan.exists()
    assert not sockets.exists()
    assert path.exists(), "a living gateway's segment stays"
    foreign = DIRECTORY / "decar-1-4194305-1-abcd"  # of another container, whose pids mean nothing here
    foreign.write_bytes(b"x")
    try:
        assert foreign.name not in remove_stale()
    finally:
        foreign.unlink()


def test_too_little_shared_memory_is_said_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plane_module, "DIRECTORY", tmp_path)
    with pytest.raises(StartError, match="--max-num-seqs"):
        Plane.create(experts=16, slots=1 << 20, vocab_size=1 << 20, positions=1)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_without_a_distribution_loses_its_weight_and_costs_no_engine(
    engines: tuple[Lockstep, Lockstep],
) -> None:
    leader, _ = engines
    rows = torch.randn(1, VOCABULARY)
    broken = torch.full((1, VOCABULARY), torch.nan)
    turns = [begin(engine, member(posterior=True)) for engine in engines]
    for engine, turn, row in zip(engines, turns, (rows, broken), strict=True):
        engine.announce(turn)
        engine.post(turn, row)
    ready = leader.wait_for_rows(turns[0])
    mixed = leader.mixed(ready)
    torch.testing.assert_close(mixed.log_softmax(-1), rows.log_softmax(-1), atol=1e-5, rtol=0)
    leader.publish(ready, np.array([3]))
    assert np.exp(leader.log_weights[0]).tolist() == [1.0, 0.0]


def test_rows_on_a_device_keep_the_models_dtype_and_normalisers_that_fit_it(tmp_path: Path) -> None:
    plane = Plane.create(experts=2, slots=2, vocab_size=VOCABULARY, positions=4, device_dtype="bfloat16")
    plane.unlink()
    memory = FileMemory(tmp_path)
    first = DeviceTransport(plane, 0, memory)
    with pytest.raises(RuntimeError, match="expert 1"):
        _ = first.rows  # its engine has not started
    second = DeviceTransport(plane, 1, memory)
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))
    second.post(np.array([3, 0]), logits)
    seen = first.rows.logits[1][[3, 0]]
    assert seen.dtype == torch.bfloat16
    torch.testing.assert_close(seen, logits.bfloat16(), atol=0, rtol=0)
    expected = logits.bfloat16().double().log_softmax(-1)[[0, 1], [5, 7]]
    found = first.log_likelihoods(np.array([3, 0]), np.array([5, 7]))[:, 1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def pruning_member(budget: float, log_weights: list[float], leader: int = 0) -> Member:
    return Member(
        slot=0,
        generation=1,
        leader=leader,
        active=(0, 1),
        rule="velocity",
        log_weights=log_weights,
        posterior=True,
        prune=budget,
    )


def decide_first_token(
    leader: Lockstep, follower: Lockstep, rows: torch.Tensor, token: int, led: Member, followed: Member
) -> Turns:
    """Both post position 0, and the leader decides ``token``; the follower's turn, which has still to adopt it."""
    turns = begin(leader, led), begin(follower, followed)
    for engine, turn, row in zip((leader, follower), turns, rows, strict=True):
        engine.announce(turn)
        engine.post(turn, row)
    ready = leader.wait_for_rows(turns[0])
    assert len(ready) == 1
    leader.weigh(ready)
    leader.mixed(ready)
    leader.publish(ready, np.array([token]))
    return turns[1]


def goes_on(engine: Lockstep) -> bool:
    """Whether ``engine`` still takes part in slot 0."""
    return bool(engine.take_part(np.array([0]))[0])


def scoring_member(**options: Any) -> Member:
    """Its prompt has 5 tokens; the gateway knows the log-likelihood of 3 of them on one expert."""
    return Member(
        slot=0,
        generation=1,
        leader=0,
        active=(0, 1),
        rule="velocity",
        log_weights=np.log([0.5, 0.5]).tolist(),
        posterior=True,
        scored=[(3, -2.0), (1, 0.0)],
        **options,
    )


@pytest.mark.parametrize(
    ("options", "first", "leaders"),
    [
        ({}, [0.25, 0.75], (0, 0)),
        ({"top_k": 1}, [0.0, 1.0], (0, 1)),
        ({"uniform": 0.2}, [1.0, 0.0], (0, 0)),
        ({"uniform": 0.3}, [0.0, 1.0], (0, 1)),
        ({"prune": 0.25}, [0.0, 1.0], (0, 1)),
        ({"prune": 0.24}, [0.25, 0.75], (0, 0)),
    ],
    ids=str,
)
def test_a_prompt_that_is_scored_as_it_is_computed_sets_the_weights_of_the_first_token(
    plane: Plane,
    engines: tuple[Lockstep, Lockstep],
    options: dict[str, Any],
    first: list[float],
    leaders: tuple[int, int],
) -> None:
    leader, follower = engines
    leader.mine.say_of_prompt(
        0, 1, math.log(0.25) - 3.0
    )  # with the -2.0 that was known: a quarter of the other's
    follower.mine.say_of_prompt(0, 1, math.log(0.75) - 5.0)
    led, followed = (scoring_member(**options) for _ in range(2))
    turn = decide_first_token(leader, follower, torch.zeros(2, 1, VOCABULARY), 3, led, followed)
    np.testing.assert_allclose(np.exp(plane.blocks[0].log_weights[0, 0]), first, atol=1e-6)
    assert follower.adopt(turn).tolist() == [3]
    follower.take_part(np.array([0]))
    assert (followed.leader_at(0), followed.leader_at(1)) == leaders
    assert (followed.alone_from == 1) == (0.0 in first)
    np.testing.assert_allclose(
        WeightsReader(plane, scoring_member(**options), "ab").between(0, 1), [first], atol=1e-6
    )


def test_a_leader_that_loses_its_weight_hands_over(plane: Plane, engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    rows = torch.zeros(2, 1, VOCABULARY)
    rows[0, 0, 3] = -9.0  # the leader would hardly have said token 3
    start = np.log([0.6, 0.4]).tolist()
    led, followed = (pruning_member(0.05, list(start)) for _ in range(2))
    turn = decide_first_token(leader, follower, rows, 3, led, followed)
    assert not goes_on(leader)
    assert (led.leader, led.active) == (1, (1,))
    # The follower, one position behind, still gets token 0 from whom it was decided by.
    assert goes_on(follower)
    assert (followed.leader_at(0), followed.leader_at(1)) == (0, 1)
    assert follower.turns(np.array([0, 0]), np.array([0, 1])).leaders.tolist() == [0, 1]
    assert Observer(plane, 1).decided(followed, 0) == 3
    assert follower.adopt(turn).tolist() == [3]
    assert followed.alone_from == follower.alone_from[0] == 1
    assert np.exp(follower.log_weights[0]).tolist() == [0.0, 1.0]
    assert follower.budget[0] < 0.05
    counted = leader.mine.counted()
    assert (counted["pruned"], counted["handed_over"]) == (1, 1)


def test_a_released_follower_knows_once_it_knows_the_token(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    leader, follower = engines
    rows = torch.zeros(2, 1, VOCABULARY)
    rows[1, 0, 3] = -9.0
    led, followed = (pruning_member(0.05, np.log([0.6, 0.4]).tolist()) for _ in range(2))
    assert Observer(plane, 1).takes_part(followed)
    decide_first_token(leader, follower, rows, 3, led, followed)
    assert not goes_on(follower)
    assert not Observer(plane, 1).takes_part(followed)
    assert goes_on(leader)
    assert led.followers == ()
    assert len(leader.wait_for_rows(leader.turns(np.array([0]), np.array([1])))) == 1  # for nobody


def test_a_later_tenant_of_a_slot_is_not_bound_by_an_earlier_ones_pruning(
    engines: tuple[Lockstep, Lockstep],
) -> None:
    leader, follower = engines
    rows = torch.zeros(2, 1, VOCABULARY)
    rows[1, 0, 3] = -9.0
    led, followed = (pruning_member(0.05, np.log([0.6, 0.4]).tolist()) for _ in range(2))
    decide_first_token(leader, follower, rows, 3, led, followed)
    new = member(generation=2, posterior=True)
    follower.join(new)
    assert goes_on(follower)
    assert new.active == (0, 1)


def test_an_engine_goes_on_after_tokens_that_others_have_said(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    """What is decided at a request's first position is decided there, wherever that is."""
    leader, _ = engines
    scored = scoring_member(top_k=1)
    scored.generation = 9
    leader.join(scored, 3)
    assert leader.produced[scored.slot] == 3
    for block, said in zip(plane.blocks, (-3.0, -1.0), strict=True):
        block.say_of_prompt(scored.slot, scored.generation, said)
    turns = leader.turns(np.array([scored.slot]), np.array([3]))
    leader.weigh(turns)
    assert np.isinf(leader.log_weights[scored.slot]).sum() == 1, "the weights are those after the whole text"
    leader.weigh(turns)  # only once
    leader.publish(turns, np.array([2]))
    assert leader.alone_from[scored.slot] == 4


def test_rows_of_an_engine_that_is_gone_are_not_read_and_those_of_the_next_are(tmp_path: Path) -> None:
    plane = Plane.create(experts=2, slots=2, vocab_size=VOCABULARY, positions=4, device_dtype="bfloat16")
    plane.unlink()
    memory = FileMemory(tmp_path)
    first, second = (DeviceTransport(plane, expert, memory) for expert in range(2))
    entry = np.array([0])
    second.post(entry, torch.full((1, VOCABULARY), 2.0))
    assert float(first.rows.logits[1][0, 0]) == 2.0
    plane.alive[1] = 0
    assert first.rows.logits[1].data_ptr() == first.rows.logits[0].data_ptr(), "its own stand in for them"
    again = DeviceTransport(plane, 1, memory)
    again.post(entry, torch.full((1, VOCABULARY), 3.0))
    plane.alive[1] = 1
    assert float(first.rows.logits[1][0, 0]) == 3.0


def test_who_takes_a_lead_over_does_not_weigh_the_prompt_anew(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    _, follower = engines
    member = scoring_member(prune=0.25)
    follower.join(member)
    for block, said in zip(plane.blocks, (-3.0, -1.0), strict=True):
        block.say_of_prompt(member.slot, member.generation, said)
    follower.log_weights[member.slot] = np.log([0.6, 0.4])  # as its leader has left them
    follower.weigh(follower.turns(np.array([member.slot]), np.array([3])))
    assert np.exp(follower.log_weights[member.slot]) == pytest.approx([0.6, 0.4])


def test_decided_tokens_and_weights_are_the_mixtures(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    """Greedy and sampled, under both rules at once; beside them, one whose tokens somebody else samples."""
    leader, follower = engines
    rows = 2 * torch.randn(2, 4, VOCABULARY, generator=torch.Generator().manual_seed(1))
    draws = [Draw(0.0, 1), Draw(0.7, 2), Draw(1.3, 2**63 - 1), None]
    members = [replace(member(slot, posterior=True), rule=RULES[slot % 2]) for slot in range(4)]
    turns = []
    for engine, own in zip(engines, rows, strict=True):
        for one, draw in zip(members, draws, strict=True):
            engine.join(one, draw=draw)
        turns.append(engine.turns(np.arange(4), np.zeros(4, np.int64)))
        turns[-1].rows[:] = np.arange(4)
        engine.announce(turns[-1])
        engine.post(turns[-1], own)
    ready = leader.wait_for_rows(turns[0])
    assert leader.plain.tolist() == [True, True, True, False]
    mixed = leader.mixed(ready)
    plain = ready.where(leader.plain[ready.slots])
    tokens = leader.decide(plain).cpu()
    scores = mixed[:3].clone()
    for i, draw in enumerate(draws[:3]):
        if draw is not None and draw.temperature:
            seed, position = torch.tensor([draw.seed]), torch.tensor([0])
            scores[i] = scores[i] / draw.temperature + gumbel(seed, position, VOCABULARY)[0]
    assert tokens.tolist() == scores.argmax(-1).tolist()
    adopted = follower.adopt(turns[1][:3])
    assert adopted.tolist() == tokens.tolist()
    assert leader.produced.tolist() == follower.produced.tolist() == [1, 1, 1, 0]
    given = rows[:, :3].double().log_softmax(-1)[:, torch.arange(3), tokens].T
    expected = (torch.tensor([0.25, 0.75]).double().log() + given).log_softmax(-1)
    np.testing.assert_allclose(leader.log_weights[:3], expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(leader.log_weights[3]), [0.25, 0.75])


def test_weights_that_are_fixed_do_not_move_with_decided_tokens(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, _ = engines
    turns = []
    for engine in engines:
        engine.join(member(), draw=Draw(0.0, 0))
        turns.append(engine.turns(np.array([0]), np.array([0])))
        turns[-1].rows[:] = 0
        engine.announce(turns[-1])
        engine.post(turns[-1], torch.randn(1, VOCABULARY))
    leader.decide(leader.wait_for_rows(turns[0]))
    np.testing.assert_allclose(np.exp(leader.log_weights[0]), [0.25, 0.75])


@pytest.mark.parametrize("plane", ["device", "staged"], indirect=True)
def test_what_goes_to_the_device_comes_as_it_was_and_aligned(plane: Plane, tmp_path: Path) -> None:
    """However many there are of each, none included."""
    transport = transport_of(plane, 0, FileMemory(tmp_path))
    for count in range(4):
        given = [
            np.arange(count, dtype=np.int64) - 1,
            np.log(np.arange(3.0 * count) + 0.5).reshape(count, 3),
            np.full(count, 2**63 - 1),
        ]
        came = transport.to_device(*given)
        for tensor, values in zip(came, given, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), values)
            assert (tensor.data_ptr() - came[0].data_ptr()) % 16 == 0
        for values, back in zip(given, transport.to_host(*came), strict=True):
            np.testing.assert_array_equal(back, values)


@pytest.fixture
def host_plane(tmp_path: Path) -> Iterator[Plane]:
    """Rows of three experts, each of which posts [4, V] of its own."""
    made = Plane.create(experts=3, slots=4, vocab_size=VOCABULARY, positions=16, hosts=(0, 1, 1))
    generator = torch.Generator().manual_seed(2)
    for expert in range(3):
        rows = torch.randn(4, VOCABULARY, generator=generator)
        HostTransport(made, expert).post(np.array([1, 2, 5, 6]), rows)
    yield made
    made.unlink()


def test_rows_in_host_memory_are_brought_to_the_device_that_mixes_them(
    host_plane: Plane, tmp_path: Path
) -> None:
    """Those of the step's entries, of experts that have a weight; and what is written later does not change them."""
    transport, entries = StagedTransport(host_plane, 1, FileMemory(tmp_path)), np.array([6, 1])
    log_weights = np.log(
        [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]],
        where=[[True, False, True], [True, False, False]],
        out=np.full((2, 3), -np.inf),
    )
    rows, places = transport.rows_of(entries, log_weights)
    assert places.tolist() == [0, 1]
    for k in (0, 2):
        assert torch.equal(rows.logits[k], transport.rows.logits[k][entries])
        assert torch.equal(rows.log_normalisers[k], transport.rows.log_normalisers[k][entries])
    before = rows.logits[0].clone()
    host_plane.fields["rows"][:] = 0.0
    assert torch.equal(rows.logits[0], before)


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_brought_mix_as_rows_in_place(host_plane: Plane, tmp_path: Path, rule: Rule) -> None:
    """Bit for bit; an expert without a weight included, and one row that is no distribution."""
    entries = np.array([6, 1, 2])
    log_weights = np.log([[0.2, 0.3, 0.5], [0.6, 0.4, 1e-300], [0.1, 0.8, 0.1]])
    log_weights[1, 2] = -np.inf
    host_plane.fields["rows"][0, 2] = host_plane.fields["log_normaliser"][0, 2] = np.nan
    found = []
    for transport in (HostTransport(host_plane, 0), StagedTransport(host_plane, 0, FileMemory(tmp_path))):
        rows, places = transport.rows_of(entries, log_weights)
        given = transport.to_device(places, log_weights)
        found.append(mix_rows(rows, *given, rule))
    assert torch.equal(*found)
    assert bool(found[0].isfinite().all())


def test_what_an_engine_on_a_device_posts_is_what_one_on_the_host_would(
    host_plane: Plane, tmp_path: Path
) -> None:
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(3)).bfloat16()
    HostTransport(host_plane, 0).post(np.array([7, 0]), logits)
    StagedTransport(host_plane, 1, FileMemory(tmp_path)).post(np.array([7, 0]), logits)
    for name in ("rows", "log_normaliser"):
        field = host_plane.fields[name]
        np.testing.assert_array_equal(field[0][[7, 0]], field[1][[7, 0]])
    tokens = np.array([5, 7])
    found = StagedTransport(host_plane, 2, FileMemory(tmp_path)).log_likelihoods(np.array([7, 0]), tokens)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
