"""Routers: texts to expert weights. Knows text only; what the experts themselves say of it is `posterior.py`'s.

Shapes: N texts, K experts, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from decar.router.features import Features, unit_rows
from decar.router.files import Centroids, Classifier, has_router, read_router, router_folder
from decar.router.manifest import Ensemble, Route, Start, Trained
from decar.router.posterior import Float64s, log_normalise, log_prior


class Router(Protocol):
    """Says which experts a text belongs to, before any expert has seen it."""

    @property
    def num_experts(self) -> int: ...

    def log_weights(self, texts: Sequence[str]) -> Float64s:
        """log p(S_k | text), [N, K], each row normalised; experts in the manifest's order."""
        ...


@dataclass(frozen=True)
class PriorRouter:
    """Every text alike: the experts' shares of the training data. ``log_priors`` [K], normalised."""

    log_priors: Float64s

    @property
    def num_experts(self) -> int:
        return len(self.log_priors)

    def log_weights(self, texts: Sequence[str]) -> Float64s:
        return np.tile(self.log_priors, (len(texts), 1))


@dataclass(frozen=True)
class ClassifierRouter:
    """Bayes' rule from a discriminative model: log π_k + logits_k / T.

    The classifier was fitted with all experts alike in number, so its logits are those of a uniform prior, and the
    ensemble's own priors enter here (label shift: Saerens et al. 2002, Neural Computation 14(1)).
    """

    features: Features
    classifier: Classifier
    log_priors: Float64s

    @property
    def num_experts(self) -> int:
        return len(self.log_priors)

    def log_weights(self, texts: Sequence[str]) -> Float64s:
        scores = classifier_scores(self.features(texts), self.classifier)
        return log_normalise(self.log_priors + scores / self.classifier.temperature)


@dataclass(frozen=True)
class CentroidRouter:
    """c-BTM's router: softmax over experts of closeness / T (Gururangan et al. 2023, arXiv 2303.14177, eq. 2)."""

    features: Features
    centroids: Centroids

    @property
    def num_experts(self) -> int:
        return len(self.centroids.centroids)

    def log_weights(self, texts: Sequence[str]) -> Float64s:
        scores = centroid_scores(self.features(texts), self.centroids)
        return log_normalise(scores / self.centroids.temperature)


def classifier_scores(features: Float64s, classifier: Classifier) -> Float64s:
    """Logits [N, K] of ``features`` [N, D], at temperature 1."""
    return np.asarray(features @ classifier.weight.T + classifier.bias, dtype=np.float64)


def centroid_scores(features: Float64s, centroids: Centroids) -> Float64s:
    """Closeness [N, K] of ``features`` [N, D] to each centroid: cosine, or minus the squared distance."""
    points = centroids.centroids.astype(np.float64)
    if centroids.metric == "cosine":
        return features @ unit_rows(points).T
    return -np.square(features[:, None] - points).sum(axis=2)


def load_router(ensemble: Ensemble, kind: Start) -> Router:
    """The router ``kind`` of ``ensemble``. Reading takes some milliseconds: keep what this returns.

    Raises:
        EnsembleError: the ensemble has no files for it, or they are damaged or another ensemble's.
    """
    if kind == "prior":
        return PriorRouter(log_prior([expert.prior for expert in ensemble.experts]))
    return load_trained(ensemble)[kind]


def load_trained(ensemble: Ensemble) -> dict[Trained, Router]:
    """Both trained routers of ``ensemble``, which share the features they read.

    Raises:
        EnsembleError: as `load_router`.
    """
    log_priors = log_prior([expert.prior for expert in ensemble.experts])
    trained = read_router(router_folder(ensemble.directory), ensemble.expert_names)
    return {
        "classifier": ClassifierRouter(trained.features, trained.classifier, log_priors),
        "centroid": CentroidRouter(trained.features, trained.centroids),
    }


def available_routers(ensemble: Ensemble) -> tuple[Route, ...]:
    """What a request may ask ``ensemble`` for. One that was read without problems has all of them or no files."""
    always: tuple[Route, ...] = ("posterior", "prior")
    if has_router(router_folder(ensemble.directory)):
        return (*always, "classifier", "centroid")
    return always
