"""What an engine's process asks of Linux."""

import ctypes
import os
import platform
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from decar.server.seat import SLICE_MS, take_long_slices

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
