"""The two mixing rules in plain torch, float32. Knows nothing about slots, planes or sampling.

Shapes: K experts, B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch

Rule = Literal["velocity", "logit"]


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
        log_weights: [B, K]; the weights of a row sum to 1 over its active experts. -inf marks an inactive
            expert, whose row may hold anything.
        rule: which mean.
        log_normalisers: [K, B] float32 logsumexp of each row of ``logits``; computed here if not given.

    Returns:
        log-probabilities [B, V] float32.

    Raises:
        ValueError: shapes that do not fit, or an unknown rule.
    """
    experts, rows, _ = logits.shape
    if log_weights.shape != (rows, experts):
        raise ValueError(f"log_weights must be [B={rows}, K={experts}], not {tuple(log_weights.shape)}")
    if log_normalisers is None:
        log_normalisers = logits.float().logsumexp(dim=-1)
    if rule == "velocity":
        return _velocity(logits, log_weights, log_normalisers)
    if rule == "logit":
        return _logit(logits, log_weights, log_normalisers)
    raise ValueError(f"rule must be 'velocity' or 'logit', not {rule!r}")


def _velocity(logits: torch.Tensor, log_weights: torch.Tensor, log_normalisers: torch.Tensor) -> torch.Tensor:
    mixed: torch.Tensor | None = None
    for expert, offset, active in _active(log_weights, log_normalisers):
        log_probs = logits[expert].float() + offset[:, None]
        log_probs = _only(active, log_probs, -torch.inf)
        mixed = log_probs if mixed is None else torch.logaddexp(mixed, log_probs)
    assert mixed is not None
    return mixed


def _logit(logits: torch.Tensor, log_weights: torch.Tensor, log_normalisers: torch.Tensor) -> torch.Tensor:
    mean: torch.Tensor | None = None
    weights = log_weights.float().exp()
    for expert, _, active in _active(log_weights, log_normalisers):
        # A weight that underflows still lets its expert forbid a token: 0 * -inf would be NaN.
        row = logits[expert].float() - log_normalisers[expert][:, None]
        part = torch.where(row.isneginf(), row, row * weights[:, expert, None])
        part = _only(active, part, 0.0)
        mean = part if mean is None else mean + part
    assert mean is not None
    return mean.log_softmax(dim=-1)


def _active(log_weights: torch.Tensor, log_normalisers: torch.Tensor):  # type: ignore[no-untyped-def]
    """Per expert: its index, log w_k - logsumexp(row) [B], and which rows it takes part in [B] bool."""
    for expert in range(log_weights.shape[1]):
        active = log_weights[:, expert].isfinite() & log_normalisers[expert].isfinite()
        offset = log_weights[:, expert].float() - log_normalisers[expert]
        yield expert, torch.where(active, offset, 0.0), active


def _only(active: torch.Tensor, values: torch.Tensor, otherwise: float) -> torch.Tensor:
    """``values`` [B, V] where ``active`` [B], else ``otherwise``; nothing is copied in the usual case."""
    if bool(active.all()):
        return values
    return torch.where(active[:, None], values, otherwise)
