"""The export stage: trained experts into one ensemble directory, or into one averaged model, each with a model card.

Knows files, never data or training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decar.router.errors import EnsembleError, TrainingError
from decar.router.files import router_folder
from decar.router.manifest import (
    MANIFEST_NAME,
    Ensemble,
    ExpertCheckpoint,
    ExpertEntry,
    Flow,
    FlowDefaults,
    Manifest,
    read_experts,
    write_manifest,
)
from decar.training.config import Recipe, TrainConfig
from decar.training.data.tokenizer import load_tokenizer
from decar.training.expert.report import ExpertReport, priors_of, read_expert_report
from decar.training.export.average import average
from decar.training.export.card import CARD_NAME, Origin, average_card, ensemble_card
from decar.training.fingerprints import expert_fingerprint, export_fingerprint, router_fingerprint
from decar.training.run import NOT_EXPORTED, Run, expert_path
from decar.training.stages import Stage, fingerprint, read_marker, replaced_directory

_COPIED = ("generation_config.json", "chat_template.jinja")
# What of a tokenizer's settings decides how a prompt is rendered, where an answer ends, and what hides a token.
_RENDERING = ("chat_template", "bos_token", "eos_token", "pad_token", "mask_token")


def export_stage(config: TrainConfig) -> Stage:
    """The stage as ``config``, the trained experts and the router are now.

    Raises:
        TrainingError: an expert, or a router that the ensemble needs, is not trained; or one of them was trained
            with another configuration.
    """
    markers = [expert_marker(recipe) for recipe in config.recipes]
    router = read_marker(config.run.router)
    if router is None and config.router.reads_text:
        raise TrainingError("the router is not trained; run `decar-train router` first")
    if router is not None and router["config"] != router_fingerprint(config):
        raise TrainingError(
            "the router was trained with another configuration; run `decar-train router` again"
        )
    return Stage(config.run.export, export_fingerprint(config), fingerprint(markers, router))


def expert_marker(recipe: Recipe) -> dict[str, str]:
    """What says that an expert is trained by ``recipe``.

    Raises:
        TrainingError: it is not.
    """
    name, marker = recipe.name, read_marker(recipe.run.expert(recipe.name))
    if marker is None:
        raise TrainingError(f"expert {name!r} is not trained; run `decar-train expert {name}` first")
    if marker["config"] != expert_fingerprint(recipe):
        raise TrainingError(
            f"expert {name!r} was trained with another configuration; run `decar-train expert {name}` again"
        )
    return marker


def origin_of(config: TrainConfig) -> Origin:
    models = {recipe.name: recipe.model for recipe in config.recipes}
    return Origin(
        config.name,
        config.seed,
        models,
        config.objective,
        config.training,
        config.documents,
        config.partition,
    )


def is_exported(run: Run, stage: Stage) -> bool:
    """Whether the ensemble directory holds what ``stage`` would write."""
    return stage.is_done and not Ensemble.inspect(run.ensemble)[1]


def export(config: TrainConfig, stage: Stage) -> Ensemble:
    """Write the ensemble directory, replacing an older ensemble, and read it back.

    An expert's prior is its share of the training tokens.

    Raises:
        TrainingError: the target holds something that is not an ensemble, or the experts' chat templates differ.
        EnsembleError: the experts do not fit together, e.g. their tokenizers differ.
    """
    target = config.run.ensemble
    check_target(target, MANIFEST_NAME, "an ensemble")
    reports = {name: read_expert_report(config.run.expert(name)) for name in config.expert_names}
    entries = tuple(
        ExpertEntry(name=name, path=expert_path(name), prior=prior)
        for name, prior in priors_of(reports).items()
    )
    experts = _read_fitting(config.work_dir, entries)
    with replaced_directory(target) as directory:
        for name in config.expert_names:
            _copy(config.run.expert(name), directory / expert_path(name))
        if read_marker(config.run.router) is None:
            router_folder(directory).mkdir()
        else:
            _copy(config.run.router, router_folder(directory))
        manifest = Manifest(
            name=config.name,
            kind="flow" if config.is_flow else "autoregressive",
            flow=_flow(config.flow, directory / entries[0].path) if config.is_flow else None,
            experts=entries,
            router=config.router.entry,
            mixing=config.mixing,
        )
        write_manifest(directory, manifest)
        card = ensemble_card(origin_of(config), manifest, reports, experts[0].reads_images)
        (directory / CARD_NAME).write_text(card, encoding="utf-8")
        Ensemble.load(directory)
    with stage.writing():
        pass
    return Ensemble.load(target)


def _flow(settings: FlowDefaults, expert: Path) -> Flow:
    """``settings``, with the mask token that the tokenizer of an ``expert`` has."""
    return Flow(mask_token_id=load_tokenizer(expert).mask_token_id, **settings.model_dump())


def export_average(config: TrainConfig) -> Path:
    """Write one model of the experts' mean weights beside the ensemble directory, and return where.

    Raises:
        TrainingError: an expert is not trained, experts differ in more than weights, or the target is no model.
        EnsembleError: an expert is damaged, or tokenizers differ.
    """
    target = config.run.ensemble_average
    check_target(target, "config.json", "a model")
    experts, reports = read_trained(config.recipes)
    with replaced_directory(target) as directory:
        average(experts, directory)
        copy_text_files(experts[0], directory)
        card = average_card(origin_of(config), reports, experts[0].reads_images)
        (directory / CARD_NAME).write_text(card, encoding="utf-8")
    return target


def read_trained(
    recipes: Sequence[Recipe],
) -> tuple[tuple[ExpertCheckpoint, ...], dict[str, ExpertReport]]:
    """The experts of one merged model, and their reports.

    Raises:
        TrainingError: an expert is not trained, or tokenizer settings differ.
        EnsembleError: an expert is damaged, or tokenizers differ.
    """
    for recipe in recipes:
        expert_marker(recipe)
    reports = {recipe.name: read_expert_report(recipe.run.expert(recipe.name)) for recipe in recipes}
    entries = [ExpertEntry(name=name, path=expert_path(name), prior=1.0) for name in reports]
    return _read_fitting(recipes[0].run.work_dir, entries), reports


def copy_text_files(expert: ExpertCheckpoint, directory: Path) -> None:
    """Copy what a merged model needs besides weights: tokenizer, chat template, processor, generation settings."""
    for file in expert.path.iterdir():
        if file.name in _COPIED or "token" in file.name or "processor" in file.name:
            shutil.copyfile(file, directory / file.name)


def check_target(target: Path, sign: str, what: str) -> None:
    """Refuse to replace a directory that does not hold ``what``, which has a file ``sign``.

    Raises:
        TrainingError: ``target`` is something else.
    """
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / sign).exists())):
        raise TrainingError(f"{target} exists and is not {what}; move it away or change ensemble_dir")


def _read_fitting(work_dir: Path, entries: Sequence[ExpertEntry]) -> tuple[ExpertCheckpoint, ...]:
    experts, problems = read_experts(work_dir, entries)
    if problems:
        raise EnsembleError(problems[0])
    first, *others = experts
    wanted = _rendering(first)
    for other in others:
        differing = [key for key, value in _rendering(other).items() if value != wanted[key]]
        if differing:
            raise TrainingError(
                f"experts {first.name!r} and {other.name!r} were trained with different tokenizer settings "
                f"({', '.join(differing)}); train them with one tokenizer"
            )
    return experts


def _rendering(expert: ExpertCheckpoint) -> dict[str, Any]:
    file = expert.path / "tokenizer_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return {key: settings.get(key) for key in _RENDERING}
    except (OSError, ValueError, AttributeError):
        raise TrainingError(f"{file} cannot be read; train expert {expert.name!r} again") from None


def _copy(source: Path, target: Path) -> None:
    # copyfile: safetensors are written for their owner only, but whoever serves the ensemble may be another user.
    ignore = shutil.ignore_patterns(*NOT_EXPORTED)
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile)
