"""One request's output from several engines, one after another: leaders hand over, the stream goes on.

Knows vLLM's output processor. Every engine has its own, which turns the engine's tokens into text, log-probabilities
and stop strings; what it has of a request so far moves to the next leader's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.lockstep import follow_membership
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Block


@dataclass
class RelayedRequest:
    """A request whose leader may change, and whose weights are read along.

    Attributes:
        member: its part in the lockstep, as far as the gateway has followed.
        speaker: whose processor has the user's state.
        on_tokens: called when tokens are there, with how many there are by now; also where the user gets only the
            whole answer.
        ids: expert -> the id that its engine knows the request by.
        early: expert -> outputs of tokens that come after ones which are still on their way from another engine.
        heard: how many tokens there are.
    """

    member: Member
    speaker: int
    on_tokens: Callable[[int], None]
    ids: dict[int, str] = field(default_factory=dict)
    early: dict[int, list[Any]] = field(default_factory=dict)
    heard: int = 0


LATE_S = 0.02
"""Tokens that have waited for longer are urgent: this is 1 to 4 steps of a small model."""


class Relay:
    """Stands in front of the output processors of ``engines``; ``blocks`` say who leads, ``thread`` does the work."""

    def __init__(self, engines: Sequence[AsyncLLM], blocks: Sequence[Block], thread: GatewayThread):
        self._blocks = blocks
        self._thread = thread
        self._relayed: dict[tuple[int, str], RelayedRequest] = {}
        self._processors = [engine.output_processor for engine in engines]
        self._process = [processor.process_outputs for processor in self._processors]
        for expert, processor in enumerate(self._processors):
            processor.process_outputs = partial(self._process_outputs, expert)

    def begin(self, member: Member, on_tokens: Callable[[int], None]) -> RelayedRequest:
        """A request that its leader is about to be given."""
        return RelayedRequest(member, member.leader, on_tokens)

    def follow(self, relayed: RelayedRequest, expert: int, request_id: str) -> None:
        """From now on, give the user what ``expert`` says as a leader, after what those before it said."""
        relayed.ids[expert] = request_id
        self._relayed[expert, request_id] = relayed

    def forget(self, relayed: RelayedRequest) -> None:
        for expert_and_id in relayed.ids.items():
            self._relayed.pop(expert_and_id, None)

    def _process_outputs(
        self, expert: int, outputs: list[Any], sent_s: float, *args: Any, **kwargs: Any
    ) -> Any:
        self._thread.hurry(self, time.monotonic() - sent_s > LATE_S)
        return self._in_order(expert, outputs, sent_s, *args, **kwargs)

    def _in_order(self, expert: int, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        if not self._relayed:
            return self._process[expert](outputs, *args, **kwargs)
        now, touched = [], []
        for output in outputs:
            relayed = self._relayed.get((expert, output.request_id))
            if relayed is None or relayed.speaker == expert:
                now.append(output)
            else:
                relayed.early.setdefault(expert, []).append(output)
            if relayed is not None:
                if relayed.member.may_release:
                    touched.append(relayed)
                if output.new_token_ids:
                    relayed.heard += len(output.new_token_ids)
                    relayed.on_tokens(relayed.heard)
        processed = self._process[expert](now, *args, **kwargs)
        for relayed in touched:
            self._hand_over(relayed, *args, **kwargs)
        return processed

    def _hand_over(self, relayed: RelayedRequest, *args: Any, **kwargs: Any) -> None:
        """Move the user's state to whoever decides the next token, and give it what has come early.

        A stop string in there ends the request here, not in the engine: whoever waits for its output aborts it.
        """
        while True:
            old = self._processors[relayed.speaker].request_states
            state = old.get(relayed.ids.get(relayed.speaker, ""))
            if state is None:
                return  # it has ended, or not begun
            follow_membership(self._blocks, relayed.member)
            speaker = relayed.member.leader_at(state.detokenizer.num_output_tokens())
            if speaker == relayed.speaker:
                return
            new = self._processors[speaker].request_states
            old_id, new_id = relayed.ids[relayed.speaker], relayed.ids[speaker]
            old[old_id], new[new_id] = new[new_id], state
            old[old_id].request_id, state.request_id = old_id, new_id
            relayed.speaker = speaker
            self._process[speaker](relayed.early.pop(speaker, []), *args, **kwargs)
