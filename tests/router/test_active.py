"""Top-k and pruning: what is dropped, and how far that moves everything that follows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decar.router import active_experts, drawn, log_normalise, log_prior, prune, restricted, top_k

weights = st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=8)


def test_the_lightest_go_as_long_as_they_fit() -> None:
    log_weights = log_prior([0.5, 0.02, 0.4, 0.08])
    kept, left = prune(log_weights, 0.1)
    assert active_experts(kept) == [0, 2]
    assert left == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(np.exp(kept), [0.5 / 0.9, 0, 0.4 / 0.9, 0], atol=1e-12)
    assert active_experts(prune(log_weights, 0.099)[0]) == [0, 2, 3]
    assert active_experts(prune(log_weights, 0.99)[0]) == [0]


def test_without_a_budget_nobody_goes() -> None:
    log_weights = log_prior([1.0, 1e-300])
    kept, left = prune(log_weights, 0.0)
    np.testing.assert_array_equal(kept, log_weights)
    assert left == 0.0


def test_weights_that_vanish_in_floats_are_dropped_at_no_cost() -> None:
    kept, left = prune(np.array([0.0, -2000.0, -np.inf]), 1e-9)
    assert active_experts(kept) == [0]
    assert left == 1e-9


@given(weights, st.floats(0, 0.999), st.integers(1, 8))
def test_what_is_left_is_normalised_and_somebody_always_is(
    priors: list[float], budget: float, k: int
) -> None:
    log_weights = log_prior(priors)
    kept, left = prune(log_weights, budget)
    dropped = sum(math.exp(w) for w, new in zip(log_weights, kept, strict=True) if new == -math.inf)
    assert dropped <= budget + 1e-12
    assert left == pytest.approx(budget - dropped, abs=1e-9)
    assert np.exp(kept).sum() == pytest.approx(1)
    heaviest = top_k(log_weights, k)
    assert len(active_experts(heaviest)) == min(k, len(priors))
    assert np.exp(heaviest).sum() == pytest.approx(1)
    assert heaviest[int(np.argmax(log_weights))] > -math.inf


def test_of_equals_the_first_ones_stay() -> None:
    assert active_experts(top_k(log_prior([1, 1, 1]), 2)) == [0, 1]


def test_each_expert_is_drawn_as_often_as_it_weighs() -> None:
    log_weights = log_prior([0.5, 0.0, 0.2, 0.3])
    experts = [active_experts(drawn(log_weights, u)) for u in np.linspace(0, 1, 10_000, endpoint=False)]
    counts = {k: experts.count([k]) for k in range(4)}
    assert counts == {0: 5_000, 1: 0, 2: 2_000, 3: 3_000}
    assert active_experts(drawn([math.log(0.9), math.log(0.1 - 1e-16)], 1 - 2**-53)) == [1]


def test_a_request_begins_with_top_k_then_pruning_then_a_draw() -> None:
    log_weights = log_prior([0.5, 0.3, 0.15, 0.05])
    kept, left = restricted(log_weights, 3, 0.2, None)
    assert active_experts(kept) == [0, 1]
    assert left == pytest.approx(0.2 - 0.15 / 0.95)
    assert active_experts(restricted(log_weights, 3, 0.2, 0.7)[0]) == [1]
    np.testing.assert_array_equal(restricted(log_weights, None, 0.0, None)[0], log_weights)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.floats(0.001, 0.6))
def test_whole_sequences_move_by_at_most_eps(seed: int, experts: int, eps: float) -> None:
    """Every sequence of an enumerable model: V=3, T=4, each expert's conditionals drawn at random."""
    vocabulary, length = 3, 4
    rng = np.random.default_rng(seed)
    tables = {
        prefix: np.log(rng.dirichlet(np.full(vocabulary, 0.4), size=experts) + 1e-12)
        for t in range(length)
        for prefix in itertools.product(range(vocabulary), repeat=t)
    }
    start = log_prior(rng.dirichlet(np.ones(experts)).tolist())
    distance, most_dropped = 0.0, 0.0
    for sequence in itertools.product(range(vocabulary), repeat=length):
        exact, (kept, left), pruned = start, prune(start, eps), 0.0
        for t, token in enumerate(sequence):
            row = tables[sequence[:t]][:, token]
            exact = exact + row
            pruned += float(np.logaddexp.reduce(kept + row))
            kept, left = prune(log_normalise(kept + row), left)
        distance += abs(math.exp(np.logaddexp.reduce(exact)) - math.exp(pruned)) / 2
        most_dropped = max(most_dropped, eps - left)
    assert distance <= eps + 1e-9
    assert most_dropped <= eps + 1e-12
