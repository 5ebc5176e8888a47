"""What the gateway lets trained routers read of a prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decar.router import Ensemble, load_trained
from decar.router.features import TfidfFeatures
from decar.router.files import Centroids, Classifier, TrainedRouter, write_router
from decar.router.manifest import Trained
from decar.server.gateway.seats import Seats
from decar.server.gateway.trained_routers import TrainedRouters
from tests.reference import Reference

TERMS = ("whale", "ocean", "self", "return", "<", ">", "/")


@pytest.fixture
def ensemble(trio: Reference, tmp_path: Path) -> Ensemble:
    """The trio, with routers that tell code by what a special token is written with too."""
    copy = Path(shutil.copytree(trio.directory, tmp_path / "trio"))
    features = TfidfFeatures(TERMS, np.ones(len(TERMS), np.float32), np.eye(len(TERMS), dtype=np.float32))
    names = tuple(expert.name for expert in Ensemble.load(copy).experts)
    weight = np.random.default_rng(0).normal(size=(len(names), len(TERMS))).astype(np.float32)
    (copy / "router").mkdir(exist_ok=True)
    write_router(
        TrainedRouter(
            names,
            features,
            Classifier(weight, np.zeros(len(names), np.float32), 0.5),
            Centroids(weight, "cosine", 0.5),
        ),
        copy / "router",
    )
    return Ensemble.load(copy)


@pytest.mark.parametrize("kind", ["classifier", "centroid"])
@pytest.mark.parametrize("text", ["the whale and the ocean", "return self", "<s> is written, ocean"])
async def test_special_tokens_are_no_words_of_the_prompt(
    trio: Reference, ensemble: Ensemble, kind: Trained, text: str
) -> None:
    engine: Any = SimpleNamespace(
        client=SimpleNamespace(renderer=SimpleNamespace(get_tokenizer=lambda: trio.tokenizer))
    )
    seats = Seats(tuple(expert.name for expert in ensemble.experts), (0, 1, 2), 3)
    ids = trio.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert trio.tokenizer.decode(ids) == text
    ends = [trio.tokenizer.bos_token_id], [trio.tokenizer.eos_token_id]
    got = await TrainedRouters(ensemble, engine, seats).log_weights(
        {"prompt_token_ids": [*ends[0], *ids, *ends[1]]}, kind
    )
    np.testing.assert_array_equal(got, load_trained(ensemble)[kind].log_weights([text])[0])
