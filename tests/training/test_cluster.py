"""Balanced assignment against the optimum of `scipy`, and what k-means promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from decar.training.cluster import balanced_assignment, balanced_kmeans


def optimum(scores: np.ndarray) -> float:
    """The largest sum of scores under the same sizes: one column per seat of each cluster."""
    num_samples, num_clusters = scores.shape
    sizes = np.full(num_clusters, num_samples // num_clusters)
    sizes[: num_samples % num_clusters] += 1
    seats = scores[:, np.repeat(np.arange(num_clusters), sizes)]
    return float(seats[linear_sum_assignment(seats, maximize=True)].sum())


@pytest.mark.parametrize(
    ("num_samples", "num_clusters"),
    [(1, 1), (9, 1), (2, 2), (7, 2), (50, 3), (101, 5), (16, 16), (20, 16), (200, 16)],
)
@pytest.mark.parametrize("kind", ["free", "ties", "crowded", "large"])
def test_assignment_is_the_optimum(num_samples: int, num_clusters: int, kind: str) -> None:
    rng = np.random.default_rng(num_samples * 100 + num_clusters)
    scores = rng.normal(size=(num_samples, num_clusters))
    if kind == "ties":  # copies of one document, and scores on a grid
        scores = np.round(scores[rng.integers(0, 4, num_samples) % num_samples], 1)
    if kind == "crowded":  # everybody wants the last cluster
        scores[:, -1] += 10
    if kind == "large":
        scores *= 1e6
    labels = balanced_assignment(scores)
    sizes = np.bincount(labels, minlength=num_clusters)
    assert sizes.max() - sizes.min() <= 1
    assert scores[np.arange(num_samples), labels].sum() == pytest.approx(optimum(scores), rel=1e-9, abs=1e-9)


def test_all_scores_equal() -> None:
    assert sorted(np.bincount(balanced_assignment(np.ones((10, 4))))) == [2, 2, 3, 3]


def unit_rows(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    rows = rng.normal(size=(num_samples, 6))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_kmeans_finds_separate_groups_of_equal_size() -> None:
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat([0, 1, 2], 40))
    rows = np.eye(6)[truth] + 0.1 * rng.normal(size=(120, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = balanced_kmeans(rows, 3, seed=1, restarts=4, max_iterations=20).labels
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 3


def test_kmeans_is_balanced_where_the_data_are_not() -> None:
    rows = np.repeat(np.eye(6)[:2], [90, 12], axis=0)
    labels = balanced_kmeans(rows, 4, seed=0, restarts=1, max_iterations=5).labels
    assert sorted(np.bincount(labels)) == [25, 25, 26, 26]


def test_kmeans_repeats_itself_by_seed_and_counts_its_objective() -> None:
    rows = unit_rows(np.random.default_rng(3), 100)
    first, second = (balanced_kmeans(rows, 4, seed=7, restarts=2, max_iterations=20) for _ in range(2))
    assert np.array_equal(first.labels, second.labels)
    assert np.linalg.norm(first.centroids, axis=1) == pytest.approx(np.ones(4))
    assert first.objective == pytest.approx((rows * first.centroids[first.labels]).sum(axis=1).mean())


def test_more_restarts_are_never_worse() -> None:
    rows = unit_rows(np.random.default_rng(4), 60)
    one, five = (balanced_kmeans(rows, 5, seed=0, restarts=n, max_iterations=20).objective for n in (1, 5))
    assert five >= one


def test_zero_rows_fit_anywhere() -> None:
    rows = np.vstack([unit_rows(np.random.default_rng(5), 10), np.zeros((4, 6))])
    result = balanced_kmeans(rows, 2, seed=0, restarts=1, max_iterations=10)
    assert np.bincount(result.labels).tolist() == [7, 7]
    assert np.isfinite(result.centroids).all()
