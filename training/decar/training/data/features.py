"""What documents are compared by: their images where they have any, their text otherwise. Never knows experts.

TF-IDF or pixels, and truncated SVD, fitted here; or embedding models.

Shapes: N documents, D features, F terms, S side of a square in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from decar.router.errors import TrainingError
from decar.router.features import TERM, EmbeddingFeatures, Features, TfidfFeatures, unit_rows
from decar.router.images import ImageEmbeddingFeatures, PixelFeatures, decode_image, pixels
from decar.training.checkpoint_files import check_files
from decar.training.config import PartitionConfig
from decar.training.data.corpus import Corpus
from decar.training.data.sources import Document

if TYPE_CHECKING:
    from PIL.Image import Image

DocumentFeatures = Callable[[Sequence[Document]], NDArray[np.float32]]
"""Documents to [N, D], rows of unit length; zeros where there is nothing to tell a document by."""
_EMBEDDING_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


def document_features(config: PartitionConfig, corpus: Corpus, seed: int) -> DocumentFeatures:
    """What a partition compares documents by; what is to be fitted, is fitted to the sample of ``corpus``.

    A document with images has features of its images alone, one without has features of its text alone; the two kinds
    have nothing in common, so their cosine is zero.

    Raises:
        TrainingError: there are no words.
    """
    parts = []
    if corpus.has_images:
        parts.append(_of_images(config, corpus, seed))
    if not corpus.with_images.all():
        parts.append(_of_texts(config, corpus, seed))
    if len(parts) == 1:
        return parts[0]

    def features(documents: Sequence[Document]) -> NDArray[np.float32]:
        return np.concatenate([part(documents) for part in parts], axis=1)

    return features


def _of_texts(config: PartitionConfig, corpus: Corpus, seed: int) -> DocumentFeatures:
    model: Features[str]
    if config.embedding is not None:
        model = EmbeddingFeatures(config.embedding)
    else:
        texts = [document.text for batch in corpus.sample_of(~corpus.with_images) for document in batch]
        model = fit_features(texts, config.num_features, config.num_components, seed)

    def features(documents: Sequence[Document]) -> NDArray[np.float32]:
        pictured = np.array([bool(document.images) for document in documents])
        texts = ["" if document.images else document.text for document in documents]
        return np.where(pictured[:, None], 0, model(texts)).astype(np.float32)

    return features


def _of_images(config: PartitionConfig, corpus: Corpus, seed: int) -> DocumentFeatures:
    model: Features[Sequence[Image]]
    if config.image_embedding is not None:
        model = ImageEmbeddingFeatures(config.image_embedding)
    else:
        images = (
            [decode_image(image) for document in batch for image in document.images]
            for batch in corpus.sample_of(corpus.with_images)
        )
        model = fit_pixels(images, config.image_side, config.num_components, seed)

    def features(documents: Sequence[Document]) -> NDArray[np.float32]:
        groups = [[decode_image(image) for image in document.images] for document in documents]
        return model(groups).astype(np.float32)

    return features


def fit_pixels(
    batches: Iterable[Sequence[Image]], side: int, num_components: int, seed: int
) -> PixelFeatures:
    """Mean and SVD of images as squares of ``side`` pixels, as a router can keep it."""
    # [N, S·S·3]: what is small of each image, whatever its size.
    values = np.concatenate([pixels(images, side).astype(np.float32) for images in batches])
    mean = values.mean(axis=0)
    return PixelFeatures(side, mean, fit_components(values - mean, num_components, seed).astype(np.float32))


def embedding_files(directory: Path | None, setting: str) -> list[Path]:
    """The files of the Hugging Face model in ``directory``; none where there is no directory.

    Args:
        setting: the field of the configuration that names the directory.

    Raises:
        TrainingError: no model is there, or a file of it is not whole.
    """
    if directory is None:
        return []
    files = sorted({file for pattern in _EMBEDDING_FILES for file in directory.glob(pattern)})
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise TrainingError(
            f"{setting}: {directory} holds no config.json with *.safetensors; save a model there"
        )
    check_files(directory, setting)
    return files


def fit_tfidf(texts: Iterable[str], num_features: int) -> tuple[Any, Any]:
    """(the fitted scikit-learn vectoriser of F terms, the sparse matrix [N, F] of ``texts``).

    Raises:
        TrainingError: there are no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        max_features=num_features, sublinear_tf=True, token_pattern=TERM, dtype=np.float64
    )
    try:
        return vectorizer, vectorizer.fit_transform(texts)
    except ValueError:
        raise TrainingError("the documents hold no words to tell them apart by") from None


def fit_components(rows: Any, num_components: int, seed: int) -> NDArray[np.float64]:
    """The leading directions [D, F] of ``rows`` [N, F], sparse or not; D at most ``num_components``."""
    from sklearn.decomposition import TruncatedSVD

    num_components = min(num_components, min(rows.shape) - 1)
    if num_components < 1:  # one text or one term: scikit-learn refuses
        return unit_rows(np.atleast_2d(np.asarray(rows.sum(axis=0))))
    with np.errstate(invalid="ignore"):  # equal rows have no variance to explain: 0 / 0
        return TruncatedSVD(num_components, random_state=seed).fit(rows).components_


def fit_features(texts: list[str], num_features: int, num_components: int, seed: int) -> TfidfFeatures:
    """TF-IDF and SVD of ``texts``, as a router can keep it.

    Raises:
        TrainingError: there are no words.
    """
    vectorizer, tfidf = fit_tfidf(texts, num_features)
    return TfidfFeatures(
        tuple(vectorizer.get_feature_names_out()),
        vectorizer.idf_.astype(np.float32),
        fit_components(tfidf, num_components, seed).astype(np.float32),
    )
