"""The rule of the verdict, on numbers whose answer is known."""

from __future__ import annotations

import pytest

from decar.training.evaluate.scores import CENTRALIZED, RANDOM
from decar.training.evaluate.systems import DENSE
from decar.training.evaluate.verdict import Comparison, Estimate, Gap, Verdict, estimate, in_words, verdict

# Student's t, 97.5%, 2 degrees of freedom: any table has it.
T_2 = 4.3027


def test_the_interval_over_seeds_is_students() -> None:
    difference = estimate([0.1, 0.2, 0.3], [9.0, 9.0, 9.0])
    assert (difference.mean, difference.sd) == (pytest.approx(0.2), pytest.approx(0.1))
    half = T_2 * 0.1 / 3**0.5
    assert difference.low == pytest.approx(0.2 - half, rel=1e-4)
    assert difference.high == pytest.approx(0.2 + half, rel=1e-4)


def test_the_interval_of_one_seed_is_from_its_texts() -> None:
    difference = estimate([0.2], [0.01])
    assert difference.sd is None
    assert (difference.low, difference.high) == (
        pytest.approx(0.2 - 0.0196, abs=1e-5),
        pytest.approx(0.2 + 0.0196, abs=1e-5),
    )


@pytest.mark.parametrize(
    ("per_seed", "expected"),
    [
        ([0.001, -0.002, 0.001], "equivalent within noise"),
        # Clear of zero, but so small that it does not matter.
        ([0.010, 0.011, 0.012], "equivalent within noise"),
        # On average nothing, but who knows.
        ([-0.1, 0.0, 0.1], "not told apart"),
        ([0.3, 0.31, 0.32], "worse"),
        ([-0.3, -0.31, -0.32], "better"),
        # The interval, and not the mean, has to lie within the margin.
        ([0.015, 0.019, 0.023], "worse"),
    ],
)
def test_the_rule(per_seed: list[float], expected: Verdict) -> None:
    assert verdict(estimate(per_seed, [0.0] * len(per_seed)), margin=0.02) == expected


def test_a_wider_margin_is_easier_to_keep() -> None:
    difference = estimate([0.3, 0.31, 0.32], [0.0] * 3)
    assert verdict(difference, margin=0.3) == "worse"
    assert verdict(difference, margin=0.34) == "equivalent within noise"


def against(second: str, difference: Estimate) -> Comparison:
    return Comparison(
        first="classifier", second=second, difference=difference, verdict=verdict(difference, 0.02)
    )


def test_the_words_say_the_numbers_and_the_reason() -> None:
    estimation, routing, total = (
        estimate([mean - 0.001, mean, mean + 0.001], [0.0] * 3) for mean in (0.3, 0.1, 0.4)
    )
    compared = [against(CENTRALIZED, total), against(RANDOM, estimate([-0.3, -0.3, -0.3], [0.0] * 3))]
    gap = Gap(system="classifier", routing=routing, estimation=estimation, total=total)
    first, second = in_words(compared, gap, {}, 3, 0.02)
    assert first == (
        "The ensemble is worse than the centralized model (+0.400 nats/token, 95% interval +0.398 to +0.402). Of it, "
        "+0.100 is routing (its weights against the posterior's) and +0.300 estimation (these experts under the "
        "posterior against one model of all data)."
    )
    assert second == (
        "Clustered experts are better than a random split of the documents (-0.300 nats/token, 95% interval -0.300 to "
        "-0.300)."
    )
    by_posterior = gap.model_copy(update={"system": DENSE})
    assert "there is no routing loss" in in_words(compared, by_posterior, {}, 3, 0.02)[0]


def test_an_equivalent_needs_no_reason() -> None:
    nothing = estimate([0.001], [0.002])
    gap = Gap(system=DENSE, routing=nothing, estimation=nothing, total=nothing)
    first, undefined, seeds = in_words(
        [against(CENTRALIZED, nothing)], gap, {RANDOM: "one expert"}, 1, margin=0.02
    )
    assert "equivalent to the centralized model within noise" in first
    assert "estimation" not in first
    assert undefined == "No random split: one expert."
    assert seeds.startswith("One seed")
