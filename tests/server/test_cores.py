"""What engines and the gateway ask of Linux."""

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from decar.server.cores import LAST_NICE, SLICE_MS, GatewayThread, take_long_slices

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def slice_ms() -> float:
    """The calling thread's slice, as Linux gives it."""
    attributes = ctypes.create_string_buffer(48)
    number = SCHED_GETATTR[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, attributes, len(attributes), 0) == 0
    _, _, _, _, _, runtime_ns, _, _ = struct.unpack("IIQiIQQQ", attributes.raw)
    return float(runtime_ns) / 1e6


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR, reason="the system call's number is not known")
def test_a_thread_and_those_it_starts_take_long_slices() -> None:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 12):
        pytest.skip("Linux lets no thread choose its slice before 6.12")
    nice = os.getpriority(os.PRIO_PROCESS, 0)

    def inner() -> list[float]:
        take_long_slices()
        with ThreadPoolExecutor(1) as started:
            return [slice_ms(), started.submit(slice_ms).result()]

    with ThreadPoolExecutor(1) as thread:
        before = thread.submit(slice_ms).result()
        assert thread.submit(inner).result() == [SLICE_MS, SLICE_MS]
        assert thread.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == nice
    assert before != SLICE_MS
    assert slice_ms() == before  # this thread's is as it was


CORES = sorted(os.sched_getaffinity(0))
SYS_NICE = 23  # the capability's bit
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="engines have cores of their own on two")


def place() -> tuple[set[int], int, int]:
    """The calling thread's cores, policy and nice value."""
    return os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)


def may_return() -> bool:
    """Whether Linux lets this process's threads be more urgent again, by what it says itself."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(status["CapEff"], 16) >> SYS_NICE & 1)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """One thread that may end anywhere."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@needs_two_cores
def test_the_gateways_thread_goes_beside_an_engine_and_gives_way_and_returns(
    thread: ThreadPoolExecutor,
) -> None:
    first, second = {CORES[0]}, set(CORES[1:])
    usual = thread.submit(place).result()
    _, policy, nice = usual
    last = LAST_NICE if may_return() else nice
    gateway = thread.submit(GatewayThread, [first, second]).result()
    assert thread.submit(place).result() == usual
    thread.submit(gateway.keep_beside, 1).result()
    assert thread.submit(place).result() == (second, policy, nice)
    thread.submit(gateway.give_way, True).result()
    assert thread.submit(place).result() == (second, os.SCHED_BATCH, last)
    thread.submit(gateway.keep_beside, 0).result()
    assert thread.submit(place).result() == (first, os.SCHED_BATCH, last)
    assert place() == usual  # other threads' places are theirs

    def started_now(initializer: object) -> tuple[set[int], int, int]:
        with ThreadPoolExecutor(1, initializer=initializer) as started:  # type: ignore[arg-type]
            return started.submit(place).result()

    assert thread.submit(started_now, None).result() == (first, os.SCHED_BATCH, last)
    assert thread.submit(started_now, gateway.be_usual).result() == usual
    thread.submit(gateway.give_way, False).result()
    thread.submit(gateway.keep_beside, None).result()
    assert thread.submit(place).result() == usual


@needs_two_cores
def test_a_thread_that_could_not_return_keeps_its_nice_value(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_priority = os.setpriority

    def less_urgent_only(which: int, who: int, priority: int) -> None:
        """As Linux does without CAP_SYS_NICE."""
        if priority < os.getpriority(which, who):
            raise PermissionError
        set_priority(which, who, priority)

    monkeypatch.setattr(os, "setpriority", less_urgent_only)
    usual = thread.submit(place).result()
    gateway = thread.submit(GatewayThread, [{core} for core in CORES]).result()
    thread.submit(gateway.give_way, True).result()
    assert thread.submit(place).result() == (usual[0], os.SCHED_BATCH, usual[2])
    thread.submit(gateway.give_way, False).result()
    assert thread.submit(place).result() == usual


def test_beside_engines_that_share_cores_the_gateways_thread_stays_as_it_is(
    thread: ThreadPoolExecutor,
) -> None:
    usual = thread.submit(place).result()
    gateway = thread.submit(GatewayThread, [set(CORES), set(CORES)]).result()
    thread.submit(gateway.keep_beside, 1).result()
    thread.submit(gateway.give_way, True).result()
    assert thread.submit(place).result() == usual


@needs_two_cores
def test_a_policy_that_an_operator_chose_stays(thread: ThreadPoolExecutor) -> None:
    thread.submit(os.sched_setscheduler, 0, os.SCHED_BATCH, os.sched_param(0)).result()
    chosen = thread.submit(place).result()
    gateway = thread.submit(GatewayThread, [{core} for core in CORES]).result()
    for yes in (True, False):
        thread.submit(gateway.give_way, yes).result()
        assert thread.submit(place).result() == chosen
