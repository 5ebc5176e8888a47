"""Texts to unit vectors: TF-IDF and truncated SVD, or a sentence-embedding model. Knows nothing about experts.

Shapes: N texts, D features, F terms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from decar.router.errors import EnsembleError
from decar.router.posterior import Float64s

Float32s = npt.NDArray[np.float32]

# Words, and single punctuation marks: brackets and operators tell code from prose better than most words do.
TERM = r"(?u)\b\w\w+\b|[^\w\s]"
_TERM = re.compile(TERM)
_EMBEDDING_BATCH = 32


Prompt = TypeVar("Prompt", contravariant=True)
"""What weights are asked for: a text, or the images that come with one."""


class Features(Protocol[Prompt]):
    """What a router knows of a prompt."""

    def __call__(self, prompts: Sequence[Prompt], /) -> Float64s:
        """[N, D], rows of unit length; a row of zeros where there is nothing to tell a prompt by."""
        ...


@dataclass(frozen=True)
class TfidfFeatures:
    """Sublinear TF-IDF of ``terms``, projected on the components of a truncated SVD.

    The same numbers as scikit-learn's TfidfVectorizer and TruncatedSVD, which fit them, without needing it to serve.

    Args:
        terms: F, lower case, as ``TERM`` finds them.
        idf: [F].
        components: [D, F].
    """

    terms: tuple[str, ...]
    idf: Float32s
    components: Float32s

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {term: index for index, term in enumerate(self.terms)}

    @cached_property
    def _projection(self) -> Float64s:
        """[F, D]: a text reads the rows of its own terms only."""
        return np.ascontiguousarray(self.components.T, dtype=np.float64) * self.idf[:, None]

    def __call__(self, texts: Sequence[str]) -> Float64s:
        # TF-IDF's own normalisation is left out: it scales a text's projection, whose length is made 1 anyway.
        rows = [self._project(text) for text in texts]
        return unit_rows(np.array(rows).reshape(len(texts), len(self.components)))

    def _project(self, text: str) -> Float64s:
        counts = Counter(_TERM.findall(text.lower()))
        found = [(self._index_of[term], count) for term, count in counts.items() if term in self._index_of]
        if not found:
            return np.zeros(len(self.components))
        index, count = np.array(found).T
        return np.asarray((1 + np.log(count)) @ self._projection[index])


@dataclass(frozen=True)
class EmbeddingFeatures:
    """Mean-pooled last hidden states of the Hugging Face encoder in ``directory``; no remote code, no network."""

    directory: Path

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False
            )
            model = AutoModel.from_pretrained(
                self.directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, KeyError) as error:
            raise EnsembleError(
                f"no embedding model can be read from {self.directory} ({' '.join(str(error).split())})"
            ) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        tokenizer.model_max_length = min(longest, tokenizer.model_max_length)
        return tokenizer, model.eval()

    def __call__(self, texts: Sequence[str]) -> Float64s:
        starts = range(0, len(texts), _EMBEDDING_BATCH)
        rows = [self._embed(texts[start : start + _EMBEDDING_BATCH]) for start in starts]
        return unit_rows(np.concatenate(rows))

    def _embed(self, texts: Sequence[str]) -> Float64s:
        import torch

        tokenizer, model = self._model
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        if not batch["input_ids"].numel():  # empty texts, and no special tokens around them
            return np.zeros((len(texts), model.config.hidden_size))
        mask = batch["attention_mask"].unsqueeze(-1)
        with torch.inference_mode():
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        mean = (hidden.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return mean.double().numpy()


def unit_rows(rows: Float64s) -> Float64s:
    """``rows`` [N, D] at length 1; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0))
