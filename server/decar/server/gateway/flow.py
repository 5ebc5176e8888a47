"""`FlowEnsemble`: K engines of masked-language models as one vLLM `EngineClient`. Knows requests, rounds, engines.

A request's path, from top to bottom: find the weights before the prompt; have the experts score the prompt, chunk by
chunk; put mask tokens where the answer is to be; reveal them in rounds with everybody else's; stream what is revealed
up to the first mask. All else vLLM's own OpenAI layer does on top.

Shapes: K places of experts, T positions of a text, n known tokens of a prompt.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from decar.router import Ensemble, active_experts, drawn, moved_on
from decar.router.flow import Revealing, prompt_chunks
from decar.server.gateway.aborts import Abort, Aborted
from decar.server.gateway.admission import check_drawable, check_revealable
from decar.server.gateway.all_engines import AllEngines
from decar.server.gateway.engine import Engine, ExpertLost, Speaker
from decar.server.gateway.flow_request import FlowCall, FlowOptions, FlowTrace, parse_flow_call
from decar.server.gateway.prompt import tokens_of
from decar.server.gateway.request import current_call
from decar.server.gateway.rounds import Answer, Rounds, Sampled
from decar.server.gateway.sampling import merged, params_of_choices, produced_by, uniforms
from decar.server.gateway.schemas import FlowDefaults, Slots
from decar.server.gateway.tracing import RequestTrace, current_trace
from decar.server.metrics import FlowMetrics
from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.flow import Denoising
from decar.server.protocol.plane import Plane

Begin = Callable[[str, Any, SamplingParams, int], Speaker]


@dataclass
class Asked:
    """What vLLM's app asks to be generated, with the `FlowCall` it belongs to.

    Attributes:
        text: [T] int64, the prompt, and mask tokens where the answer is to be.
        prompt_tokens: how many of them are the prompt.
        first_choice: index of this prompt's first choice in the response.
        abort: of the prompt's request.
        trace: told of what happens to the HTTP request; None where nobody wants to know.
        weighing: one choice at a time; what it finds is there for the others.
        log_weights: [K] after the prompt; None: not known yet.
    """

    call: FlowCall
    first_choice: int
    prompt: Any
    text: np.ndarray
    prompt_tokens: int
    params: SamplingParams
    request_id: str
    abort: Abort
    trace: RequestTrace | None
    weighing: asyncio.Lock = field(default_factory=asyncio.Lock)
    log_weights: np.ndarray | None = None


class FlowEnsemble(AllEngines):
    """K engines that reveal masked tokens as one model.

    Args:
        ensemble: what is served.
        engines: one per expert, in manifest order, sharing ``plane``.
        plane: made by the caller; removed by `shutdown`.
        begin: begins to say an answer, as `VirtualEngine.begin` does.
        slots: how many answers are revealed at once.
        thread: this one.
        metrics: told what mixed each token.
        min_experts: how many have to live for the ensemble to be served.
        max_queued: how many requests may wait; None: four for each slot.
    """

    options = FlowOptions

    def __init__(
        self,
        ensemble: Ensemble,
        engines: Sequence[Engine],
        plane: Plane,
        *,
        begin: Begin,
        slots: int,
        thread: GatewayThread,
        metrics: FlowMetrics,
        min_experts: int = 1,
        max_queued: int | None = None,
    ):
        super().__init__(ensemble, engines, plane, thread, metrics, slots, min_experts, max_queued)
        assert ensemble.manifest.flow is not None
        self._mask = ensemble.manifest.flow.mask_token_id
        self._begin = begin
        self.rounds = Rounds(self.experts, plane, metrics, self._mask)
        self._prompts = itertools.count()

    # --- what is served -----------------------------------------------------------------------------------

    @property
    def slots(self) -> Slots:
        return Slots(total=self.queue.total, in_use=self.rounds.under_way)

    def leads(self) -> list[int]:
        """Of each expert, how many requests it leads: in a flow ensemble nobody does."""
        return [0] * len(self.experts)

    def defaults(self) -> FlowDefaults:
        """What a request gets that does not say."""
        manifest = self.ensemble.manifest
        assert manifest.flow is not None
        router = {**manifest.router.model_dump(exclude={"kind"}), "route": manifest.router.kind}
        return FlowDefaults(**router, rule=manifest.mixing.rule, **manifest.flow.model_dump())

    def forget(self, expert: int) -> None:
        """Nothing that an expert says is kept."""

    def busy(self, expert: int) -> bool:
        return self.rounds.needs(expert) or super().busy(expert)

    def call_of(self, model: str | None, options: Any) -> FlowCall:
        """A request's `FlowCall`, from its `model` and `decar` fields.

        Raises:
            RequestError: says which field is wrong and how to mend it.
        """
        call = parse_flow_call(self.ensemble, model, options)
        call.log_weights = self.seats.seated(call.log_weights)
        call.seats, call.trained_routers = self.seats, self.trained_routers
        return call

    def shutdown(self, timeout: float | None = None) -> None:
        self.rounds.stop()
        super().shutdown(timeout)

    async def get_supported_tasks(self) -> Any:
        return ("generate",)

    # --- generate -----------------------------------------------------------------------------------------

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Reveal an answer to ``prompt`` as the current `FlowCall` asks.

        Raises:
            VLLMValidationError: something is asked that a flow ensemble has no answer to.
        """
        self._admission.check(prompt, sampling_params, kwargs.get("priority", 0))
        call = current_call.get() or self.call_of(None, None)
        assert isinstance(call, FlowCall)
        if call.beams:
            raise VLLMValidationError(
                "a flow ensemble has no next token that beams could be searched for: leave use_beam_search out",
                parameter="use_beam_search",
            )
        check_revealable(sampling_params)
        if call.draw:
            check_drawable(sampling_params)
        tokens = tokens_of(prompt)
        text = self._masked(call, tokens, sampling_params)
        given = int(np.argmax([*(text == self._mask), True]))  # what comes after is the answer's
        self._metrics.asked(call.model, requests=int(call.prompts == 0), prompt_tokens=given)
        first_choice = call.prompts * sampling_params.n
        call.prompts += 1
        abort = self._aborts.of(request_id, prompt, sampling_params)
        trace = current_trace.get()
        if trace is not None:
            trace.generates(tokens, sampling_params)
        return self._answer(
            Asked(call, first_choice, prompt, text, len(tokens), sampling_params, request_id, abort, trace)
        )

    def _masked(self, call: FlowCall, tokens: Sequence[int], params: SamplingParams) -> np.ndarray:
        """The text [T] that is to be revealed: a prompt that has mask tokens is asked to be filled in, and nothing is
        added to it unless the request says how much.

        Raises:
            VLLMValidationError: it is longer than what experts read.
        """
        most = self.model_config.max_model_len
        added = params.max_tokens if call.bounded or self._mask not in tokens else 0
        added = most - len(tokens) if added is None else added
        if len(tokens) + added > most:
            raise VLLMValidationError(
                f"the prompt has {len(tokens)} tokens and max_tokens is {added}, but experts read no more than {most} "
                "in all: shorten one of them",
                parameter="max_tokens",
            )
        return np.array([*tokens, *[self._mask] * added], np.int64)

    async def _answer(self, asked: Asked) -> AsyncGenerator[RequestOutput, None]:
        params = asked.params
        draws = uniforms(params) if asked.call.draw else [None] * params.n
        choices = (
            self._choice(asked, i, each, uniform)
            for i, (each, uniform) in enumerate(zip(params_of_choices(params), draws, strict=True))
        )
        outputs = next(choices) if params.n == 1 else merged(choices, params, self.queue.total)
        try:
            async for output in outputs:
                output.request_id = asked.request_id
                if asked.trace is not None:
                    asked.trace.heard(output)
                yield output
        except Aborted as aborted:
            yield aborted.output()
        except Exception as error:
            if asked.trace is not None:
                asked.trace.failed(error)
            raise
        finally:
            await outputs.aclose()

    async def _choice(
        self, asked: Asked, index: int, params: SamplingParams, uniform: float | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """One choice, from the experts that live."""
        async with self.place(asked.abort):
            with asked.abort.waking():
                log_weights = await self._weigh(asked)
            answer = self._begun(asked, index, params, log_weights, uniform)
            if asked.trace is not None:
                for k in answer.active:
                    asked.trace.joins(self.experts[k].name)
            trace = FlowTrace(experts=[self.experts[k].name for k in answer.active])
            asked.call.choices[asked.first_choice + index] = trace
            self.rounds.join(answer)
            produced = 0
            try:
                with asked.abort.in_engines(answer.speaker.abort):
                    while True:
                        output = await answer.speaker.next()
                        before, produced = produced, produced_by(output.outputs[0], params, produced)
                        if asked.call.trace:
                            new = slice(answer.begins + before, answer.begins + produced)
                            trace.weights += answer.weights[new].tolist()
                            trace.revealed_at += answer.revealed_at[new].tolist()
                        yield output
                        if output.finished:
                            return
            finally:
                self.rounds.leave(answer)
                await answer.speaker.abort()  # which is quiet where it has ended
                told = slice(answer.begins, answer.begins + produced)
                self._count(asked, answer.weights[told], answer.revealed_at[told] > 0)

    def _begun(
        self,
        asked: Asked,
        index: int,
        params: SamplingParams,
        log_weights: np.ndarray,
        uniform: float | None,
    ) -> Answer:
        """One choice's answer, from ``log_weights`` [K] after the prompt, or from the expert that ``uniform`` draws."""
        call, flow = asked.call, asked.call.flow
        seed = secrets.randbits(63) if params.seed is None else params.seed & (2**63 - 1)
        masked = np.flatnonzero(asked.text == self._mask)
        revealing = Revealing(
            masked,
            flow.order,
            flow.schedule,
            flow.steps,
            flow.block_length,
            seed,
            log_weights if uniform is None else drawn(log_weights, uniform),
            posterior=call.posterior,
        )
        begins = int(masked[0])

        def lost(expert: int) -> np.ndarray:
            self._metrics.failed_over(expert)
            if asked.trace is not None:
                asked.trace.loses(self.experts[expert].name)
            if uniform is None:
                return self.of_living(call, revealing.log_weights)
            return drawn(self.of_living(call, log_weights), uniform)

        vocab_size = self.ensemble.vocab_size
        alternatives = vocab_size if params.logprobs == -1 else params.logprobs
        sampled = Sampled(
            call.rule,
            params.temperature,
            seed,
            min(max(params.top_k, 0), vocab_size),
            params.top_p,
            params.min_p,
            None if alternatives is None else min(alternatives, vocab_size),
        )
        speaker = self._begin(f"{asked.request_id}-{index}", asked.prompt, params, begins)
        return Answer(asked.text.copy(), begins, asked.prompt_tokens, revealing, sampled, speaker, lost)

    def _count(self, asked: Asked, weights: np.ndarray, mixed: np.ndarray) -> None:
        """Tokens [T] have been told; those that are ``mixed``, and not the prompt's, by these weights [T, K]."""
        self._metrics.asked(asked.call.model, generated=len(weights))
        weights = weights[mixed]
        entropy_nats = self._metrics.observe(weights)
        if asked.trace is not None:
            names = [expert.name for expert in self.experts]
            asked.trace.mixed(names, weights, (), entropy_nats)

    # --- weigh --------------------------------------------------------------------------------------------

    async def _weigh(self, asked: Asked) -> np.ndarray:
        """Log weights [K] of the living after the prompt, which is scored once for all choices.

        Raises:
            ExpertDown: none of those with weight lives, or the user wants no answer without them.
        """
        call = asked.call
        async with asked.weighing:
            if asked.log_weights is None:
                log_weights = call.log_weights
                if call.router is not None:
                    routers = call.trained_routers or self.trained_routers
                    log_weights = await routers.log_weights(asked.prompt, call.router)
                asked.log_weights = await self._scored(asked, log_weights) if call.scored else log_weights
        return self.of_living(call, asked.log_weights)

    async def _scored(self, asked: Asked, log_weights: np.ndarray) -> np.ndarray:
        """Log weights [K], from those before the prompt: the experts that live score it."""
        while True:
            living = self.of_living(asked.call, log_weights)
            active = active_experts(living)
            if len(active) == 1:
                return living
            try:
                return moved_on(living, await self._log_likelihoods(asked, active))
            except ExpertLost as lost:
                self._metrics.failed_over(lost.expert)
                if asked.trace is not None:
                    asked.trace.loses(self.experts[lost.expert].name)

    async def _log_likelihoods(self, asked: Asked, active: Sequence[int]) -> np.ndarray:
        """log p_k(prompt) [K] of the ``active`` experts, 0 for others: chunk by chunk from left to right, each given
        those before it (`prompt_chunks`).

        Raises:
            ExpertLost: one of them is.
        """
        prompt = asked.text[: asked.prompt_tokens]
        known = np.flatnonzero(prompt != self._mask)
        number = next(self._prompts)
        work = []
        for i, chunk in enumerate(prompt_chunks(len(known), asked.call.flow.prompt_chunks)):
            text = asked.text.copy()
            text[known[chunk.start :]] = self._mask
            positions = known[chunk.start : chunk.stop]
            part = Denoising(self._mask, positions, tokens=prompt[positions])
            work += [self._score(k, f"prompt-{number}-{i}", text.tolist(), part) for k in active]
        scores = np.zeros(len(self.experts))
        for expert, score in await asyncio.gather(*work):
            scores[expert] += score
        return scores

    async def _score(self, expert: int, name: str, text: list[int], part: Denoising) -> tuple[int, float]:
        engine = self.experts[expert].engine
        try:
            return expert, float((await engine.denoise(name, text, part)).sum())
        except Exception:
            if engine.client.errored:
                raise ExpertLost(expert) from None
            raise
