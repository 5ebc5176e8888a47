"""`EnsembleClient`: K vLLM engines as one vLLM `EngineClient`. Knows requests, slots and engines, not HTTP.

A request's path: find the weights, as far as they are known before the prompt is computed, choose a leader, take
a slot, give the request to the leader with the user's sampling parameters and to every follower with trivial
ones, and stream the leader's output. Everything else vLLM's own OpenAI layer does on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from decar.router import (
    Ensemble,
    active_experts,
    load_trained,
    load_trained_images,
    moved_on,
    restricted,
)
from decar.router.manifest import Trained
from decar.server.gateway.prompt import Beginning, PromptLogprobs, PromptScorer, tokens_of
from decar.server.gateway.request import Call, ChoiceTrace, current_call, offered_routers, parse_call
from decar.server.gateway.slots import Slots
from decar.server.gateway.weights import WeightsReader
from decar.server.metrics import EnsembleMetrics
from decar.server.protocol.cores import GatewayThread, current_core, start_threads
from decar.server.protocol.lockstep import follow_membership
from decar.server.protocol.member import REQUEST_KEY, ROWS_KEY, Member
from decar.server.protocol.plane import Plane
from decar.server.vllm_adapter.images import images_of, is_text, keep_images
from decar.server.vllm_adapter.relay import Relay, RelayedRequest


@dataclass
class ExpertEngine:
    """One expert as the gateway sees it."""

    name: str
    engine: AsyncLLM
    pid: int
    cores: set[int]  # that it may run on
    up: bool = True


@dataclass
class Asked:
    """What vLLM's app asks to be generated, with the `Call` it belongs to.

    Attributes:
        first_choice: index of this prompt's first choice in the response.
        kwargs: what vLLM passes through to an engine as it is.
    """

    call: Call
    first_choice: int
    prompt: Any
    params: SamplingParams
    request_id: str
    kwargs: dict[str, Any]


class EnsembleClient(EngineClient):
    """K engines that decode as one model.

    Args:
        ensemble: what is served.
        engines: one per expert, in manifest order, sharing ``plane``.
        pids: process ids of the engines.
        plane: made by the caller; removed by `shutdown`.
    """

    def __init__(self, ensemble: Ensemble, engines: Sequence[AsyncLLM], pids: Sequence[int], plane: Plane):
        self.ensemble = ensemble
        self.plane = plane
        cores = [os.sched_getaffinity(pid) for pid in pids]
        self.experts = [
            ExpertEngine(*fields) for fields in zip(ensemble.expert_names, engines, pids, cores, strict=True)
        ]
        self.slots = Slots(plane.spec.slots)
        # Where vLLM's app asks about "the" engine, any one will do: they differ in weights only.
        first = engines[0]
        self.vllm_config = first.vllm_config
        self.model_config = first.model_config
        self.renderer = first.renderer
        self.input_processor = first.input_processor
        self._scorer = PromptScorer(engines, ensemble.vocab_size, plane.spec.prompt_unit)
        self.thread = GatewayThread(cores if current_platform.is_cpu() else [])
        others = ThreadPoolExecutor(thread_name_prefix="decar")
        asyncio.get_running_loop().set_default_executor(others)
        renderers = [engine.renderer for engine in engines]
        for pool in (others, *(pool for of in renderers for pool in (of._executor, of._mm_executor))):
            start_threads(pool)
        self._relay = Relay(engines, plane.blocks, self.thread)
        self._metrics = EnsembleMetrics(ensemble.expert_names, plane)
        self._routers = load_trained(ensemble) if "classifier" in offered_routers(ensemble) else {}
        for router in self._routers.values():
            router.log_weights(["what loads on first use, loads before the first request"])
        self._image_routers = load_trained_images(ensemble)
        for image_router in self._image_routers.values():
            image_router.log_weights([[]])  # as above: no images are enough for the model to load
        if self._image_routers:
            keep_images(self.renderer)
        self._running: dict[
            int, tuple[Member, Any]
        ] = {}  # slot -> its member; its leader's output queue, once there
        self._last_arrival = 0.0
        self._stopped = False
        self._watches: list[asyncio.Task[None]] = []

    # --- the request's path -------------------------------------------------------------------------------

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Decode ``prompt`` as the current `Call` asks: by one expert alone, or by all of them as one.

        Raises:
            VLLMValidationError: something is asked that an ensemble has no answer to.
            EngineDeadError: an engine that takes part died.
        """
        if kwargs.get("priority"):
            raise VLLMValidationError(
                "priority is not offered: requests are served as they come", parameter="priority"
            )
        if isinstance(prompt, AsyncGenerator):
            raise VLLMValidationError("an ensemble does not take a prompt as a stream", parameter="prompt")
        for key in (REQUEST_KEY, ROWS_KEY):
            if key in (sampling_params.extra_args or {}):
                raise VLLMValidationError(f"vllm_xargs.{key} is decar's own", parameter="vllm_xargs")
        for field, ids in (
            ("logit_bias", sampling_params.logit_bias),
            ("allowed_token_ids", sampling_params.allowed_token_ids),
        ):
            if any(token >= self.ensemble.vocab_size for token in ids or ()):
                raise VLLMValidationError(
                    f"{field} names a token id beyond the {self.ensemble.vocab_size} that all experts share",
                    parameter=field,
                )
        self._check_counts(sampling_params)
        call = current_call.get() or parse_call(self.ensemble, None, None)
        if call.draw:
            _check_drawable(sampling_params)
        first_choice = call.prompts * sampling_params.n
        call.prompts += 1
        return self._generate(Asked(call, first_choice, prompt, sampling_params, request_id, kwargs))

    async def _generate(self, asked: Asked) -> AsyncGenerator[RequestOutput, None]:
        call = asked.call
        log_weights, prompt_logprobs = await self._routed(asked)
        scored = call.scored and prompt_logprobs is None
        if len(active_experts(log_weights)) == 1:
            outputs = self._alone(asked, active_experts(log_weights)[0])
        else:
            children = []
            uniforms = _uniforms(asked.params) if call.draw else [None] * asked.params.n
            for i, (params, uniform) in enumerate(zip(_children(asked.params), uniforms, strict=True)):
                child = replace(
                    asked,
                    params=params,
                    first_choice=asked.first_choice + i,
                    request_id=f"{asked.request_id}-{i}",
                )
                begun = self._scored if scored else self._weighted
                children.append(begun(child, log_weights, uniform))
            outputs = children[0] if len(children) == 1 else _merged(children, asked.params)
        try:
            async for output in outputs:
                output.request_id = asked.request_id
                if prompt_logprobs is not None:
                    output.prompt_logprobs = prompt_logprobs
                yield output
        finally:
            await outputs.aclose()

    async def _routed(self, asked: Asked) -> tuple[np.ndarray, PromptLogprobs | None]:
        """Log weights [K] before the prompt; where its log-probabilities are asked for, those after it, and they.

        From here on, ``asked`` does not ask for that any more.
        """
        call, log_weights = asked.call, asked.call.log_weights
        if call.router is not None:
            log_weights = await self._looked_at(asked.prompt, call.router)
        count = asked.params.prompt_logprobs
        if count is None or len(active_experts(log_weights)) == 1:
            return log_weights, None
        asked.params = copy(asked.params)
        asked.params.prompt_logprobs = None
        asked.params.skip_reading_prefix_cache = False
        prompt_logprobs, after = await self._scorer.log_probs(
            asked.prompt,
            asked.request_id,
            asked.kwargs,
            log_weights,
            call.rule,
            self.ensemble.vocab_size if count < 0 else count,
            posterior=call.scored,
        )
        return after, prompt_logprobs

    async def _looked_at(self, prompt: Any, router: Trained) -> np.ndarray:
        """Log weights [K] that a trained router gives for a prompt: for its images, if any, and else for its text."""
        images = images_of(prompt)
        if images and self._image_routers:
            return (await asyncio.to_thread(self._image_routers[router].log_weights, [images]))[0]
        text = self.renderer.get_tokenizer().decode(np.asarray(tokens_of(prompt))[is_text(prompt)])
        return (await asyncio.to_thread(self._routers[router].log_weights, [text]))[0]

    async def _scored(
        self, asked: Asked, log_weights: np.ndarray, uniform: float | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """One choice whose prompt moves the weights: at once where experts have scored it before, else as they
        compute it."""
        async with self._scorer.beginning(asked.prompt) as beginning:
            if beginning.whole:
                log_weights = moved_on(log_weights, beginning.log_likelihoods)
                outputs = self._weighted(asked, log_weights, uniform)
            else:
                outputs = self._mixed(asked, log_weights, asked.call.prune, uniform, beginning)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output

    async def _weighted(
        self, asked: Asked, log_weights: np.ndarray, uniform: float | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """One choice whose weights [K] are known."""
        call = asked.call
        log_weights, budget = restricted(log_weights, call.top_k, call.prune, uniform)
        active = active_experts(log_weights)
        if len(active) == 1:
            outputs = self._alone(asked, active[0])
        else:
            outputs = self._mixed(asked, log_weights, budget if call.posterior else 0.0, None)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output

    async def _alone(self, asked: Asked, expert: int) -> AsyncGenerator[RequestOutput, None]:
        """One expert is active: plain vLLM, no plane."""
        call, name = asked.call, self.experts[expert].name
        weights = [float(k == expert) for k in range(len(self.experts))]
        traces = [ChoiceTrace([name], name) for _ in range(asked.params.n)]
        call.choices.update((asked.first_choice + i, trace) for i, trace in enumerate(traces))
        outputs = self.experts[expert].engine.generate(
            asked.prompt, asked.params, asked.request_id, **asked.kwargs
        )
        key = object()
        self.thread.hurry(key, True)
        produced = 0
        try:
            async for output in outputs:
                produced += sum(len(completion.token_ids) for completion in output.outputs)
                if call.trace:
                    for completion in output.outputs:
                        traces[completion.index].weights += [weights] * len(completion.token_ids)
                        traces[completion.index].leaders += [name] * len(completion.token_ids)
                yield output
        finally:
            self.thread.hurry(key, False)
            self._metrics.observe_alone(produced)
            await outputs.aclose()

    async def _mixed(
        self,
        asked: Asked,
        log_weights: np.ndarray,
        budget: float,
        uniform: float | None,
        beginning: Beginning | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Several experts are active: all of them run one choice in lockstep, and its leader answers.

        Args:
            log_weights: [K]; before the prompt if there is a ``beginning``, which the experts go on to score.
            budget: weight that may be pruned.
            uniform: draws one of them by the weights after the prompt.
        """
        call, active = asked.call, active_experts(log_weights)
        self.thread.arrived()
        async with self.slots.take() as (slot, generation):
            leader = self._leader(log_weights if beginning is None else np.zeros(len(log_weights)), active)
            member = Member(
                slot=slot,
                generation=generation,
                leader=leader,
                active=tuple(active),
                rule=call.rule,
                log_weights=log_weights.tolist(),
                posterior=call.posterior,
                prune=budget,  # weights that do not move have been pruned already
                scored=None if beginning is None else beginning.scored,
                top_k=None if beginning is None else call.top_k,
                uniform=uniform,
            )
            reader = WeightsReader(self.plane, member)
            trace = ChoiceTrace([self.experts[k].name for k in active], self.experts[leader].name)
            call.choices[asked.first_choice] = trace
            queues: dict[int, Any] = {}
            finished = False
            produced = 0
            relayed = RelayedRequest(
                member, leader, on_tokens=partial(self._keep_up, reader, beginning, slot)
            )
            try:
                self._running[slot] = (member, None)
                self.thread.hurry(slot, True)
                self._share_cores()
                arrival = self._next_arrival()
                for k in self._in_order(active, leader):
                    queues[k] = await self.experts[k].engine.add_request(
                        asked.request_id,
                        asked.prompt,
                        _params_of(k, member, asked.params),
                        arrival_time=arrival,
                        **asked.kwargs,
                    )
                    if member.may_release or k == leader:
                        self._relay.follow(relayed, k, queues[k].request_id)
                queue = queues[leader]
                self._running[slot] = (member, queue)
                if not all(self.experts[k].up for k in active):
                    raise EngineDeadError()
                streams = asked.params.output_kind != RequestOutputKind.FINAL_ONLY
                self.thread.hurry(slot, streams or member.may_release)
                while not finished:
                    output = queue.get_nowait() or await queue.get()
                    finished = output.finished
                    start = produced
                    produced += sum(len(completion.token_ids) for completion in output.outputs)
                    self.thread.hurry(slot, member.may_release or not produced)
                    if produced and not start and beginning is not None:
                        self._begin(trace, member, reader)
                    if call.trace:
                        weights = reader.between(start, produced)
                        trace.weights += weights.tolist()
                        trace.leaders += [
                            self._leader_of(member, t, of) for t, of in enumerate(weights, start)
                        ]
                    yield output
            finally:
                self._running.pop(slot, None)
                self.thread.hurry(slot, False)
                self._share_cores()
                self._relay.forget(relayed)
                ended = {leader} if finished and not member.led_before else set()
                await asyncio.shield(self._abort({k: q for k, q in queues.items() if k not in ended}))
                self._metrics.observe(reader.between(0, produced))

    def _keep_up(self, reader: WeightsReader, beginning: Beginning | None, slot: int, produced: int) -> None:
        """Tokens have come, ``produced`` by now: the first one says what experts have found of a new prompt."""
        if beginning is not None and not beginning.learned.is_set():
            fields = self.plane.fields
            beginning.learn(fields["prompt_sums"][:, slot], fields["prompt_sum"][:, slot])
        reader.keep_up(produced)

    def _begin(self, trace: ChoiceTrace, member: Member, reader: WeightsReader) -> None:
        """A prompt has been scored as it was computed: only now is it known who takes part."""
        [weights] = reader.between(0, 1)
        trace.experts = [self.experts[k].name for k in np.flatnonzero(weights)]
        trace.leader = self._leader_of(member, 0, weights)

    def _leader_of(self, member: Member, position: int, weights: np.ndarray) -> str:
        """Who leads at a position mixed by ``weights`` [K]. A leader that the prompt leaves without any still decides
        the first token; it does so for the next one."""
        leader = member.leader_at(position)
        return self.experts[leader if weights[leader] else member.leader_at(position + 1)].name

    def _leader(self, log_weights: np.ndarray, active: list[int]) -> int:
        """The expert with the largest weight; among equals, the one that leads most requests already: the gateway then
        hears from one engine a step, and the others have nothing to sample."""
        leads = self.leads()
        return max(active, key=lambda k: (round(float(log_weights[k]), 9), leads[k]))

    def _in_order(self, active: list[int], leader: int) -> list[int]:
        """Followers first: they have nothing to do for the leader that it could not do meanwhile. But last whoever
        shares the core that this process runs on: waking, that engine takes it, and the others would not be told."""
        here = current_core()
        return sorted(active, key=lambda k: (here in self.experts[k].cores, k == leader))

    def _share_cores(self) -> None:
        """Find this thread its place among engines that compute on all cores.

        While requests run that their experts decode together to the end, it is beside the engine that leads least.
        Where experts are released, engines decode apart, and Linux finds it the core that is least busy.
        """
        together = any(not member.may_release for member, _ in self._running.values())
        leads = self.leads()
        self.thread.keep_beside(min(range(len(leads)), key=lambda k: (leads[k], -k)) if together else None)

    def leads(self) -> list[int]:
        """How many requests each expert leads now."""
        leaders = [member.leader for member, _ in self._running.values()]
        return [leaders.count(k) for k in range(len(self.experts))]

    def _check_counts(self, params: SamplingParams) -> None:
        """As vLLM's engines do: for an ensemble's prompt they are not asked, and for its answer after the prompt.

        Raises:
            VLLMValidationError: more log-probabilities are asked for than --max-logprobs allows.
        """
        limit = self.model_config.max_logprobs
        if limit == -1:
            limit = self.ensemble.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and (self.ensemble.vocab_size if count == -1 else count) > limit:
                raise VLLMValidationError(
                    f"{name} asks for {'all' if count == -1 else count} log-probabilities a token, and --max-logprobs "
                    f"allows {limit}",
                    parameter=name,
                )

    def _next_arrival(self) -> float:
        """Arrival times are unique and the same for every engine: the order of age that holds yield by."""
        self._last_arrival = max(time.time(), self._last_arrival + 1e-6)
        return self._last_arrival

    async def _abort(self, queues: dict[int, Any]) -> None:
        for k, queue in queues.items():
            if self.experts[k].up:
                engine = self.experts[k].engine
                with contextlib.suppress(EngineDeadError):
                    # The engine is told also where its output processor knows the request no more: see `Relay`.
                    engine.output_processor.abort_requests([queue.request_id], internal=True)
                    await engine.engine_core.abort_requests_async([queue.request_id])

    # --- health -------------------------------------------------------------------------------------------

    def watch_engines(self) -> None:
        """Start noticing engines that die. Call once, inside the event loop."""
        for k, expert in enumerate(self.experts):
            expert.engine._run_output_handler()
            self._watches.append(asyncio.create_task(self._watch(k)))

    async def _watch(self, expert: int) -> None:
        handler = self.experts[expert].engine.output_handler
        assert handler is not None
        await asyncio.wait([handler])
        self.experts[expert].up = False
        self.plane.alive[expert] = 0
        for member, queue in list(self._running.values()):
            follow_membership(self.plane.blocks, member)  # those that had released it go on
            if expert in member.active and queue is not None:
                queue.put(EngineDeadError())

    @property
    def is_running(self) -> bool:
        return not self._stopped  # a dead engine turns /health 503; it does not stop the server

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    @property
    def errored(self) -> bool:
        # vLLM refuses every request once this is true; those that a dead engine has no part in go on.
        return all(expert.engine.errored for expert in self.experts)

    @property
    def dead_error(self) -> BaseException:
        return EngineDeadError()

    async def check_health(self) -> None:
        if not all(expert.up for expert in self.experts):
            raise self.dead_error

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop every engine and remove the plane."""
        self._stopped = True
        for expert in self.experts:
            expert.engine.shutdown(timeout=timeout)
        self.plane.unlink()

    # --- what vLLM's app asks of an engine, asked of all --------------------------------------------------

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        for expert in self.experts:
            expert.engine.check_admission(n, request_id)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        await self._all("abort", request_id)

    async def get_supported_tasks(self) -> Any:
        return await self.experts[0].engine.get_supported_tasks()

    async def is_tracing_enabled(self) -> bool:
        return await self.experts[0].engine.is_tracing_enabled()

    async def do_log_stats(self) -> None:
        await self._all("do_log_stats")

    async def reset_mm_cache(self) -> None:
        await self._all("reset_mm_cache")

    async def reset_encoder_cache(self) -> None:
        await self._all("reset_encoder_cache")

    async def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self._scorer.forget()
        return all(await self._all("reset_prefix_cache", *args, **kwargs))

    async def start_profile(self, *args: Any, **kwargs: Any) -> None:
        await self._all("start_profile", *args, **kwargs)

    async def stop_profile(self) -> None:
        await self._all("stop_profile")

    async def pause_generation(self, **kwargs: Any) -> None:
        await self._all("pause_generation", **kwargs)

    async def resume_generation(self) -> None:
        await self._all("resume_generation")

    async def is_paused(self) -> bool:
        return any(await self._all("is_paused"))

    async def is_sleeping(self) -> bool:
        return any(await self._all("is_sleeping"))

    async def sleep(self, *args: Any, **kwargs: Any) -> None:
        await self._all("sleep", *args, **kwargs)

    async def wake_up(self, *args: Any, **kwargs: Any) -> bool:
        return all(await self._all("wake_up", *args, **kwargs))

    async def release_kv_cache_memory(self) -> None:
        await self._all("release_kv_cache_memory")

    async def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return await asyncio.gather(
            *(getattr(e.engine, method)(*args, **kwargs) for e in self.experts if e.up)
        )

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise VLLMValidationError("an ensemble generates text; it has no embeddings")

    async def add_lora(self, lora_request: Any) -> bool:
        raise VLLMValidationError("an ensemble serves whole experts; merge the adapter into its expert")

    async def notify_kv_transfer_request_rejected(self, *args: Any, **kwargs: Any) -> None:
        raise VLLMValidationError("an ensemble does not take keys and values from other servers")


def _params_of(expert: int, member: Member, params: SamplingParams) -> SamplingParams:
    """The leader's sampling parameters are the user's; a follower's only keep it running as long."""
    wire = {REQUEST_KEY: member.to_wire()}
    if (
        expert == member.leader or member.may_release
    ):  # where leaders may hand over, everybody is ready to lead
        mine = copy(params)
        mine.extra_args = {**(params.extra_args or {}), **wire}
        return mine
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=params.skip_reading_prefix_cache,
        extra_args=wire,
    )


_DRAWABLE = frozenset(
    {
        *("n", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "include_stop_str_in_output"),
        *("prompt_logprobs", "flat_logprobs", "detokenize", "skip_special_tokens", "output_kind"),
        *("spaces_between_special_tokens", "stream_interval", "skip_clone", "output_text_buffer_length"),
        *("skip_reading_prefix_cache", "watermarking", "routed_experts_prompt_start"),
    }
)
"""Sampling parameters under which drawing an expert is drawing from the mixture, whatever their values."""


def _check_drawable(params: SamplingParams) -> None:
    """Refuse what does not commute with mixing: there, one expert's sample is not the mixture's.

    Raises:
        VLLMValidationError: names the parameter.
    """
    plain = SamplingParams()
    for name in params.__struct_fields__:
        value, wanted = getattr(params, name), getattr(plain, name)
        if name in _DRAWABLE or name.startswith("_") or value == wanted or (name == "top_k" and value == -1):
            continue
        raise VLLMValidationError(
            f'decar.sampling "draw" is exact only for plain sampling, and {name} is {value!r}: set it to {wanted!r} '
            '(or leave it out, where that is the default), or decar.sampling to "mixture"',
            parameter=name,
        )


def _uniforms(params: SamplingParams) -> list[float]:
    """A number from 0 to 1 for each choice, which draws its expert."""
    rng = np.random.default_rng(params.seed if params.seed is None else abs(params.seed))
    numbers: list[float] = rng.random(params.n).tolist()
    return numbers


def _children(params: SamplingParams) -> list[SamplingParams]:
    """One set of sampling parameters per choice; as in vLLM, a seed differs by the choice's index."""
    children = []
    for i in range(params.n):
        child = copy(params)
        child.n = 1
        if params.seed is not None:
            child.seed = params.seed + i
        children.append(child)
    return children


async def _merged(
    children: list[AsyncGenerator[RequestOutput, None]], params: SamplingParams
) -> AsyncGenerator[RequestOutput, None]:
    """Run the choices of one request side by side; give their outputs as one request's."""
    final_only = params.output_kind == RequestOutputKind.FINAL_ONLY
    outputs: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()

    async def run(index: int, child: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async for output in child:
                outputs.put_nowait((index, output))
            outputs.put_nowait((index, None))
        except Exception as error:
            outputs.put_nowait((index, error))
        finally:
            await child.aclose()

    tasks = [asyncio.create_task(run(i, child)) for i, child in enumerate(children)]
    finals: dict[int, CompletionOutput] = {}
    unfinished = len(children)
    try:
        while unfinished:
            index, output = await outputs.get()
            if output is None:
                continue
            if isinstance(output, BaseException):
                raise output
            for completion in output.outputs:
                completion.index = index
            if output.finished:
                unfinished -= 1
                output.finished = not unfinished
                finals[index] = output.outputs[0]
            if not final_only:
                yield output
            elif not unfinished:
                output.outputs = [finals[i] for i in sorted(finals)]
                yield output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
