"""The same operations in plain torch: what the kernels are held to, and what runs where there is no GPU.

Shapes: K experts, B rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from decar.kernels.rows import Rows, Rule

_TINY = torch.finfo(torch.float32).tiny


def mix_rows(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule, *, anchored: bool
) -> torch.Tensor:
    """See `decar.kernels.mix_rows`; ``anchored=False`` gives normalised log-probabilities."""
    normalisers, log_weights, active = _effective(rows, entries, log_weights)
    part = active.any(dim=0).nonzero().flatten().tolist()  # the other experts' rows are not read
    everyone = bool(active[:, part].all())
    if rule == "logit":
        # At least the smallest normal number: a weight that underflows still lets its expert forbid a token.
        weights = log_weights.exp().clamp(min=_TINY).float()
        terms = [_row(rows, k, entries).mul_(weights[:, [k]]) for k in part]
    else:
        anchor = (log_weights.exp() * normalisers).sum(dim=1, keepdim=True) if anchored else 0.0
        offsets = (log_weights - normalisers + anchor).float()
        terms = [_row(rows, k, entries).add_(offsets[:, [k]]) for k in part]
    if not everyone:
        nothing = 0.0 if rule == "logit" else -torch.inf
        terms = [term.where(active[:, [k]], nothing) for k, term in zip(part, terms, strict=True)]
    if not terms:
        return torch.full((len(entries), rows.vocab_size), -torch.inf, device=rows.device)
    if rule == "velocity":
        return functools.reduce(torch.logaddexp, terms)
    mixed = functools.reduce(torch.Tensor.add_, terms)
    if not everyone:
        mixed = mixed.where(active.any(dim=1, keepdim=True), -torch.inf)
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
    normalisers, old, active = _effective(rows, entries, log_weights)
    logits = torch.stack([buffer[entries, tokens] for buffer in rows.logits], dim=1).double()
    new = (old + logits - normalisers).where(active, -torch.inf)
    total = new.logsumexp(dim=1, keepdim=True)
    return torch.where(total > -torch.inf, new - total, log_weights.double())


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log Z (0 where inactive) and log weights normalised over the active, [B, K] float64; and who is active."""
    normalisers = torch.stack([of.index_select(0, entries) for of in rows.log_normalisers], dim=1).double()
    active = log_weights.isfinite() & normalisers.isfinite()
    log_weights = log_weights.double().where(active, -torch.inf)
    total = log_weights.logsumexp(dim=1, keepdim=True)
    log_weights = log_weights - total.where(total > -torch.inf, 0.0)
    return normalisers.where(active, 0.0), log_weights, active


def _log_softmax(mixed: torch.Tensor) -> torch.Tensor:
    """A row in which no token is possible stays -inf."""
    total = mixed.logsumexp(dim=-1, keepdim=True)
    return mixed - total.where(total > -torch.inf, 0.0)
