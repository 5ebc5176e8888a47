"""Engines without a model, driven by a test, for everything in the gateway that is not vLLM's.

The plane, slots, members and choices are real; an engine says what the test has it say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from decar.router import Ensemble
from decar.router.manifest import ExpertEntry, Manifest
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.metrics import EnsembleMetrics
from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Plane

VOCAB_SIZE = 8
MAX_LOGPROBS = 5


class EngineDied(Exception):
    """What a fake engine's requests end with when it is dead."""


class FakeQueue:
    """Outputs of one request, in order."""

    def __init__(self, request_id: str):
        self.request_id = request_id
        self._outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    def put(self, output: RequestOutput | Exception) -> None:
        self._outputs.put_nowait(output)

    def get_nowait(self) -> RequestOutput | None:
        return None if self._outputs.empty() else _given(self._outputs.get_nowait())

    async def get(self) -> RequestOutput:
        return _given(await self._outputs.get())


def _given(output: RequestOutput | Exception) -> RequestOutput:
    if isinstance(output, Exception):
        raise output
    return output


def _output(
    request_id: str, given: Submitted, tokens: Sequence[int], finish_reason: str | None
) -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text="".join(map(str, tokens)),
        token_ids=list(tokens),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=finish_reason,
    )
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=given.prompt["prompt_token_ids"],
        prompt_logprobs=None,
        outputs=[completion],
        finished=finish_reason is not None,
    )


@dataclass
class Submitted:
    """What an engine was given."""

    prompt: Any
    params: SamplingParams
    arrival_time: float | None
    queue: FakeQueue
    trace_headers: dict[str, str] | None = None
    said: list[int] = field(default_factory=list)

    @property
    def member(self) -> Member:
        member = Member.of(self.params)
        assert member is not None
        return member


