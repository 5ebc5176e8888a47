"""Routers that read text, from a file of each expert's texts. The fitting is decar-train's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from decar.router.errors import EnsembleError, TrainingError
from decar.training.config import RouterConfig
from decar.training.new.texts import sample_texts
from decar.training.router.stage import Fitted, RouterReport, fit_to_texts

HELD_OUT = 0.1
PIECE_CHARS = 2_000
"""Texts are cut to this, so that a few long ones are many to learn from."""
_SEED = 0


def fit_routers(files: Mapping[str, Path]) -> tuple[Fitted[str], RouterReport]:
    """Classifier and centroids of the texts in ``files``, by expert; a tenth of each file's is held out to calibrate
    and measure them.

    Raises:
        EnsembleError: a file is missing, cannot be read, or has fewer than two texts.
    """
    settings = RouterConfig()
    of_each = settings.sample // len(files)
    rng = np.random.default_rng(_SEED)
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    for name, file in files.items():
        texts = sample_texts(f"--data {name}", file, of_each, PIECE_CHARS, cut_rows=True)
        if len(texts) < 2:
            raise EnsembleError(
                f"--data {name}: {file} holds one text of at most {PIECE_CHARS:,} characters; a router "
                "needs some to learn from and others to be measured on, a hundred or more"
            )
        order = rng.permutation(len(texts)).tolist()
        count = max(round(HELD_OUT * len(texts)), 1)
        held_out.append([texts[i] for i in order[:count]])
        train.append([texts[i] for i in order[count:]])
    labels = np.repeat(np.arange(len(train)), [len(texts) for texts in train])
    try:
        texts = [text for shard in train for text in shard]
        return fit_to_texts(list(files), settings, _SEED, texts, labels, held_out)
    except TrainingError as error:
        raise EnsembleError(f"--data: {error}; give texts with words") from None
