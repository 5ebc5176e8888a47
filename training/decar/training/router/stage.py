"""The router stage: classifier and centroids from the shards, calibrated and measured on what is held out.

One router is for texts; where every expert knows images, a second one is for images. Knows texts, images and whose
they are, never an expert's weights.

Shapes: N prefixes, K experts, D features.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from decar.router.features import EmbeddingFeatures, Features
from decar.router.files import (
    EMBEDDING_FOLDER,
    IMAGE_FOLDER,
    Centroids,
    Classifier,
    Metric,
    TrainedRouter,
    write_router,
)
from decar.router.images import ImageEmbeddingFeatures, decode_image
from decar.router.posterior import Float64s, log_normalise, log_prior
from decar.router.routers import centroid_scores, classifier_scores
from decar.training.config import RouterConfig, TrainConfig
from decar.training.data.corpus import IMAGES_FIELD
from decar.training.data.features import embedding_files, fit_features, fit_pixels
from decar.training.data.shards import check_marker, has_column, read_images, read_texts
from decar.training.fingerprints import partition_fingerprint, router_fingerprint
from decar.training.plots import pyplot
from decar.training.run import SPLITS, Run, plot_file, read_report, report_file, require
from decar.training.stages import Stage, digest

if TYPE_CHECKING:
    from PIL.Image import Image

SHORTEST_CHARS = 16
_NUM_BINS = 10
_LOG_TEMPERATURES = (np.log(1e-3), np.log(1e3))

# Whose images are in memory at once.
_IMAGE_DOCUMENTS = 64

Labels = NDArray[np.int64]
Prompt = TypeVar("Prompt")


class Quality(BaseModel):
    """How well weights predict whose a prefix is: ``nll`` in nats; ``ece``, the expected calibration error, over
    ten bins of the largest weight (Guo et al. 2017, arXiv 1706.04599)."""

    prefixes: int
    accuracy: float
    nll: float
    ece: float


class RouterQuality(BaseModel):
    """``by_length``: characters of the prefix, as text since JSON has no other keys. ``reliability``: for each bin
    (mean largest weight, accuracy, prefixes)."""

    temperature: float | None
    all_lengths: Quality
    by_length: dict[str, Quality]
    reliability: list[tuple[float, float, int]]


class ImageReport(BaseModel):
    """The router for images: documents with images it was trained on, and each router on those held out."""

    train_documents: int
    routers: dict[str, Quality]


class RouterReport(BaseModel):
    """``report.json``. Held-out text, and images, at temperatures that were tuned on the other half of it."""

    experts: list[str]
    train_prefixes: int
    routers: dict[str, RouterQuality]
    images: ImageReport | None = None

    @property
    def lengths(self) -> list[str]:
        """Those of ``by_length``, alike for all routers."""
        return list(self.routers["prior"].by_length)


@dataclass(frozen=True)
class Prefixes:
    """Beginnings of documents: texts, their experts [N], the document each is from [N]."""

    texts: list[str]
    labels: Labels
    documents: Labels

    @property
    def lengths(self) -> Labels:
        return np.array([len(text) for text in self.texts])


def router_stage(config: TrainConfig) -> Stage:
    """The stage as ``config``, the shards and the embedding model are now.

    Raises:
        TrainingError: shards are missing or made with another configuration, or there is no usable embedding model.
    """
    files = [config.run.shard(name, split) for name in config.expert_names for split in SPLITS]
    require(config.run.partition, *files)
    check_marker(config.run.partition, partition_fingerprint(config))
    files += embedding_files(config.router.embedding, "router.embedding")
    files += embedding_files(config.router.image_embedding, "router.image_embedding")
    return Stage(config.run.router, router_fingerprint(config), digest(*files))


def read_router_report(stage: Stage) -> RouterReport:
    """The report of a finished router stage.

    Raises:
        TrainingError: it is missing or damaged.
    """
    return read_report(stage.directory, RouterReport)


@dataclass(frozen=True)
class Known:
    """What is known of prompts: features ``rows`` [N, D], their experts ``labels`` [N] and the ``documents`` [N] they
    are from."""

    rows: Float64s
    labels: Labels
    documents: Labels


@dataclass(frozen=True)
class Fitted(Generic[Prompt]):
    """A trained router, and the held-out log weights [N, K] that each kind gives when it is calibrated on others."""

    router: TrainedRouter[Prompt]
    held_out: dict[str, Float64s]

    def temperature(self, kind: str) -> float | None:
        temperatures = {
            "centroid": self.router.centroids.temperature,
            "classifier": self.router.classifier.temperature,
        }
        return temperatures.get(kind)


def train_router(run: Run, settings: RouterConfig, seed: int, stage: Stage) -> RouterReport:
    """Fit features, classifier and centroids, tune their temperatures, measure them, and put all in place.

    Raises:
        TrainingError: the shards hold no words, or an embedding model cannot be read.
    """
    fitted, report = fit_to_texts(run.experts, settings, seed, *_texts(run, settings.sample))
    images, report.images = _fit_images(run, settings, seed)
    with stage.writing() as directory:
        _write(fitted.router, directory, settings.embedding, "router.embedding")
        if images is not None:
            (directory / IMAGE_FOLDER).mkdir()
            _write(
                images.router, directory / IMAGE_FOLDER, settings.image_embedding, "router.image_embedding"
            )
        report_file(directory).write_text(report.model_dump_json(indent=2) + "\n")
        _plot(report, plot_file(directory, "calibration"))
    return report


def fit_to_texts(
    names: Sequence[str],
    settings: RouterConfig,
    seed: int,
    texts: list[str],
    labels: Labels,
    held_out_texts: list[list[str]],
) -> tuple[Fitted[str], RouterReport]:
    """Classifier and centroids of ``texts``, of experts ``labels`` [N], and how well they do on each expert's held-out
    texts.

    Raises:
        TrainingError: there are no words.
        EnsembleError: an embedding model cannot be read.
    """
    features: Features[str]
    if settings.embedding is not None:
        features = EmbeddingFeatures(settings.embedding)
    else:
        features = fit_features(texts, settings.num_features, settings.num_components, seed)
    train = draw_prefixes(texts, labels, settings.prefixes_per_document, seed)
    held_out = held_out_prefixes(held_out_texts)
    known = Known(features(held_out.texts), held_out.labels, held_out.documents)
    prefixes = Known(features(train.texts), train.labels, train.documents)
    whole = Known(features(texts), labels, np.arange(len(texts)))
    fitted = _fit(names, settings.centroid_metric, features, prefixes, whole, known)
    report = RouterReport(
        experts=list(names),
        train_prefixes=len(train.texts),
        routers={
            kind: _quality(log_weights, held_out, fitted.temperature(kind))
            for kind, log_weights in fitted.held_out.items()
        },
    )
    return fitted, report


def _write(router: TrainedRouter[Any], folder: Path, embedding: Path | None, setting: str) -> None:
    if embedding is not None:
        (folder / EMBEDDING_FOLDER).mkdir()
        for file in embedding_files(embedding, setting):
            shutil.copyfile(file, folder / EMBEDDING_FOLDER / file.name)
    write_router(router, folder)


def _fit(
    names: Sequence[str],
    metric: Metric,
    features: Features[Prompt],
    prompts: Known,
    whole: Known,
    held_out: Known,
) -> Fitted[Prompt]:
    """A classifier of ``prompts`` and the centroids of ``whole`` documents, calibrated and tried on ``held_out``."""
    num_experts = len(names)
    weight, bias = fit_classifier(prompts.rows, prompts.labels, num_experts)
    means = np.stack([whole.rows[whole.labels == k].mean(axis=0) for k in range(num_experts)])
    means = means.astype(np.float32)
    # Documents are held out as they come, so each expert's share of them is the prior that they were drawn with.
    shares = log_prior(np.bincount(whole.labels, minlength=num_experts).tolist())
    flat = np.zeros(num_experts)
    by_classifier = classifier_scores(held_out.rows, Classifier(weight, bias, 1.0))
    by_centroid = centroid_scores(held_out.rows, Centroids(means, metric, 1.0))
    router = TrainedRouter(
        tuple(names),
        features,
        Classifier(weight, bias, fit_temperature(by_classifier, held_out.labels, shares)),
        Centroids(means, metric, fit_temperature(by_centroid, held_out.labels, flat)),
    )
    return Fitted(
        router,
        {
            "prior": np.tile(shares, (len(held_out.rows), 1)),
            "centroid": _cross_fitted(by_centroid, held_out, flat),
            "classifier": _cross_fitted(by_classifier, held_out, shares),
        },
    )


def _texts(run: Run, sample: int) -> tuple[list[str], Labels, list[list[str]]]:
    """(training texts, their experts, each expert's held-out texts): those without images, if every expert has some.

    What is said of an image says little of whose it is, but in a corpus of images it is all that a text can go by.
    Of a large corpus they are a sample: every n-th document of every shard.
    """
    train, held_out = (_sampled(run.shards(split), sample, _texts_without_images) for split in SPLITS)
    if not all([*train, *held_out]):
        train, held_out = (_sampled(run.shards(split), sample, read_texts) for split in SPLITS)
    labels = np.repeat(np.arange(len(train)), [len(texts) for texts in train])
    return [text for shard in train for text in shard], labels, held_out


def _sampled(shards: Sequence[Path], sample: int, read: Callable[[Path], Iterator[str]]) -> list[list[str]]:
    """The texts of each shard, thinned out alike, to ``sample`` in all."""
    counts = [sum(1 for _ in read(shard)) for shard in shards]
    step = max(-(-sum(counts) // sample), 1)
    return [list(islice(read(shard), None, None, step)) for shard in shards]


def _texts_without_images(shard: Path) -> Iterator[str]:
    texts = read_texts(shard)
    if not has_column(shard, IMAGES_FIELD):
        return texts
    return (text for text, images in zip(texts, read_images(shard), strict=True) if not images)


def _fit_images(
    run: Run, settings: RouterConfig, seed: int
) -> tuple[Fitted[Sequence[Image]] | None, ImageReport | None]:
    """The router for images and its report, or None where an expert has no image to train on or none held out."""
    counts = {split: [sum(map(bool, read_images(shard))) for shard in run.shards(split)] for split in SPLITS}
    if not all(count for per_expert in counts.values() for count in per_expert):
        return None, None
    features: Features[Sequence[Image]]
    if settings.image_embedding is not None:
        features = ImageEmbeddingFeatures(settings.image_embedding)
    else:
        step = -(-sum(counts["train"]) // settings.sample)
        groups = (group for shard in run.shards("train") for group in read_images(shard) if group)
        images = ([decode_image(image) for image in group] for group in islice(groups, None, None, step))
        features = fit_pixels(images, settings.image_side, settings.num_components, seed)
    train, held_out = (_image_features(run.shards(split), features) for split in SPLITS)
    fitted = _fit(run.experts, settings.centroid_metric, features, train, train, held_out)
    report = ImageReport(
        train_documents=len(train.rows),
        routers={
            kind: quality_of(log_weights, held_out.labels) for kind, log_weights in fitted.held_out.items()
        },
    )
    return fitted, report


def _image_features(shards: Sequence[Path], features: Features[Sequence[Image]]) -> Known:
    """Of each document with images. They are decoded a few at a time."""
    rows = []
    labels: list[int] = []
    for k, shard in enumerate(shards):
        groups = (group for group in read_images(shard) if group)
        while batch := list(islice(groups, _IMAGE_DOCUMENTS)):
            rows.append(features([[decode_image(image) for image in group] for group in batch]))
            labels += [k] * len(batch)
    return Known(np.concatenate(rows), np.array(labels), np.arange(len(labels)))


def draw_prefixes(texts: list[str], labels: Labels, per_document: int, seed: int) -> Prefixes:
    """Beginnings of lengths drawn log-uniformly: p(S_k | prefix) changes most while a text is short."""
    rng = np.random.default_rng(seed)
    longest = np.log([max(len(text), 1) for text in texts])[:, None]
    shortest = np.minimum(np.log(SHORTEST_CHARS), longest)
    lengths = np.exp(rng.uniform(shortest, longest, size=(len(texts), per_document))).round().astype(np.int64)
    return Prefixes(
        [text[:length] for text, row in zip(texts, lengths, strict=True) for length in row],
        np.repeat(labels, per_document),
        np.repeat(np.arange(len(texts)), per_document),
    )


def held_out_prefixes(shards: Iterable[list[str]]) -> Prefixes:
    """Every document's first 16, 32, 64, … characters; a shorter one whole."""
    found = []
    document = 0
    for label, texts in enumerate(shards):
        for text in texts:
            length = min(SHORTEST_CHARS, len(text))
            while length and length <= len(text):
                found.append((text[:length], label, document))
                length *= 2
            document += 1
    prefixes, labels, documents = zip(*found, strict=True)
    return Prefixes(list(prefixes), np.array(labels), np.array(documents))


def fit_classifier(
    features: Float64s, labels: Labels, num_experts: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight [K, D] and bias [K] of a logistic regression to which all experts are equally likely beforehand."""
    from sklearn.linear_model import LogisticRegression

    if num_experts == 1:
        return np.zeros((1, features.shape[1]), np.float32), np.zeros(1, np.float32)
    model = LogisticRegression(class_weight="balanced", max_iter=1_000).fit(features, labels)
    weight, bias = model.coef_, model.intercept_
    if num_experts == 2:  # scikit-learn keeps one logit, that of the second
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight.astype(np.float32), bias.astype(np.float32)


def fit_temperature(scores: Float64s, labels: Labels, log_priors: Float64s) -> float:
    """The T that makes log π_k + scores_k / T the most likely, of scores [N, K].

    Targets are Platt's ("Probabilistic outputs for support vector machines", 1999): experts that are told apart
    without error would else ask for endless confidence.
    """
    from scipy.optimize import minimize_scalar

    num_prefixes, num_experts = scores.shape
    targets = np.full(scores.shape, 1.0 / (num_prefixes + num_experts))
    targets[np.arange(num_prefixes), labels] = (num_prefixes + 1.0) / (num_prefixes + num_experts)

    def loss(log_temperature: float) -> float:
        return -float((targets * log_normalise(log_priors + scores / np.exp(log_temperature))).sum())

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded").x))


def _cross_fitted(scores: Float64s, prompts: Known, log_priors: Float64s) -> Float64s:
    """Log weights [N, K] of each half of the documents, at the temperature that suits the other half."""
    log_weights = np.empty_like(scores)
    half = prompts.documents % 2 == 0
    for mine in (half, ~half):
        # One document alone has no other half.
        others = ~mine if (~mine).any() else mine
        temperature = fit_temperature(scores[others], prompts.labels[others], log_priors)
        log_weights[mine] = log_normalise(log_priors + scores[mine] / temperature)
    return log_weights


def _quality(log_weights: Float64s, prefixes: Prefixes, temperature: float | None) -> RouterQuality:
    lengths = prefixes.lengths
    return RouterQuality(
        temperature=temperature,
        all_lengths=quality_of(log_weights, prefixes.labels),
        by_length={
            str(length): quality_of(log_weights[lengths == length], prefixes.labels[lengths == length])
            for length in np.unique(lengths[lengths >= SHORTEST_CHARS])
        },
        reliability=_reliability(log_weights, prefixes.labels),
    )


def quality_of(log_weights: Float64s, labels: Labels) -> Quality:
    """Accuracy, mean negative log-likelihood and expected calibration error of weights [N, K] for labels [N]."""
    bins = _reliability(log_weights, labels)
    return Quality(
        prefixes=len(labels),
        accuracy=float((log_weights.argmax(axis=1) == labels).mean()),
        nll=-float(log_weights[np.arange(len(labels)), labels].mean()),
        ece=sum(abs(confidence - accuracy) * count for confidence, accuracy, count in bins) / len(labels),
    )


def _reliability(log_weights: Float64s, labels: Labels) -> list[tuple[float, float, int]]:
    confidence = np.exp(log_weights.max(axis=1))
    correct = log_weights.argmax(axis=1) == labels
    bins = np.minimum((confidence * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    return [
        (float(confidence[bins == b].mean()), float(correct[bins == b].mean()), int((bins == b).sum()))
        for b in np.unique(bins)
    ]


def _plot(report: RouterReport, path: Path) -> None:
    """Accuracy and NLL against the length of the prefix, and accuracy against confidence."""
    plt = pyplot()

    figure, (accuracy, nll, calibration) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for name, router in report.routers.items():
        lengths = [int(length) for length in router.by_length]
        accuracy.plot(lengths, [q.accuracy for q in router.by_length.values()], marker="o", label=name)
        nll.plot(lengths, [q.nll for q in router.by_length.values()], marker="o", label=name)
        confidence, correct, _ = zip(*router.reliability, strict=True)
        calibration.plot(confidence, correct, marker="o", label=f"{name}, error {router.all_lengths.ece:.3f}")
    calibration.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for axis, title, unit in ((accuracy, "accuracy", "share"), (nll, "negative log-likelihood", "nats")):
        axis.set(title=title, xlabel="characters of the prefix", ylabel=unit)
        axis.set_xscale("log", base=2)
    calibration.set(title="calibration, all lengths", xlabel="largest weight", ylabel="accuracy")
    for axis in (accuracy, nll, calibration):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(f"routers of {', '.join(report.experts)} on held-out text")
    figure.savefig(path, dpi=130)
    plt.close(figure)
