"""`EnsembleClient`: K engines as one vLLM `EngineClient`. Knows requests, slots and engines, not HTTP.

A request's path, from top to bottom: find the weights, as far as they are known before the prompt is computed; choose
who stays active; take a slot and choose a leader; give the request to the leader with the user's sampling parameters
and to every follower with trivial ones; stream the leader's output. All else vLLM's own OpenAI layer does on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from decar.router import Ensemble, active_experts, moved_on, restricted
from decar.server.gateway.aborts import Abort, Aborted
from decar.server.gateway.admission import check_drawable, refuse_failed
from decar.server.gateway.all_engines import AllEngines
from decar.server.gateway.beams import Beam, beam_of
from decar.server.gateway.core_policy import CorePolicy
from decar.server.gateway.engine import Engine, ExpertLost, OutputQueue, Relay, Speech
from decar.server.gateway.leaders import Leaders
from decar.server.gateway.prompt import PromptLogprobs, PromptScorer, tokens_of
from decar.server.gateway.request import Call, ChoiceTrace, DecarOptions, current_call, parse_call
from decar.server.gateway.sampling import (
    merged,
    params_alone,
    params_of,
    params_of_choices,
    produced_by,
    uniforms,
    without_prompt_logprobs,
)
from decar.server.gateway.schemas import Defaults
from decar.server.gateway.slots import Slots
from decar.server.gateway.tracing import RequestTrace, current_trace
from decar.server.gateway.weights import WeightsReader
from decar.server.metrics import EnsembleMetrics
from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.lockstep import RULES, follow_membership
from decar.server.protocol.member import Member
from decar.server.protocol.mirror import row_bytes
from decar.server.protocol.plane import Plane


@dataclass
class Asked:
    """What vLLM's app asks to be generated, with the `Call` it belongs to.

    Attributes:
        first_choice: index of this prompt's first choice in the response.
        kwargs: what vLLM passes through to an engine as it is.
        abort: of the prompt's request.
        slot: of a choice, once it has needed one; kept until it ends.
        speech: what has been said of a choice's answer, where an expert has been lost.
        beam: whose next token this is, in a beam search.
        trace: told of what happens to the HTTP request; None where nobody wants to know.
    """

    call: Call
    first_choice: int
    prompt: Any
    params: SamplingParams
    request_id: str
    kwargs: dict[str, Any]
    abort: Abort
    slot: int | None = None
    speech: Speech | None = None
    beam: Beam | None = None
    trace: RequestTrace | None = None

    @property
    def spoken(self) -> Sequence[int]:
        """Tokens of the answer that are there already."""
        return () if self.speech is None else self.speech.tokens


def _choices_of(asked: Asked) -> Iterator[Asked]:
    """Each choice of what is asked, as if it were all; made as it is needed, since there may be thousands."""
    for i, params in enumerate(params_of_choices(asked.params)):
        first_choice, request_id = asked.first_choice + i, f"{asked.request_id}-{i}"
        yield replace(asked, params=params, first_choice=first_choice, request_id=request_id)


class EnsembleClient(AllEngines):
    """K engines that decode as one model.

    Args:
        ensemble: what is served.
        engines: one per expert, in manifest order, sharing ``plane``.
        plane: made by the caller; removed by `shutdown`.
        relay: joins what engines say of a request that is handed over.
        thread: this one.
        metrics: told what mixed each token.
        min_experts: how many have to live for the ensemble to be served.
        max_queued: how many requests may wait; None: four for each slot.
        hosts: [C], of each place in the plane; (): all on one.
    """

    options = DecarOptions

    def __init__(
        self,
        ensemble: Ensemble,
        engines: Sequence[Engine],
        plane: Plane,
        *,
        relay: Relay,
        thread: GatewayThread,
        metrics: EnsembleMetrics,
        min_experts: int = 1,
        max_queued: int | None = None,
        hosts: Sequence[int] = (),
    ):
        slots = plane.spec.slots
        super().__init__(ensemble, engines, plane, thread, metrics, slots, min_experts, max_queued)
        self.slots = Slots(slots)
        sizes = {rule: row_bytes(plane.spec, rule) for rule in RULES}
        self.leaders = Leaders(hosts or (0,) * plane.spec.experts, sizes)
        self._core_policy = CorePolicy(self.experts, self.leaders, thread)
        self._scorer = PromptScorer(self.experts, ensemble.vocab_size, plane.spec.prompt_unit)
        self._relay = relay
        self._last_arrival = 0.0

    def give_engine(self, expert: int, engine: Engine) -> None:
        self._relay.stand_before(expert, engine)
        super().give_engine(expert, engine)

    def forget(self, expert: int) -> None:
        """What an expert has said of prompts, since its next engine has other weights."""
        self._scorer.forget(expert)

    def leads(self) -> list[int]:
        """Of each expert, how many requests it leads."""
        return self.leaders.counts()

    def defaults(self) -> Defaults:
        """What a request gets that does not say."""
        manifest = self.ensemble.manifest
        router = {**manifest.router.model_dump(exclude={"kind"}), "route": manifest.router.kind}
        return Defaults(**router, **manifest.mixing.model_dump())

    def call_of(self, model: str | None, options: Any) -> Call:
        """A request's `Call`, from its `model` and `decar` fields.

        Raises:
            RequestError: says which field is wrong and how to mend it.
        """
        call = parse_call(self.ensemble, model, options)
        call.log_weights = self.seats.seated(call.log_weights)
        call.seats, call.trained_routers = self.seats, self.trained_routers
        call.wire_rows = self.plane.spec.wire_rows
        return call

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Decode ``prompt`` as the current `Call` asks: by one expert alone, or by all of them as one.

        Raises:
            VLLMValidationError: something is asked that an ensemble has no answer to.
            ExpertDown: no expert that may answer lives.
        """
        self._admission.check(prompt, sampling_params, kwargs.get("priority", 0))
        call = current_call.get() or self.call_of(None, None)
        if call.draw:
            check_drawable(sampling_params)
        if not (call.beams and call.prompts):  # whose every step is a prompt
            tokens = len(tokens_of(prompt))
            self._metrics.asked(call.model, requests=int(call.prompts == 0), prompt_tokens=tokens)
        first_choice = call.prompts * sampling_params.n
        call.prompts += 1
        abort = self._aborts.of(request_id, prompt, sampling_params)
        asked = Asked(call, first_choice, prompt, sampling_params, request_id, kwargs, abort)
        asked.trace = current_trace.get()
        if asked.trace is not None:
            asked.trace.generates(tokens_of(prompt), sampling_params)
            kwargs["trace_headers"] = asked.trace.headers
        if call.beams:
            asked.beam = beam_of(call, prompt)
        return self._answer(asked)

    async def _answer(self, asked: Asked) -> AsyncGenerator[RequestOutput, None]:
        if asked.params.structured_outputs is not None:
            await asyncio.to_thread(self.experts[0].engine.choose_grammar, asked.params)
        only = asked.call.only_expert
        if only is not None:
            self.of_living(asked.call, asked.call.log_weights)
            prompt_logprobs = None
            each = iter([asked]) if asked.params.n == 1 else _choices_of(asked)
            choices = (self._asked_alone(choice, only) for choice in each)
        else:
            try:
                with asked.abort.waking():
                    log_weights, prompt_logprobs = await self._weigh(asked)
            except Aborted as aborted:
                yield aborted.output(asked.params.n)
                return
            scored = asked.call.scored and prompt_logprobs is None
            draws = uniforms(asked.params) if asked.call.draw else [None] * asked.params.n
            choices = (
                self._choice(choice, log_weights, uniform, scored)
                for choice, uniform in zip(_choices_of(asked), draws, strict=True)
            )
        outputs = next(choices) if asked.params.n == 1 else merged(choices, asked.params, self.queue.total)
        try:
            async for output in outputs:
                output.request_id = asked.request_id
                if prompt_logprobs is not None:
                    output.prompt_logprobs = prompt_logprobs
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

    async def _asked_alone(self, asked: Asked, expert: int) -> AsyncGenerator[RequestOutput, None]:
        """One choice of the one expert that the request may be answered by: plain vLLM."""
        async with self.place(asked.abort):
            client = self.experts[expert].engine.client
            kwargs = self._joined(asked, expert)
            outputs = client.generate(asked.prompt, asked.params, asked.request_id, **kwargs)
            try:
                with asked.abort.in_engines(lambda: client.abort(asked.request_id)):
                    async with contextlib.aclosing(self._said_alone(asked, expert, outputs)) as said:
                        async for output in said:
                            yield output
            except Exception:
                if client.errored:
                    raise self.down([expert]) from None
                raise

    # --- whoever dies -------------------------------------------------------------------------------------

    async def _choice(
        self, asked: Asked, log_weights: np.ndarray, uniform: float | None, scored: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        """One choice, from the experts that live: when one is lost, the others go on where it was broken off.

        Args:
            scored: whether the prompt has still to move the ``log_weights`` [K].
        """
        async with self.place(asked.abort), contextlib.AsyncExitStack() as kept:
            while True:
                try:
                    async with contextlib.AsyncExitStack() as attempt:
                        with asked.abort.waking():
                            outputs = await self._attempt(asked, log_weights, uniform, scored, kept, attempt)
                        attempt.push_async_callback(outputs.aclose)
                        async for output in outputs:
                            yield output
                    return
                except ExpertLost as lost:
                    self._go_on_without(asked, lost.expert)

    async def _attempt(
        self,
        asked: Asked,
        log_weights: np.ndarray,
        uniform: float | None,
        scored: bool,
        kept: contextlib.AsyncExitStack,
        attempt: contextlib.AsyncExitStack,
    ) -> AsyncGenerator[RequestOutput, None]:
        """What the experts that live say from here on; what has been said counts as scored text does.

        It is returned, not passed on: every generator on a token's way costs each token.

        Args:
            attempt: is left when that has been read.

        Raises:
            ExpertLost: one of them is, here or in what is returned.
            ExpertDown: none of them may answer.
        """
        call, beam, budget = asked.call, asked.beam, asked.call.prune
        answered = 0 if beam is None else len(beam.spoken)  # tokens of the prompt that count as the answer's
        if beam is not None and beam.before is not None and not self.missing(call, beam.before.log_weights):
            log_weights, budget, scored, answered = beam.before.log_weights, beam.before.budget, False, 1
        log_weights = self.of_living(call, log_weights)
        active = active_experts(log_weights)
        if len(active) == 1:
            if beam is not None:
                beam.weigh(log_weights, budget)
            return self._alone(asked, active[0])
        if scored:
            return await self._scored(asked, log_weights, uniform, kept, attempt)
        if call.posterior and (answered or asked.spoken):
            known = [(len(tokens_of(asked.prompt)) - answered, 0.0)] * len(self.experts)
            return self._mixed(asked, log_weights, budget, uniform, kept, known)
        return self._weighted(asked, log_weights, uniform, kept)

    def _go_on_without(self, asked: Asked, expert: int) -> None:
        """
        Raises:
            ExpertDown: the user wants no answer without ``expert``.
        """
        call = asked.call
        self._metrics.failed_over(expert)
        if asked.trace is not None:
            asked.trace.loses(self.experts[expert].name)
        if call.on_expert_loss == "fail":
            raise self.down([expert])
        if asked.speech is not None and asked.params.prompt_logprobs is not None:
            asked.params = without_prompt_logprobs(asked.params)  # they have been said

    # --- weigh --------------------------------------------------------------------------------------------

    async def _weigh(self, asked: Asked) -> tuple[np.ndarray, PromptLogprobs | None]:
        """Log weights [K] before the prompt; where its log-probabilities are asked for, those after it, and they.

        From here on, ``asked`` does not ask for that any more.
        """
        call, log_weights = asked.call, asked.call.log_weights
        if asked.beam is not None and asked.beam.search.start is not None:
            log_weights = asked.beam.search.start
        elif call.router is not None:
            routers = call.trained_routers or self.trained_routers
            log_weights = await routers.log_weights(asked.prompt, call.router)
            if asked.beam is not None:
                asked.beam.search.start = log_weights
        count = asked.params.prompt_logprobs
        if count is None:
            return log_weights, None
        asked.params = without_prompt_logprobs(asked.params)
        while True:
            try:
                prompt_logprobs, after = await self._scorer.log_probs(
                    asked.prompt,
                    asked.request_id,
                    asked.kwargs,
                    self.of_living(call, log_weights),
                    call.rule,
                    self.ensemble.vocab_size if count < 0 else count,
                    posterior=call.scored,
                )
            except ExpertLost as lost:
                self._go_on_without(asked, lost.expert)
            else:
                return after, prompt_logprobs

    async def _scored(
        self,
        asked: Asked,
        log_weights: np.ndarray,
        uniform: float | None,
        kept: contextlib.AsyncExitStack,
        attempt: contextlib.AsyncExitStack,
    ) -> AsyncGenerator[RequestOutput, None]:
        """One choice whose text moves the weights: at once where experts have scored it before, else as they
        compute it."""
        active = active_experts(log_weights)
        beginning = await attempt.enter_async_context(
            self._scorer.beginning(asked.prompt, active, asked.spoken)
        )
        if beginning.whole:
            log_weights = moved_on(log_weights, beginning.log_likelihoods)
            return self._weighted(asked, log_weights, uniform, kept)
        prune = asked.call.prune
        return self._mixed(asked, log_weights, prune, uniform, kept, beginning.scored, beginning.learn)

    # --- route --------------------------------------------------------------------------------------------

    def _weighted(
        self, asked: Asked, log_weights: np.ndarray, uniform: float | None, kept: contextlib.AsyncExitStack
    ) -> AsyncGenerator[RequestOutput, None]:
        """One choice whose weights [K] are known."""
        call = asked.call
        log_weights, budget = restricted(log_weights, call.top_k, call.prune, uniform)
        if asked.beam is not None:
            asked.beam.weigh(log_weights, budget)
        active = active_experts(log_weights)
        if len(active) == 1:
            return self._alone(asked, active[0])
        # weights that do not move have been pruned already
        return self._mixed(asked, log_weights, budget if call.posterior else 0.0, None, kept)

    async def _alone(self, asked: Asked, expert: int) -> AsyncGenerator[RequestOutput, None]:
        """One expert is active: plain vLLM, no plane.

        Raises:
            ExpertLost: it is.
        """
        relayed = self._relay.begin(expert, speech=asked.speech)
        queue = await self._submit(asked, expert, params_alone(asked.params, asked.speech))
        self._relay.follow(relayed, expert, queue.request_id)
        ended = False

        def end() -> Awaitable[None]:
            return self._cancel([(expert, queue)])

        async def heard() -> AsyncGenerator[RequestOutput, None]:
            nonlocal ended
            with self.health.hearing(queue, lambda k: k == expert) as hearing, asked.abort.in_engines(end):
                while not ended:
                    output = await hearing.next()
                    ended = output.finished
                    yield output

        try:
            async with contextlib.aclosing(self._said_alone(asked, expert, heard())) as said:
                async for output in said:
                    yield output
        except ExpertLost:
            asked.speech = self._relay.break_off(relayed) or asked.speech
            raise
        finally:
            self._relay.forget(relayed)
            if not ended:
                await asyncio.shield(end())

    async def _said_alone(
        self, asked: Asked, expert: int, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """What ``expert`` says in ``outputs``, with a trace of it."""
        call, name = asked.call, self.experts[expert].name
        weights = [float(k == expert) for k in range(len(self.experts))]
        trace = call.choices.setdefault(asked.first_choice, ChoiceTrace([name], name))
        key = object()
        self.thread.hurry(key, True)
        produced = start = len(asked.spoken)
        try:
            async for output in outputs:
                refuse_failed(asked.params, output)
                before, produced = produced, produced_by(output.outputs[0], asked.params, produced)
                if call.trace:
                    trace.weights += [weights] * (produced - before)
                    trace.leaders += [name] * (produced - before)
                yield output
        finally:
            self.thread.hurry(key, False)
            self._metrics.observe_alone(produced - start)
            self._metrics.asked(call.model, generated=produced - start)
            if asked.trace is not None:
                asked.trace.spoke(name, produced - start)
            await outputs.aclose()

    # --- slot, leader, fan out, stream --------------------------------------------------------------------

    async def _mixed(
        self,
        asked: Asked,
        log_weights: np.ndarray,
        budget: float,
        uniform: float | None,
        kept: contextlib.AsyncExitStack,
        scored: list[tuple[int, float]] | None = None,
        learn: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Several experts are active: all of them run one choice in lockstep, and its leader answers.

        Args:
            log_weights: [K]; before the text that is not ``scored``, which the experts go on to score.
            budget: weight that may be pruned.
            uniform: draws one of them by the weights after the prompt.
            kept: has the slot, also for a later attempt.
            learn: is told what the experts have found of that text, see `Beginning.learn`.

        Raises:
            ExpertLost: one of them is.
        """
        call, active, start = asked.call, active_experts(log_weights), len(asked.spoken)
        if asked.beam is not None and scored is not None:
            learn = asked.beam.learning(log_weights, budget, scored, learn)
        if asked.slot is None:
            asked.slot = kept.enter_context(self.slots.take())
        slot = asked.slot
        known = log_weights if scored is None else np.zeros(len(log_weights))
        member = Member(
            slot=slot,
            generation=self.slots.next_generation(),
            leader=active[0],
            active=tuple(active),
            rule=call.rule,
            log_weights=log_weights.tolist(),
            posterior=call.posterior,
            prune=budget,
            scored=scored,
            top_k=None if scored is None else call.top_k,
            uniform=uniform,
        )
        member.leader = leader = self.leaders.choose(known, member)
        trace = ChoiceTrace([self.experts[k].name for k in active], self.experts[leader].name)
        trace = call.choices.setdefault(asked.first_choice, trace)
        reader = WeightsReader(self.plane, member, [expert.name for expert in self.experts], start)

        def keep_up(produced: int) -> int:
            """The first token says what experts have found of a new text; later ones let leaders go on."""
            nonlocal learn
            if learn is not None:
                fields = self.plane.fields
                if (fields["prompt_of"][list(active), slot] != member.generation).any():
                    return produced + 1  # that of an expert on another host is still under way
                learn(fields["prompt_sums"][:, slot], fields["prompt_sum"][:, slot])
                learn = None
            return reader.keep_up(produced)

        relayed = self._relay.begin(leader, member, keep_up, asked.speech)
        queues: dict[int, OutputQueue] = {}
        finished = False
        read = produced = start

        def note(until: int) -> None:
            """Tokens up to there have been said."""
            nonlocal read
            if until > read == 0 and scored is not None:
                reader.begin(trace)
            if call.trace:
                reader.extend(trace, read, until)
            if call.wire_rows:
                trace.tails += reader.tails(read, until)
            read = until

        try:
            self.leaders.begin(member)
            self.thread.hurry(slot, True)
            self._core_policy.share_cores()
            await self._fan_out(asked, member, relayed, queues)
            queue = queues[leader]
            with (
                self.health.hearing(queue, lambda k: self._needs(member, relayed, k)) as hearing,
                asked.abort.in_engines(lambda: self._cancel(queues.items())),
            ):
                streams = asked.params.output_kind != RequestOutputKind.FINAL_ONLY
                self.thread.hurry(slot, streams or member.may_release)
                while not finished:
                    output = await hearing.next()
                    refuse_failed(asked.params, output)
                    finished = output.finished
                    produced = produced_by(output.outputs[0], asked.params, produced)
                    self.thread.hurry(slot, member.may_release or produced == start)
                    note(produced)
                    yield output
        except ExpertLost:
            asked.speech = self._relay.break_off(relayed) or asked.speech
            note(len(asked.spoken))
            raise
        finally:
            self.leaders.end(member)
            self.thread.hurry(slot, False)
            self._core_policy.share_cores()
            # Before what may be cancelled: a request's last choice often is.
            weights = reader.between(start, read)
            entropy_nats = self._metrics.observe(weights)
            self._metrics.asked(call.model, generated=read - start)
            if asked.trace is not None:
                leaders = [leader, *(k for _, k in member.led_before), member.leader]
                names = [expert.name for expert in self.experts]
                asked.trace.mixed(names, weights, leaders, entropy_nats)
            # Its own engine has ended it, unless another has led before, which may not know yet.
            ended = leader if finished and not member.led_before else None
            await asyncio.shield(self._leave(relayed, [k for k in queues.items() if k[0] != ended]))

    def _needs(self, member: Member, relayed: Any, expert: int) -> bool:
        """Whether a request is lost without ``expert``: it takes part, or has not said yet what it decided."""
        follow_membership(self.plane.blocks, member)  # those that have released it go on
        return expert in member.active or self._relay.speaks(relayed, expert)

    async def _fan_out(
        self, asked: Asked, member: Member, relayed: Any, queues: dict[int, OutputQueue]
    ) -> None:
        """Give the request to every active expert; ``queues`` has those that took it, also on failure."""
        leader = member.leader
        arrival_s = self._next_arrival()
        for k in self._core_policy.in_order(member.active, leader):
            params = params_of(k, member, asked.params, asked.speech)
            queues[k] = await self._submit(asked, k, params, arrival_time=arrival_s)
            self._relay.follow(relayed, k, queues[k].request_id)

    async def _submit(self, asked: Asked, expert: int, params: SamplingParams, **more: Any) -> OutputQueue:
        """Give the request to one expert's engine.

        Raises:
            ExpertLost: it is dead.
        """
        engine = self.experts[expert].engine
        try:
            kwargs = self._joined(asked, expert)
            return await engine.submit(asked.request_id, asked.prompt, params, **more, **kwargs)
        except Exception:
            if engine.client.errored:
                raise ExpertLost(expert) from None
            raise

    def _joined(self, asked: Asked, expert: int) -> dict[str, Any]:
        """What vLLM passes through, for an engine that is about to be given a part."""
        if asked.trace is None:
            return asked.kwargs
        return {**asked.kwargs, "trace_headers": asked.trace.joins(self.experts[expert].name)}

    def _next_arrival(self) -> float:
        """Arrival times are unique and the same for every engine: the order of age that holds yield by."""
        self._last_arrival = max(time.time(), self._last_arrival + 1e-6)
        return self._last_arrival

    async def _leave(self, relayed: Any, queues: Iterable[tuple[int, OutputQueue]]) -> None:
        """Nobody listens to these any more; what they still say until they know is nobody's."""
        try:
            await self._cancel(queues)
        finally:
            self._relay.forget(relayed)

    async def _cancel(self, queues: Iterable[tuple[int, OutputQueue]]) -> None:
        for k, queue in queues:
            await self.experts[k].engine.cancel(queue.request_id)
