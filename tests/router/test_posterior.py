"""Expert weights: Bayes' rule in log space."""

from __future__ import annotations

import math

import numpy as np
import pytest

from decar.router import log_normalise, log_prior, log_weights_after, moved_on

EXACT = 1e-12  # float64 arithmetic on a handful of numbers


def test_prior_is_normalised_and_keeps_zeros() -> None:
    weights = np.exp(log_prior([3, 1, 0]))
    assert weights == pytest.approx([0.75, 0.25, 0.0], abs=EXACT)
    assert log_prior([3, 1, 0])[2] == -math.inf
    assert log_prior([7.0]).tolist() == [0.0]


def test_prior_survives_weights_of_any_size() -> None:
    """1e308 + 1e308 is infinite, 1e-308 * 1e-308 is zero: only log space has both."""
    assert np.exp(log_prior([1e308, 1e308])) == pytest.approx([0.5, 0.5], abs=EXACT)
    assert np.exp(log_prior([1e-308, 3e-308])) == pytest.approx(
        [0.25, 0.75], abs=1e-9
    )  # subnormal log rounding


def test_normalise_works_along_the_last_axis() -> None:
    rows = log_normalise(np.log([[1.0, 3.0], [2.0, 2.0]]))
    assert np.exp(rows) == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]), abs=EXACT)


@pytest.mark.parametrize("shift", [-1e6, 0.0, 1e6])
def test_normalise_does_not_see_a_common_factor(shift: float) -> None:
    """A long text has log-likelihoods of thousands of nats: exp() of them is zero."""
    weights = np.exp(log_normalise(np.array([math.log(0.2), math.log(0.8)]) + shift))
    assert weights == pytest.approx([0.2, 0.8], abs=1e-9)  # float64 has 1e-10 left beside 1e6


@pytest.mark.parametrize(
    "weights", [[-math.inf, -math.inf], [math.nan, 0.0], [math.inf, 0.0]], ids=["zero", "nan", "infinite"]
)
def test_what_cannot_be_normalised_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        log_normalise(weights)


def test_bayes_rule_by_hand() -> None:
    after = log_weights_after(np.log([0.5, 0.5]), np.log([0.9, 0.1]))
    assert np.exp(after) == pytest.approx([0.9, 0.1], abs=EXACT)
    again = log_weights_after(after, np.log([0.9, 0.1]))
    assert np.exp(again) == pytest.approx([0.81 / 0.82, 0.01 / 0.82], abs=EXACT)


def test_one_token_at_a_time_is_the_whole_text_at_once() -> None:
    rng = np.random.default_rng(0)
    likelihoods = np.log(rng.uniform(0.001, 1, size=(2000, 3)))
    step_by_step = log_prior([0.2, 0.3, 0.5])
    for row in likelihoods:
        step_by_step = log_weights_after(step_by_step, row)
    at_once = log_weights_after(log_prior([0.2, 0.3, 0.5]), likelihoods.sum(axis=0))
    assert step_by_step == pytest.approx(at_once, abs=1e-9)  # 2,000 roundings of numbers below 1e4


def test_the_posterior_obeys_the_chain_rule() -> None:
    """Over any text, the sum of the mixture's log-probs is log of the sum over k of prior_k p_k(text)."""
    rng = np.random.default_rng(1)
    experts = np.log(rng.dirichlet(np.ones(20), size=(500, 3)))  # [T, K, V]
    text = rng.integers(0, 20, size=500)
    log_weights = log_prior([0.2, 0.3, 0.5])
    total = 0.0
    for t, token in enumerate(text):
        likelihoods = experts[t, :, token]
        total += np.logaddexp.reduce(log_weights + likelihoods)
        log_weights = log_weights_after(log_weights, likelihoods)
    whole = experts[np.arange(500), :, text].sum(axis=0)
    assert total == pytest.approx(np.logaddexp.reduce(log_prior([0.2, 0.3, 0.5]) + whole), abs=1e-9)


def test_an_expert_without_prior_never_gets_weight() -> None:
    after = log_weights_after(log_prior([1, 0]), [-1e9, 0.0])
    assert np.exp(after).tolist() == [1.0, 0.0]


def test_an_expert_that_rules_a_token_out_is_out() -> None:
    after = log_weights_after(log_prior([0.5, 0.5]), [-math.inf, -3.0])
    assert np.exp(after).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="zero"):
        log_weights_after(after, [-3.0, -math.inf])


def test_what_no_expert_could_have_written_moves_no_weights() -> None:
    before = log_prior([0.2, 0.8, 0.0])
    np.testing.assert_allclose(moved_on(before, [-1.0, -2.0, -3.0]), log_weights_after(before, [-1, -2, -3]))
    for said in ([-math.inf] * 3, [math.nan, -math.inf, -1.0]):
        np.testing.assert_array_equal(moved_on(before, said), before)
    np.testing.assert_allclose(np.exp(moved_on(before, [-1.0, math.nan, math.nan])), [1, 0, 0], atol=EXACT)
    both = moved_on([before, before], [[-1.0, -2.0, -3.0], [-math.inf] * 3])
    np.testing.assert_allclose(both, [log_weights_after(before, [-1, -2, -3]), before], atol=EXACT)
