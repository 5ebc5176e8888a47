"""What an engine says of prompts, read from the hidden states of the steps that compute them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

from decar.server.protocol.lockstep import Lockstep
from decar.server.protocol.member import Member, PromptRows
from decar.server.protocol.runtime import DIRECTORY
from decar.server.vllm_adapter.step import Step

_POSITIONS_AT_ONCE = 256  # of a prompt, whose logits are in memory
# Of float32 logits: what a core takes from conversion to sum without leaving its cache.
_CACHED_BYTES = 2**19


@dataclass
class _Unscored:
    """A prompt that has still to be scored.

    Attributes:
        images: as (first position, length).
        known: its leading tokens whose log-likelihood the gateway knows.
        end, total: how far it has been scored beyond that, and Σ log p of those tokens.
    """

    member: Member
    tokens: Sequence[int]
    images: Sequence[tuple[int, int]]
    known: int
    end: int
    total: float = 0.0


class PromptReader:
    """Scores new prompts into the plane, and writes out the rows that a request asks for.

    Args:
        writes_rows: False where another rank does, and this one only computes its part of them.
    """

    def __init__(self, step: Step, lockstep: Lockstep, writes_rows: bool = True):
        self._step, self._lockstep, self._writes_rows = step, lockstep, writes_rows
        self._unscored: dict[str, _Unscored] = {}  # by request
        self._rows: dict[str, PromptRows] = {}  # by request
        self._at_once = _POSITIONS_AT_ONCE
        if current_platform.is_cpu():
            self._at_once = max(_CACHED_BYTES // (4 * lockstep.vocab_size), 1)

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._unscored or self._rows)

    def score(
        self, request_id: str, member: Member, tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> None:
        """Have a prompt scored as it is computed."""
        images = [(feature.mm_position.offset, feature.mm_position.length) for feature in mm_features]
        assert member.scored is not None
        known, _ = member.scored[self._lockstep.expert]
        self._unscored[request_id] = _Unscored(member, tokens, images, known, end=known)

    def write_rows(self, request_id: str, rows: PromptRows) -> None:
        """Have rows of a prompt written out as they are computed."""
        self._rows[request_id] = rows

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._unscored.pop(request_id, None)
            self._rows.pop(request_id, None)

    def read(self) -> None:
        """Read this step's part of every prompt."""
        for request_id, unscored in list(self._unscored.items()):
            # A slot with a new tenant: this request is being aborted.
            if self._lockstep.holds_slot(unscored.member) and self._score(request_id, unscored):
                del self._unscored[request_id]
        for request_id, asked in self._rows.items():
            shape = (asked.end - asked.start, self._lockstep.vocab_size)
            for first, last, logits in self._logits(request_id, asked.start, asked.end):
                if not self._writes_rows:
                    continue
                with contextlib.suppress(FileNotFoundError):  # the client has left
                    rows = np.memmap(DIRECTORY / asked.file, np.float32, "r+", shape=shape)
                    rows[first - asked.start : last - asked.start] = logits.log_softmax(dim=-1).cpu().numpy()

    def _score(self, request_id: str, unscored: _Unscored) -> bool:
        """Sum log p of this step's tokens, and leave the sums in the plane. Whether all are there."""
        tokens, known = unscored.tokens, unscored.known
        for first, last, logits in self._logits(request_id, known - 1, len(tokens) - 1):
            targets = torch.tensor(tokens[first + 1 : last + 1], device=logits.device)
            said = torch.nn.functional.cross_entropy(logits, targets, reduction="none").neg()
            self._add(unscored, first + 1, said.double().cpu().numpy())
        if unscored.end < len(tokens):
            return False
        member = unscored.member
        self._lockstep.mine.say_of_prompt(member.slot, member.generation, unscored.total)
        return True

    def _add(self, unscored: _Unscored, start: int, said: np.ndarray) -> None:
        """Take in log p [n] of the tokens from ``start`` on."""
        if start == unscored.known:
            unscored.total = 0.0  # also anew, after a preemption
        for first, length in unscored.images:  # whose places hold no text
            said[max(first - start, 0) : max(first + length - start, 0)] = 0.0
        sums = unscored.total + np.cumsum(said)
        unit, end = self._lockstep.prompt_unit, start + len(said)
        ends = np.arange(-(-start // unit) * unit, end, unit)  # of units, and a token more
        self._lockstep.mine.prompt_sums[unscored.member.slot, ends // unit - 1] = sums[ends - start]
        self._lockstep.mine.count("scored_tokens", len(said))
        unscored.end, unscored.total = end, float(sums[-1])

    def _logits(self, request_id: str, start: int, end: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first, last, logits [last - first, V] float32) of the positions from ``start`` to ``end`` in this step."""
        if request_id not in self._step.rows:
            return
        computed, hidden_states = self._step.hidden_states(request_id)
        start, end = max(start, computed), min(end, computed + len(hidden_states))
        if start >= end:
            return
        for some in hidden_states[start - computed : end - computed].split(_POSITIONS_AT_ONCE):
            of_shared = self._step.compute_logits(some)[:, : self._lockstep.vocab_size]
            for logits in of_shared.split(self._at_once):
                yield start, start + len(logits), logits.float()
                start += len(logits)
