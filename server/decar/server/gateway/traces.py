"""What mixed each token of a request, read from the plane, and what the response says of it. Knows no engines.

Shapes: K experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from decar.server.gateway.request import ChoiceTrace
from decar.server.protocol.lockstep import follow_membership
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Block


class Traces:
    """Reads ``blocks`` (K), and knows experts by ``names`` (K)."""

    def __init__(self, names: Sequence[str], blocks: Sequence[Block]):
        self._names, self._blocks = names, blocks

    def weights(self, member: Member, start: int, end: int) -> np.ndarray:
        """Weights [T, K] that mixed the tokens from ``start`` to ``end``."""
        follow_membership(self._blocks, member)
        weights = np.empty((end - start, len(self._names)))
        begin = start
        for until, leader in [*member.led_before, (end, member.leader)]:
            rows = self._blocks[leader].log_weights[member.slot, begin : min(until, end)]
            weights[begin - start :][: len(rows)] = np.exp(rows.astype(np.float64))
            begin += len(rows)
        if member.alone_from is not None:
            weights[max(member.alone_from - start, 0) :] = np.eye(len(self._names))[member.leader]
        return weights

    def begin(self, trace: ChoiceTrace, member: Member) -> None:
        """A prompt has been scored as it was computed: only now is it known who takes part."""
        [weights] = self.weights(member, 0, 1)
        trace.experts = [self._names[k] for k in np.flatnonzero(weights)]
        trace.leader = self._leader(member, 0, weights)

    def extend(self, trace: ChoiceTrace, member: Member, start: int, end: int) -> None:
        """Note what mixed the tokens from ``start`` to ``end``."""
        weights = self.weights(member, start, end)
        trace.weights += weights.tolist()
        trace.leaders += [self._leader(member, position, row) for position, row in enumerate(weights, start)]

    def _leader(self, member: Member, position: int, weights: np.ndarray) -> str:
        """Who leads at a position mixed by ``weights`` [K]. A leader that the prompt leaves without any still decides
        the first token; it does so for the next one."""
        leader = member.leader_at(position)
        return self._names[leader if weights[leader] else member.leader_at(position + 1)]
