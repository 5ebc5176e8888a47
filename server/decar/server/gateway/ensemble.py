"""`EnsembleClient`: K engines as one vLLM `EngineClient`. Knows requests, slots and engines, not HTTP.

A request's path, from top to bottom: find the weights, as far as they are known before the prompt is computed; choose
who stays active; take a slot and choose a leader; give the request to the leader with the user's sampling parameters
and to every follower with trivial ones; stream the leader's output. All else vLLM's own OpenAI layer does on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from decar.router import Ensemble, active_experts, moved_on, restricted
from decar.server.gateway.admission import Admission, check_drawable, check_grammar
from decar.server.gateway.all_engines import AllEngines
from decar.server.gateway.core_policy import CorePolicy
from decar.server.gateway.engine import Engine, OutputQueue, Relay
from decar.server.gateway.leaders import Leaders
from decar.server.gateway.prompt import Beginning, PromptLogprobs, PromptScorer
from decar.server.gateway.request import Call, ChoiceTrace, current_call, parse_call
from decar.server.gateway.sampling import (
    merged,
    params_of,
    params_of_choices,
    uniforms,
    without_prompt_logprobs,
)
from decar.server.gateway.slots import Slots
from decar.server.gateway.trained_routers import TrainedRouters
from decar.server.gateway.weights import WeightsReader
from decar.server.metrics import EnsembleMetrics
from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Plane


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


class EnsembleClient(AllEngines):
    """K engines that decode as one model.

    Args:
        ensemble: what is served.
        engines: one per expert, in manifest order, sharing ``plane``.
        plane: made by the caller; removed by `shutdown`.
        relay: joins what engines say of a request that is handed over.
        thread: this one.
        metrics: told what mixed each token.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        engines: Sequence[Engine],
        plane: Plane,
        *,
        relay: Relay,
        thread: GatewayThread,
        metrics: EnsembleMetrics,
    ):
        super().__init__(ensemble, engines, plane)
        self.slots = Slots(plane.spec.slots)
        self.leaders = Leaders(len(engines))
        self.thread = thread
        self._core_policy = CorePolicy(engines, self.leaders, thread)
        self._admission = Admission(ensemble.vocab_size, self.model_config.max_logprobs)
        self._scorer = PromptScorer(engines, ensemble.vocab_size, plane.spec.prompt_unit)
        self._trained_routers = TrainedRouters(ensemble, engines[0])
        self._relay = relay
        self._metrics = metrics
        self._last_arrival = 0.0

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Decode ``prompt`` as the current `Call` asks: by one expert alone, or by all of them as one.

        Raises:
            VLLMValidationError: something is asked that an ensemble has no answer to.
            Exception: as `Engine.dead_error` makes it, if an engine that takes part died.
        """
        self._admission.check(prompt, sampling_params, kwargs.get("priority", 0))
        call = current_call.get() or parse_call(self.ensemble, None, None)
        if call.draw:
            check_drawable(sampling_params)
        first_choice = call.prompts * sampling_params.n
        call.prompts += 1
        return self._answer(Asked(call, first_choice, prompt, sampling_params, request_id, kwargs))

    async def _answer(self, asked: Asked) -> AsyncGenerator[RequestOutput, None]:
        log_weights, prompt_logprobs = await self._weigh(asked)
        scored = asked.call.scored and prompt_logprobs is None
        active = active_experts(log_weights)
        if len(active) == 1:
            outputs = self._alone(asked, active[0])
        else:
            choices = []
            draws = uniforms(asked.params) if asked.call.draw else [None] * asked.params.n
            for i, (params, uniform) in enumerate(zip(params_of_choices(asked.params), draws, strict=True)):
                choice = replace(
                    asked,
                    params=params,
                    first_choice=asked.first_choice + i,
                    request_id=f"{asked.request_id}-{i}",
                )
                begun = self._scored if scored else self._weighted
                choices.append(begun(choice, log_weights, uniform))
            outputs = choices[0] if len(choices) == 1 else merged(choices, asked.params)
        try:
            async for output in outputs:
                check_grammar(asked.params, output)
                output.request_id = asked.request_id
                if prompt_logprobs is not None:
                    output.prompt_logprobs = prompt_logprobs
                yield output
        finally:
            await outputs.aclose()

    # --- weigh --------------------------------------------------------------------------------------------

    async def _weigh(self, asked: Asked) -> tuple[np.ndarray, PromptLogprobs | None]:
        """Log weights [K] before the prompt; where its log-probabilities are asked for, those after it, and they.

        From here on, ``asked`` does not ask for that any more.
        """
        call, log_weights = asked.call, asked.call.log_weights
        if call.router is not None:
            log_weights = await self._trained_routers.log_weights(asked.prompt, call.router)
        count = asked.params.prompt_logprobs
        if count is None or len(active_experts(log_weights)) == 1:
            return log_weights, None
        asked.params = without_prompt_logprobs(asked.params)
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

    # --- route --------------------------------------------------------------------------------------------

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
            # weights that do not move have been pruned already
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
        outputs = self.experts[expert].engine.client.generate(
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

    # --- slot, leader, fan out, stream --------------------------------------------------------------------

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
            known = log_weights if beginning is None else np.zeros(len(log_weights))
            leader = self.leaders.choose(known, active)
            member = Member(
                slot=slot,
                generation=generation,
                leader=leader,
                active=tuple(active),
                rule=call.rule,
                log_weights=log_weights.tolist(),
                posterior=call.posterior,
                prune=budget,
                scored=None if beginning is None else beginning.scored,
                top_k=None if beginning is None else call.top_k,
                uniform=uniform,
            )
            trace = ChoiceTrace([self.experts[k].name for k in active], self.experts[leader].name)
            call.choices[asked.first_choice] = trace
            reader = WeightsReader(self.plane, member, self.ensemble.expert_names)
            relayed = self._relay.begin(member, partial(self._keep_up, reader, beginning, slot))
            queues: dict[int, OutputQueue] = {}
            finished = False
            produced = 0
            try:
                self.leaders.begin(member)
                self.thread.hurry(slot, True)
                self._core_policy.share_cores()
                await self._fan_out(asked, member, relayed, queues)
                queue = queues[leader]
                self.health.hear(member, queue)
                streams = asked.params.output_kind != RequestOutputKind.FINAL_ONLY
                self.thread.hurry(slot, streams or member.may_release)
                while not finished:
                    output = queue.get_nowait() or await queue.get()
                    finished = output.finished
                    start = produced
                    produced += sum(len(completion.token_ids) for completion in output.outputs)
                    self.thread.hurry(slot, member.may_release or not produced)
                    if produced and not start and beginning is not None:
                        reader.begin(trace)
                    if call.trace:
                        reader.extend(trace, start, produced)
                    yield output
            finally:
                self.leaders.end(member)
                self.health.forget(member)
                self.thread.hurry(slot, False)
                self._core_policy.share_cores()
                self._relay.forget(relayed)
                # Its own engine has ended it, unless another has led before, which may not know yet.
                ended = leader if finished and not member.led_before else None
                await asyncio.shield(self._cancel(k for k in queues.items() if k[0] != ended))
                self._metrics.observe(reader.between(0, produced))

    async def _fan_out(
        self, asked: Asked, member: Member, relayed: Any, queues: dict[int, OutputQueue]
    ) -> None:
        """Give the request to every active expert; ``queues`` has those that took it, also on failure."""
        leader = member.leader
        arrival_s = self._next_arrival()
        for k in self._core_policy.in_order(member.active, leader):
            queues[k] = await self.experts[k].engine.submit(
                asked.request_id,
                asked.prompt,
                params_of(k, member, asked.params),
                arrival_time=arrival_s,
                **asked.kwargs,
            )
            if member.may_release or k == leader:
                self._relay.follow(relayed, k, queues[k].request_id)

    def _next_arrival(self) -> float:
        """Arrival times are unique and the same for every engine: the order of age that holds yield by."""
        self._last_arrival = max(time.time(), self._last_arrival + 1e-6)
        return self._last_arrival

    async def _cancel(self, queues: Iterable[tuple[int, OutputQueue]]) -> None:
        for k, queue in queues:
            if self.experts[k].up:
                await self.experts[k].engine.cancel(queue.request_id)

    def _keep_up(self, reader: WeightsReader, beginning: Beginning | None, slot: int, produced: int) -> None:
        """Tokens have come, ``produced`` by now: the first one says what experts have found of a new prompt."""
        if beginning is not None and not beginning.learned.is_set():
            fields = self.plane.fields
            beginning.learn(fields["prompt_sums"][:, slot], fields["prompt_sum"][:, slot])
        reader.keep_up(produced)
