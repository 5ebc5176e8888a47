"""What each expert thought of prompts before, so that no prompt is scored twice. Knows tokens, and no engines.

A prompt's log-likelihood is a sum over its tokens, so a prefix's is where the sum of a longer text begins. Kept are
the sums at the ends of units, whole KV blocks that an engine finds in its prefix cache and does not compute again, and
of whole prompts.

T tokens, U units of a prompt.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

MAX_ENTRIES = 65_536  # about 10 MiB an expert


class PrefixScores:
    """One expert's log-likelihoods of text beginnings, the least recently used forgotten first.

    Args:
        unit: its tokens.
        max_entries: how many are kept.
    """

    def __init__(self, unit: int, max_entries: int = MAX_ENTRIES):
        self._unit = unit
        self._max_entries = max_entries
        self._sums: OrderedDict[bytes, float] = OrderedDict()

    def known(self, prompt: Sequence[int], salt: bytes = b"") -> tuple[int, float]:
        """The longest beginning whose score is kept: (its tokens, Σ log p(x_i | x_<i) of them after the first).

        That many tokens, less one, may come from the engine's cache: the prediction of the last one is known too.

        Args:
            salt: what, beside its tokens, tells prompts apart.
        """
        found = (1, 0.0)
        for length, key in self._beginnings(prompt, salt):
            total = self._sums.get(key)
            if total is not None:
                self._sums.move_to_end(key)
                found = (length, total)
        return found

    def learn(
        self,
        prompt: Sequence[int],
        start: int,
        total: float,
        sums: Sequence[float],
        whole: float,
        salt: bytes = b"",
    ) -> None:
        """Keep what a scoring found out.

        Args:
            start, total: what `known` said.
            sums: [U], Σ log p of the tokens from ``start`` to each unit's end and one token more; not read before
                ``start``.
            whole: the same of all tokens from ``start`` on.
        """
        for length, key in self._beginnings(prompt, salt):
            if length > start:
                said = whole if length == len(prompt) else sums[(length - 1) // self._unit - 1]
                self._sums[key] = total + said
        while len(self._sums) > self._max_entries:
            self._sums.popitem(last=False)

    def _beginnings(self, prompt: Sequence[int], salt: bytes) -> Iterator[tuple[int, bytes]]:
        """(length, key) of the beginnings that are kept, in growing order: one token beyond each unit, and all."""
        ids = np.asarray(prompt, dtype="<i8")
        digest = hashlib.blake2b(salt, digest_size=16)
        end = 0
        for length in [*range(self._unit + 1, len(ids), self._unit), len(ids)]:
            digest.update(ids[end:length].tobytes())
            end = length
            yield length, digest.digest()
