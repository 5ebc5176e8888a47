"""Which place in the plane each expert has, where a manifest's order is another: experts come and go, engines stay.

K experts, C places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seats:
    """Of each expert (its ``names`` in manifest order), its place among ``total`` (C)."""

    names: tuple[str, ...]
    of: tuple[int, ...]
    total: int

    def seated(self, log_weights: np.ndarray) -> np.ndarray:
        """Log weights [K] of experts as those of places [C]; -inf where there is none."""
        placed = np.full(self.total, -np.inf)
        placed[list(self.of)] = log_weights
        return placed

    def by_expert(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """Rows [T, C] of places as those of experts [T, K]."""
        return [[row[seat] for seat in self.of] for row in rows]

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Some experts' names, as the manifest has them; then those of experts that have come meanwhile."""
        return sorted(names, key=lambda name: self.names.index(name) if name in self.names else self.total)

    def free(self, but: Sequence[int] = ()) -> int:
        """A place that is no expert's, nor one of ``but``."""
        return next(seat for seat in range(self.total) if seat not in self.of and seat not in but)
