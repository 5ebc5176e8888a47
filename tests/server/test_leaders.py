"""Who leads, whom the gateway tells first, and beside which engine it computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decar.kernels import Rule
from decar.server.gateway import core_policy
from decar.server.gateway.core_policy import CorePolicy
from decar.server.gateway.leaders import ROOM_BYTES, Leaders
from decar.server.protocol.member import Member


def member(slot: int, leader: int, prune: float = 0.0, active: tuple[int, ...] = (0, 1, 2)) -> Member:
    return Member(
        slot=slot,
        generation=1,
        leader=leader,
        active=active,
        rule="velocity",
        log_weights=[0.0, 0.0, 0.0],
        posterior=False,
        prune=prune,
    )


def among(*active: int, prune: float = 0.0) -> Member:
    """A request that is about to get its leader."""
    return member(9, active[0], prune, active)


def logs(*weights: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(weights)


ONE_HOST = (0, 0, 0)
ROW: dict[Rule, int] = {"velocity": ROOM_BYTES // 4, "logit": ROOM_BYTES // 4}


def test_the_heaviest_of_the_active_leads() -> None:
    leaders = Leaders(ONE_HOST, ROW)
    assert leaders.choose(logs(0.2, 0.5, 0.3), among(0, 1, 2)) == 1
    assert leaders.choose(logs(0.2, 0.5, 0.3), among(0, 2)) == 2
    leaders.begin(member(0, leader=0))
    assert leaders.choose(logs(0.2, 0.5, 0.3), among(0, 1, 2)) == 1, (
        "whoever leads already does not outweigh it"
    )


def test_among_equals_the_one_that_leads_most_does() -> None:
    leaders = Leaders(ONE_HOST, ROW)
    equal = logs(1, 1, 1) - np.log(3)
    assert leaders.choose(equal, among(0, 1, 2)) == 0
    leaders.begin(member(0, leader=2))
    assert leaders.choose(equal, among(0, 1, 2)) == 2
    assert leaders.choose(equal, among(0, 1)) == 0, "it has to take part"
    leaders.begin(member(1, leader=1))
    leaders.begin(member(2, leader=1))
    assert leaders.choose(equal, among(0, 1, 2)) == 1


def test_weights_that_differ_by_rounding_are_equal() -> None:
    leaders = Leaders(ONE_HOST, ROW)
    leaders.begin(member(0, leader=0))
    assert leaders.choose(np.array([np.log(0.5), np.log(0.5) + 1e-12]), among(0, 1)) == 0
    assert leaders.choose(np.array([np.log(0.5), np.log(0.5) + 1e-6]), among(0, 1)) == 1


def test_the_host_with_the_most_rows_leads_whatever_the_weights_are() -> None:
    leaders = Leaders((0, 1, 1), ROW)
    assert leaders.choose(logs(0.8, 0.1, 0.1), among(0, 1, 2)) == 1, "one row to bring, not two"
    leaders.begin(member(0, leader=1))
    assert leaders.choose(logs(0.8, 0.1, 0.1), among(0, 1, 2)) == 1
    assert leaders.choose(logs(0.1, 0.2, 0.7), among(1, 2)) == 2, "on one host nothing is to bring: as on one"


@pytest.mark.parametrize(
    ("row_bytes", "expected"),
    [
        (ROOM_BYTES // 100, [0, 0, 0, 0, 0, 0, 0, 0]),  # which is nothing to a link: as on one host
        (ROOM_BYTES // 4, [0, 0, 0, 1, 1, 1, 2, 2]),  # two rows each: the third is over it
        (ROOM_BYTES, [0, 1, 2, 0, 1, 2, 0, 1]),
    ],
)
def test_hosts_that_are_as_near_share_what_a_link_takes_long_for(row_bytes: int, expected: list[int]) -> None:
    leaders = Leaders((0, 1, 2), {"velocity": row_bytes, "logit": 0})
    led = []
    for slot in range(len(expected)):
        led.append(leaders.choose(logs(0.8, 0.1, 0.1), among(0, 1, 2)))
        leaders.begin(member(slot, led[-1]))
    assert led == expected


def test_what_is_brought_is_counted_of_experts_that_are_left() -> None:
    leaders = Leaders((0, 1, 2), {"velocity": ROOM_BYTES, "logit": 0})
    alone = member(0, leader=0, prune=0.1)
    leaders.begin(alone)
    assert leaders.choose(logs(0.8, 0.1, 0.1), among(0, 1, 2)) == 1
    alone.active = (0,)
    assert leaders.choose(logs(0.8, 0.1, 0.1), among(0, 1, 2)) == 0


def test_a_request_that_experts_leave_is_led_by_the_one_that_stays() -> None:
    leaders = Leaders((0, 1, 1), ROW)
    assert leaders.choose(logs(0.8, 0.1, 0.1), among(0, 1, 2, prune=0.1)) == 0
    assert leaders.choose(logs(1, 1, 1), among(0, 1, 2, prune=0.1)) == 1, "among equals, the nearest"


def test_who_leads_what_is_counted_while_it_runs() -> None:
    leaders = Leaders(ONE_HOST, ROW)
    first, second = member(0, leader=1), member(1, leader=1, prune=0.1)
    leaders.begin(first)
    leaders.begin(second)
    assert leaders.counts() == [0, 2, 0]
    second.leader = 2  # it was handed over
    assert leaders.counts() == [0, 1, 1]
    assert leaders.some_stay
    leaders.end(first)
    assert leaders.counts() == [0, 0, 1]
    assert not leaders.some_stay, "the one that is left may release experts"
    leaders.end(second)
    leaders.end(second)
    assert leaders.counts() == [0, 0, 0]
    assert not leaders.some_stay


class Thread:
    """Remembers where it was told to compute."""

    def __init__(self) -> None:
        self.beside: list[int | None] = []

    def keep_beside(self, engine: int | None) -> None:
        self.beside.append(engine)


class Engine:
    def __init__(self, *cores: int):
        self.cores = set(cores)


@pytest.fixture
def thread() -> Thread:
    return Thread()


def policy_of(leaders: Leaders, thread: Thread) -> CorePolicy:
    experts: Any = [SimpleNamespace(engine=Engine(core), up=True) for core in range(3)]
    return CorePolicy(experts, leaders, thread)  # type: ignore[arg-type]


def test_the_thread_computes_beside_the_engine_that_leads_least(thread: Thread) -> None:
    leaders = Leaders(ONE_HOST, ROW)
    policy = policy_of(leaders, thread)
    policy.share_cores()
    leaders.begin(member(0, leader=0))
    policy.share_cores()
    leaders.begin(member(1, leader=2))
    policy.share_cores()
    # Nothing runs; the last of those that lead nothing; the only one that leads nothing.
    assert thread.beside == [None, 2, 1]


def test_where_experts_are_released_the_thread_is_free(thread: Thread) -> None:
    leaders = Leaders(ONE_HOST, ROW)
    policy = policy_of(leaders, thread)
    leaders.begin(member(0, leader=0, prune=0.1))
    policy.share_cores()
    assert thread.beside == [None]


@pytest.mark.parametrize(
    ("here", "told"), [(0, [1, 2, 0]), (1, [2, 0, 1]), (2, [1, 0, 2]), (7, [1, 2, 0])], ids=str
)
def test_followers_are_told_first_and_whoever_shares_the_core_last(
    thread: Thread, monkeypatch: pytest.MonkeyPatch, here: int, told: list[int]
) -> None:
    monkeypatch.setattr(core_policy, "current_core", lambda: here)
    assert policy_of(Leaders(ONE_HOST, ROW), thread).in_order([0, 1, 2], leader=0) == told
