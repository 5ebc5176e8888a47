"""What SIGTERM and SIGINT do to a server that runs. Knows signals, not what ends by them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def told_to_stop(end_now: Callable[[], NoReturn]) -> None:
    """Return at the first of these signals. From then on, the next calls ``end_now``, whatever this process does.

    To be awaited on the main thread's event loop.
    """
    told, loop = asyncio.Event(), asyncio.get_running_loop()

    def first(*_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, lambda *_: end_now())
        loop.call_soon_threadsafe(told.set)

    for number in _SIGNALS:
        signal.signal(number, first)
    await told.wait()
