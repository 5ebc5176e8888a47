"""Routers: texts, or images, to expert weights. What the experts themselves say of them is `posterior.py`'s.

Shapes: N prompts, K experts, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from decar.router.features import Features, Prompt, unit_rows
from decar.router.files import (
    Centroids,
    Classifier,
    TrainedRouter,
    has_router,
    image_router_folder,
    read_image_router,
    read_router,
    router_folder,
)
from decar.router.manifest import Ensemble, RouterKind, Start, Trained
from decar.router.posterior import Float64s, log_normalise, log_prior

if TYPE_CHECKING:
    from PIL.Image import Image


class Router(Protocol[Prompt]):
    """Says which experts a prompt belongs to, before any expert has seen it."""

    @property
    def num_experts(self) -> int: ...

    def log_weights(self, prompts: Sequence[Prompt], /) -> Float64s:
        """log p(S_k | prompt), [N, K], each row normalised; experts in the manifest's order."""
        ...


P = TypeVar("P")
ImageRouter: TypeAlias = "Router[Sequence[Image]]"
"""A router whose prompts are images, one or more each."""


@dataclass(frozen=True)
class PriorRouter:
    """Every prompt alike: the experts' shares of the training data. ``log_priors`` [K], normalised."""

    log_priors: Float64s

    @property
    def num_experts(self) -> int:
        return len(self.log_priors)

    def log_weights(self, prompts: Sequence[object]) -> Float64s:
        return np.tile(self.log_priors, (len(prompts), 1))


@dataclass(frozen=True)
class ClassifierRouter(Generic[Prompt]):
    """Bayes' rule from a discriminative model: log π_k + logits_k / T.

    The classifier was fitted with all experts alike in number, so its logits are those of a uniform prior, and the
    ensemble's own priors enter here (label shift: Saerens et al. 2002, Neural Computation 14(1)).
    """

    features: Features[Prompt]
    classifier: Classifier
    log_priors: Float64s

    @property
    def num_experts(self) -> int:
        return len(self.log_priors)

    def log_weights(self, prompts: Sequence[Prompt]) -> Float64s:
        scores = classifier_scores(self.features(prompts), self.classifier)
        return log_normalise(self.log_priors + scores / self.classifier.temperature)


@dataclass(frozen=True)
class CentroidRouter(Generic[Prompt]):
    """c-BTM's router: softmax over experts of closeness / T (Gururangan et al. 2023, arXiv 2303.14177, eq. 2)."""

    features: Features[Prompt]
    centroids: Centroids

    @property
    def num_experts(self) -> int:
        return len(self.centroids.centroids)

    def log_weights(self, prompts: Sequence[Prompt]) -> Float64s:
        scores = centroid_scores(self.features(prompts), self.centroids)
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


def load_router(ensemble: Ensemble, kind: Start) -> Router[str]:
    """The router ``kind`` of ``ensemble``. Reading takes some milliseconds: keep what this returns.

    Raises:
        EnsembleError: the ensemble has no files for it, or they are damaged or another ensemble's.
    """
    if kind == "prior":
        return PriorRouter(log_prior([expert.prior for expert in ensemble.experts]))
    return load_trained(ensemble)[kind]


def load_trained(ensemble: Ensemble) -> dict[Trained, Router[str]]:
    """Both trained routers of ``ensemble`` for texts, which share the features they read.

    Raises:
        EnsembleError: as `load_router`.
    """
    return _both(read_router(router_folder(ensemble.directory), ensemble.expert_names), ensemble)


def load_trained_images(ensemble: Ensemble) -> dict[Trained, ImageRouter]:
    """Both trained routers of ``ensemble`` for images; none where it has no files for them.

    Raises:
        EnsembleError: as `load_router`.
    """
    folder = image_router_folder(ensemble.directory)
    if not has_router(folder):
        return {}
    return _both(read_image_router(folder, ensemble.expert_names), ensemble)


def _both(trained: TrainedRouter[P], ensemble: Ensemble) -> dict[Trained, Router[P]]:
    log_priors = log_prior([expert.prior for expert in ensemble.experts])
    return {
        "classifier": ClassifierRouter(trained.features, trained.classifier, log_priors),
        "centroid": CentroidRouter(trained.features, trained.centroids),
    }


def available_routers(ensemble: Ensemble) -> tuple[RouterKind, ...]:
    """What a request may ask ``ensemble`` for. One that was read without problems has all of them or no files."""
    always: tuple[RouterKind, ...] = ("posterior", "prior")
    if ensemble.has_router:
        return (*always, "classifier", "centroid")
    return always
