"""What each expert thought of prompts before, so that no prompt is scored twice. Knows tokens, and no engines.

A prompt's log-likelihood is a sum over its tokens, so a prefix's is where the sum of a longer text begins. Kept are
the sums at the ends of KV blocks, which an engine finds in its prefix cache and does not compute again, and of whole
prompts.

T tokens, B tokens of a KV block.
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
        block_size: B.
        max_entries: how many are kept.
    """

    def __init__(self, block_size: int, max_entries: int = MAX_ENTRIES):
        self._block_size = block_size
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
        log_likelihoods: Sequence[float],
        salt: bytes = b"",
    ) -> float:
        """Keep what a scoring found out, and return the whole prompt's score.

        Args:
            start, total: what `known` said.
            log_likelihoods: [T - start], log p of each token from ``start`` on.
        """
        sums = total + np.cumsum(np.asarray(log_likelihoods, dtype=np.float64))
        whole = float(sums[-1]) if len(sums) else total
        for length, key in self._beginnings(prompt, salt):
            if length > start:
                self._sums[key] = float(sums[length - 1 - start])
        while len(self._sums) > self._max_entries:
            self._sums.popitem(last=False)
        return whole

    def forget(self) -> None:
        """As when the engine's weights have changed."""
        self._sums.clear()

    def _beginnings(self, prompt: Sequence[int], salt: bytes) -> Iterator[tuple[int, bytes]]:
        """(length, key) of the beginnings that are kept, in growing order: one token beyond each block, and all."""
        ids = np.asarray(prompt, dtype="<i8")
        digest = hashlib.blake2b(salt, digest_size=16)
        end = 0
        for length in [*range(self._block_size + 1, len(ids), self._block_size), len(ids)]:
            digest.update(ids[end:length].tobytes())
            end = length
            yield length, digest.digest()
