"""What a system's outcomes amount to over many texts: means, and differences with their standard errors.

Knows outcomes and whose texts they are of, never models.

Shapes: N texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from decar.training.evaluate.held_out import Text
from decar.training.evaluate.systems import Outcome

Floats = NDArray[np.float64]


class Row(BaseModel):
    """One system. Means are taken for each expert's held-out texts and then pooled by the experts' priors.

    ``family``: the system without its pruning. ``nll``: nats per token of the continuation; ``above_dense``: how much
    more than the dense posterior's, with its standard error over texts. ``accuracy``: the share of tokens that greedy
    decoding, given the text before them, would choose; ``exact``: the share of chats' answers that it would give
    (None without chats). ``active_experts``: per token of the continuation. ``prompt_passes``: experts that run over a
    prompt. ``dropped_*``: posterior mass released per text. ``spread``: the standard deviations over seeds of the
    fields that it names, where the row is the mean over several.
    """

    system: str
    family: str
    prune: float = 0.0
    perplexity: float
    nll: float
    nll_by_domain: dict[str, float]
    above_dense: float
    standard_error: float
    accuracy: float
    exact: float | None
    active_experts: float
    prompt_passes: float
    dropped_mean: float
    dropped_max: float
    spread: dict[str, float] = {}


class Difference(BaseModel):
    """``nats`` per token by which ``first`` is worse than ``second`` on the same texts, with its standard error."""

    first: str
    second: str
    nats: float
    standard_error: float


@dataclass(frozen=True)
class Totals:
    """A system's sums over the continuation of each text, all [N]."""

    nats: Floats
    right: Floats
    exact: Floats
    active: Floats
    passes: Floats
    dropped: Floats
    tokens: Floats

    @classmethod
    def of(cls, outcomes: Iterable[tuple[float, ...]]) -> Totals:
        return cls(*np.array(list(outcomes)).T)


def summed(outcome: Outcome) -> tuple[float, ...]:
    """What `Totals` keeps of one text."""
    return (
        -float(outcome.log_probs.sum()),
        float(outcome.right.sum()),
        outcome.exact,
        float(outcome.active.sum()),
        outcome.prompt_passes,
        outcome.dropped,
        len(outcome.log_probs),
    )


class Pool:
    """How measures of texts become one number: a ratio of sums for each expert's texts, the ratios pooled by prior."""

    def __init__(self, texts: Iterable[Text], priors: Mapping[str, float]) -> None:
        domains, is_answer = zip(*((text.domain, text.is_answer) for text in texts), strict=True)
        self.names = list(priors)
        self.share = np.array(list(priors.values())) / sum(priors.values())
        self.is_answer = np.array(is_answer)
        self.texts_of = [np.array(domains) == domain for domain in range(len(priors))]

    def row(self, name: str, total: Totals, dense: Totals) -> Row:
        each = np.ones(len(total.nats))
        nll = self._ratio(total.nats, total.tokens)
        above, error = self.excess(total, dense)
        by_domain = [total.nats[mine].sum() / total.tokens[mine].sum() for mine in self.texts_of]
        answers = self.is_answer.astype(np.float64)
        return Row(
            system=name,
            family=name,
            perplexity=perplexity(nll),
            nll=nll,
            nll_by_domain=dict(zip(self.names, map(float, by_domain), strict=True)),
            above_dense=above,
            standard_error=error,
            accuracy=self._ratio(total.right, total.tokens),
            exact=self._ratio(total.exact * answers, answers) if self.is_answer.any() else None,
            active_experts=self._ratio(total.active, total.tokens),
            prompt_passes=self._ratio(total.passes, each),
            dropped_mean=self._ratio(total.dropped, each),
            dropped_max=float(total.dropped.max()),
        )

    def excess(self, first: Totals, second: Totals) -> tuple[float, float]:
        """(nats per token that ``first`` needs more than ``second``, its standard error over texts)."""
        excess, tokens = first.nats - second.nats, second.tokens
        # Of a ratio of sums over texts, to first order (Cochran, "Sampling Techniques", 1977, ch. 6).
        variances = [
            np.square(excess[mine] - excess[mine].sum() / tokens[mine].sum() * tokens[mine]).sum()
            / tokens[mine].sum() ** 2
            for mine in self.texts_of
        ]
        return self._ratio(excess, tokens), float(np.sqrt(np.square(self.share) @ variances))

    def counts(self, values: Floats) -> dict[str, int]:
        """The sum of ``values`` [N] over each expert's texts."""
        return {name: int(values[mine].sum()) for name, mine in zip(self.names, self.texts_of, strict=True)}

    def _ratio(self, values: Floats, counts: Floats) -> float:
        """Experts none of whose texts count have no part in it."""
        pairs = [
            (share, values[mine].sum() / counts[mine].sum())
            for share, mine in zip(self.share, self.texts_of, strict=True)
            if counts[mine].any()
        ]
        shares, ratios = np.array(pairs).T
        return float(shares @ ratios / shares.sum())


def perplexity(nll: float) -> float:
    return math.exp(min(nll, 100))
