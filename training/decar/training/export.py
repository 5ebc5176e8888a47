"""The export stage: trained experts into one ensemble directory. Knows files, never data or training."""

from __future__ import annotations

import shutil
from pathlib import Path

from decar.router.errors import TrainingError
from decar.router.manifest import MANIFEST_NAME, Ensemble, ExpertEntry, Manifest, RouterEntry, write_manifest
from decar.training.config import TrainConfig
from decar.training.expert import expert_directory, expert_fingerprint, read_expert_report
from decar.training.stages import MARKER, Stage, fingerprint, read_marker, replaced_directory

_NOT_EXPORTED = {MARKER, "report.json"}


def export_stage(config: TrainConfig) -> Stage:
    """The stage as ``config`` and the trained experts are now.

    Raises:
        TrainingError: an expert is not trained, or was trained with another configuration.
    """
    markers = []
    for name in config.expert_names:
        marker = read_marker(expert_directory(config, name))
        if marker is None:
            raise TrainingError(f"expert {name!r} is not trained; run `decar-train expert {name}` first")
        if marker["config"] != expert_fingerprint(config, name):
            raise TrainingError(
                f"expert {name!r} was trained with another configuration; run `decar-train expert {name}` again"
            )
        markers.append(marker)
    return Stage(
        config.work_dir / "export",
        fingerprint(config.name, config.expert_names, config.mixing, config.ensemble_path.resolve()),
        fingerprint(markers),
    )


def is_exported(config: TrainConfig, stage: Stage) -> bool:
    """Whether the ensemble directory holds what ``stage`` would write."""
    return stage.is_done and not Ensemble.inspect(config.ensemble_path)[1]


def export(config: TrainConfig, stage: Stage) -> Ensemble:
    """Write the ensemble directory, replacing an older ensemble, and read it back.

    An expert's prior is its share of the training tokens.

    Raises:
        TrainingError: the target holds something that is not an ensemble.
        EnsembleError: the experts do not fit together, e.g. their tokenizers differ.
    """
    target = config.ensemble_path
    if target.exists() and (
        not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST_NAME).exists())
    ):
        raise TrainingError(f"{target} exists and is not an ensemble; move it away or change ensemble_dir")
    tokens = {name: read_expert_report(config, name).train_tokens for name in config.expert_names}
    experts = []
    with replaced_directory(target) as directory:
        for name in config.expert_names:
            _copy_expert(expert_directory(config, name), directory / "experts" / name)
            prior = tokens[name] / sum(tokens.values())
            experts.append(ExpertEntry(name=name, path=f"experts/{name}", prior=prior))
        (directory / "router").mkdir()
        manifest = Manifest(
            name=config.name,
            experts=tuple(experts),
            router=RouterEntry(kind="posterior"),
            mixing=config.mixing,
        )
        write_manifest(directory, manifest)
        Ensemble.load(directory)
    with stage.writing():
        pass
    return Ensemble.load(target)


def _copy_expert(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.name not in _NOT_EXPORTED:
            shutil.copyfile(file, target / file.name)
