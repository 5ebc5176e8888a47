"""What a partition looks like: sizes, silhouette, terms, examples, pictures. Knows labels, not how they came about.

Shapes: N documents of the sample, K experts, D features, F terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.router.images import decode_image
from decar.training.data.features import fit_tfidf
from decar.training.plots import pyplot

Labels = NDArray[np.int64]
Rows = NDArray[np.float32]

SHEET_COLUMNS = 12
_TOP_TERMS = 12
_NEAREST = 3
_SNIPPET_CHARS = 200
_THUMBNAIL_PIXELS = 96
# The silhouette costs N² distances, and no more points can be told apart in a picture.
_LOOKED_AT = 5_000


class FormatReport(BaseModel):
    """The training ``documents`` of one expert that the data hold in one ``format``.

    The first of them is in row ``row``, from 0, of the shard; it comes from ``source``, and is the ``text``-th, from 1,
    of all texts and chats that were read.
    """

    format: str
    documents: int
    row: int
    source: str
    text: int


class Repeated(BaseModel):
    """A document that is there several ``times``; ``begins`` is the start of it, on one line."""

    times: int
    begins: str


class ShardReport(BaseModel):
    """What one expert received. ``top_terms`` and ``nearest``, the beginnings of the documents that are nearest to the
    expert's centroid, are of the sample. ``formats`` is empty in reports of older versions."""

    expert: str
    train_documents: int
    held_out_documents: int
    train_chars: int
    sources: dict[str, int]
    top_terms: list[str]
    nearest: list[str]
    formats: list[FormatReport] = []


class PartitionReport(BaseModel):
    """``report.json`` of a partition.

    Of the ``texts`` that were read, chats included, in ``formats``, some were ``dropped``, by reason; ``documents`` are
    what the others were cut into. ``left_out`` says what of the folders in ``data.files`` was not read.
    ``held_out_duplicates`` held-out documents are among the training documents too, and were removed from the held-out
    ones or kept; ``held_out_duplicate`` is the start of the first of them. ``duplicates`` training documents, of
    whichever expert, say what an earlier one says, and were kept (None in reports of older versions); ``most_repeated``
    is the one that is there most often. ``balance``: the largest expert's documents over the smallest's. Of the
    ``sample`` documents: ``mean_cosine`` to their expert's centroid; ``silhouette`` (Rousseeuw 1987) by cosine
    distance, None where it is not defined.
    ``skipped_lines`` of each file were bad; ``first_skipped`` says what was wrong with the first.
    """

    method: str
    texts: int
    formats: dict[str, int] = {}
    dropped: dict[str, int]
    left_out: dict[str, int] = {}
    documents: int
    held_out_duplicates: int
    duplicates_removed: bool
    balance: float
    sample: int
    mean_cosine: float
    silhouette: float | None
    skipped_lines: dict[str, int]
    first_skipped: str | None
    shards: list[ShardReport]
    held_out_duplicate: str | None = None
    duplicates: int | None = None
    most_repeated: Repeated | None = None


def centroids(features: Rows, labels: Labels, num_experts: int) -> Rows:
    """[K, D] of unit length; zeros for an expert without documents in the sample."""
    sums = np.stack([features[labels == k].sum(axis=0) for k in range(num_experts)])
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.asarray(sums / np.where(norms > 0, norms, 1.0))


def silhouette(features: Rows, labels: Labels, seed: int) -> float | None:
    """The mean silhouette of at most 5,000 documents, by cosine distance; None where one expert has all of them."""
    from sklearn.metrics import silhouette_score

    some = _some(len(labels), _LOOKED_AT, seed)
    if not 2 <= len(np.unique(labels[some])) < len(some):
        return None
    return float(silhouette_score(features[some], labels[some], metric="cosine"))


