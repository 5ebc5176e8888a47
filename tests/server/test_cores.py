"""What engines and the gateway ask of Linux."""

import asyncio
import ctypes
import os
import platform
import struct
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

import pytest

from decar.server.protocol.cores import LAST_NICE, SLICE_MS, GatewayThread, start_threads, take_long_slices

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
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="engines have cores of their own on two")


def place() -> tuple[set[int], int, int]:
    """The calling thread's cores, policy and nice value."""
    return os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)


def may_return() -> bool:
    """Whether Linux lets a thread be more urgent again."""

    def tried() -> bool:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, LAST_NICE)
        try:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        except PermissionError:
            return False
        return True

    with ThreadPoolExecutor(1) as other:
        return other.submit(tried).result()


def in_its_own_thread(coroutine: Coroutine[None, None, None]) -> None:
    """Run a test where what it does to its thread stays its own."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, coroutine).result()


async def settled() -> tuple[set[int], int, int]:
    """`place`, once the current loop has done what it has put off."""
    await asyncio.sleep(0)
    return place()


@needs_two_cores
def test_the_gateways_thread_goes_beside_an_engine_and_gives_way_and_returns() -> None:
    usual = (_, policy, nice) = place()
    first, second = {CORES[0]}, set(CORES[1:])
    way = (os.SCHED_BATCH, LAST_NICE if may_return() else nice)

    def place_of_a_thread_started_now() -> tuple[set[int], int, int]:
        with ThreadPoolExecutor(1) as started:
            return started.submit(place).result()

    async def test() -> None:
        gateway = GatewayThread([first, second])
        assert await settled() == usual
        gateway.keep_beside(1)
        assert place() == (second, policy, nice), "what has come is sent before"
        assert await settled() == (second, *way)
        gateway.keep_beside(0)
        assert await settled() == (first, *way)
        assert place_of_a_thread_started_now() == (first, *way)
        gateway.keep_beside(None)
        assert place() == usual

    in_its_own_thread(test())
    assert place() == usual


@needs_two_cores
def test_the_gateways_thread_gives_way_while_nothing_is_urgent() -> None:
    async def test() -> None:
        gateway = GatewayThread([{core} for core in CORES])
        gateway.keep_beside(0)
        assert (await settled())[1] == os.SCHED_BATCH
        for key in ("one", "another", "one"):
            gateway.hurry(key, True)
            assert place()[1] == os.SCHED_OTHER
        gateway.hurry("one", False)
        assert (await settled())[1] == os.SCHED_OTHER
        gateway.hurry("another", False)
        gateway.hurry("one", True)  # before the loop came to it
        assert (await settled())[1] == os.SCHED_OTHER
        gateway.hurry("one", False)
        assert (await settled())[1] == os.SCHED_BATCH

    in_its_own_thread(test())


@needs_two_cores
def test_what_arrives_is_urgent_until_it_or_what_it_has_started_is_taken_over() -> None:
    async def test() -> None:
        gateway = GatewayThread([{core} for core in CORES])
        gateway.keep_beside(0)

        async def arrived() -> None:
            gateway.arrived()

        async def fails() -> None:
            with gateway.arriving():
                assert (await settled())[1] == os.SCHED_OTHER
                raise ValueError("a bad request")

        await arrived()  # with nothing that arrives
        assert (await settled())[1] == os.SCHED_BATCH
        with gateway.arriving():
            assert (await settled())[1] == os.SCHED_OTHER
            await asyncio.create_task(arrived())
            assert (await settled())[1] == os.SCHED_BATCH
        with pytest.raises(ValueError, match="a bad request"):
            await fails()
        assert (await settled())[1] == os.SCHED_BATCH

    in_its_own_thread(test())


@needs_two_cores
def test_a_thread_that_could_not_return_keeps_its_nice_value(monkeypatch: pytest.MonkeyPatch) -> None:
    set_priority = os.setpriority

    def less_urgent_only(which: int, who: int, priority: int) -> None:
        """As Linux does without CAP_SYS_NICE."""
        if priority < os.getpriority(which, who):
            raise PermissionError
        set_priority(which, who, priority)

    monkeypatch.setattr(os, "setpriority", less_urgent_only)
    usual = (_, _, nice) = place()

    async def test() -> None:
        gateway = GatewayThread([{core} for core in CORES])
        gateway.keep_beside(0)
        assert await settled() == ({CORES[0]}, os.SCHED_BATCH, nice)
        gateway.keep_beside(None)
        assert place() == usual

    in_its_own_thread(test())


@pytest.mark.parametrize(
    "engines", [[set(CORES), set(CORES)], [{CORES[0]}], []], ids=["shared", "free", "gpus"]
)
def test_unless_engines_have_all_cores_and_each_its_own_the_gateways_thread_stays(
    engines: list[set[int]],
) -> None:
    if engines == [set(CORES)]:
        pytest.skip("one core: none is free")
    usual = place()

    async def test() -> None:
        GatewayThread(engines).keep_beside(0)
        assert await settled() == usual

    in_its_own_thread(test())


@needs_two_cores
def test_cores_that_are_taken_away_end_no_request() -> None:
    async def test() -> None:
        gateway = GatewayThread([set(CORES), {max(CORES) + 10_000}])
        usual = place()
        gateway.keep_beside(1)
        assert (await settled())[0] == usual[0]
        gateway.keep_beside(None)
        assert place() == usual

    in_its_own_thread(test())


@needs_two_cores
def test_threads_that_were_started_early_are_usual() -> None:
    usual = place()

    async def test() -> None:
        gateway = GatewayThread([{core} for core in CORES])
        with ThreadPoolExecutor(3) as pool:
            start_threads(pool)
            gateway.keep_beside(0)
            assert await settled() != usual
            together = threading.Barrier(3)

            def meet() -> tuple[set[int], int, int]:
                together.wait()
                return place()

            assert [met.result() for met in [pool.submit(meet) for _ in range(3)]] == [usual] * 3

    in_its_own_thread(test())


@needs_two_cores
def test_a_policy_that_an_operator_chose_stays() -> None:
    async def test() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        everywhere, *chosen = place()
        gateway = GatewayThread([{core} for core in CORES])
        for engine, cores in ((0, {CORES[0]}), (None, everywhere)):
            gateway.keep_beside(engine)
            assert await settled() == (cores, *chosen)

    in_its_own_thread(test())
