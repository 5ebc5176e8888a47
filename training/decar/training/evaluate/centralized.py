"""The centralized twin: one model of an expert's architecture, trained on all shards with all the experts' compute.

Knows the experts' reports and shards, never their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from decar.router.errors import TrainingError
from decar.training.config import Recipe, TrainConfig
from decar.training.expert.report import ExpertReport, read_expert_report
from decar.training.expert.stage import expert_stage, train_model
from decar.training.fingerprints import expert_fingerprint
from decar.training.stages import Stage, fingerprint


def why_no_twin(recipes: Sequence[Recipe]) -> str | None:
    """Why there is no centralized model to compare experts of ``recipes`` with, or None where there is one."""
    first, *others = recipes
    for other in others:
        if other.model != first.model:
            return (
                f"experts {first.name!r} and {other.name!r} have different models; a centralized model to compare "
                "with is defined for experts of one architecture"
            )
    return None


def with_all_compute(recipes: Sequence[Recipe]) -> Recipe:
    """An expert's recipe with as many steps as all trained experts took together, none fewer; a step is as large as
    theirs.

    Raises:
        TrainingError: an expert's report is missing, or experts differ in architecture, so that steps do not add up.
    """
    problem = why_no_twin(recipes)
    if problem:
        raise TrainingError(problem)
    steps = sum(read_expert_report(recipe.run.expert(recipe.name)).steps for recipe in recipes)
    training = recipes[0].training.model_copy(update={"max_steps": steps, "patience": None})
    return replace(recipes[0], training=training)


def centralized_stage(config: TrainConfig) -> Stage:
    """The stage as ``config``, all shards and the tokenizer are now.

    Raises:
        TrainingError: shards or experts are missing, or made with another configuration.
    """
    twin = with_all_compute(config.recipes)
    inputs = [expert_stage(config, name).inputs for name in config.expert_names]
    return Stage(config.run.centralized, expert_fingerprint(twin), fingerprint(inputs))


def train_centralized(recipes: Sequence[Recipe], stage: Stage, callbacks: Iterable[Any] = ()) -> ExpertReport:
    """Train the twin, from its last complete checkpoint if there is one, and put it in place.

    Args:
        recipes: the experts'.

    Raises:
        TrainingError: an unusable model, shard or tokenizer.
    """
    shards = [recipe.name for recipe in recipes]
    return train_model(with_all_compute(recipes), shards, stage, callbacks)
