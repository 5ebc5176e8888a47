"""What documents are compared by: TF-IDF and truncated SVD, fitted here, or an embedding model. Never knows experts.

Shapes: N documents, D features, F terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decar.router.errors import TrainingError
from decar.router.features import TERM, EmbeddingFeatures, Features, TfidfFeatures, unit_rows
from decar.training.config import PartitionConfig
from decar.training.sources import Document

DocumentFeatures = Callable[[Sequence[Document]], NDArray[np.float32]]
"""Documents to [N, D], rows of unit length; zeros where there is nothing to tell a document by."""
_EMBEDDING_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


def document_features(config: PartitionConfig, sample: Sequence[Document], seed: int) -> DocumentFeatures:
    """What a partition compares documents by; what is to be fitted, is fitted to ``sample``.

    A model that looks at something else of a document than its text is chosen here, and nowhere else.

    Raises:
        TrainingError: there are no words.
    """
    model: Features
    if config.embedding is not None:
        model = EmbeddingFeatures(config.embedding)
    else:
        texts = [document.text for document in sample]
        model = fit_features(texts, config.num_features, config.num_components, seed)

    def features(documents: Sequence[Document]) -> NDArray[np.float32]:
        return model([document.text for document in documents]).astype(np.float32)

    return features


def embedding_files(directory: Path | None, setting: str) -> list[Path]:
    """The files of the Hugging Face model in ``directory``; none where there is no directory.

    Args:
        setting: the field of the configuration that names the directory.

    Raises:
        TrainingError: no model is there.
    """
    if directory is None:
        return []
    files = sorted({file for pattern in _EMBEDDING_FILES for file in directory.glob(pattern)})
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise TrainingError(
            f"{setting}: {directory} holds no config.json with *.safetensors; save a model there"
        )
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


def fit_components(tfidf: Any, num_components: int, seed: int) -> NDArray[np.float64]:
    """The leading directions [D, F] of ``tfidf`` [N, F], D at most ``num_components``."""
    from sklearn.decomposition import TruncatedSVD

    num_components = min(num_components, min(tfidf.shape) - 1)
    if num_components < 1:  # one text or one term: scikit-learn refuses
        return unit_rows(np.asarray(tfidf.sum(axis=0)))
    return TruncatedSVD(num_components, random_state=seed).fit(tfidf).components_


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
