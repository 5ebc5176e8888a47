"""Who leads which request. Knows members and weights; knows nothing of engines.

K experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from decar.server.protocol.member import Member


class Leaders:
    """The requests that ``experts`` (K) decode together now, by slot."""

    def __init__(self, experts: int):
        self._experts = experts
        self._members: dict[int, Member] = {}

    def choose(self, log_weights: np.ndarray, active: Sequence[int]) -> int:
        """The expert with the largest of ``log_weights`` [K]; among equals, the one that leads most requests already:
        the gateway then hears from one engine a step, and the others have nothing to sample."""
        leads = self.counts()
        return max(active, key=lambda k: (round(float(log_weights[k]), 9), leads[k]))

    def begin(self, member: Member) -> None:
        self._members[member.slot] = member

    def end(self, member: Member) -> None:
        self._members.pop(member.slot, None)

    def counts(self) -> list[int]:
        """How many requests each expert [K] leads now."""
        leaders = [member.leader for member in self._members.values()]
        return [leaders.count(k) for k in range(self._experts)]

    @property
    def some_stay(self) -> bool:
        """Whether there are requests that their experts decode together to the end."""
        return any(not member.may_release for member in self._members.values())
