"""Which experts take part in a request: top-k, pruning. Arithmetic on log weights; knows no engines.

Shapes: K experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from decar.router.posterior import Float64s, log_normalise


def active_experts(log_weights: npt.ArrayLike) -> list[int]:
    """Indices of the experts that have any weight."""
    return [int(k) for k in np.flatnonzero(np.isfinite(log_weights))]


def top_k(log_weights: npt.ArrayLike, k: int) -> Float64s:
    """Log weights [K] of the ``k`` heaviest experts, normalised; the first ones among equals. The others get -inf."""
    values = np.array(log_weights, dtype=np.float64)
    values[np.argsort(-values, kind="stable")[k:]] = -np.inf
    return log_normalise(values)


def drawn(log_weights: npt.ArrayLike, uniform: float) -> Float64s:
    """Log weights [K] of one expert alone, drawn by the weights: the one at ``uniform``, from 0 to 1, of their sum."""
    values = np.asarray(log_weights, dtype=np.float64)
    shares = np.cumsum(np.exp(values))
    expert = np.searchsorted(shares / shares[-1], uniform, side="right")
    return np.where(np.arange(len(values)) == expert, 0.0, -np.inf)


def restricted(
    log_weights: npt.ArrayLike, k: int | None, budget: float, uniform: float | None
) -> tuple[Float64s, float]:
    """What a request begins with: `top_k` if ``k`` is given, `prune`, and `drawn` if ``uniform`` is given.

    Args:
        log_weights: [K], normalised.

    Returns:
        log weights [K], normalised, -inf where an expert has no part; and how much weight may still be pruned.
    """
    values = np.asarray(log_weights, dtype=np.float64)
    if k is not None:
        values = top_k(values, k)
    values, left = prune(values, budget)
    return values if uniform is None else drawn(values, uniform), left


def prune(log_weights: npt.ArrayLike, budget: float) -> tuple[Float64s, float]:
    """Drop the lightest experts, as many as have weights that add up to at most ``budget``; never all.

    Under the posterior router a text goes on as the mixture Σ_k w_k p_k of the experts' distributions of everything
    that follows. Without a set of experts of weight δ it goes on as a distribution at most δ away in total variation,
    and pruning again adds up: who starts with a budget of ε and takes each drop out of it stays within ε.

    Args:
        log_weights: [K], normalised.

    Returns:
        log weights [K], normalised, -inf where dropped; and the budget that is left.
    """
    values = np.array(log_weights, dtype=np.float64)
    active = np.flatnonzero(np.isfinite(values))
    lightest_first = active[np.argsort(values[active], kind="stable")][:-1]
    mass = np.cumsum(np.exp(values[lightest_first]))
    count = int(np.searchsorted(mass, budget, side="right"))
    if budget <= 0 or not count:
        return values, budget
    values[lightest_first[:count]] = -np.inf
    return log_normalise(values), budget - float(mass[count - 1])
