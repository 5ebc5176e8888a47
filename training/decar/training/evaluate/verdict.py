"""What may be said of a difference between two systems, by a stated rule. Knows numbers and names, never how they came.

Differences are in nats per token; a positive one says that the first system needs more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel

from decar.training.evaluate.scores import AVERAGE, BEST, CENTRALIZED, MOE, RANDOM, TOP_1, SeedReport
from decar.training.evaluate.systems import DENSE

CONFIDENCE = 0.95
Verdict = Literal["equivalent within noise", "better", "worse", "not told apart"]
# Who is compared with whom, in the report's words.
_WORDS = {
    CENTRALIZED: "the centralized model",
    RANDOM: "a random split of the documents",
    TOP_1[0]: "top-1 by the nearest centroid (the paper's)",
    TOP_1[1]: "top-1 by the posterior",
    AVERAGE: "the experts' parameter average",
    MOE: "the experts merged into a mixture of experts (and trained for moe.steps more)",
    BEST: "the best expert alone",
}


RULE, RULE_RANGE = "0.82 · divergence − 2.72", (3, 26)
"""A rule of thumb of arXiv 2603.22755, its fit to six points, and which divergences these have; in percent."""


def rule_of_thumb(divergence: float) -> float:
    """What that rule expects experts to gain by their fusion over the best of them, in percent."""
    return 0.82 * divergence - 2.72


class Estimate(BaseModel):
    """A mean over seeds, its standard deviation ``sd`` over them (None for one), and its 95% interval.

    ``standard_errors`` are over the texts of each seed.
    """

    per_seed: list[float]
    standard_errors: list[float]
    mean: float
    sd: float | None
    low: float
    high: float


class Comparison(BaseModel):
    """``first`` against ``second``; ``verdict`` is about the first."""

    first: str
    second: str
    difference: Estimate
    verdict: Verdict


class Gap(BaseModel):
    """How far a system is from the centralized model, ``total`` = ``routing`` + ``estimation``.

    ``routing``: what its weights lose against the posterior's (negative where they gain). ``estimation``: what the
    posterior of these experts loses against the centralized model, whoever weights them.
    """

    system: str
    routing: Estimate
    estimation: Estimate
    total: Estimate


def estimate(per_seed: Sequence[float], standard_errors: Sequence[float]) -> Estimate:
    """Over seeds a t interval with n - 1 degrees of freedom; for one seed a normal one, from its error over texts."""
    from scipy import stats

    mean = float(np.mean(per_seed))
    tail = (1 + CONFIDENCE) / 2
    if len(per_seed) > 1:
        sd = float(np.std(per_seed, ddof=1))
        half = float(stats.t.ppf(tail, len(per_seed) - 1)) * sd / np.sqrt(len(per_seed))
    else:
        sd = None
        half = float(stats.norm.ppf(tail)) * standard_errors[0]
    return Estimate(
        per_seed=list(per_seed),
        standard_errors=list(standard_errors),
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
    )


def verdict(difference: Estimate, margin: float) -> Verdict:
    """Equivalent where the whole interval lies within the margin; else better or worse where it excludes zero."""
    if -margin <= difference.low and difference.high <= margin:
        return "equivalent within noise"
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "not told apart"


def comparisons(seeds: Sequence[SeedReport], margin: float) -> list[Comparison]:
    """What the ensemble has to be held against, as far as it is defined."""
    served = seeds[0].served
    found = []
    for other in (CENTRALIZED, RANDOM, *TOP_1, AVERAGE, MOE, BEST):
        difference = _over_seeds(seeds, served, other)
        if difference is not None:
            found.append(
                Comparison(
                    first=served, second=other, difference=difference, verdict=verdict(difference, margin)
                )
            )
    return found


def gaps(seeds: Sequence[SeedReport]) -> list[Gap]:
    """Of every system without pruning, the default first; none without a centralized model."""
    estimation = _over_seeds(seeds, DENSE, CENTRALIZED)
    if estimation is None:
        return []
    served = seeds[0].served
    systems = dict.fromkeys([served, *(d.first for d in seeds[0].differences if d.second == CENTRALIZED)])
    nothing = estimate([0.0] * len(seeds), [0.0] * len(seeds))
    return [
        Gap(
            system=system,
            routing=_over_seeds(seeds, system, DENSE) or nothing,
            estimation=estimation,
            total=total,
        )
        for system in systems
        if (total := _over_seeds(seeds, system, CENTRALIZED)) is not None
    ]


def _over_seeds(seeds: Sequence[SeedReport], first: str, second: str) -> Estimate | None:
    found = [d for seed in seeds for d in seed.differences if (d.first, d.second) == (first, second)]
    if len(found) < len(seeds):
        return None
    return estimate([d.nats for d in found], [d.standard_error for d in found])


def in_words(
    compared: Sequence[Comparison],
    gap: Gap | None,
    undefined: Mapping[str, str],
    num_seeds: int,
    margin: float,
) -> list[str]:
    """The verdict, a sentence or two for each comparison; ``gap`` is the default system's."""
    sentences = [_sentence(comparison, margin) for comparison in compared]
    for i, comparison in enumerate(compared):
        if (
            comparison.second == CENTRALIZED
            and comparison.verdict != "equivalent within noise"
            and gap is not None
        ):
            sentences[i] += _why(gap)
    sentences += [f"No {name}: {why}." for name, why in undefined.items()]
    if num_seeds == 1:
        sentences.append(
            "One seed: intervals are over its held-out texts, and say nothing about another training run."
        )
    return sentences


def _why(gap: Gap) -> str:
    if gap.system == DENSE:
        return (
            " All of it is estimation: the posterior itself weights the experts, so there is no routing loss."
        )
    return (
        f" Of it, {gap.routing.mean:+.3f} is routing (its weights against the posterior's) and "
        f"{gap.estimation.mean:+.3f} estimation (these experts under the posterior against one model of all data)."
    )


def _sentence(comparison: Comparison, margin: float) -> str:
    first = "Clustered experts" if comparison.second == RANDOM else "The ensemble"
    verb = "are" if comparison.second == RANDOM else "is"
    against = _WORDS[comparison.second]
    difference = comparison.difference
    interval = f"{CONFIDENCE:.0%} interval {difference.low:+.3f} to {difference.high:+.3f}"
    numbers = f"{difference.mean:+.3f} nats/token, {interval}"
    said = {
        "equivalent within noise": f"{verb} equivalent to {against} within noise ({numbers}, all within ±{margin:g})",
        "better": f"{verb} better than {against} ({numbers})",
        "worse": f"{verb} worse than {against} ({numbers})",
        "not told apart": f"{verb} not told apart from {against} ({numbers}, not within ±{margin:g})",
    }[comparison.verdict]
    return f"{first} {said}."
