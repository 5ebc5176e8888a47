"""Places in the plane. Knows no requests and no engines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Slots:
    """Places in the plane. Whoever takes one has a place in the queue, and there are as many of either."""

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # last freed, first reused: its memory is warm
        self._generation = 0

    @property
    def in_use(self) -> int:
        return self.total - len(self._free)

    def next_generation(self) -> int:
        """A number for a slot's next tenant, which no other one has."""
        self._generation += 1
        return self._generation

    @contextlib.contextmanager
    def take(self) -> Iterator[int]:
        """A slot, for as long as the context lasts."""
        slot = self._free.pop()
        try:
            yield slot
        finally:
            self._free.append(slot)
