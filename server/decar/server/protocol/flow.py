"""What an engine of a flow ensemble is asked of one sequence. Knows no vLLM, so that both sides can import it.

The rows lie in the plane, [K, E, V]: which entry a row is written to is the gateway's to say, one round after another.

Shapes: n positions of a sequence, E entries of an expert's rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FLOW_KEY = "decar_flow"
"""Key of a `Denoising` among a request's own parameters."""
FLOW_TASK: Literal["token_classify"] = "token_classify"
"""What vLLM calls it when a model says something of every position."""
ROWS_BYTES = 64 << 20
"""Of one expert's rows: what does not fit in waits for the next round."""


def entries_of(slots: int, positions: int, vocab_size: int) -> int:
    """E, even: room for all masked positions of ``slots`` sequences of ``positions`` tokens if that is not more than
    `ROWS_BYTES`, and for those of one sequence in any case."""
    fitting = ROWS_BYTES // (4 * vocab_size)
    entries = max(positions, min(slots * positions, fitting))
    return entries + entries % 2


@dataclass(frozen=True)
class Denoising:
    """What is wanted of one sequence, which has the mask token where nothing is known.

    Attributes:
        mask_token_id: its logit is left out, before the normaliser is taken.
        positions: [n] integers, of which rows are needed: the row at a position says what is there.
        entries: [n], where in the expert's rows they go; None: nowhere.
        tokens: [n]; then the answer is the log-probability [n] of each of them at its position. None: nothing.
    """

    mask_token_id: int
    positions: np.ndarray
    entries: np.ndarray | None = None
    tokens: np.ndarray | None = None

    def to_wire(self) -> dict[str, Any]:
        """With bytes for arrays, since vLLM copies what is in a request item by item."""
        return {
            name: value.astype(np.int32).tobytes() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def of(cls, extra: Any) -> Denoising | None:
        """What a request's own parameters ask for; None for one that is not decar's."""
        wire = (extra or {}).get(FLOW_KEY)
        if wire is None:
            return None
        entries, tokens = wire["entries"], wire["tokens"]
        return cls(
            wire["mask_token_id"],
            _integers(wire["positions"]),
            None if entries is None else _integers(entries),
            None if tokens is None else _integers(tokens),
        )


def _integers(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, np.int32).astype(np.int64)
