"""The same operations in plain torch: what the kernels are held to, and what runs where there is no GPU.

Shapes: K experts, B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from decar.kernels.rows import Rows, Rule

_TINY, _LOWEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).min
_CACHED_BYTES = 2**19
"""Of the experts' rows that are mixed at a time: what a core's cache keeps from the first operation to the last. Twice
as fast as all at once, measured with 64 rows of 32,000 numbers."""

_NOISE_AT_ONCE = 2**19
"""Numbers of noise that are drawn at a time. Each takes some 50 bytes meanwhile, and a flow ensemble has hundreds of
rows: drawn all at once, 512 rows of 30,000 took 800 MB, and twice as long."""


def mix_rows(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule, *, anchored: bool
) -> torch.Tensor:
    """See `decar.kernels.mix_rows`; ``anchored=False`` gives normalised log-probabilities."""
    log_z, effective, weights = _effective(rows, entries, log_weights)
    active = effective > -np.inf  # [K, B]
    part = np.flatnonzero(active.any(axis=1))
    if not len(part):
        return torch.full((len(entries), rows.vocab_size), -torch.inf, device=rows.device)
    if rule == "logit":
        # At least the smallest normal number: a weight that underflows still lets its expert forbid a token.
        numbers = np.maximum(weights[part], _TINY)
    else:
        anchor = (weights * log_z).sum(axis=0) if anchored else 0.0
        numbers = (effective - log_z + anchor)[part]
    columns = torch.from_numpy(numbers[:, :, None].astype(np.float32)).to(rows.device)  # [K, B, 1]
    absent = torch.from_numpy(~active[part, :, None]).to(rows.device)
    mixed = torch.empty(len(entries), rows.vocab_size, device=rows.device)
    at_once = max(_CACHED_BYTES // (4 * len(part) * rows.vocab_size), 1)
    terms = torch.empty(len(part), min(at_once, len(entries)), rows.vocab_size, device=rows.device)
    everyone = bool(active[part].all())
    for start in range(0, len(entries), at_once):
        some = slice(start, start + at_once)
        chunk = terms[:, : len(entries[some])]
        for term, k in zip(chunk, part, strict=True):
            _read(rows.logits[k], entries[some], term)
        chunk = chunk.mul_(columns[:, some]) if rule == "logit" else chunk.add_(columns[:, some])
        if not everyone:
            chunk.masked_fill_(absent[:, some], 0.0 if rule == "logit" else -math.inf)
        if rule == "logit":
            torch.sum(chunk, 0, out=mixed[some])
        elif len(part) == 2:
            torch.logaddexp(chunk[0], chunk[1], out=mixed[some])
        else:
            # Where no expert allows a token, -inf - -inf would be no number.
            top = chunk.amax(0).clamp_(min=_LOWEST)
            torch.sum(chunk.sub_(top).exp_(), 0, out=mixed[some]).log_().add_(top)
    if rule == "velocity":
        return mixed
    if not everyone:
        mixed.masked_fill_(absent.all(dim=0), -math.inf)
    return mixed if anchored else _log_softmax(mixed)


def decide(
    rows: Rows,
    entries: torch.Tensor,
    log_weights: torch.Tensor,
    rule: Rule,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `decar.kernels.decide`."""
    scores = mix_rows(rows, entries, log_weights, rule, anchored=True)
    sampled = (temperatures > 0).nonzero()[:, 0]
    for some in sampled.split(max(_NOISE_AT_ONCE // rows.vocab_size, 1)):
        noise = gumbel(seeds[some], positions[some], rows.vocab_size).to(scores)
        scores[some] = scores[some] / temperatures[some, None].float() + noise
    tokens = scores.argmax(dim=1)
    return tokens, posterior(rows, entries, log_weights, tokens)


def posterior(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Bayes: log w'_k = log w_k + log p_k(token), normalised; [B, K] float64."""
    log_z, old, _ = (
        torch.from_numpy(values.T).to(rows.device) for values in _effective(rows, entries, log_weights)
    )
    likelihoods = torch.stack([buffer[entries, tokens] for buffer in rows.logits], dim=1).double() - log_z
    new = (old + likelihoods).where(old > -math.inf, -math.inf)
    total = new.logsumexp(dim=1, keepdim=True)
    return torch.where(total > -math.inf, new - total, log_weights.double())


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Noise [B, V] float32. Token v takes word v % 4 of Philox(key=seed, counter=(v // 4, position, 0, 0))."""
    counters = torch.arange(-(-vocab_size // 4), device=seeds.device).expand(len(seeds), -1)
    zero = torch.zeros_like(counters)
    words = philox((counters, positions[:, None] + zero, zero, zero), seeds[:, None] + zero)
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size].double()
    uniform = ((bits + 0.5) * 2.0**-32).clip(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform)).float()


def philox(counter: Sequence[torch.Tensor], key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox4x32 with 7 rounds (Salmon et al. 2011): four words of 32 bits from four and a key of 64, all int64."""
    a, b, c, d = counter
    low = 0xFFFFFFFF
    first, second = key & low, key >> 32
    for _ in range(7):
        even, odd = a * 0xD2511F53, c * 0xCD9E8D57  # wraps at 64 bits, which are all that is wanted
        high_even, high_odd = even >> 32 & low, odd >> 32 & low
        a, b, c, d = high_odd ^ b ^ first, odd & low, high_even ^ d ^ second, even & low
        first, second = first + 0x9E3779B9 & low, second + 0xBB67AE85 & low
    return a, b, c, d


def _read(buffer: torch.Tensor, entries: torch.Tensor, into: torch.Tensor) -> None:
    """Copy one expert's rows [B, V], as float32."""
    if buffer.dtype == into.dtype:
        torch.index_select(buffer, 0, entries, out=into)
    else:
        into.copy_(buffer.index_select(0, entries))


def _effective(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log Z, 0 where inactive; log weights normalised over the active, else -inf; and weights: [K, B] float64.

    In numpy, whose calls cost a tenth of torch's, and by expert: these are few numbers, and many steps.
    """
    chosen = entries.cpu().numpy()
    log_z = np.stack([values.cpu().numpy()[chosen] for values in rows.log_normalisers]).astype(np.float64)
    given = np.ascontiguousarray(log_weights.double().cpu().numpy().T)
    active = np.isfinite(given) & np.isfinite(log_z)
    if not active.all():
        given, log_z = np.where(active, given, -np.inf), np.where(active, log_z, 0.0)
    top = given.max(axis=0)
    top[np.isneginf(top)] = 0.0
    weights = np.exp(given - top)
    total = weights.sum(axis=0)
    total[total == 0] = 1.0
    return log_z, given - (top + np.log(total)), weights / total


def _log_softmax(mixed: torch.Tensor) -> torch.Tensor:
    """A row in which no token is possible stays -inf."""
    total = mixed.logsumexp(dim=-1, keepdim=True)
    return mixed - total.where(total > -torch.inf, 0.0)
