"""Who leads which request. Knows members and weights; knows nothing of engines.

K experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from decar.kernels import Rule
from decar.server.protocol.member import Member

ROOM_BYTES = 256 << 10
"""Of rows that a host may be brought each step before others are asked to lead: 2 ms of a link of 1 Gb/s, 0.2 of 10."""


class Leaders:
    """The requests that experts decode together now, by slot.

    Args:
        hosts: [K], of each expert, by number: a leader needs a row of every other expert each token, and those of its
            own host lie in its memory.
        row_bytes: of a row on its way from one host to another, by rule.
    """

    def __init__(self, hosts: Sequence[int], row_bytes: Mapping[Rule, int]):
        self._hosts, self._row_bytes = hosts, row_bytes
        self._members: dict[int, Member] = {}

    def choose(self, log_weights: np.ndarray, member: Member) -> int:
        """Who of the active experts is to lead a request.

        The expert with the largest of ``log_weights`` [K]; among equals, the one that leads most already: the gateway
        then hears from one engine a step, and the others have nothing to sample.

        Where active experts are on several hosts, it is first of all one of the host with the most of them, which has
        the fewest rows brought; and once that is brought `ROOM_BYTES` a step, the host that is brought least, so that
        each link takes its share. But a request that experts may leave is led by the largest weight, wherever that
        is: the one that stays, whose rows are never on the way.
        """
        hosts, active, leads = self._hosts, member.active, self.counts()
        beside = Counter(hosts[k] for k in active)
        brought = self._brought() if len(beside) > 1 else None

        def merit(k: int) -> tuple[float, ...]:
            weight = round(float(log_weights[k]), 9)
            near = () if brought is None else (beside[hosts[k]], min(ROOM_BYTES - brought[hosts[k]], 0))
            return (weight, *near, leads[k]) if member.may_release else (*near, weight, leads[k])

        return max(active, key=merit)

    def _brought(self) -> Counter[int]:
        """Bytes of rows that each host is brought for a token of all that it leads."""
        hosts = self._hosts
        brought: Counter[int] = Counter()
        for member in self._members.values():
            far = sum(hosts[k] != hosts[member.leader] for k in member.active)
            brought[hosts[member.leader]] += far * self._row_bytes[member.rule]
        return brought

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