def top_terms(
    texts: Sequence[str], labels: Labels, num_experts: int, num_features: int, seed: int
) -> list[list[str]]:
    """Of each expert, the terms whose mean TF-IDF weight stands out most from all documents', of at most 5,000."""
    some = _some(len(labels), _LOOKED_AT, seed)
    try:
        vectorizer, tfidf = fit_tfidf([texts[i] for i in some], num_features)
    except TrainingError:  # no words, which an embedding model can do without
        return [[] for _ in range(num_experts)]
    terms = vectorizer.get_feature_names_out()
    found = []
    for k in range(num_experts):
        members = labels[some] == k
        if members.any():
            contrast = np.asarray(tfidf[members].mean(axis=0) - tfidf.mean(axis=0)).ravel()
        else:
            contrast = np.zeros(len(terms))
        best = np.argsort(-contrast, kind="stable")[:_TOP_TERMS]
        found.append([str(terms[i]) for i in best if contrast[i] > 0])
    return found


def nearest(texts: Sequence[str], features: Rows, labels: Labels, expert: int, centroid: Rows) -> list[str]:
    """The beginnings, on one line, of the documents of ``expert`` that are nearest to ``centroid`` [D]."""
    best = nearest_members(features, labels, expert, centroid, _NEAREST)
    return [snippet(texts[i]) for i in best]


def snippet(text: str) -> str:
    """The beginning of ``text``, on one line."""
    return " ".join(text[: 2 * _SNIPPET_CHARS].split())[:_SNIPPET_CHARS]


def nearest_members(features: Rows, labels: Labels, expert: int, centroid: Rows, most: int) -> Labels:
    """The numbers of the ``most`` documents of ``expert`` that are nearest to ``centroid`` [D]."""
    members = np.flatnonzero(labels == expert)
    return members[np.argsort(-(features[members] @ centroid), kind="stable")[:most]]


def draw_sheet(images: Mapping[str, Sequence[bytes]], title: str, file: Path) -> None:
    """A contact sheet: a row of small ``images``, encoded, for each expert."""
    plt = pyplot()

    size = (SHEET_COLUMNS + 2, len(images) + 0.8)
    figure, axes = plt.subplots(len(images), SHEET_COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for (name, row), places in zip(images.items(), axes, strict=True):
        places[0].set_ylabel(name, rotation="horizontal", ha="right", va="center")
        for encoded, axis in zip(row, places, strict=False):
            small = decode_image(encoded)
            small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
            axis.imshow(small)
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_map(features: Rows, labels: Labels, names: Sequence[str], title: str, seed: int, file: Path) -> None:
    """A picture of at most 5,000 documents and the centroids, on the features' two principal components."""
    from sklearn.decomposition import PCA

    plt = pyplot()
    some = _some(len(labels), _LOOKED_AT, seed)
    middles = centroids(features, labels, len(names))
    # A missing second component (one document, one feature) is drawn as zero.
    flat = np.zeros((len(some) + len(names), 2))
    components = min(2, len(some), features.shape[1])
    pca = PCA(components, random_state=seed).fit(features[some])
    flat[:, :components] = pca.transform(np.concatenate([features[some], middles]))
    shares = [*np.nan_to_num(pca.explained_variance_ratio_), 0.0, 0.0]
    figure, axis = plt.subplots(figsize=(8, 7), layout="constrained")
    colours = plt.get_cmap("tab20" if len(names) > 10 else "tab10").colors
    for k, name in enumerate(names):
        members = np.flatnonzero(labels[some] == k)
        axis.scatter(*flat[members].T, s=6, alpha=0.5, color=colours[k], linewidths=0, label=name)
        axis.scatter(*flat[len(some) + k], s=90, marker="X", color=colours[k], edgecolors="black")
    axis.set(
        title=title,
        xlabel=f"first principal component ({shares[0]:.0%} of the variance)",
        ylabel=f"second ({shares[1]:.0%})",
    )
    axis.legend(markerscale=3, fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _some(number: int, most: int, seed: int) -> Labels:
    if number <= most:
        return np.arange(number)
    return np.sort(np.random.default_rng(seed).choice(number, most, replace=False))
