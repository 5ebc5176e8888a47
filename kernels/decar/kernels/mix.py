"""The public operations: check, then run the fused kernels on a GPU and plain torch elsewhere.

Shapes: K experts, B rows, V vocabulary, E entries of a buffer.
"""

from __future__ import annotations

from types import ModuleType
from typing import get_args

import torch

from decar.kernels import reference
from decar.kernels.rows import Rows, Rule


def mix(
    logits: torch.Tensor,
    log_weights: torch.Tensor,
    rule: Rule = "velocity",
    log_normalisers: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mix the experts' next-token distributions.

    velocity: log p = logsumexp_k(log w_k + log p_k), the posterior-weighted sum of the experts'
    velocities (arXiv 2601.03184) at one autoregressive step, where u^k = p_k - delta_mask.
    logit: log p = log_softmax(sum_k w_k log p_k), the normalised geometric mean.

    Args:
        logits: [K, B, V] floating point; a token that an expert forbids is -inf.
        log_weights: [B, K], normalised here over the experts that take part. -inf marks an inactive expert,
            whose row is never read; so does a row without a distribution (NaN, nothing allowed).
        rule: which mean.
        log_normalisers: [K, B] float32 logsumexp of each row of ``logits``; computed here if not given.

    Returns:
        log-probabilities [B, V] float32.

    Raises:
        ValueError: shapes that do not fit, or an unknown rule.
    """
    rows = Rows.stacked(logits, log_normalisers)
    entries = torch.arange(logits.shape[1], device=logits.device)
    _check(rows, entries, log_weights, rule)
    return _implementation(rows).mix_rows(rows, entries, log_weights, rule, anchored=False)


def mix_rows(rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Mixture logits of rows read in place: `mix` plus one number for each row, which softmax does not see.

    Under the velocity rule that is the mean log-normaliser of the experts; under the logit rule the result is
    sum_k w_k logits_k itself, in one pass. Under both, K identical experts give exactly that expert's logits.

    Args:
        rows: the experts' buffers.
        entries: [B] int64, which entry of every buffer.
        log_weights: [B, K], as for `mix`.
        rule: which mean.

    Returns:
        logits [B, V] float32.

    Raises:
        ValueError: as `mix`.
    """
    _check(rows, entries, log_weights, rule)
    return _implementation(rows).mix_rows(rows, entries, log_weights, rule, anchored=True)


def decide(
    rows: Rows,
    entries: torch.Tensor,
    log_weights: torch.Tensor,
    rule: Rule,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix, choose a token and move the posterior on, without ever writing the mixed rows.

    A token is argmax_v(log p_v / temperature + g_v), g the Gumbel noise of (seed, position, v): a sample of
    softmax(log p / temperature), the same one whatever the batch. Ties go to the smaller id.

    Args:
        rows: as for `mix_rows`.
        entries: as for `mix_rows`.
        log_weights: as for `mix_rows`.
        rule: as for `mix_rows`.
        temperatures: [B]; 0 is greedy.
        seeds: [B] int64, not negative.
        positions: [B] int64, from 0 to 2^32 - 1.

    Returns:
        tokens [B] int64, and log weights [B, K] float64 after them: log w_k + log p_k(token), normalised.
        Weights stay as they were where no expert could have given the token.

    Raises:
        ValueError: as `mix`.
    """
    _check(rows, entries, log_weights, rule)
    check_one_each(entries, temperatures=temperatures, seeds=seeds, positions=positions)
    return _implementation(rows).decide(rows, entries, log_weights, rule, temperatures, seeds, positions)


def check_one_each(entries: torch.Tensor, **settings: torch.Tensor | None) -> None:
    """Raise ValueError, with its name, for a setting that is given and is not [B] as ``entries`` is."""
    for name, tensor in settings.items():
        if tensor is not None and tensor.shape != entries.shape:
            raise ValueError(f"{name} must be [B={len(entries)}], not {tuple(tensor.shape)}")


def _check(rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule) -> None:
    if log_weights.shape != (len(entries), rows.experts):
        raise ValueError(
            f"log_weights must be [B={len(entries)}, K={rows.experts}], not {tuple(log_weights.shape)}"
        )
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be 'velocity' or 'logit', not {rule!r}")


def _implementation(rows: Rows) -> ModuleType:
    if rows.device.type != "cuda":
        return reference
    from decar.kernels import fused  # triton is slow to import, and needless without a GPU

    return fused
