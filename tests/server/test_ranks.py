"""What an expert of several processes needs of each: told tokens, dealt cores, and memory that is found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.device_communicators import shm_broadcast

from decar.server.protocol.plane import Plane
from decar.server.protocol.runtime import DIRECTORY, new_name, remove_all_of, remove_stale
from decar.server.vllm_adapter import engine, ranks
from decar.server.vllm_adapter.executor import RanksExecutor, own_segments
from decar.server.vllm_adapter.ranks import Ranks, share_of


class Group:
    """vLLM's group of two ranks, both in this process."""

    def __init__(self, said: deque[list[int]], rank: int, size: int):
        self.said = said
        self.rank_in_group, self.world_size = rank, size

    def broadcast_object(self, obj: Any = None) -> Any:
        if self.rank_in_group:
            return self.said.popleft()
        self.said.append(obj)
        return obj


def ranks_of(size: int, said: deque[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    found = []
    for rank in range(size):
        group = Group(said, rank, size)
        monkeypatch.setattr(ranks, "get_tp_group", lambda group=group: group)
        found.append(Ranks())
    return found


def test_all_keep_what_the_first_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ranks_of(2, deque(), monkeypatch)
    assert (first.first, second.first) == (True, False)
    for dtype in (torch.int32, torch.int64):
        first.tell(torch.tensor([7, 8, 9], dtype=dtype), [1])
        tokens = torch.zeros(3, dtype=dtype)
        assert second.hear(tokens) == [1]
        assert tokens[[0, 2]].tolist() == [7, 9]


def test_who_is_alone_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    said: deque[list[int]] = deque()
    [alone] = ranks_of(1, said, monkeypatch)
    alone.tell(torch.tensor([7]))
    assert alone.first
    assert not said


@pytest.mark.parametrize(
    ("cores", "counts", "dealt"),
    [
        (2, [1, 1], [(0,), (1,)]),
        (2, [1, 1, 1], [(0,), (1,), (0,)]),
        (8, [1, 1, 1], [(0, 1), (2, 3), (4, 5)]),
        (2, [2, 2], [(0, 1), (0, 1)]),
        (2, [2, 1], [(0, 1), (0,)]),
        (1, [2, 1], [(0,), (0,)]),
        (8, [2, 2], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (8, [4, 1], [(0, 1, 2, 3), (4,)]),
    ],
    ids=str,
)
def test_cores_are_dealt_out_by_ranks(
    monkeypatch: pytest.MonkeyPatch, cores: int, counts: list[int], dealt: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(engine, "current_platform", SimpleNamespace(is_cpu=lambda: True))
    found = engine.dealt_cores(range(cores), counts)
    assert found == dealt
    for theirs, count in zip(found, counts, strict=True):
        shares = [share_of(theirs, rank, count) for rank in range(count)]
        assert all(shares)
        assert set().union(*shares) <= set(theirs)
        if len(theirs) >= count:
            assert sum(map(len, shares)) == len(set().union(*shares)), "no core is two ranks'"


def test_who_must_not_write_into_the_plane_has_one_of_its_own() -> None:
    plane = Plane.create(experts=2, slots=3, vocab_size=11, positions=8)
    try:
        own = Plane.of_nobody(plane.spec)
        own.fields["running"][1, 2] = 5
        assert own.blocks[1].running[2] == 5
        assert not plane.fields["running"].any()
        assert own.fields["rows"].shape == plane.fields["rows"].shape
    finally:
        plane.unlink()


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> type[SharedMemory]:
    monkeypatch.setattr(shm_broadcast, "shared_memory", shm_broadcast.shared_memory)  # back afterwards
    own_segments()
    kind: type[SharedMemory] = shm_broadcast.shared_memory.SharedMemory
    return kind


def test_message_queues_lie_where_they_are_found_again(segments: type[SharedMemory]) -> None:
    one, other = segments(create=True, size=64), segments(create=True, size=64)
    reader = segments(name=one.name)
    assert one.buf is not None
    assert reader.buf is not None
    one.buf[0] = 5
    assert reader.buf[0] == 5
    assert {one.name, other.name} <= {path.name for path in DIRECTORY.iterdir()}
    reader.close()
    one.close()
    one.unlink()
    remove_all_of(new_name())
    other.close()
    assert not {one.name, other.name} & {path.name for path in DIRECTORY.iterdir()}


def test_what_a_process_has_made_goes_also_while_nobody_has_heard_of_its_end() -> None:
    """Its parent is one that does not look: a process that has ended keeps its id until then."""
    code = "from decar.server.protocol.runtime import *; path = DIRECTORY / new_name(); path.touch(); print(path.name)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.read().strip()  # to the end of what it says
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert name in remove_stale()


def test_ranks_are_ended_at_once() -> None:
    """One that waits for another in the midst of a layer hears no signal that it could catch."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    RanksExecutor._ensure_worker_termination(processes)  # type: ignore[arg-type]  # of processes, all can be killed
    for process in processes:
        with process:
            assert process.wait(10) == -signal.SIGKILL
