"""Expert weights in log space: prior, posterior, normalisation.

Shapes: K experts, T tokens. All arithmetic is float64: a posterior is a product over a whole text.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]


def log_normalise(log_weights: npt.ArrayLike) -> Float64s:
    """Return ``log_weights`` [..., K] shifted so that the weights sum to 1; -inf stays -inf.

    Raises:
        ValueError: every weight is zero, or one is NaN or +inf.
    """
    # Experts first: numpy adds up whole rows of many requests much faster than many rows of a few experts.
    values = np.ascontiguousarray(np.asarray(log_weights, dtype=np.float64).T)
    top = values.max(axis=0)
    if not np.isfinite(top).all():
        raise ValueError("expert weights are all zero, or one of them is not a number")
    shifted = values - top
    normalised: Float64s = shifted - np.log(np.exp(shifted).sum(axis=0))
    return normalised.T


def log_prior(weights: Sequence[float]) -> Float64s:
    """Log of non-negative ``weights`` [K], normalised; a zero weight becomes -inf."""
    with np.errstate(divide="ignore"):
        return log_normalise(np.log(np.asarray(weights, dtype=np.float64)))


def log_weights_after(log_weights: npt.ArrayLike, log_likelihoods: npt.ArrayLike) -> Float64s:
    """Bayes' rule: posterior log weights [..., K] from prior log weights [..., K] and log p_k(x) [..., K].

    This is the paper's p_t(S_k | z): the posterior of the subset given what has been generated
    (arXiv 2601.03184), the same product as c-BTM's and DEMix's domain posterior over a whole prefix.
    """
    return log_normalise(
        np.asarray(log_weights, dtype=np.float64) + np.asarray(log_likelihoods, dtype=np.float64)
    )


def moved_on(log_weights: npt.ArrayLike, log_likelihoods: npt.ArrayLike) -> Float64s:
    """`log_weights_after` for what real experts say.

    An expert without a distribution (NaN) had no part in the text; where no active expert could have written it,
    there is nothing to learn from it, and the weights stay.

    Args:
        log_weights: [..., K].
        log_likelihoods: [..., K].
    """
    before = np.array(log_weights, dtype=np.float64)
    said = np.asarray(log_likelihoods, dtype=np.float64)
    if np.isfinite(before).all() and np.isfinite(said).all():
        return log_weights_after(before, said)
    said = np.where(np.isfinite(said), said, -np.inf)
    known = np.isfinite(before + said).any(axis=-1)
    before[known] = log_weights_after(before[known], said[known])
    return before
