"""Beam search: vLLM asks for the next token of every beam as for the first one of a new prompt. Knows no engines.

A beam's weights are those that an answer of its tokens has: they begin where the user's prompt ends, each token of the
beam moves them on, and what has been pruned on the way stays so.

K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decar.router import moved_on, restricted
from decar.server.gateway.prompt import tokens_of
from decar.server.gateway.request import Call


@dataclass(frozen=True)
class Weighed:
    """What mixes a text's next token: log weights [K], -inf for experts that have no part any more; and how much weight
    may still be pruned."""

    log_weights: np.ndarray
    budget: float


@dataclass
class BeamSearch:
    """One prompt's.

    Attributes:
        call: the request that it is part of.
        prompt_tokens: how many the user's prompt has.
        start: log weights [K] that a trained router gives for the user's prompt, once it has been asked.
        weighed: what mixes the next token of each of the longest beams so far, by their tokens.
    """

    call: Call
    prompt_tokens: int
    start: np.ndarray | None = None
    weighed: dict[tuple[int, ...], Weighed] = field(default_factory=dict)


@dataclass(frozen=True)
class Beam:
    """A beam whose next token is asked for.

    Attributes:
        spoken: its tokens, which follow the user's prompt.
        before: what mixed the last one of these; None at the beginning, and where weights do not move.
    """

    search: BeamSearch
    spoken: tuple[int, ...]
    before: Weighed | None

    def learning(
        self,
        log_weights: np.ndarray,
        budget: float,
        scored: Sequence[tuple[int, float]],
        learn: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> Callable[[np.ndarray, np.ndarray], None]:
        """As ``learn``, see `Beginning.learn`, and the beam's weights are found as its leader finds them."""

        def find(sums: np.ndarray, wholes: np.ndarray) -> None:
            said = wholes + [known for _, known in scored]
            self.weigh(*restricted(moved_on(log_weights, said), self.search.call.top_k, budget, None))
            if learn is not None:
                learn(sums, wholes)

        return find

    def weigh(self, log_weights: np.ndarray, budget: float) -> None:
        """Note what mixes the next token. All beams have one length, and have asked before one of them is answered."""
        weighed = self.search.weighed
        if not self.search.call.posterior:
            return
        if weighed and len(next(iter(weighed))) < len(self.spoken):
            weighed.clear()
        weighed[self.spoken] = Weighed(log_weights, budget)


_current: ContextVar[BeamSearch | None] = ContextVar("decar_beams", default=None)
"""Of the task that looks for one prompt's beams."""


def beam_of(call: Call, prompt: Any) -> Beam:
    """The beam that vLLM asks for as ``prompt``: a search's first one is the user's own."""
    tokens, search = tokens_of(prompt), _current.get()
    if search is None or search.call is not call:
        search = BeamSearch(call, len(tokens))
        _current.set(search)
    spoken = tuple(tokens[search.prompt_tokens :])
    return Beam(search, spoken, search.weighed.get(spoken[:-1]) if spoken else None)