class FakeEngine:
    """One expert's engine, and what vLLM's app may ask of it.

    Attributes:
        requests: what it was given, by the id that it knows the request by.
        cancelled: ids of requests that it was told to end.
        refuses: raised by `submit`, if not None.
        busy: while it is clear, `submit` does not return.
    """

    def __init__(self, expert: int, plane: Plane, cores: set[int] | None = None):
        self.expert, self.plane = expert, plane
        self.client: Any = self
        self.pid = 1000 + expert
        self.cores = cores or set()
        self.files = None
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=2))
        self.model_config = SimpleNamespace(max_logprobs=MAX_LOGPROBS)
        self.renderer = SimpleNamespace(get_tokenizer=lambda: None)
        self.input_processor = None
        self.requests: dict[str, Submitted] = {}
        self.cancelled: list[str] = []
        self.refuses: Exception | None = None
        self.busy = asyncio.Event()
        self.busy.set()
        self._dead = asyncio.Event()

    async def submit(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        trace_headers: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> FakeQueue:
        await self.busy.wait()
        if self.errored:
            raise self.dead_error()
        if self.refuses is not None:
            raise self.refuses
        queue = FakeQueue(self._id(request_id))
        while queue.request_id in self.requests:  # the same request once more
            queue.request_id += "'"
        self.requests[queue.request_id] = Submitted(prompt, params, arrival_time, queue, trace_headers)
        return queue

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        queue = await self.submit(request_id, prompt, params, **kwargs)
        finished = False
        while not finished:
            output = await queue.get()
            finished = output.finished
            yield output

    def choose_grammar(self, params: SamplingParams) -> None: ...

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        given = self.requests.get(request_id)
        if given is not None:
            given.queue.put(_output(request_id, given, (), finish_reason="abort"))

    async def abort(self, request_id: str) -> None:
        await self.cancel(self._id(request_id))

    async def died(self) -> None:
        await self._dead.wait()

    def dead_error(self) -> Exception:
        return EngineDied()

    def has_work(self) -> bool:
        return bool(self.running)

    def end(self) -> None:
        self.die()

    def keep_images(self, key: str) -> None: ...

    def describe(self, described: Any, tokens: Any, logprobs: Any, ranks: Any) -> None:
        raise NotImplementedError

    def thread_pools(self) -> Sequence[ThreadPoolExecutor]:
        return []

    @property
    def errored(self) -> bool:
        return self._dead.is_set()

    def shutdown(self, timeout: float | None = None) -> None: ...

    async def reset_prefix_cache(self) -> bool:
        return True

    def _id(self, request_id: str) -> str:
        return f"{request_id}@{self.expert}"

    def latest(self, request_id: str) -> Submitted:
        """What it was given last of a request that it was given several times."""
        key = self._id(request_id)
        return self.requests[max((found for found in self.requests if found.rstrip("'") == key), key=len)]

    # --- what a test has it do ----------------------------------------------------------------------------

    def die(self) -> None:
        self._dead.set()

    @property
    def running(self) -> list[str]:
        """Ids of requests that it was given and has not been told to end."""
        return [request_id for request_id in self.requests if request_id not in self.cancelled]

    def says(
        self, request_id: str, *tokens: int, start: int = 0, finished: bool = False, mixed: bool = True
    ) -> None:
        """Give a request tokens from position ``start`` on; if ``mixed``, by the weights that it began with."""
        given = self.latest(request_id)
        given.said += tokens
        if mixed:
            member = given.member
            block = self.plane.blocks[self.expert]
            for position in range(start, start + len(tokens)):
                block.log_weights[member.slot, position % self.plane.spec.ring] = np.asarray(
                    member.log_weights
                )
        given.queue.put(_output(request_id, given, tokens, "length" if finished else None))


class FakeRelay:
    """Remembers whom it was told of; tokens are told of as a test says."""

    def __init__(self, engines: Sequence[FakeEngine]) -> None:
        self.engines = engines
        self.begun: list[Any] = []
        self.followed: list[tuple[int, str]] = []
        self.forgotten = 0

    def begin(self, leader: int, member: Any = None, on_tokens: Any = None, speech: Any = None) -> Any:
        relayed = SimpleNamespace(leader=leader, member=member, on_tokens=on_tokens, speech=speech, ids={})
        self.begun.append(relayed)
        return relayed

    def follow(self, relayed: Any, expert: int, request_id: str) -> None:
        self.followed.append((expert, request_id))
        relayed.ids[expert] = request_id

    def speaks(self, relayed: Any, expert: int) -> bool:
        return bool(relayed.leader == expert)

    def break_off(self, relayed: Any) -> Any:
        before = [] if relayed.speech is None else relayed.speech.tokens
        given = self.engines[relayed.leader].requests.get(relayed.ids.get(relayed.leader, ""))
        tokens = [*before, *(given.said if given else ())]
        return SimpleNamespace(tokens=tokens, ticket=len(self.begun)) if tokens else None

    def stand_before(self, expert: int, engine: Any) -> None: ...

    def forget(self, relayed: Any) -> None:
        self.forgotten += 1


def fake_ensemble(*priors: float) -> Ensemble:
    """An ensemble of experts "a", "b", ... that lies nowhere."""
    names = [chr(ord("a") + k) for k in range(len(priors))]
    entries = tuple(
        ExpertEntry(name=name, path=name, prior=prior) for name, prior in zip(names, priors, strict=True)
    )
    experts: Any = tuple(
        SimpleNamespace(
            name=entry.name,
            prior=entry.prior,
            vocab_size=VOCAB_SIZE + k,
            path=Path("/somewhere", entry.path),
            reads_images=False,
            options=entry.options,
        )
        for k, entry in enumerate(entries)
    )
    return Ensemble(Path("fake"), Manifest(name="fake", experts=entries), experts)


class FakeServer:
    """An `EnsembleClient` over `FakeEngine`s."""

    def __init__(self, *priors: float, slots: int = 2, places: int = 0):
        self.plane = Plane.create(
            experts=places or len(priors), slots=slots, vocab_size=VOCAB_SIZE, positions=16
        )
        self.plane.unlink()
        self.engines = [FakeEngine(expert, self.plane) for expert in range(len(priors))]
        self.relay = FakeRelay(self.engines)
        ensemble = fake_ensemble(*priors)
        self.client = EnsembleClient(
            ensemble,
            self.engines,
            self.plane,
            relay=self.relay,
            thread=GatewayThread([]),
            metrics=EnsembleMetrics(self.plane, CollectorRegistry()),
        )
