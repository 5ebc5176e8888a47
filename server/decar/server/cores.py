"""Who gets a core while engines compute on every one of them. Knows Linux's scheduler, and nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar

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


_arrival: ContextVar[object | None] = ContextVar("arrival", default=None)


class GatewayThread:
    """The thread that all requests share, where engines compute on all cores. To be made on that thread.

    What it does slows the engine on its core, and through it those that wait for that one's rows. An engine that
    follows has time to spare at every step, while its leader mixes and samples: beside it, a thread that gives way
    does most of its work then. Unless every engine has cores of its own, all of this does nothing.

    Args:
        engines: the cores of each engine.
    """

    def __init__(self, engines: Sequence[set[int]]):
        self._engines = engines
        self._everywhere = self._keeps_to = os.sched_getaffinity(0)
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        self._apart = len(set().union(*engines)) == sum(map(len, engines))
        self._is_usual = os.sched_getscheduler(0) == os.SCHED_OTHER
        self._may_be_nice = self._is_usual and self._may_return()
        self._beside: int | None = None
        self._urgent: set[Hashable] = set()
        self._gives_way = False

    def keep_beside(self, engine: int | None) -> None:
        """Compute on the cores of ``engine`` only, and give way to it while nothing is urgent; None: as others do."""
        self._beside = engine
        cores = self._engines[engine] if engine is not None and self._apart else self._everywhere
        if cores != self._keeps_to:
            os.sched_setaffinity(0, cores)
            self._keeps_to = cores
        self._decide()

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

    def be_usual(self) -> None:
        """Undo, on a thread that this one has started, what it has inherited."""
        os.sched_setaffinity(0, self._everywhere)
        if self._is_usual:
            self._set(os.SCHED_OTHER, self._nice)

    def _decide(self) -> None:
        if not self._may_wait():
            self._give_way(False)
        elif not self._gives_way:  # once what the current task has waited for has been sent
            asyncio.get_running_loop().call_soon(lambda: self._give_way(self._may_wait()))

    def _may_wait(self) -> bool:
        return self._beside is not None and not self._urgent and self._apart and self._is_usual

    def _give_way(self, yes: bool) -> None:
        """Take a core from an engine only when it waits, or has computed for much longer; or as others do, again."""
        if yes != self._gives_way:
            self._gives_way = yes
            self._set(*((os.SCHED_BATCH, LAST_NICE) if yes else (os.SCHED_OTHER, self._nice)))

    def _set(self, policy: int, nice: int) -> None:
        """Without CAP_SYS_NICE there is no way back from a nice value: then the policy alone, by which a thread that
        wakes does not interrupt another."""
        with contextlib.suppress(OSError):  # some sandboxes have no policies
            os.sched_setscheduler(0, policy, os.sched_param(0))
        if self._may_be_nice:
            os.setpriority(os.PRIO_PROCESS, 0, nice)

    def _may_return(self) -> bool:
        """Whether this thread could be as urgent again as it is, once it were less so."""
        try:
            os.setpriority(os.PRIO_PROCESS, 0, self._nice - 1)
        except PermissionError:
            return False
        os.setpriority(os.PRIO_PROCESS, 0, self._nice)
        return True
