"""Trained routers on disk: what their files hold, written and checked. Knows no ensemble and does no routing.

    router/router.json          whose router it is, terms, temperatures
    router/router.safetensors   every array
    router/embedding/           the sentence-embedding model, where one takes the place of TF-IDF
    router/image/               the same for images, where the experts know any: the side of the square they are
                                resized to in place of terms, or an image-embedding model

Shapes: K experts, D features, F terms, S side in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from decar.router.errors import EnsembleError
from decar.router.features import EmbeddingFeatures, Features, Float32s, TfidfFeatures
from decar.router.images import ImageEmbeddingFeatures, PixelFeatures

if TYPE_CHECKING:
    from PIL.Image import Image

ROUTER_FOLDER = "router"
IMAGE_FOLDER = "image"
EMBEDDING_FOLDER = "embedding"
JSON_NAME = "router.json"
ARRAYS_NAME = "router.safetensors"
_FIX = "`decar-train router CONFIG.yaml`, or `decar new` with --data, makes it"

Metric = Literal["cosine", "euclidean"]
Prompt = TypeVar("Prompt")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Settings(_Strict):
    """``router.json``."""

    format_version: Literal[1] = 1
    experts: tuple[str, ...] = Field(min_length=1)
    classifier_temperature: float = Field(gt=0, allow_inf_nan=False)
    centroid_metric: Metric
    centroid_temperature: float = Field(gt=0, allow_inf_nan=False)


class _TextSettings(_Settings):
    """``terms`` are those of TF-IDF; null where the embedding model is used."""

    terms: tuple[str, ...] | None


class _ImageSettings(_Settings):
    """``side`` is that of pixel features; null where the embedding model is used."""

    side: int | None = Field(gt=0)


AnySettings = TypeVar("AnySettings", bound=_Settings)


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
class TrainedRouter(Generic[Prompt]):
    """All that ``decar-train router`` fits to one kind of prompt, for the experts named in this order."""

    experts: tuple[str, ...]
    features: Features[Prompt]
    classifier: Classifier
    centroids: Centroids


def router_folder(directory: Path) -> Path:
    """Where the ensemble in ``directory`` keeps its router."""
    return directory / ROUTER_FOLDER


def image_router_folder(directory: Path) -> Path:
    """Where the ensemble in ``directory`` keeps its router for images."""
    return router_folder(directory) / IMAGE_FOLDER


def write_router(router: TrainedRouter[Any], folder: Path) -> None:
    """Write ``router`` to ``folder``. The files of an embedding model have to be there already."""
    arrays: dict[str, Float32s] = {
        "classifier.weight": router.classifier.weight,
        "classifier.bias": router.classifier.bias,
        "centroids": router.centroids.centroids,
    }
    features = router.features
    if isinstance(features, TfidfFeatures):
        arrays |= {"tfidf.idf": features.idf, "tfidf.components": features.components}
    if isinstance(features, PixelFeatures):
        arrays |= {"pixels.mean": features.mean, "pixels.components": features.components}
    common: dict[str, Any] = {
        "experts": router.experts,
        "classifier_temperature": router.classifier.temperature,
        "centroid_metric": router.centroids.metric,
        "centroid_temperature": router.centroids.temperature,
    }
    settings: _Settings
    if isinstance(features, PixelFeatures | ImageEmbeddingFeatures):
        settings = _ImageSettings(**common, side=getattr(features, "side", None))
    else:
        settings = _TextSettings(**common, terms=getattr(features, "terms", None))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS_NAME)
    (folder / JSON_NAME).write_text(json.dumps(settings.model_dump(mode="json")) + "\n", encoding="utf-8")


def has_router(folder: Path) -> bool:
    """Whether anything in ``folder`` claims to be a trained router, usable or not."""
    return (folder / JSON_NAME).exists() or (folder / ARRAYS_NAME).exists()


def router_problems(directory: Path, experts: Sequence[str], required: bool) -> list[str]:
    """What is wrong with the routers of the ensemble in ``directory``.

    Args:
        required: there has to be a router for texts. There may be one for images, and none may be wrong.
    """
    folder, images = router_folder(directory), image_router_folder(directory)
    problems = []
    for wanted, read in (
        (required or has_router(folder), lambda: read_router(folder, experts)),
        (has_router(images), lambda: read_image_router(images, experts)),
    ):
        try:
            if wanted:
                read()
        except EnsembleError as error:
            problems.append(str(error))
    return problems


def read_router(folder: Path, experts: Sequence[str]) -> TrainedRouter[str]:
    """The router in ``folder``, checked to be that of ``experts`` in their order. Embedding models load on first use.

    Raises:
        EnsembleError: a file is missing, damaged, or another ensemble's.
    """
    settings = _read_settings(folder / JSON_NAME, _TextSettings, experts)
    arrays = _Arrays(folder / ARRAYS_NAME)
    features: Features[str]
    if settings.terms is None:
        features = EmbeddingFeatures(_embedding(folder))
        num_features = arrays.size("centroids", 1)
    else:
        num_terms = len(settings.terms)
        num_features = arrays.size("tfidf.components", 0)
        features = TfidfFeatures(
            settings.terms,
            arrays.get("tfidf.idf", num_terms),
            arrays.get("tfidf.components", num_features, num_terms),
        )
    return TrainedRouter(settings.experts, features, *_read_weights(settings, arrays, num_features))


def read_image_router(folder: Path, experts: Sequence[str]) -> TrainedRouter[Sequence[Image]]:
    """The router for images in ``folder``, as `read_router`.

    Raises:
        EnsembleError: a file is missing, damaged, or another ensemble's.
    """
    settings = _read_settings(folder / JSON_NAME, _ImageSettings, experts)
    arrays = _Arrays(folder / ARRAYS_NAME)
    features: Features[Sequence[Image]]
    if settings.side is None:
        features = ImageEmbeddingFeatures(_embedding(folder))
        num_features = arrays.size("centroids", 1)
    else:
        num_values = settings.side**2 * 3
        num_features = arrays.size("pixels.components", 0)
        features = PixelFeatures(
            settings.side,
            arrays.get("pixels.mean", num_values),
            arrays.get("pixels.components", num_features, num_values),
        )
    return TrainedRouter(settings.experts, features, *_read_weights(settings, arrays, num_features))


def _embedding(folder: Path) -> Path:
    directory = folder / EMBEDDING_FOLDER
    if not (directory / "config.json").is_file():
        raise EnsembleError(f"{directory / 'config.json'} is missing; {_FIX}")
    return directory


def _read_weights(settings: _Settings, arrays: _Arrays, num_features: int) -> tuple[Classifier, Centroids]:
    num_experts = len(settings.experts)
    return (
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


def _read_settings(file: Path, model: type[AnySettings], experts: Sequence[str]) -> AnySettings:
    try:
        settings = model.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise EnsembleError(f"{file} is missing; {_FIX}") from None
    except OSError as error:
        raise EnsembleError(f"{file} cannot be read ({error.strerror})") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise EnsembleError(f"{file} is damaged ({where}: {first['msg']}); {_FIX}") from None
    if settings.experts != tuple(experts):
        raise EnsembleError(
            f"{file} is a router of the experts {', '.join(settings.experts)}, but the manifest has "
            f"{', '.join(experts)}, in this order; `decar-train router CONFIG.yaml` trains one for them"
        )
    return settings


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
