"""What mixed each token of a request, read along as tokens come, and what the response says of it. Knows no engines.

Shapes: K experts, T tokens of an answer, R positions of the plane's ring.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from decar.server.gateway.request import ChoiceTrace
from decar.server.protocol.lockstep import follow_membership
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Plane, stamp_of


class WeightsReader:
    """Reads what a request's leaders write into rings of R positions, and lets them go on.

    Args:
        plane: whose ``weights_read`` is the caller's to write.
        member: the request's part in the lockstep, brought up to date here.
        names: of the experts [K].
        start: the position that the request begins at.
    """

    def __init__(self, plane: Plane, member: Member, names: Sequence[str], start: int = 0):
        self._plane, self._member, self._names = plane, member, names
        self._ring = plane.spec.ring
        self._weights = np.zeros((start + self._ring, plane.spec.experts))
        self._end = start  # up to which positions have been read
        self._tails: list[float] = []  # of those that nobody has taken
        self._let_go_on()

    def keep_up(self, produced: int) -> int:
        """Note that ``produced`` tokens are there, and return how many have to be there when this is called next, so
        that no leader waits."""
        if produced - self._end >= self._ring // 2:
            self._read(produced)
        return self._end + self._ring // 2

    def between(self, start: int, end: int) -> np.ndarray:
        """Weights [end - start, K] that mixed the tokens from ``start`` to ``end``, which are there."""
        if end > self._end:
            self._read(end)
        return self._weights[start:end]

    def tails(self, start: int, end: int) -> list[float]:
        """What rows that came in part may have changed in the tokens from ``start`` to ``end``, by total variation.
        To be asked of each once, in order."""
        self.between(start, end)
        taken, self._tails = self._tails[: end - start], self._tails[end - start :]
        return taken

    def begin(self, trace: ChoiceTrace) -> None:
        """A prompt has been scored as it was computed: only now is it known who takes part."""
        [weights] = self.between(0, 1)
        trace.experts = [self._names[k] for k in np.flatnonzero(weights)]
        trace.leader = self._leader(0, weights)

    def extend(self, trace: ChoiceTrace, start: int, end: int) -> None:
        """Note what mixed the tokens from ``start`` to ``end``."""
        weights = self.between(start, end)
        trace.weights += weights.tolist()
        trace.leaders += [self._leader(position, row) for position, row in enumerate(weights, start)]

    def _leader(self, position: int, weights: np.ndarray) -> str:
        """Who leads at a position mixed by ``weights`` [K]. A leader that the prompt leaves without any still decides
        the first token; it does so for the next one."""
        leader = self._member.leader_at(position)
        return self._names[leader if weights[leader] else self._member.leader_at(position + 1)]

    def _read(self, end: int) -> None:
        member, blocks = self._member, self._plane.blocks
        follow_membership(blocks, member)
        if end > len(self._weights):
            grown = np.empty((max(end, 2 * len(self._weights)), len(blocks)))
            grown[: self._end] = self._weights[: self._end]
            self._weights = grown
        for until, leader in [*member.led_before, (end, member.leader)]:
            positions = np.arange(self._end, min(until, end))
            said = blocks[leader].log_weights[member.slot, positions % self._ring]
            self._weights[positions] = np.exp(said.astype(np.float64))
            tails = blocks[leader].tails
            if tails is not None:
                found = tails[member.slot, positions % self._ring]
                if member.alone_from is not None:
                    found[positions >= member.alone_from] = 0.0  # which nobody has mixed
                self._tails += found.tolist()
            self._end = max(self._end, min(until, end))
        if member.alone_from is not None:
            self._weights[member.alone_from : end] = np.eye(len(blocks))[member.leader]
        self._let_go_on()

    def _let_go_on(self) -> None:
        last_read = stamp_of(self._member.generation, self._end - 1)
        self._plane.weights_read[self._member.slot] = last_read
        self._plane.tell_others()
