"""Balanced assignment against the optimum of `scipy`, and what k-means promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from decar.training.partition.cluster import (
    balanced_assignment,
    balanced_kmeans,
    equal_sizes,
    two_stage_kmeans,
)


def optimum(scores: np.ndarray, sizes: np.ndarray) -> float:
    """The largest sum of scores under ``sizes``: one column per seat of each cluster."""
    seats = scores[:, np.repeat(np.arange(len(sizes)), sizes)]
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
    assert scores[np.arange(num_samples), labels].sum() == pytest.approx(
        optimum(scores, equal_sizes(num_samples, num_clusters)), rel=1e-9, abs=1e-9
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(scores, sizes): often with ties and copies, as blocks of documents that move together give; any sizes."""
    num_clusters = draw(st.integers(1, 6))
    rows = draw(st.integers(1, 8))
    grid = draw(st.sampled_from([st.integers(-3, 3).map(float), st.floats(-1, 1, width=32)]))
    scores = draw(arrays(np.float64, (rows, num_clusters), elements=grid))
    scores = scores.repeat(draw(arrays(np.int64, rows, elements=st.integers(1, 6))), axis=0)
    if draw(st.booleans()):
        return scores, equal_sizes(len(scores), num_clusters)
    seats = draw(arrays(np.int64, len(scores), elements=st.integers(0, num_clusters - 1)))
    return scores, np.bincount(seats, minlength=num_clusters)


@settings(max_examples=400, deadline=None)
@given(problems())
def test_any_assignment_is_the_optimum(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, sizes = problem
    labels = balanced_assignment(scores, sizes)
    assert np.bincount(labels, minlength=len(sizes)).tolist() == sizes.tolist()
    # at most 48 scores of at most 3: sums round at 1e-14
    assert scores[np.arange(len(scores)), labels].sum() == pytest.approx(optimum(scores, sizes), abs=1e-9)


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


def grouped(rng: np.random.Generator, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(unit rows [N, 8] around orthogonal axes, the group of each)."""
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = (np.eye(8)[groups] + 0.03 * rng.normal(size=(len(groups), 8))).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), groups


def test_two_stages_give_equal_sizes_and_divide_no_more_groups_than_they_must() -> None:
    rows, groups = grouped(np.random.default_rng(0), [20, 30, 50, 40, 60, 25, 75])
    found = two_stage_kmeans(rows, 3, fine_clusters=7, seed=0, restarts=3, max_iterations=20)
    assert sorted(np.bincount(found.labels)) == [100, 100, 100]
    divided = [g for g in range(7) if len(set(found.labels[groups == g])) > 1]
    # A basic solution of the transportation problem divides at most K - 1 of the fine clusters.
    assert len(divided) <= 2
    assert found.objective == pytest.approx(
        (rows * found.centroids[found.labels]).sum(axis=1).mean(), rel=1e-5
    )
    again = two_stage_kmeans(rows, 3, fine_clusters=7, seed=0, restarts=3, max_iterations=20)
    assert np.array_equal(found.labels, again.labels)


@pytest.mark.parametrize(
    ("rows", "num_clusters", "fine_clusters"),
    [
        (np.eye(3), 3, 1024),  # more fine clusters than samples
        (np.eye(4).repeat(5, axis=0), 3, 10),  # fewer different samples than fine clusters
        (np.eye(4).repeat(5, axis=0), 3, 2),  # fewer fine clusters than clusters
        (np.zeros((7, 2)), 2, 3),  # nothing to tell them apart by
        (np.eye(3), 1, 2),
    ],
)
def test_two_stages_on_odd_data(rows: np.ndarray, num_clusters: int, fine_clusters: int) -> None:
    found = two_stage_kmeans(
        rows.astype(np.float32),
        num_clusters,
        fine_clusters=fine_clusters,
        seed=0,
        restarts=2,
        max_iterations=5,
    )
    sizes = np.bincount(found.labels, minlength=num_clusters)
    assert sizes.max() - sizes.min() <= 1
    assert np.isfinite(found.centroids).all()
