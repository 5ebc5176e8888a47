"""The plane's rules, engine against engine: threads stand in for processes, memory and protocol are real.

All of it runs over both transports. A mapped file stands in for device memory: CUDA does not map memory into
the process that owns it. CUDA's own mapping has test_cuda_memory.py.
"""

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decar.router.errors import StartError
from decar.server.protocol import plane as plane_module
from decar.server.protocol.lockstep import Lockstep, Turn
from decar.server.protocol.member import Member
from decar.server.protocol.plane import DIRECTORY, Plane, remove_stale, stamp_of
from decar.server.protocol.transport import DeviceTransport, HostTransport

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


@pytest.fixture(params=["host", "device"])
def plane(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Plane]:
    dtype = "float32" if request.param == "device" else None
    made = Plane.create(experts=2, slots=4, vocab_size=VOCABULARY, positions=16, device_dtype=dtype)
    try:
        yield made
    finally:
        made.unlink()


@pytest.fixture
def engines(plane: Plane, tmp_path: Path) -> tuple[Lockstep, Lockstep]:
    """Two engines attached to ``plane``, over the transport it was made for."""

    def engine(expert: int) -> Lockstep:
        attached = Plane.attach(plane.spec)
        if not plane.spec.on_device:
            return Lockstep(attached, expert, HostTransport(attached, expert))
        return Lockstep(attached, expert, DeviceTransport(attached, expert, FileMemory(tmp_path)))

    return engine(0), engine(1)


def member(slot: int = 0, generation: int = 1, leader: int = 0, posterior: bool = False) -> Member:
    return Member(slot, generation, leader, (0, 1), "velocity", np.log([0.25, 0.75]).tolist(), posterior)


