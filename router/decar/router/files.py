"""A trained router on disk: what its files hold, written and checked. Knows no ensemble and does no routing.

    router/router.json          whose router it is, terms, temperatures
    router/router.safetensors   every array
    router/embedding/           the sentence-embedding model, where one takes the place of TF-IDF

Shapes: K experts, D features, F terms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from decar.router.errors import EnsembleError
from decar.router.features import EmbeddingFeatures, Features, Float32s, TfidfFeatures

ROUTER_FOLDER = "router"
EMBEDDING_FOLDER = "embedding"
JSON_NAME = "router.json"
ARRAYS_NAME = "router.safetensors"
_FIX = "`decar-train router CONFIG.yaml` makes it"

Metric = Literal["cosine", "euclidean"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Settings(_Strict):
    """``router.json``. ``terms`` are those of TF-IDF; null where the embedding model is used."""

    format_version: Literal[1] = 1
    experts: tuple[str, ...] = Field(min_length=1)
    terms: tuple[str, ...] | None
    classifier_temperature: float = Field(gt=0, allow_inf_nan=False)
    centroid_metric: Metric
    centroid_temperature: float = Field(gt=0, allow_inf_nan=False)


@dataclass(frozen=True)
class Classifier:
    """Multinomial logistic regression, fitted with all experts alike in number.

    ``logits / temperature`` is therefore log p(text | S_k) up to a constant, and whoever knows the priors adds them.

    Args:
        weight: [K, D].
        bias: [K].
    """

    weight: Float32s
    bias: Float32s
    temperature: float


@dataclass(frozen=True)
class Centroids:
    """``centroids`` [K, D]: mean features of each expert's documents."""

    centroids: Float32s
    metric: Metric
    temperature: float


@dataclass(frozen=True)
class TrainedRouter:
    """All that ``decar-train router`` fits, for the experts named in this order."""

    experts: tuple[str, ...]
    features: Features
    classifier: Classifier
    centroids: Centroids


def router_folder(directory: Path) -> Path:
    """Where the ensemble in ``directory`` keeps its router."""
    return directory / ROUTER_FOLDER


def write_router(router: TrainedRouter, folder: Path) -> None:
    """Write ``router`` to ``folder``. The files of an embedding model have to be there already."""
    arrays: dict[str, Float32s] = {
        "classifier.weight": router.classifier.weight,
        "classifier.bias": router.classifier.bias,
        "centroids": router.centroids.centroids,
    }
    terms = None
    if isinstance(router.features, TfidfFeatures):
        terms = router.features.terms
        arrays |= {"tfidf.idf": router.features.idf, "tfidf.components": router.features.components}
    settings = _Settings(
        experts=router.experts,
        terms=terms,
        classifier_temperature=router.classifier.temperature,
        centroid_metric=router.centroids.metric,
        centroid_temperature=router.centroids.temperature,
    )
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS_NAME)
    (folder / JSON_NAME).write_text(json.dumps(settings.model_dump(mode="json")) + "\n", encoding="utf-8")


def has_router(folder: Path) -> bool:
    """Whether anything in ``folder`` claims to be a trained router, usable or not."""
    return (folder / JSON_NAME).exists() or (folder / ARRAYS_NAME).exists()


def router_problem(folder: Path, experts: Sequence[str], required: bool) -> str | None:
    """What is wrong with the router in ``folder``. Where none is ``required`` there may be none, but no wrong one."""
    if not required and not has_router(folder):
        return None
    try:
        read_router(folder, experts)
    except EnsembleError as error:
        return str(error)
    return None


def read_router(folder: Path, experts: Sequence[str]) -> TrainedRouter:
    """The router in ``folder``, checked to be that of ``experts`` in their order. Embedding models load on first use.

    Raises:
        EnsembleError: a file is missing, damaged, or another ensemble's.
    """
    settings = _read_settings(folder / JSON_NAME)
    if settings.experts != tuple(experts):
        raise EnsembleError(
            f"{folder / JSON_NAME} is a router of the experts {', '.join(settings.experts)}, but the manifest has "
            f"{', '.join(experts)}, in this order; `decar-train router CONFIG.yaml` trains one for them"
        )
    arrays = _Arrays(folder / ARRAYS_NAME)
    num_experts = len(experts)
    features: Features
    if settings.terms is None:
        features = EmbeddingFeatures(folder / EMBEDDING_FOLDER)
        if not (features.directory / "config.json").is_file():
            raise EnsembleError(f"{features.directory / 'config.json'} is missing; {_FIX}")
        num_features = arrays.size("centroids", 1)
    else:
        num_terms = len(settings.terms)
        num_features = arrays.size("tfidf.components", 0)
        features = TfidfFeatures(
            settings.terms,
            arrays.get("tfidf.idf", num_terms),
            arrays.get("tfidf.components", num_features, num_terms),
        )
    return TrainedRouter(
        settings.experts,
        features,
        Classifier(
            arrays.get("classifier.weight", num_experts, num_features),
            arrays.get("classifier.bias", num_experts),
            settings.classifier_temperature,
        ),
        Centroids(
            arrays.get("centroids", num_experts, num_features),
            settings.centroid_metric,
            settings.centroid_temperature,
        ),
    )


def _read_settings(file: Path) -> _Settings:
    try:
        return _Settings.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise EnsembleError(f"{file} is missing; {_FIX}") from None
    except OSError as error:
        raise EnsembleError(f"{file} cannot be read ({error.strerror})") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise EnsembleError(f"{file} is damaged ({where}: {first['msg']}); {_FIX}") from None


class _Arrays:
    """The arrays of one safetensors file, each checked as it is taken."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.arrays: dict[str, Any] = load_file(file)
        except FileNotFoundError:
            raise EnsembleError(f"{file} is missing; {_FIX}") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise EnsembleError(f"{file} is damaged ({error}); {_FIX}") from None

    def get(self, name: str, *shape: int) -> Float32s:
        array = self.arrays.get(name)
        if array is None or array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
            raise EnsembleError(
                f"{self.file} is damaged ({name} is no finite float32 array of shape {list(shape)}); {_FIX}"
            )
        return np.asarray(array)

    def size(self, name: str, axis: int) -> int:
        """0 where there is no such array or axis, which `get` then reports."""
        array = self.arrays.get(name)
        return array.shape[axis] if array is not None and array.ndim > axis else 0
