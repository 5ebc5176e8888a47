"""Systems on known scores: against their definitions, and pruning against every sequence of a model small enough."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from decar.router.manifest import Mixing, RouterEntry
from decar.router.posterior import Float64s, log_normalise
from decar.training.evaluate.systems import DENSE, ROUTERS, Scores, System, posterior_path, served, systems

T, K, V = 9, 3, 5


def make_scores(seed: int, alike: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(T, 1 if alike else K, V, generator=generator).expand(T, K, V).log_softmax(-1)
    ids = torch.randint(V, (T,), generator=generator)
    rng = np.random.default_rng(seed)
    return Scores(
        prompt=np.full(K, -7.0) if alike else rng.normal(size=K) - 7,
        tokens=rows[torch.arange(T), :, ids].double().numpy(),
        rows=rows,
        ids=ids,
        starts={start: log_normalise(rng.normal(size=K)) for start in ROUTERS},
    )


def by_name(name: str) -> System:
    return next(system for system in systems(K, [0.5, 0.1, 0.01]) if system.name == name)


def test_names_are_unique_and_top_k_leaves_somebody_out() -> None:
    for num_experts in (1, 2, 4):
        names = [system.name for system in systems(num_experts, [0.1, 0.01])]
        assert len(set(names)) == len(names)
        assert any("top-1" in name for name in names) == (num_experts > 1)
        assert any("top-2" in name for name in names) == (num_experts > 2)


@pytest.mark.parametrize("system", systems(K, [0.5, 0.1, 0.01]), ids=lambda system: system.name)
def test_identical_experts_are_that_expert(system: System) -> None:
    scores = make_scores(0, alike=True)
    outcome = system.outcome(scores)
    # rows are float32: the logit rule's sum and normaliser round at 6e-8 of a few nats
    np.testing.assert_allclose(outcome.log_probs, scores.tokens[:, 0], atol=1e-6)
    assert outcome.dropped <= system.prune


def test_the_dense_posterior_telescopes_to_the_sequences_mixture() -> None:
    scores = make_scores(1)
    prior = scores.starts["prior"]
    whole = np.logaddexp.reduce(prior + scores.prompt + scores.tokens.sum(axis=0))
    prompt = np.logaddexp.reduce(prior + scores.prompt)
    outcome = by_name(DENSE).outcome(scores)
    assert outcome.log_probs.sum() == pytest.approx(whole - prompt, rel=1e-12)
    assert (outcome.active.tolist(), outcome.prompt_passes) == ([K] * T, K)
    after = by_name("classifier→posterior").outcome(scores)
    expected = np.logaddexp.reduce(scores.starts["classifier"] + scores.tokens.sum(axis=0))
    assert after.log_probs.sum() == pytest.approx(expected, rel=1e-12)


def test_static_weights_and_top_k() -> None:
    scores = make_scores(2)
    weights = np.exp(scores.starts["classifier"])
    mixed = by_name("classifier").outcome(scores)
    np.testing.assert_allclose(np.exp(mixed.log_probs), np.exp(scores.tokens) @ weights)
    first, second = np.argsort(-weights)[:2]
    one, two = (by_name(f"classifier, top-{k}").outcome(scores) for k in (1, 2))
    np.testing.assert_allclose(one.log_probs, scores.tokens[:, first])
    pair = weights[[first, second]] / weights[[first, second]].sum()
    np.testing.assert_allclose(np.exp(two.log_probs), np.exp(scores.tokens[:, [first, second]]) @ pair)
    assert (
        one.prompt_passes,
        two.prompt_passes,
        by_name(f"{DENSE}, top-1").outcome(scores).prompt_passes,
    ) == (1, 2, K)
    assert two.active.tolist() == [2] * T


def test_the_logit_rule_is_the_normalised_geometric_mean() -> None:
    scores = make_scores(3)
    weights = np.exp(scores.starts["prior"])
    mean = np.prod(np.exp(scores.rows.double().numpy()) ** weights[:, None], axis=1)
    expected = mean[np.arange(T), scores.ids] / mean.sum(axis=1)
    np.testing.assert_allclose(
        np.exp(by_name("prior, logit rule").outcome(scores).log_probs), expected, rtol=1e-5
    )


def test_drawing_costs_one_expert_and_changes_no_probability() -> None:
    scores = make_scores(4)
    dense, drawn = (by_name(name).outcome(scores) for name in (DENSE, f"{DENSE}, drawn"))
    assert np.array_equal(drawn.log_probs, dense.log_probs)
    assert (drawn.active.tolist(), drawn.prompt_passes) == ([1] * T, K)


def test_greedy_choices_are_the_mixtures() -> None:
    seen = set()
    for seed in range(20):
        scores = make_scores(seed)
        rows, ids = scores.rows.double().numpy(), scores.ids.numpy()
        weights = np.exp(scores.starts["classifier"])
        for name, mixed in (
            ("classifier", np.exp(rows).transpose(0, 2, 1) @ weights),
            ("classifier, logit rule", rows.transpose(0, 2, 1) @ weights),
            ("classifier, top-1", rows[:, weights.argmax()]),
        ):
            outcome = by_name(name).outcome(scores)
            right = mixed.argmax(axis=1) == ids
            assert outcome.right.tolist() == right.tolist()
            assert outcome.exact == right.all()
            seen.add(bool(right.any()) and not right.all())
    assert True in seen


def test_greedy_choices_of_a_drawn_expert_are_its_own() -> None:
    scores = make_scores(4)
    scores.ids[:] = scores.rows[:, 1].argmax(dim=-1)  # the second expert's greedy answer
    weights = np.exp(log_normalise(scores.starts["prior"] + scores.prompt))
    drawn = by_name(f"{DENSE}, drawn").outcome(scores)
    own = (scores.rows.argmax(dim=-1) == scores.ids[:, None]).double().numpy()
    np.testing.assert_allclose(drawn.right, own @ weights)
    assert not own[:, [0, 2]].all(axis=0).any()
    assert drawn.exact == pytest.approx(weights[1])


def test_the_default_of_a_manifest_is_one_of_the_systems_or_one_more() -> None:
    compared = systems(K, [0.1])
    assert served(RouterEntry(), Mixing(), compared).name == DENSE
    assert served(RouterEntry(), Mixing(prune=0.1), compared).name == f"{DENSE} ε 0.1"
    output = RouterEntry(scope="output", start="classifier")
    assert served(output, Mixing(), compared).name == "classifier→posterior"
    assert served(RouterEntry(kind="centroid"), Mixing(top_k=1), compared).name == "centroid, top-1"
    other = served(RouterEntry(kind="classifier"), Mixing(rule="logit", top_k=2, prune=0.2), compared)
    assert other not in compared
    assert (other.start, other.bayes, other.rule, other.experts) == ("classifier", "none", "logit", 2)
    assert other.name == "as served ε 0.2"


def test_static_weights_are_pruned_once() -> None:
    scores = make_scores(5)
    weights = np.exp(scores.starts["classifier"])
    budget = float(np.sort(weights)[0]) + 1e-9
    outcome = System("static", "classifier", prune=budget).outcome(scores)
    kept = np.flatnonzero(weights > weights.min())
    expected = np.exp(scores.tokens[:, kept]) @ (weights[kept] / weights[kept].sum())
    np.testing.assert_allclose(np.exp(outcome.log_probs), expected)
    assert outcome.dropped == pytest.approx(weights.min())


def test_pruning_stays_within_its_budget_and_never_takes_an_expert_back() -> None:
    for seed in range(50):
        scores = make_scores(seed)
        for budget in (0.5, 0.1, 0.01):
            path, left = posterior_path(scores.starts["prior"], scores.tokens, budget)
            assert 0 <= left <= budget
            active = np.isfinite(path)
            assert (active[1:] <= active[:-1]).all()
            np.testing.assert_allclose(np.exp(path).sum(axis=1), 1)


# ---------------------------------------------------------------------------------------------- every sequence

LENGTH = 6


def sequences(experts: Float64s) -> Iterator[Float64s]:
    """log p_k of each token [LENGTH, K], of every sequence over the vocabulary of ``experts`` [K, V]."""
    for tokens in itertools.product(range(experts.shape[1]), repeat=LENGTH):
        yield experts[:, list(tokens)].T


def total_variation(experts: Float64s, prior: Float64s, budget: float) -> float:
    """Between the mixture of all sequences' probabilities, and the one whose experts are pruned on the way."""
    distance = 0.0
    mass = 0.0
    for tokens in sequences(experts):
        exact = np.exp(np.logaddexp.reduce(prior + tokens.sum(axis=0)))
        path, _ = posterior_path(prior, tokens, budget)
        pruned = np.exp(np.logaddexp.reduce(path + tokens, axis=1).sum())
        distance += abs(exact - pruned) / 2
        mass += pruned
    assert mass == pytest.approx(1)  # what remains is a distribution of sequences
    return distance


@pytest.mark.parametrize("budget", [0.3, 0.1, 0.01])
def test_pruned_sequences_are_within_the_budget_in_total_variation(budget: float) -> None:
    rng = np.random.default_rng(0)
    distances = [
        total_variation(log_normalise(rng.normal(size=(3, 3))), log_normalise(rng.normal(size=3)), budget)
        for _ in range(10)
    ]
    assert max(distances) <= budget
    assert max(distances) > budget / 100  # else nothing was pruned, and nothing was tested


def test_under_static_weights_a_small_mass_matters_more_with_every_token() -> None:
    """Why top-k of a static router has no such bound: one expert says a, the other b."""
    weights = np.array([0.9, 0.1])
    exact = {tokens: np.prod(weights[list(tokens)]) for tokens in itertools.product([0, 1], repeat=LENGTH)}
    distance = sum(abs(p - (not any(tokens))) for tokens, p in exact.items()) / 2
    assert distance == pytest.approx(1 - 0.9**LENGTH)