def test_a_step_decides_one_token_that_both_engines_keep(
    plane: Plane, engines: tuple[Lockstep, Lockstep]
) -> None:
    leader, follower = engines
    rows = torch.randn(2, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    adopted: list[int | None] = []

    def follow() -> None:
        turn = Turn(member(posterior=True), 0, row=0)
        follower.join(turn.member)
        follower.announce([turn])
        follower.post([turn], rows[1])
        adopted.extend(follower.adopt([turn]))
        follower.finish([turn])

    turn = Turn(member(posterior=True), 0, row=0)
    leader.join(turn.member)
    leader.announce([turn])
    thread = threading.Thread(target=follow)
    thread.start()
    # Both announce before either waits, as both engines' steps overlap.
    while not leader.rows_may_come(turn.member, 0):
        pass
    leader.post([turn], rows[0])
    ready = leader.wait_for_rows([turn])
    assert ready == [turn]
    mixed = leader.mixed(ready)
    token = int(mixed.argmax())
    leader.publish(ready, [token])
    thread.join(timeout=30)
    leader.finish([turn])
    log_probs = rows[:, 0].double().log_softmax(-1)
    expected = (log_probs + torch.tensor([0.25, 0.75]).double().log()[:, None]).logsumexp(0)
    torch.testing.assert_close(mixed[0].log_softmax(-1).double(), expected, atol=1e-5, rtol=0)
    assert adopted == [token]
    posterior = np.array([0.25, 0.75]) * log_probs[:, token].exp().numpy()
    np.testing.assert_allclose(np.exp(turn.member.log_weights), posterior / posterior.sum(), atol=1e-6)
    np.testing.assert_allclose(np.exp(plane.blocks[0].log_weights[0, 0]), [0.25, 0.75], atol=1e-6)


def test_what_nobody_is_computing_is_a_hold_at_once(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    led, followed = Turn(member(), 0, row=0), Turn(member(), 0, row=0)
    for engine, turn in ((leader, led), (follower, followed)):
        engine.join(turn.member)
    leader.announce([led])
    leader.post([led], torch.zeros(1, VOCABULARY))
    assert leader.wait_for_rows([led]) == []
    assert not leader.rows_may_come(led.member, 0)
    follower.announce([followed])
    assert leader.rows_may_come(led.member, 0), "a row that is being computed is worth running for"
    follower.post([followed], torch.zeros(1, VOCABULARY))
    assert follower.adopt([followed]) == [None], "the leader held, and runs nothing for this slot"
    follower.finish([followed])
    assert leader.rows_may_come(led.member, 0), "a posted row stays"


def test_a_posted_row_is_never_rewritten(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    turn = Turn(member(), 0, row=0)
    follower.join(turn.member)
    follower.post([turn], torch.arange(VOCABULARY).float()[None])
    follower.post([turn], torch.zeros(1, VOCABULARY))
    assert leader.transport.rows.logits[1][turn.entry].tolist() == list(range(VOCABULARY))


def test_a_dead_peer_is_not_waited_for(plane: Plane, engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    turn = Turn(member(), 0, row=0)
    follower.join(turn.member)
    follower.announce([turn])
    leader.join(turn.member)
    leader.post([turn], torch.zeros(1, VOCABULARY))
    plane.alive[1] = 0
    assert leader.wait_for_rows([turn]) == []


def test_an_older_tenant_of_a_slot_is_silent(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    old, new = member(generation=1), member(generation=2)
    follower.join(old)
    assert follower.holds_slot(old)
    follower.join(new)
    assert not follower.holds_slot(old)
    assert follower.holds_slot(new)
    follower.announce([Turn(new, 0), Turn(old, 0)])
    assert leader.blocks[1].running[0] == stamp_of(2, 0)


def test_ids_beyond_the_shared_vocabulary_are_not_posted(engines: tuple[Lockstep, Lockstep]) -> None:
    _, follower = engines
    turn = Turn(member(), 0, row=0)
    wide = torch.zeros(1, VOCABULARY + 5)
    wide[0, VOCABULARY:] = 100.0
    follower.post([turn], wide)
    assert follower.transport.rows.log_normalisers[1][turn.entry].item() == pytest.approx(np.log(VOCABULARY))


def test_segments_are_private_and_those_of_dead_gateways_are_removed(plane: Plane) -> None:
    path = DIRECTORY / plane.spec.name
    assert path.stat().st_mode & 0o077 == 0
    prefix = plane.spec.name.split("-")[:2]  # decar, and this pid namespace
    orphan = DIRECTORY / "-".join([*prefix, "4194305", "1", "abcd"])  # beyond the largest pid Linux gives out
    orphan.write_bytes(b"x")
    assert orphan.name in remove_stale()
    assert not orphan.exists()
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
    leader, follower = engines
    rows = torch.randn(1, VOCABULARY)
    broken = torch.full((1, VOCABULARY), torch.nan)
    led = Turn(member(posterior=True), 0, row=0)
    for engine, row in ((leader, rows), (follower, broken)):
        engine.join(led.member)
        engine.announce([led])
        engine.post([led], row)
    ready = leader.wait_for_rows([led])
    mixed = leader.mixed(ready)
    torch.testing.assert_close(mixed.log_softmax(-1), rows.log_softmax(-1), atol=1e-5, rtol=0)
    leader.publish(ready, [3])
    assert np.exp(led.member.log_weights).tolist() == [1.0, 0.0]


def test_rows_on_a_device_keep_the_models_dtype_and_normalisers_that_fit_it(tmp_path: Path) -> None:
    plane = Plane.create(experts=2, slots=2, vocab_size=VOCABULARY, positions=4, device_dtype="bfloat16")
    plane.unlink()
    memory = FileMemory(tmp_path)
    first = DeviceTransport(plane, 0, memory)
    with pytest.raises(RuntimeError, match="expert 1"):
        _ = first.rows  # its engine has not started
    second = DeviceTransport(plane, 1, memory)
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))
    second.post([3, 0], logits)
    seen = first.rows.logits[1][[3, 0]]
    assert seen.dtype == torch.bfloat16
    torch.testing.assert_close(seen, logits.bfloat16(), atol=0, rtol=0)
    expected = logits.bfloat16().double().log_softmax(-1)[[0, 1], [5, 7]]
    found = first.log_likelihoods([3, 0], [5, 7])[:, 1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def pruning_member(budget: float, log_weights: list[float], leader: int = 0) -> Member:
    return Member(0, 1, leader, (0, 1), "velocity", log_weights, True, prune=budget)


def decide_first_token(
    leader: Lockstep, follower: Lockstep, rows: torch.Tensor, token: int, led: Turn, followed: Turn
) -> None:
    """Both post position 0 of their turns, and the leader decides ``token``."""
    for engine, turn, row in ((leader, led, rows[0]), (follower, followed, rows[1])):
        engine.join(turn.member)
        engine.announce([turn])
        engine.post([turn], row)
    ready = leader.wait_for_rows([led])
    assert ready == [led]
    leader.weigh(ready)
    leader.mixed(ready)
    leader.publish(ready, [token])


def scoring_member(**options: Any) -> Member:
    """Its prompt has 5 tokens; the gateway knows the log-likelihood of 3 of them on one expert."""
    start = np.log([0.5, 0.5]).tolist()
    return Member(0, 1, 0, (0, 1), "velocity", start, True, scored=[(3, -2.0), (1, 0.0)], **options)


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
    leader.mine.prompt_sum[0] = math.log(0.25) - 3.0  # with the -2.0 that was known: a quarter of the other's
    follower.mine.prompt_sum[0] = math.log(0.75) - 5.0
    led, followed = (Turn(scoring_member(**options), 0, row=0) for _ in range(2))
    decide_first_token(leader, follower, torch.zeros(2, 1, VOCABULARY), 3, led, followed)
    np.testing.assert_allclose(np.exp(plane.blocks[0].log_weights[0, 0]), first, atol=1e-6)
    assert follower.adopt([followed]) == [3]
    follower.takes_part(followed.member)
    assert (followed.member.leader_at(0), followed.member.leader_at(1)) == leaders
    assert (followed.member.alone_from == 1) == (0.0 in first)


def test_a_leader_that_loses_its_weight_hands_over(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    rows = torch.zeros(2, 1, VOCABULARY)
    rows[0, 0, 3] = -9.0  # the leader would hardly have said token 3
    start = np.log([0.6, 0.4]).tolist()
    led, followed = (Turn(pruning_member(0.05, list(start)), 0, row=0) for _ in range(2))
    decide_first_token(leader, follower, rows, 3, led, followed)
    assert not leader.takes_part(led.member)
    assert (led.member.leader, led.member.active) == (1, (1,))
    # The follower, one position behind, still gets token 0 from whom it was decided by.
    assert follower.takes_part(followed.member)
    assert (followed.member.leader_at(0), followed.member.leader_at(1)) == (0, 1)
    assert follower.adopt([followed]) == [3]
    assert follower.decided(followed.member, 0) == 3
    assert followed.member.alone_from == 1
    assert np.exp(followed.member.log_weights).tolist() == [0.0, 1.0]
    assert followed.member.prune < 0.05
    counted = leader.mine.counted()
    assert (counted["pruned"], counted["handed_over"]) == (1, 1)


def test_a_released_follower_knows_once_it_knows_the_token(engines: tuple[Lockstep, Lockstep]) -> None:
    leader, follower = engines
    rows = torch.zeros(2, 1, VOCABULARY)
    rows[1, 0, 3] = -9.0
    led, followed = (Turn(pruning_member(0.05, np.log([0.6, 0.4]).tolist()), 0, row=0) for _ in range(2))
    assert follower.takes_part(followed.member)
    decide_first_token(leader, follower, rows, 3, led, followed)
    assert not follower.takes_part(followed.member)
    assert leader.takes_part(led.member)
    assert led.member.followers == ()
    assert leader.wait_for_rows([Turn(led.member, 1, row=0)]) != []  # for nobody


def test_a_later_tenant_of_a_slot_is_not_bound_by_an_earlier_ones_pruning(
    engines: tuple[Lockstep, Lockstep],
) -> None:
    leader, follower = engines
    rows = torch.zeros(2, 1, VOCABULARY)
    rows[1, 0, 3] = -9.0
    led, followed = (Turn(pruning_member(0.05, np.log([0.6, 0.4]).tolist()), 0, row=0) for _ in range(2))
    decide_first_token(leader, follower, rows, 3, led, followed)
    new = member(generation=2, posterior=True)
    assert follower.takes_part(new)
    assert new.active == (0, 1)
