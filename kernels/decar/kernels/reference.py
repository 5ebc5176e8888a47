"""The same operations in plain torch: what the kernels are held to, and what runs where there is no GPU.

Shapes: K experts, B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from decar.kernels.rows import Rows, Rule

_TINY = torch.finfo(torch.float32).tiny


def mix_rows(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule, *, anchored: bool
) -> torch.Tensor:
    """See `decar.kernels.mix_rows`; ``anchored=False`` gives normalised log-probabilities."""
    log_z, effective = _effective(rows, entries, log_weights)
    active = effective > -np.inf  # [B, K]
    part = np.flatnonzero(active.any(axis=0))
    if not len(part):
        return torch.full((len(entries), rows.vocab_size), -torch.inf, device=rows.device)
    if rule == "logit":
        # At least the smallest normal number: a weight that underflows still lets its expert forbid a token.
        numbers = _columns(np.maximum(np.exp(effective[:, part]), _TINY), rows)
        nothing = 0.0
    else:
        anchor = (np.exp(effective) * log_z).sum(axis=1, keepdims=True) if anchored else 0.0
        numbers = _columns((effective - log_z + anchor)[:, part], rows)
        nothing = -math.inf
    mixed: torch.Tensor | None = None
    for number, k in zip(numbers, part, strict=True):  # one expert's rows in memory at a time, and the sum
        term = _row(rows, k, entries)
        term = term.mul_(number) if rule == "logit" else term.add_(number)
        if not active[:, k].all():
            term.masked_fill_(_column(~active[:, k], rows), nothing)
        if mixed is None:
            mixed = term
        else:
            mixed = mixed.add_(term) if rule == "logit" else torch.logaddexp(mixed, term, out=mixed)
    assert mixed is not None
    if rule == "velocity":
        return mixed
    mixed.masked_fill_(_column(~np.any(active, axis=1), rows), -math.inf)
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
    sampled = temperatures > 0
    if bool(sampled.any()):
        noise = gumbel(seeds[sampled], positions[sampled], rows.vocab_size).to(scores)
        scores[sampled] = scores[sampled] / temperatures[sampled, None].float() + noise
    tokens = scores.argmax(dim=1)
    return tokens, posterior(rows, entries, log_weights, tokens)


def posterior(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Bayes: log w'_k = log w_k + log p_k(token), normalised; [B, K] float64."""
    log_z, old = (
        torch.from_numpy(values).to(rows.device) for values in _effective(rows, entries, log_weights)
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


def _row(rows: Rows, expert: int, entries: torch.Tensor) -> torch.Tensor:
    """One expert's rows [B, V] float32, copied."""
    return rows.logits[expert].index_select(0, entries).to(torch.float32)


def _columns(values: np.ndarray, rows: Rows) -> torch.Tensor:
    """Numbers [B, K] as one column [B, 1] an expert: [K, B, 1] float32."""
    return torch.from_numpy(values.T[:, :, None].astype(np.float32)).to(rows.device)


def _column(values: Any, rows: Rows) -> torch.Tensor:
    """What is true of each row [B], as a column [B, 1]."""
    return torch.from_numpy(values[:, None]).to(rows.device)


def _effective(rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """log Z [B, K], 0 where inactive, and log weights [B, K] normalised over the active, else -inf; float64.

    In numpy, whose calls cost a tenth of torch's: these are few numbers, and many steps.
    """
    columns = [values.index_select(0, entries).cpu().numpy() for values in rows.log_normalisers]
    log_z = np.stack(columns, axis=1).astype(np.float64)
    given = log_weights.double().cpu().numpy()
    active = np.isfinite(given) & np.isfinite(log_z)
    effective = np.where(active, given, -np.inf)
    top = np.where(active.any(axis=1), effective.max(axis=1), 0.0)[:, None]
    total = np.exp(effective - top).sum(axis=1, keepdims=True)
    shift = top + np.log(total, out=np.zeros_like(total), where=total > 0)
    return np.where(active, log_z, 0.0), effective - shift


def _log_softmax(mixed: torch.Tensor) -> torch.Tensor:
    """A row in which no token is possible stays -inf."""
    total = mixed.logsumexp(dim=-1, keepdim=True)
    return mixed - total.where(total > -torch.inf, 0.0)
