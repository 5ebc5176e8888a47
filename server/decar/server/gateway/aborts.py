"""Requests that are ended by their ids, as vLLM's own route does. Knows who waits and who is to be told, no engines.

A request is ended where it is: what engines have is aborted there, and says so in its last output, with the text so
far; what waits for anything else is woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

EndInEngines = Callable[[], Awaitable[Any]]


class Aborted(Exception):
    """What has been aborted before an engine could say so."""

    def __init__(self, prompt: Any, params: SamplingParams):
        super().__init__("aborted")
        self._prompt, self._params = prompt, params

    def output(self, choices: int = 1) -> RequestOutput:
        """What an engine says of a request that has no token yet."""
        wanted = self._params.logprobs is not None
        ended = [
            CompletionOutput(
                index=index,
                text="",
                token_ids=[],
                cumulative_logprob=0.0 if wanted else None,
                logprobs=[] if wanted else None,
                finish_reason="abort",
            )
            for index in range(choices)
        ]
        ids = self._prompt.get("prompt_token_ids") if isinstance(self._prompt, dict) else None
        return RequestOutput("", None, ids, None, ended, finished=True)


class Abort:
    """Of one request: whether it has been asked for, and how it is done. Its choices share it."""

    def __init__(self, prompt: Any, params: SamplingParams):
        self._aborted = Aborted(prompt, params)
        self._asked = False
        self._waiting: set[asyncio.Task[Any] | None] = set()
        self._woken: set[asyncio.Task[Any] | None] = set()
        self._ends: set[EndInEngines] = set()

    @contextlib.contextmanager
    def waking(self) -> Iterator[None]:
        """While no engine has the request, and the current task waits for something else, an abort wakes that.

        Raises:
            Aborted: it has.
        """
        if self._asked:
            raise self._aborted
        task = asyncio.current_task()
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._woken:
                raise
            self._woken.discard(task)
            if sys.version_info >= (3, 11) and task is not None and task.uncancel():
                raise  # it has been cancelled as well
            raise self._aborted from None
        finally:
            self._waiting.discard(task)

    @contextlib.contextmanager
    def in_engines(self, end: EndInEngines) -> Iterator[None]:
        """While engines have the request, an abort is ``end``'s to do.

        Raises:
            Aborted: it has been asked for meanwhile.
        """
        if self._asked:
            raise self._aborted
        self._ends.add(end)
        try:
            yield
        finally:
            self._ends.discard(end)

    async def do(self) -> None:
        self._asked = True
        for task in self._waiting:
            assert task is not None
            task.cancel()
        self._woken |= self._waiting
        self._waiting.clear()
        for end in list(self._ends):
            await end()


class Aborts:
    """Of all requests that are under way."""

    def __init__(self) -> None:
        self._under_way: WeakKeyDictionary[Abort, set[str]] = WeakKeyDictionary()

    def of(self, request_id: str, prompt: Any, params: SamplingParams) -> Abort:
        """That of a request, which is under way as long as somebody has it. Users know the request by its id, or
        without the number that vLLM gives the prompts of one HTTP request."""
        abort = Abort(prompt, params)
        self._under_way[abort] = {request_id, re.sub(r"[-_]\d+$", "", request_id)}
        return abort

    async def do(self, request_ids: Iterable[Any]) -> None:
        """End the requests of these ids; what is no id, or nobody's, is passed over."""
        wanted = {request_id for request_id in request_ids if isinstance(request_id, str)}
        for abort in [abort for abort, names in self._under_way.items() if names & wanted]:
            await abort.do()
