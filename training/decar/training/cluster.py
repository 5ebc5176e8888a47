"""Balanced spherical k-means: K clusters of unit vectors whose sizes differ by at most one.

Knows arrays only, never text. Shapes: N samples, K clusters, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Prices converge ever more slowly: the last misfits, and ties, are cheaper to move one chain at a time.
_MAX_SWEEPS = 200
_MISFITS = 1 / 200
_SMALL_STEP = 1e-9
# Relative to the largest score. Rounding (about 1e-16) must not look like a cycle that improves the assignment.
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Clustering:
    """``labels`` [N] in 0..K-1, ``centroids`` [K, D] of unit length, ``objective``: the mean cosine to the centroid."""

    labels: Ints
    centroids: Floats
    objective: float


def balanced_kmeans(
    features: Floats, num_clusters: int, *, seed: int, restarts: int, max_iterations: int
) -> Clustering:
    """The best of ``restarts`` runs of spherical k-means with equal cluster sizes; the same for the same seed.

    Args:
        features: [N, D], rows of unit length (zero rows are allowed and fit anywhere), N >= num_clusters.
    """
    rng = np.random.default_rng(seed)
    runs = (_one_run(features, num_clusters, rng, max_iterations) for _ in range(restarts))
    return max(runs, key=lambda run: run.objective)


def _one_run(
    features: Floats, num_clusters: int, rng: np.random.Generator, max_iterations: int
) -> Clustering:
    centroids = _spread_seeds(features, num_clusters, rng)
    labels, prices = _assign(features @ centroids.T, np.zeros(num_clusters))
    for _ in range(max_iterations):
        centroids = _centroids(features, labels, centroids)
        previous = labels
        labels, prices = _assign(features @ centroids.T, prices)
        if np.array_equal(previous, labels):
            break
    centroids = _centroids(features, labels, centroids)
    objective = float(np.einsum("nd,nd->n", features, centroids[labels]).mean())
    return Clustering(labels, centroids, objective)


def _spread_seeds(features: Floats, num_clusters: int, rng: np.random.Generator) -> Floats:
    """k-means++ seeding (Arthur and Vassilvitskii 2007) with the cosine distance."""
    chosen = [int(rng.integers(len(features)))]
    distance = np.full(len(features), np.inf)
    for _ in range(num_clusters - 1):
        distance = np.minimum(distance, np.clip(1.0 - features @ features[chosen[-1]], 0.0, None))
        total = distance.sum()
        weights = distance / total if total > 0 else None
        chosen.append(int(rng.choice(len(features), p=weights)))
    return features[chosen]


def _centroids(features: Floats, labels: Ints, previous: Floats) -> Floats:
    """Unit-length means [K, D]; a mean of zero keeps the previous centroid."""
    members = np.arange(len(previous))[:, None] == labels
    sums = members.astype(features.dtype) @ features
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norms > _TOLERANCE, sums / np.maximum(norms, _TOLERANCE), previous)


def balanced_assignment(scores: Floats) -> Ints:
    """The assignment of N samples to K clusters with the largest sum of scores, sizes fixed to N/K.

    The first N mod K clusters hold one sample more. The result is optimal (a transportation problem). First
    each cluster gets a price, lowered or raised until about the right number of samples prefers it: coordinate
    descent on the dual, as in Bertsekas's auction. For its own sizes, such an assignment is optimal. Then samples
    move along cheapest chains of clusters until the sizes fit: successive shortest paths (Ahuja, Magnanti
    and Orlin, "Network Flows", 1993, ch. 9), on a graph of K nodes only.

    Args:
        scores: [N, K], N >= K, finite.

    Returns:
        labels [N].
    """
    return _assign(scores, np.zeros(scores.shape[1]))[0]


def _assign(scores: Floats, prices: Floats) -> tuple[Ints, Floats]:
    """(labels [N], prices [K]); the prices of a similar problem are a good start."""
    num_samples, num_clusters = scores.shape
    sizes = np.full(num_clusters, num_samples // num_clusters)
    sizes[: num_samples % num_clusters] += 1
    prices = _prices(scores, sizes, prices)
    labels = np.argmax(scores - prices, axis=1)
    excess = np.bincount(labels, minlength=num_clusters) - sizes
    loss = np.full((num_clusters, num_clusters), np.inf)
    stale: Iterable[int] = range(num_clusters)
    tolerance = _TOLERANCE * float(np.abs(scores).max(initial=1.0))
    while excess.any():
        for cluster in stale:
            members = np.flatnonzero(labels == cluster)
            losses = scores[members, cluster, None] - scores[members]
            loss[cluster] = losses.min(axis=0, initial=np.inf)
            loss[cluster, cluster] = np.inf
        path = _cheapest_path(loss, np.flatnonzero(excess > 0), np.flatnonzero(excess < 0), tolerance)
        # All samples that tie for the cheapest move go at once: copies of one document would go one by one.
        movable = []
        for a, b in itertools.pairwise(path):
            members = np.flatnonzero(labels == a)
            movable.append(members[scores[members, a] - scores[members, b] <= loss[a, b]])
        count = min(excess[path[0]], -excess[path[-1]], *map(len, movable))
        for samples, b in zip(movable, path[1:], strict=True):
            labels[samples[:count]] = b
        excess[path[0]] -= count
        excess[path[-1]] += count
        stale = path
    return labels, prices


def _prices(scores: Floats, sizes: Ints, start: Floats) -> Floats:
    """Prices [K] under which about ``sizes[k]`` samples like cluster k best."""
    prices = start.copy()
    net = (scores - prices).T.copy()
    num_clusters, num_samples = net.shape
    for _ in range(_MAX_SWEEPS if num_clusters > 1 else 0):
        largest_step = 0.0
        for cluster, size in enumerate(sizes):
            below = net[:cluster].max(axis=0, initial=-np.inf)
            above = net[cluster + 1 :].max(axis=0, initial=-np.inf)
            margin = net[cluster] - np.maximum(below, above)
            border = np.partition(margin, [num_samples - size - 1, num_samples - size])
            step = (border[num_samples - size - 1] + border[num_samples - size]) / 2
            net[cluster] -= step
            prices[cluster] += step
            largest_step = max(largest_step, abs(step))
        misfits = np.abs(np.bincount(net.argmax(axis=0), minlength=num_clusters) - sizes).sum()
        if misfits <= num_samples * _MISFITS or largest_step < _SMALL_STEP:
            break
    return prices


def _cheapest_path(loss: Floats, sources: Ints, targets: Ints, tolerance: float) -> list[int]:
    """Bellman-Ford over the K clusters from any source to the nearest target; ``loss`` [K, K] may be negative."""
    num_clusters = len(loss)
    distance = np.full(num_clusters, np.inf)
    distance[sources] = 0.0
    parent = np.full(num_clusters, -1)
    for _ in range(num_clusters - 1):
        through = distance[:, None] + loss
        best = np.argmin(through, axis=0)
        nearest = through[best, np.arange(num_clusters)]
        improved = nearest < distance - tolerance
        if not improved.any():
            break
        distance[improved], parent[improved] = nearest[improved], best[improved]
    path = [int(targets[np.argmin(distance[targets])])]
    while parent[path[-1]] >= 0:
        path.append(int(parent[path[-1]]))
    return path[::-1]
