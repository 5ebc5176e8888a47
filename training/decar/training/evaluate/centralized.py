"""The centralized twin: one model of an expert's architecture, trained on all shards with all the experts' compute.

Knows the experts' reports and shards, never their weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig
from decar.training.expert.stage import (
    ExpertReport,
    expert_stage,
    read_expert_report,
    train_model,
)
from decar.training.stages import Stage, fingerprint


def why_no_twin(config: TrainConfig) -> str | None:
    """Why there is no centralized model to compare with, or None where there is one."""
    first = config.expert_names[0]
    for name in config.expert_names:
        if config.model_of(name) != config.model_of(first):
            return (
                f"experts {first!r} and {name!r} have different models; a centralized model to compare with is "
                "defined for experts of one architecture"
            )
    return None


def with_all_compute(config: TrainConfig) -> TrainConfig:
    """``config`` with as many steps as all trained experts took together, none fewer; a step is as large as theirs.

    Raises:
        TrainingError: an expert's report is missing, or experts differ in architecture, so that steps do not add up.
    """
    problem = why_no_twin(config)
    if problem:
        raise TrainingError(problem)
    reports = [read_expert_report(config.run.expert(name)) for name in config.expert_names]
    steps = sum(report.steps for report in reports)
    own = {"max_steps": steps, "patience": None}
    return config.model_copy(update={"training": config.training.model_copy(update=own)})


def centralized_stage(config: TrainConfig) -> Stage:
    """The stage as ``config``, all shards and the tokenizer are now.

    Raises:
        TrainingError: shards or experts are missing, or made with another configuration.
    """
    twin = with_all_compute(config)
    stages = [expert_stage(twin, name) for name in config.expert_names]
    return Stage(config.run.centralized, stages[0].config, fingerprint([s.inputs for s in stages]))


def train_centralized(config: TrainConfig, stage: Stage, callbacks: Iterable[Any] = ()) -> ExpertReport:
    """Train the twin, from its last complete checkpoint if there is one, and put it in place.

    Raises:
        TrainingError: an unusable model, shard or tokenizer.
    """
    names = config.expert_names
    return train_model(with_all_compute(config), names[0], names, stage, callbacks)
