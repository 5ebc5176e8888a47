"""Tiny ensembles, built once per session."""

import importlib
import os
from collections.abc import Sequence

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, by whomever, and when kernels run (tests/kernels/conftest.py).
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("decar.kernels.fused")
    del os.environ["TRITON_INTERPRET"]

from tests.reference import ExpertSpec, Reference, make_ensemble

DUO = (ExpertSpec("code", "llama", 1, 0.5), ExpertSpec("prose", "llama", 2, 0.5))
TRIO = (
    ExpertSpec(
        "maths", "llama-padded", 5, 0.2
    ),  # first, where its larger vocabulary is most easily taken for all's
    ExpertSpec("code", "llama", 3, 0.5),
    ExpertSpec("prose", "qwen2", 4, 0.3),
)
TWINS = (ExpertSpec("left", "llama", 6, 0.4), ExpertSpec("right", "llama", 6, 0.6))


def _built(factory: pytest.TempPathFactory, name: str, specs: Sequence[ExpertSpec]) -> Reference:
    return Reference.load(make_ensemble(factory.mktemp("ensembles") / name, specs, name=name))


@pytest.fixture(scope="session")
def duo(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """K=2 Llamas."""
    return _built(tmp_path_factory, "duo", DUO)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """K=3: one of another architecture, one with a padded vocabulary."""
    return _built(tmp_path_factory, "trio", TRIO)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """K=2 with equal weights."""
    return _built(tmp_path_factory, "twins", TWINS)
