"""Who gets a core while engines compute on every one of them. Knows Linux's scheduler, and nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

_libc = ctypes.CDLL(None, use_errno=True)


def yield_core() -> None:
    """Let another runnable thread have this core. Through ctypes, since Python's own call keeps the GIL."""
    _libc.sched_yield()


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number by machine: the C library has no function for it yet."""
_ATTRIBUTES = "IIQiIQQQ"  # size, policy, flags, nice, priority, runtime (of a slice, in ns), deadline, period
_KEEP_POLICY = 0x08
SLICE_MS = 5
"""Longer than Linux lets a thread run by default, which is 0.7 to 2.8 ms."""


def take_long_slices() -> None:
    """Let this thread, and those that it will start, compute for `SLICE_MS` at a time.

    Its share of the core stays what it is, but Linux, from 6.12 on, lets threads of shorter slices that wake have the
    core at once: the gateway's, and a client's on the same machine. Elsewhere nothing changes.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        size = struct.calcsize(_ATTRIBUTES)
        wanted = struct.pack(_ATTRIBUTES, size, 0, _KEEP_POLICY, nice, 0, SLICE_MS * 1_000_000, 0, 0)
        _libc.syscall(number, 0, wanted, 0)


def current_core() -> int:
    """The core that this thread runs on just now."""
    return int(_libc.sched_getcpu())


LAST_NICE = 19
"""The least urgent that a thread can be."""


def start_threads(pool: ThreadPoolExecutor) -> None:
    """Start all threads of ``pool`` now: later they would inherit where and how this thread computes then."""
    together = threading.Barrier(pool._max_workers)
    for _ in range(pool._max_workers):
        pool.submit(together.wait)


_arrival: ContextVar[object | None] = ContextVar("arrival", default=None)


class GatewayThread:
    """The thread that all requests share, where engines compute on all cores. To be made on that thread.

    What it does slows the engine on its core, and through it those that wait for that one's rows. An engine that
    follows has time to spare at every step, while its leader mixes and samples: beside it, a thread that gives way
    does most of its work then. Unless engines have all cores, and each its own, all of this does nothing.

    Args:
        engines: the cores of each engine; empty where they do not compute on cores.
    """

    def __init__(self, engines: Sequence[set[int]]):
        self._engines = engines
        self._everywhere = self._keeps_to = os.sched_getaffinity(0)
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        cores = set().union(*engines)
        self._crowded = cores >= self._everywhere and len(cores) == sum(map(len, engines))
        self._may_be_batch = self._could(
            partial(_set_policy, os.SCHED_BATCH), partial(_set_policy, os.SCHED_OTHER)
        )
        self._may_be_nice = self._could(partial(_set_nice, LAST_NICE), partial(_set_nice, self._nice))
        self._beside: int | None = None
        self._urgent: set[Hashable] = set()
        self._gives_way = False

    def keep_beside(self, engine: int | None) -> None:
        """Compute on the cores of ``engine`` only, and give way to it while nothing is urgent; None: as others do."""
        self._beside = engine if self._crowded else None
        self._decide()  # first: a thread that gives way may be long in getting to the rest
        cores = self._everywhere if self._beside is None else self._engines[self._beside]
        if cores != self._keeps_to:
            _set_cores(cores)
            self._keeps_to = cores

    def moved(self, engine: int, cores: set[int]) -> None:
        """``engine`` computes on these cores now: most often, on the same."""
        self._engines = [cores if k == engine else others for k, others in enumerate(self._engines)]

    def hurry(self, key: Hashable, urgent: bool) -> None:
        """Note whether what ``key`` stands for should not wait for an engine to have time to spare."""
        if urgent != (key in self._urgent):
            (self._urgent.add if urgent else self._urgent.discard)(key)
            self._decide()

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """What the current task does inside is urgent until it, or one that it has started, says `arrived`."""
        token = _arrival.set(object())
        self.hurry(_arrival.get(), True)
        try:
            yield
        finally:
            self.arrived()
            _arrival.reset(token)

    def arrived(self) -> None:
        """The current task is no more urgent than it will say by `hurry`."""
        self.hurry(_arrival.get(), False)

    def _decide(self) -> None:
        if not self._may_wait():
            self._give_way(False)
        elif not self._gives_way:
            # After what is ready now: the first token that was urgent has still to be sent.
            asyncio.get_running_loop().call_soon(lambda: self._give_way(self._may_wait()))

    def _may_wait(self) -> bool:
        return self._beside is not None and not self._urgent

    def _give_way(self, yes: bool) -> None:
        """Take a core from an engine only when it waits, or has computed for much longer; or as others do, again."""
        if yes != self._gives_way:
            self._gives_way = yes
            self._set(*((os.SCHED_BATCH, LAST_NICE) if yes else (os.SCHED_OTHER, self._nice)))

    def _set(self, policy: int, nice: int) -> None:
        """Without CAP_SYS_NICE there is no way back from a nice value: then the policy alone, by which a thread that
        wakes does not interrupt another. Where not even that is to be had, nothing."""
        if self._may_be_batch:
            _set_policy(policy)
        if self._may_be_nice:
            _set_nice(nice)

    @staticmethod
    def _could(leave: Callable[[], None], come_back: Callable[[], None]) -> bool:
        """Whether a thread like this one could do both. Not where an operator has chosen another policy."""

        def tried() -> bool:
            try:
                if os.sched_getscheduler(0) != os.SCHED_OTHER:
                    return False
                leave()
                come_back()
            except OSError:
                return False
            return True

        with ThreadPoolExecutor(1) as other:
            return other.submit(tried).result()


def _set_policy(policy: int) -> None:
    os.sched_setscheduler(0, policy, os.sched_param(0))


def _set_nice(nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, nice)


def _set_cores(cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # an operator has taken them away meanwhile
        os.sched_setaffinity(0, cores)
