"""What an engine on another host says is heard no earlier than what it has written. Knows `AsyncLLM`'s engine client.

Tokens come over vLLM's sockets, and the weights that mixed them, who leads from then on, and what a prompt's tokens
said by way of the plane. On one host the plane is first, by the order of writing; between hosts, whoever is faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any

from decar.server.protocol.plane import Plane

_LOOK_FOR_END_S = 0.1
_LAST_WORDS_S = 2.0


class Brought:
    """Waits for what other hosts' engines have written to be in ``plane``.

    Args:
        heard: a pipe that can be read when there is something new; "" where there are no other hosts.
    """

    def __init__(self, plane: Plane, heard: str):
        self._plane = plane
        self._pipe = os.open(heard, os.O_RDWR | os.O_NONBLOCK) if heard else None
        self._news = asyncio.Event()

    def watch(self) -> None:
        """Begin. Call once, inside the event loop."""
        if self._pipe is not None:
            asyncio.get_running_loop().add_reader(self._pipe, self._hear)

    def hold_back(self, expert: int, llm: Any) -> None:
        """Have an `AsyncLLM`, which has heard nothing yet, hear each step's outputs when all that its engine has
        written before is here. Where that does not come any more, since the engine's host is gone, neither they nor
        what follows is heard, and others go on from there.
        """
        if self._plane.mirrored[expert] == float("inf"):
            return  # it writes here itself
        core = llm.engine_core
        next_outputs, mirrored = core.get_output_async, self._plane.mirrored

        async def outputs_when_brought() -> Any:
            outputs, dead_since = await next_outputs(), None
            while mirrored[expert] < outputs.timestamp:
                if core.resources.engine_dead:
                    dead_since = dead_since or time.monotonic()
                    if time.monotonic() - dead_since > _LAST_WORDS_S:
                        while (
                            True
                        ):  # up to the error that ends them: later ones would not follow what was heard
                            await next_outputs()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_FOR_END_S):
                        await self._news.wait()
            return outputs

        core.get_output_async = outputs_when_brought

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            assert self._pipe is not None
            os.read(self._pipe, 1 << 16)
        self._news.set()
        self._news = asyncio.Event()
