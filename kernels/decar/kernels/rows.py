"""`Rows`: where the experts' rows lie. Knows addresses and shapes, and nothing of how rows are mixed.

Shapes: K experts, E entries of a buffer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Rule = Literal["velocity", "logit"]
MAX_EXPERTS = 16


class Rows:
    """K buffers of logits, one per expert, read in place. Cheap to keep, so make it once.

    Args:
        logits: K tensors [E, V], float32, bfloat16 or float16, all of one dtype and layout; they may live in
            memory of other processes or devices as long as this device can read it. A token that an expert
            forbids is -inf.
        log_normalisers: K tensors [E] float32: the logsumexp of each row, posted with it.

    Raises:
        ValueError: buffers that do not fit together.
    """

    def __init__(self, logits: Sequence[torch.Tensor], log_normalisers: Sequence[torch.Tensor]):
        if not 1 <= len(logits) <= MAX_EXPERTS or len(log_normalisers) != len(logits):
            raise ValueError(f"from 1 to {MAX_EXPERTS} experts can be mixed, each with its log-normalisers")
        first = logits[0]
        if first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"rows must be float32, bfloat16 or float16, not {first.dtype}")
        for buffer in logits:
            if (buffer.shape, buffer.dtype) != (first.shape, first.dtype) or buffer.dim() != 2:
                raise ValueError("the experts' rows must be [E, V] of one shape and dtype")
            if buffer.stride() != first.stride() or buffer.stride(1) != 1:
                raise ValueError("the experts' rows must lie contiguous, at one distance from each other")
        for buffer in log_normalisers:
            if buffer.shape != first.shape[:1] or buffer.dtype != torch.float32 or not buffer.is_contiguous():
                raise ValueError(f"log-normalisers must be [E={first.shape[0]}] float32, contiguous")
        self.logits = tuple(logits)
        self.log_normalisers = tuple(log_normalisers)
        self.experts = len(logits)
        self.vocab_size = first.shape[1]
        self.stride = first.stride(0)
        self.dtype = first.dtype
        self.device = first.device
        addresses = [buffer.data_ptr() for buffer in logits]
        self.aligned = all(a % 16 == 0 for a in addresses) and self.stride * first.element_size() % 16 == 0
        self.pointers = torch.tensor(addresses, device=self.device)  # [K] int64
        self.normaliser_pointers = torch.tensor(
            [buffer.data_ptr() for buffer in log_normalisers], device=self.device
        )
        self._counters: torch.Tensor | None = None

    def counters(self, count: int) -> torch.Tensor:
        """At least ``count`` counters, int32, that are 0.

        Whoever counts leaves them so, since zeroing is one more launch. What counts in them runs one after the other.
        """
        if self._counters is None or len(self._counters) < count:
            self._counters = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._counters

    @classmethod
    def stacked(cls, logits: torch.Tensor, log_normalisers: torch.Tensor | None = None) -> Rows:
        """Rows [K, B, V] that already lie in one tensor; entry b of every buffer is row b."""
        if log_normalisers is None:
            log_normalisers = logits.float().logsumexp(dim=-1)
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        return cls(logits.unbind(0), log_normalisers.float().contiguous().unbind(0))
