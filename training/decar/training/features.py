"""Fitting TF-IDF and truncated SVD, for the partition and for the router. Knows texts only, never experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from decar.router.errors import TrainingError
from decar.router.features import TERM, TfidfFeatures, unit_rows


def fit_tfidf(texts: list[str], num_features: int) -> tuple[Any, Any]:
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


def embed(tfidf: Any, components: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of unit length [N, D]."""
    return unit_rows(np.asarray(tfidf @ components.T))


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
