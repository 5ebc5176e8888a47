"""The ranks of an engine, where several processes hold one expert's weights together. Knows vLLM's tensor parallelism.

Every rank computes a part of each layer and has all logits. The first takes part in the lockstep, decides every token,
and tells the others, which sample nothing: so no two can differ, whichever row or token comes while they look.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.distributed.parallel_state import get_tp_group

from decar.server.protocol.lockstep import HELD


class Ranks:
    """This process's place among them. To be made once vLLM has joined them.

    Attributes:
        first: whether it is the one that decides.
    """

    def __init__(self) -> None:
        self._group = get_tp_group()
        self.first = self._group.rank_in_group == 0
        self._alone = self._group.world_size == 1

    def tell(self, tokens: torch.Tensor, held: Sequence[int] = ()) -> None:
        """Give the others what has been decided: ``tokens`` [B], and none for the rows that are ``held``."""
        if self._alone:
            return
        told = tokens.tolist()
        for row in held:
            told[row] = HELD
        self._group.broadcast_object(told)

    def hear(self, tokens: torch.Tensor) -> list[int]:
        """Write into ``tokens`` [B] what the first has decided; returns the rows that are held."""
        told: list[int] = self._group.broadcast_object()
        tokens.copy_(torch.tensor(told, dtype=tokens.dtype))
        return [row for row, token in enumerate(told) if token == HELD]


def share_of(cores: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """The cores of an engine that one of its ranks computes on: its part of them, all where there are too few."""
    each = len(cores) // ranks
    return cores[rank * each : (rank + 1) * each] if each else cores
