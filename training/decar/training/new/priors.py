"""Priors that a sample of texts makes most likely. Knows models' scores of texts, and no files of an ensemble.

The ensemble says that a text comes from expert k with probability π_k, and then has probability p_k(text). Given texts
that the ensemble is to be used for, the π that makes them the most likely maximises Σ_n log Σ_k π_k p_k(text_n). That
is each expert's share of texts, where a text that several explain is divided among them by their posteriors.

Shapes: N texts, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decar.router.errors import EnsembleError
from decar.router.posterior import Float64s, log_normalise, log_prior

MAX_TEXTS = 200
PIECE_CHARS = 1_000
MAX_TOKENS = 256
"""Of a text that is scored: experts who differ have told so by then."""
_BATCH = 4
_CONVERGED = 1e-9
_MOST_STEPS = 10_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """``priors`` [K], which add up to 1, from so many ``texts``."""

    priors: list[float]
    texts: int

    @property
    def standard_errors(self) -> list[float]:
        """Of each prior, by the number of texts alone: that of a share of independent texts."""
        return [float(np.sqrt(prior * (1 - prior) / self.texts)) for prior in self.priors]


def estimate_priors(
    folders: Sequence[Path],
    texts: Sequence[str],
    vocab_size: int,
    max_positions: int | None,
    progress: Progress = lambda done, total: None,
) -> Estimate:
    """Score ``texts`` with the experts in ``folders``, one in memory at a time, in float32.

    Args:
        vocab_size: token ids that every expert has; others are not said.
        max_positions: the longest text that every expert can score.
        progress: is called with the number of texts scored, and of all; each counts once for every expert.

    Raises:
        EnsembleError: no text has two tokens, which the least that can be scored has; or an expert gives NaN.
        TrainingError: the first expert's tokenizer cannot be read.
    """
    from decar.training.data.tokenizer import load_tokenizer
    from decar.training.evaluate.held_out import Text, chosen, scored
    from decar.training.expert.model import load_model

    tokenizer = load_tokenizer(folders[0])
    longest = min(MAX_TOKENS, max_positions or MAX_TOKENS)
    encoded = tokenizer(list(texts), truncation=True, max_length=longest, verbose=False)["input_ids"]
    # By length, so that batches have little padding.
    prompts = sorted((Text(0, ids, 1) for ids in encoded if len(ids) > 1), key=lambda text: len(text.ids))
    if not prompts:
        raise EnsembleError("--sample: none of its texts has two tokens; give longer ones")
    said = np.empty((len(prompts), len(folders)))
    for k, folder in enumerate(folders):
        model: Any = load_model(folder)
        for n, (text, rows) in enumerate(scored([model], prompts, _BATCH, vocab_size)):
            said[n, k] = chosen(text, rows).sum()
            progress(k * len(prompts) + n + 1, len(folders) * len(prompts))
        del model
    return Estimate(likeliest_shares(said).tolist(), len(prompts))


def likeliest_shares(log_likelihoods: Float64s) -> Float64s:
    """The shares [K] that make texts of ``log_likelihoods`` [N, K] the most likely, and one text more that all explain
    alike: so no share is zero, which no later text could mend.

    Expectation maximisation (Dempster, Laird and Rubin 1977) of the mixture's weights alone: the likelihood is concave
    in them, so that it ends at the best.
    """
    num_texts, num_experts = log_likelihoods.shape
    shares = np.full(num_experts, 1 / num_experts)
    for _ in range(_MOST_STEPS):
        of_texts = np.exp(log_normalise(log_prior(shares.tolist()) + log_likelihoods))
        before, shares = shares, (of_texts.sum(axis=0) + 1 / num_experts) / (num_texts + 1)
        if np.abs(shares - before).max() < _CONVERGED:
            break
    return shares
