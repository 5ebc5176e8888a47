"""What the gateway asks of one expert's engine, and of whoever joins several engines' answers to one.

The gateway knows no engine but by this; `vllm_adapter` has vLLM's, the unit tests have one without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from vllm.engine.protocol import EngineClient
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from decar.server.protocol.flow import Denoising
from decar.server.protocol.member import Member

PromptLogprobs = list[dict[int, Logprob] | None]


class OutputQueue(Protocol):
    """What an engine gives of one request, to be read by one task.

    Attributes:
        request_id: by which the engine knows the request.
    """

    request_id: str

    def get_nowait(self) -> RequestOutput | None:
        """What there is, or None; raises an exception that was put."""
        ...

    async def get(self) -> RequestOutput: ...

    def put(self, output: Exception) -> None:
        """End the request with an error, in whoever reads."""
        ...


class FilesElsewhere(Protocol):
    """Files under /dev/shm of another host, for an engine there to write to. Its methods block."""

    def make_rows(self, size_bytes: int) -> str:
        """Make one; its name."""
        ...

    def take_rows(self, name: str) -> np.ndarray:
        """The bytes [size] of one."""
        ...

    def drop_rows(self, name: str) -> None:
        """Remove one."""
        ...


class Engine(Protocol):
    """One expert's engine.

    Attributes:
        client: what vLLM's app may ask of an engine, for everything that is merely passed on.
        pid: of its process.
        cores: that it computes on; empty where it computes on a device, or elsewhere.
        files: on its host; None: it is the gateway's.
    """

    client: EngineClient
    pid: int
    cores: set[int]
    files: FilesElsewhere | None

    async def submit(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        **kwargs: Any,
    ) -> OutputQueue:
        """Have a request computed.

        Raises:
            VLLMValidationError: the engine refuses it.
            Exception: as `dead_error` makes it, if the engine is dead.
        """
        ...

    def choose_grammar(self, params: SamplingParams) -> None:
        """Check the grammar of ``params``, and note there what compiles it in every engine. May take seconds.

        Raises:
            VLLMValidationError: nothing does.
        """
        ...

    async def cancel(self, request_id: str) -> None:
        """End the request of an `OutputQueue`'s id, also one that its engine alone still knows; quiet if it is dead."""
        ...

    async def died(self) -> None:
        """Return when the engine is dead. To be awaited on the event loop that its requests run on."""
        ...

    async def denoise(self, request_id: str, tokens: Sequence[int], part: Denoising) -> np.ndarray:
        """Have an expert of a flow ensemble compute what ``part`` asks of a sequence.

        Returns:
            the log-probabilities [n] that it asks for; else [0].

        Raises:
            Exception: as `dead_error` makes it, if the engine is dead.
        """
        ...

    def dead_error(self) -> Exception:
        """What a request ends with whose engine is dead."""
        ...

    def has_work(self) -> bool:
        """Whether requests of this engine have not ended."""
        ...

    def end(self) -> None:
        """End its process, whatever it is doing; quiet if it has ended."""
        ...

    def keep_images(self, key: str) -> None:
        """Have this engine's renderer keep a prompt's images [N], as PIL has them, in the prompts that it makes."""
        ...

    def describe(
        self,
        described: PromptLogprobs,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        ranks: torch.Tensor,
    ) -> None:
        """Say of a prompt's next T positions what a response says of them, after those that are ``described``.

        Args:
            tokens, logprobs: [T, 1 + N]: the prompt's own token, and the best ones.
            ranks: [T], of the prompt's own.
        """
        ...

    def thread_pools(self) -> Sequence[ThreadPoolExecutor]:
        """Pools of threads that this engine's part in the gateway's process computes in."""
        ...


class NoEngine:
    """In a place that no expert has had yet: what is asked of an engine that is dead."""

    errored = True

    def __init__(self) -> None:
        self.client: Any = self
        self.cores: set[int] = set()
        self.files = None

    async def died(self) -> None: ...

    def has_work(self) -> bool:
        return False

    def end(self) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None: ...


@dataclass
class ExpertEngine:
    """One expert as the gateway sees it.

    Attributes:
        seated: whether an expert of the ensemble has this place.
        up: whether requests may be given to its engine, which changes when one has died and the next one is warm.
    """

    name: str
    engine: Engine
    up: bool = True
    seated: bool = True

    @property
    def lives(self) -> bool:
        """As `up`, and also before its death has been told to everybody."""
        return self.up and not self.engine.client.errored


class ExpertLost(Exception):
    """The engine of an expert that takes part in a request has died: the request goes on without it, or ends."""

    def __init__(self, expert: int):
        super().__init__(expert)
        self.expert = expert


class ExpertDown(Exception):
    """What a request ends with that none of the experts which live may answer."""


class Speech(Protocol):
    """An answer that was broken off.

    Attributes:
        tokens: [T], what the user has been told of it, or will be as soon as they listen.
        ticket: tells it from every other one.
    """

    tokens: list[int]
    ticket: int


class Speaker(Protocol):
    """Says one answer of a flow ensemble, as an engine would.

    Attributes:
        ends: tokens that end it.
    """

    ends: frozenset[int]

    def say(
        self,
        tokens: Sequence[int],
        logprobs: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
        finish: str | None,
    ) -> bool:
        """Say the next tokens [n]; whether the answer goes on, which a stop string may have ended.

        Args:
            logprobs: token ids and log-probabilities [n, 1 + N], the token said first, and its rank [n].
            finish: why they are the last ones: "stop" or "length".
        """
        ...

    async def next(self) -> RequestOutput:
        """What has been said since the last time; raises what `fail` was given."""
        ...

    def fail(self, error: Exception) -> None:
        """End the answer with an error for whoever listens."""
        ...

    async def abort(self) -> None:
        """End it as it is, with the finish reason "abort"; quiet if it has ended."""
        ...


class Relay(Protocol):
    """Gives a user what several engines say, one after another, as one engine's output."""

    def begin(
        self,
        leader: int,
        member: Member | None = None,
        on_tokens: Callable[[int], int] | None = None,
        speech: Speech | None = None,
    ) -> Any:
        """A request that ``leader`` is about to be given, alone or as a ``member`` whose leader may change.

        Args:
            on_tokens: is told, as the first tokens come, how many there are by now, also where the user gets only the
                whole answer; gives the number to be told of next.
            speech: what has been said of the answer before, to be gone on with.
        """
        ...

    def follow(self, relayed: Any, expert: int, request_id: str) -> None:
        """From now on, give the user what ``expert`` says as a leader, after what those before it said; and an error
        that it ends the request with, also as a follower."""
        ...

    def speaks(self, relayed: Any, expert: int) -> bool:
        """Whether it is ``expert`` that the user hears now."""
        ...

    def break_off(self, relayed: Any) -> Speech | None:
        """Forget a request, and keep what has been said of its answer; None: nothing yet."""
        ...

    def forget(self, relayed: Any) -> None: ...

    def stand_before(self, expert: int, engine: Any) -> None:
        """An expert has a new `Engine`."""
        ...
