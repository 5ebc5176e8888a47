"""Masked tokens of flow ensembles: sampled from the mixture, with what each expert thinks of them.

Knows nothing of the order in which tokens are revealed. Shapes: K experts, B masked positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from decar.kernels.mix import check_one_each, decide, mix_rows
from decar.kernels.reference import gumbel
from decar.kernels.rows import Rows, Rule

_TRUNCATED_AT_ONCE = 2**22
"""Numbers of mixed rows that are truncated at a time: each takes some 50 bytes meanwhile."""


class Revealed(NamedTuple):
    """Tokens [B] int64, their log-probabilities [B] float64 under the mixture, and [B, K] float64 under each expert."""

    tokens: torch.Tensor
    log_probs: torch.Tensor
    expert_log_probs: torch.Tensor


def reveal(
    rows: Rows,
    entries: torch.Tensor,
    log_weights: torch.Tensor,
    rule: Rule,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> Revealed:
    """Choose a token for each of the masked positions of any number of requests, in one call of `decide`.

    Rows that truncate (top-k, top-p, min-p) are mixed by `mix_rows` instead, and get the same noise. As in vLLM, min-p
    comes first, then top-k, then top-p, all on the mixture at its temperature. Greedy rows need none of them.

    Args:
        rows: the experts' buffers. The mask token has to be -inf in a row before the row's normaliser is taken, so that
            no probability is spent on it: that is for whoever writes the rows.
        entries: [B] int64, which entry of every buffer is a position's.
        log_weights: [B, K], as for `mix`: a request's, for each of its positions.
        rule: which mean.
        temperatures: [B]; 0 is greedy.
        seeds: [B] int64, not negative.
        positions: [B] int64, from 0 to 2^32 - 1, such as `Revealing.noise` gives: no two draws of a seed share one.
        top_k: [B] integers, how many of the likeliest tokens are kept; 0 keeps all. None: no row has one.
        top_p: [B], the likeliest tokens are kept until they have this probability; 1 keeps all. None: as above.
        min_p: [B], tokens are kept that have this share of the likeliest one's probability; 0 keeps all. None: as
            above.

    Returns:
        the tokens, and their log-probabilities under the mixture and the experts themselves, before temperature and
        truncation; -inf under an expert that takes no part.

    Raises:
        ValueError: as `decide`.
    """
    check_one_each(entries, top_k=top_k, top_p=top_p, min_p=min_p)
    if top_k is None and top_p is None and min_p is None:
        tokens, _ = decide(rows, entries, log_weights, rule, temperatures, seeds, positions)
    else:
        limits = (
            torch.zeros_like(entries) if top_k is None else top_k,
            torch.ones_like(temperatures) if top_p is None else top_p,
            torch.zeros_like(temperatures) if min_p is None else min_p,
        )
        truncates = (temperatures > 0) & ((limits[0] > 0) | (limits[1] < 1) | (limits[2] > 0))
        plain, tokens = (~truncates).nonzero()[:, 0], torch.empty_like(entries)
        draws = (values[plain] for values in (temperatures, seeds, positions))
        tokens[plain], _ = decide(rows, entries[plain], log_weights[plain], rule, *draws)
        for some in truncates.nonzero()[:, 0].split(max(_TRUNCATED_AT_ONCE // rows.vocab_size, 1)):
            mixed = mix_rows(rows, entries[some], log_weights[some], rule)
            kept = _truncated(mixed / temperatures[some, None].float(), *(limit[some] for limit in limits))
            noise = gumbel(seeds[some], positions[some], rows.vocab_size)
            tokens[some] = (kept + noise).argmax(dim=1)
    return Revealed(tokens, *_log_probs(rows, entries, log_weights, rule, tokens))


def velocity(log_probs: torch.Tensor, mask_token_id: int, rate: float) -> torch.Tensor:
    """The velocity of masked positions: rate · (p − δ_mask), at which probability flows from the mask to the tokens.

    Its coefficients are the schedule's alone, so that the velocity of a mixture, the weighted sum of the experts'
    velocities (arXiv 2601.03184), is that of the mixed probabilities. An Euler step of h has p = δ_mask + h · velocity.

    Args:
        log_probs: [B, V], of one expert or of `mix`; -inf at the mask token.
        rate: κ'(t) / (1 − κ(t)) (`decar.router.flow.rate`).

    Returns:
        [B, V], each row of which sums to 0.
    """
    flows = rate * log_probs.exp()
    flows[:, mask_token_id] -= rate
    return flows


def _truncated(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """``scaled`` logits [B, V] with -inf for what is not kept; of equal ones the smaller ids are kept first."""
    values, order = scaled.sort(dim=1, descending=True, stable=True)
    values.masked_fill_(values < values[:, :1] + min_p[:, None].log(), -torch.inf)
    rank = torch.arange(values.shape[1], device=values.device)
    values.masked_fill_((top_k[:, None] > 0) & (rank >= top_k[:, None]), -torch.inf)
    probabilities = values.double().softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    values.masked_fill_((top_p[:, None] < 1) & (before >= top_p[:, None]), -torch.inf)
    return torch.empty_like(scaled).scatter_(1, order, values)


def _log_probs(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of ``tokens``: [B] under the mixture, [B, K] under each expert. See `reveal`."""
    normalisers = torch.stack([values[entries] for values in rows.log_normalisers], dim=1).double()
    part = log_weights.isfinite() & normalisers.isfinite()
    logits = torch.stack([buffer[entries, tokens] for buffer in rows.logits], dim=1).double()
    said = (logits - normalisers).where(part, -torch.inf)
    if rule == "velocity":
        weights = log_weights.double().where(part, -torch.inf)
        terms, total = (weights + said).logsumexp(dim=1), weights.logsumexp(dim=1)
    else:
        mixed = mix_rows(rows, entries, log_weights, rule)
        terms, total = mixed.gather(1, tokens[:, None])[:, 0].double(), mixed.logsumexp(dim=1).double()
    return terms - total.where(total > -torch.inf, 0.0), said
