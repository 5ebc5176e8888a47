"""Who leads which request. Knows members and weights; knows nothing of engines.

K experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from decar.server.protocol.member import Member


class Leaders:
    """The requests that experts decode together now, by slot.

    Args:
        hosts: [K], of each expert, by number: a leader needs a row of every other expert each token, and those of its
            own host lie in its memory.
    """

    def __init__(self, hosts: Sequence[int]):
        self._hosts = hosts
        self._members: dict[int, Member] = {}

    def choose(self, log_weights: np.ndarray, member: Member) -> int:
        """Who of the active experts is to lead a request.

        On one host the expert with the largest of ``log_weights`` [K] leads; among equals, the one that leads most
        already: the gateway then hears from one engine a step, and the others have nothing to sample. Where there
        are several, it is whoever has the most rows on its own host, and among those the one whose host leads least,
        so that each link takes its share. A request that experts may leave is led by the largest weight wherever
        that is: the one that stays, whose rows are never on the way.
        """
        hosts, active, leads = self._hosts, member.active, self.counts()
        weights = {k: round(float(log_weights[k]), 9) for k in active}
        if len({hosts[k] for k in active}) == 1:
            return max(active, key=lambda k: (weights[k], leads[k]))
        beside = Counter(hosts[k] for k in active)
        led: Counter[int] = Counter()
        for k, count in enumerate(leads):
            led[hosts[k]] += count

        def cheapness(k: int) -> tuple[float, ...]:
            near, load = beside[hosts[k]], -led[hosts[k]]
            return (weights[k], near, load) if member.may_release else (near, load, weights[k])

        return max(active, key=cheapness)

    def begin(self, member: Member) -> None:
        self._members[member.slot] = member

    def end(self, member: Member) -> None:
        self._members.pop(member.slot, None)

    def counts(self) -> list[int]:
        """How many requests each expert [K] leads now."""
        leaders = [member.leader for member in self._members.values()]
        return [leaders.count(k) for k in range(len(self._hosts))]

    @property
    def some_stay(self) -> bool:
        """Whether there are requests that their experts decode together to the end."""
        return any(not member.may_release for member in self._members.values())
