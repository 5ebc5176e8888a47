"""One step of a model runner, as the lockstep sees it. Knows requests by id, rows, tokens and tensors, nothing else.

vLLM has two model runners; `StepV1` and `StepV2` say the same of both. What is private to a runner is named in its
file and nowhere else.

Shapes: B batch rows, V' token ids of the model, T positions, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

Settle = Callable[[torch.Tensor], None]
"""Gets the sampled tokens [B] before the runner keeps them: may write others in their place, and drop rows."""


class Step(ABC):
    """A model runner's current step, from its forward pass to its tokens.

    Args:
        runner: vLLM's model runner, its model loaded.
        vocab_size: V; the model's logits are masked from there on, since some expert has no row for those ids.
    """

    def __init__(self, runner: Any, vocab_size: int):
        self._runner = runner
        self._vocab_size = vocab_size
        self._model_logits = runner.model.compute_logits
        runner.model.compute_logits = self.compute_logits

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Logits [T, V'] of hidden states [T, H], ids that not every expert has masked."""
        logits = self._model_logits(hidden_states, *args, **kwargs)
        if logits is not None and logits.shape[-1] > self._vocab_size:
            logits[..., self._vocab_size :] = -torch.inf
        return logits

    # ---- between two steps

    @abstractmethod
    def append(self, request_id: str, token: int) -> None:
        """Give a request whose row was dropped the token of that position, as if it had been sampled."""

    @abstractmethod
    def go_on(self, request_id: str, tokens: Sequence[int]) -> None:
        """Before the step that a request begins in: it begins after ``tokens`` [T], as one does that was preempted."""

    @abstractmethod
    def redraw(self, request_id: str, tokens: int) -> None:
        """Bring a request's random numbers to where they are after ``tokens`` sampled tokens."""

    # ---- after the forward pass

    @property
    @abstractmethod
    def ran(self) -> bool:
        """Whether there is a forward pass to sample from."""

    @property
    @abstractmethod
    def rows(self) -> Mapping[str, int]:
        """Batch row by request id, of what this step computes."""

    @abstractmethod
    def hidden_states(self, request_id: str) -> tuple[int, torch.Tensor]:
        """(first, [T, H]): what this step computes of a request, from position ``first`` on."""

    @abstractmethod
    def logits(self) -> torch.Tensor:
        """Logits [B, V'] float32, before grammar and penalties. What is written into them is what is sampled from."""

    @abstractmethod
    def sample(
        self,
        grammar_output: Any,
        undecided: Collection[int] = (),
        settle: Settle | None = None,
        sampler: bool = True,
    ) -> Any:
        """Sample, keep the tokens, and return the runner's output.

        Args:
            undecided: rows whose sample is not used, so that they draw no random numbers.
            settle: see `Settle`.
            sampler: False where no row's sample is used: ``settle`` then gets zeros.
        """

    @abstractmethod
    def keep_told(self, grammar_output: Any, settle: Settle) -> Any:
        """As `sample`, with the tokens that ``settle`` writes, whatever would be sampled here."""

    @abstractmethod
    def drop(self, rows: Sequence[int]) -> None:
        """Within ``settle``: no token for these rows. The scheduler says whether their position runs again."""
