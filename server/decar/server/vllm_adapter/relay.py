"""One request's output from several engines, one after another: leaders hand over or die, the stream goes on.

Knows vLLM's output processor. Every engine has its own, which turns the engine's tokens into text, log-probabilities
and stop strings; what it has of a request so far moves to the next leader's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.v1.engine import EngineCoreOutput, FinishReason

from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.lockstep import follow_membership
from decar.server.protocol.member import Member, Spoken
from decar.server.protocol.plane import Block

_tickets = itertools.count(1)


@dataclass
class BrokenOff:
    """An answer without a speaker: `decar.server.gateway.engine.Speech`.

    Attributes:
        tokens: [T], what has been said.
        state: the user's, as the last speaker's processor had it.
    """

    tokens: list[int]
    state: Any
    ticket: int = field(default_factory=lambda: next(_tickets))


@dataclass
class RelayedRequest:
    """A request whose speaker may change, and whose weights are read along.

    Attributes:
        member: its part in the lockstep, as far as the gateway has followed; None where one engine answers alone.
        speaker: whose processor has the user's state.
        on_tokens: called when ``tell_at`` tokens are there, with how many there are by now; gives the next such number.
        ids: expert -> the id that its engine knows the request by.
        early: expert -> outputs of tokens that come after ones which are still on their way from another engine.
        heard: how many tokens there are.
        failed: an engine has ended it with an error.
        going_on: who is to go on with which ticket's answer.
    """

    member: Member | None
    speaker: int
    on_tokens: Callable[[int], int] | None
    ids: dict[int, str] = field(default_factory=dict)
    early: dict[int, list[Any]] = field(default_factory=dict)
    heard: int = 0
    tell_at: int = 0
    failed: bool = False
    going_on: tuple[int, int] | None = None


LATE_S = 0.02
"""Tokens that have waited for longer are urgent: this is 1 to 4 steps of a small model."""


class Relay:
    """Stands in front of the output processors of ``engines``; ``blocks`` say who leads, ``thread`` does the work."""

    def __init__(self, engines: Sequence[Any], blocks: Sequence[Block], thread: GatewayThread):
        self._blocks = blocks
        self._thread = thread
        self._relayed: dict[tuple[int, str], RelayedRequest] = {}
        self._broken_off: dict[tuple[int, int], BrokenOff] = {}  # by who is to go on, and ticket
        self._processors: list[Any] = [None] * len(blocks)
        self._process: list[Any] = [None] * len(blocks)
        for expert, engine in enumerate(engines):
            self.stand_before(expert, engine)

    def stand_before(self, expert: int, engine: Any) -> None:
        """From now on, an expert's engine is this `LLMEngine`."""
        processor = self._processors[expert] = engine.llm.output_processor
        self._process[expert] = processor.process_outputs
        processor.process_outputs = partial(self._process_outputs, expert)
        processor.add_request = partial(self._add_request, expert, processor.add_request)
        processor.propagate_error = partial(self._propagate_error, expert)

    def begin(
        self,
        leader: int,
        member: Member | None = None,
        on_tokens: Callable[[int], int] | None = None,
        speech: Any | None = None,
    ) -> RelayedRequest:
        """A request that ``leader`` is about to be given; it goes on with ``speech`` (`BrokenOff`), if any."""
        relayed = RelayedRequest(member, leader, on_tokens)
        if speech is not None:
            relayed.heard = len(speech.tokens)
            relayed.going_on = leader, speech.ticket
            self._broken_off[relayed.going_on] = speech
        return relayed

    def follow(self, relayed: RelayedRequest, expert: int, request_id: str) -> None:
        """From now on, give the user what ``expert`` says as a leader, after what those before it said; and an error
        that it ends the request with, also as a follower: else its leader would wait for it."""
        relayed.ids[expert] = request_id
        self._relayed[expert, request_id] = relayed
        if relayed.failed and expert == relayed.speaker:
            self._fail(relayed)

    def speaks(self, relayed: RelayedRequest, expert: int) -> bool:
        """Whether it is ``expert`` that the user hears now."""
        return relayed.speaker == expert

    def break_off(self, relayed: RelayedRequest) -> BrokenOff | None:
        """Take a request's user's state out of its speaker's processor; None if nothing was said yet."""
        relayed.on_tokens = None
        request_id = relayed.ids.get(relayed.speaker, "")
        states = self._processors[relayed.speaker].request_states
        if request_id not in states or not states[request_id].detokenizer.num_output_tokens():
            return None
        state = states.pop(request_id)
        return BrokenOff(list(state.detokenizer.output_token_ids), state)

    def forget(self, relayed: RelayedRequest) -> None:
        """Its engines have no part of the request any more."""
        for expert_and_id in relayed.ids.items():
            self._relayed.pop(expert_and_id, None)
        if relayed.going_on is not None:
            self._broken_off.pop(relayed.going_on, None)

    def _add_request(
        self, expert: int, add_request: Callable[..., Any], request: Any, *args: Any, **kwargs: Any
    ) -> None:
        """In place of a processor's `add_request`: who goes on with an answer gets its user's state."""
        add_request(request, *args, **kwargs)
        spoken = Spoken.of(request.sampling_params)
        speech = None if spoken is None else self._broken_off.pop((expert, spoken.ticket), None)
        if speech is not None:
            states, request_id = self._processors[expert].request_states, request.request_id
            speech.state.request_id, speech.state.queue = request_id, states[request_id].queue
            states[request_id] = speech.state

    def _propagate_error(self, expert: int, e: Exception) -> None:
        """In place of a processor's `propagate_error`: whom the relay knows goes on, and hears of a death elsewhere."""
        for request_id, state in self._processors[expert].request_states.items():
            if (expert, request_id) not in self._relayed and state.queue is not None:
                state.queue.put(e)

    def _process_outputs(
        self, expert: int, outputs: list[Any], sent_s: float, *args: Any, **kwargs: Any
    ) -> Any:
        self._thread.hurry(self, time.monotonic() - sent_s > LATE_S)
        return self._in_order(expert, outputs, sent_s, *args, **kwargs)

    def _in_order(self, expert: int, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """What followers say is nobody's: the end that they reach as their leader does is no end of a request, in
        vLLM's statistics or its spans. They are cancelled."""
        if not self._relayed:
            return self._process[expert](outputs, *args, **kwargs)
        now, touched, failed = [], [], []
        for output in outputs:
            relayed = self._relayed.get((expert, output.request_id))
            moves = relayed is not None and relayed.member is not None and relayed.member.may_release
            if relayed is None or relayed.speaker == expert:
                now.append(output)
            elif moves:
                relayed.early.setdefault(expert, []).append(output)
            if relayed is None:
                continue
            if moves:
                touched.append(relayed)
            if relayed.speaker != expert and output.finish_reason == FinishReason.ERROR:
                failed.append(relayed)
            elif relayed.speaker == expert:
                self._count(relayed, output)
        processed = self._process[expert](now, *args, **kwargs)
        for relayed in failed:
            self._fail(relayed)
        for relayed in touched:
            self._hand_over(relayed, *args, **kwargs)
        return processed

    def _count(self, relayed: RelayedRequest, output: Any) -> None:
        """Know of tokens that follow those which were heard before."""
        if output.new_token_ids:
            relayed.heard += len(output.new_token_ids)
            if relayed.on_tokens is not None and relayed.heard >= relayed.tell_at:
                relayed.tell_at = relayed.on_tokens(relayed.heard)

    def _fail(self, relayed: RelayedRequest) -> None:
        """End a request with an error for its user, as if its speaker said so."""
        relayed.failed = True
        if relayed.speaker in relayed.ids:
            end = EngineCoreOutput(relayed.ids[relayed.speaker], [], finish_reason=FinishReason.ERROR)
            self._process[relayed.speaker]([end])

    def _hand_over(self, relayed: RelayedRequest, *args: Any, **kwargs: Any) -> None:
        """Move the user's state to whoever decides the next token, and give it what has come early.

        A stop string in there ends the request here, not in the engine: whoever waits for its output aborts it.
        """
        while True:
            old = self._processors[relayed.speaker].request_states
            state = old.get(relayed.ids.get(relayed.speaker, ""))
            if state is None:
                return  # it has ended, or not begun
            assert relayed.member is not None, "one that answers alone hands nothing over"
            follow_membership(self._blocks, relayed.member)
            speaker = relayed.member.leader_at(state.detokenizer.num_output_tokens())
            if speaker == relayed.speaker:
                return
            new = self._processors[speaker].request_states
            old_id, new_id = relayed.ids[relayed.speaker], relayed.ids[speaker]
            old[old_id], new[new_id] = new[new_id], state
            old[old_id].request_id, state.request_id = old_id, new_id
            relayed.speaker = speaker
            early = relayed.early.pop(speaker, [])
            for output in early:
                self._count(relayed, output)
            self._process[speaker](early, *args, **kwargs)
