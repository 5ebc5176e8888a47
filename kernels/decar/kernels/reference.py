"""The same operations in plain torch: what the kernels are held to, and what runs where there is no GPU.

Shapes: K experts, B rows, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from decar.kernels.rows import Rows, Rule

_TINY = torch.finfo(torch.float32).tiny


def mix_rows(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule, *, anchored: bool
) -> torch.Tensor:
    """See `decar.kernels.mix_rows`; ``anchored=False`` gives normalised log-probabilities."""
    normalisers, effective = _effective(rows, entries, log_weights)
    part = [k for k in range(rows.experts) if any(log_w[k] > -math.inf for log_w in effective)]
    if not part:
        return torch.full((len(entries), rows.vocab_size), -torch.inf, device=rows.device)
    if rule == "logit":
        # At least the smallest normal number: a weight that underflows still lets its expert forbid a token.
        factors = [[[max(math.exp(log_w[k]), _TINY)] for log_w in effective] for k in part]
        scale = torch.tensor(factors, device=rows.device)  # [K, B, 1]
        terms = [_row(rows, k, entries).mul_(scale[i]) for i, k in enumerate(part)]
    else:
        shifts = []
        for log_z, log_w in zip(normalisers, effective, strict=True):
            anchor = sum(math.exp(log_w[k]) * log_z[k] for k in part) if anchored else 0.0
            shifts.append([log_w[k] - log_z[k] + anchor for k in part])
        offset = torch.tensor(shifts, device=rows.device).T[:, :, None]  # [K, B, 1]
        terms = [_row(rows, k, entries).add_(offset[i]) for i, k in enumerate(part)]
    if any(log_w[k] == -math.inf for log_w in effective for k in part):
        active = torch.tensor(
            [[log_w[k] > -math.inf for log_w in effective] for k in part], device=rows.device
        )
        nothing = 0.0 if rule == "logit" else -math.inf
        terms = [term.where(active[i, :, None], nothing) for i, term in enumerate(terms)]
        if rule == "logit":
            terms[0] = terms[0].where(active.any(dim=0)[:, None], -math.inf)
    if rule == "velocity":
        return functools.reduce(torch.logaddexp, terms)
    mixed = functools.reduce(torch.Tensor.add_, terms)
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
    normalisers, old = _effective(rows, entries, log_weights)
    likelihoods = torch.stack([buffer[entries, tokens] for buffer in rows.logits], dim=1).double()
    prior = torch.tensor(old, dtype=torch.float64, device=rows.device)
    likelihoods -= torch.tensor(normalisers, dtype=torch.float64, device=rows.device)
    new = (prior + likelihoods).where(prior > -math.inf, -math.inf)
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


def _effective(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor
) -> tuple[list[list[float]], list[list[float]]]:
    """log Z [B, K], 0 where inactive, and log weights [B, K] normalised over the active, else -inf.

    Python's floats: the few numbers of a small batch cost 0.3 ms as a chain of torch operations, measured in
    an engine, and 0.03 ms so.
    """
    columns = [buffer.index_select(0, entries).tolist() for buffer in rows.log_normalisers]
    normalisers, effective = [], []
    for *log_z, given in zip(*columns, log_weights.tolist(), strict=True):
        active = [
            w if math.isfinite(w) and math.isfinite(z) else -math.inf
            for w, z in zip(given, log_z, strict=True)
        ]
        top = max(active)
        shift = top + math.log(sum([math.exp(w - top) for w in active])) if top > -math.inf else 0.0
        normalisers.append([z if w > -math.inf else 0.0 for z, w in zip(log_z, active, strict=True)])
        effective.append([w - shift for w in active])
    return normalisers, effective


def _log_softmax(mixed: torch.Tensor) -> torch.Tensor:
    """A row in which no token is possible stays -inf."""
    total = mixed.logsumexp(dim=-1, keepdim=True)
    return mixed - total.where(total > -torch.inf, 0.0)
