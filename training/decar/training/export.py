"""The export stage: trained experts and a router into one ensemble directory. Knows files, never data or training."""

from __future__ import annotations

import shutil
from pathlib import Path

from decar.router.errors import TrainingError
from decar.router.files import router_folder
from decar.router.manifest import MANIFEST_NAME, Ensemble, ExpertEntry, Manifest, write_manifest
from decar.training.config import TrainConfig
from decar.training.expert import expert_directory, expert_fingerprint, read_expert_report
from decar.training.router import router_directory, router_fingerprint
from decar.training.stages import MARKER, Stage, fingerprint, read_marker, replaced_directory

_NOT_EXPORTED = (MARKER, "report.json", "*.png")


def export_stage(config: TrainConfig) -> Stage:
    """The stage as ``config``, the trained experts and the router are now.

    Raises:
        TrainingError: an expert, or a router that the ensemble needs, is not trained; or one of them was trained
            with another configuration.
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
    router = read_marker(router_directory(config))
    if router is None and config.router.reads_text:
        raise TrainingError("the router is not trained; run `decar-train router` first")
    if router is not None and router["config"] != router_fingerprint(config):
        raise TrainingError(
            "the router was trained with another configuration; run `decar-train router` again"
        )
    return Stage(
        config.work_dir / "export",
        fingerprint(
            config.name,
            config.expert_names,
            config.router.entry,
            config.mixing,
            config.ensemble_path.resolve(),
        ),
        fingerprint(markers, router),
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
    tokens = {
        name: read_expert_report(expert_directory(config, name)).train_tokens for name in config.expert_names
    }
    experts = []
    with replaced_directory(target) as directory:
        for name in config.expert_names:
            _copy(expert_directory(config, name), directory / "experts" / name)
            prior = tokens[name] / sum(tokens.values())
            experts.append(ExpertEntry(name=name, path=f"experts/{name}", prior=prior))
        if read_marker(router_directory(config)) is None:
            router_folder(directory).mkdir()
        else:
            _copy(router_directory(config), router_folder(directory))
        manifest = Manifest(
            name=config.name,
            experts=tuple(experts),
            router=config.router.entry,
            mixing=config.mixing,
        )
        write_manifest(directory, manifest)
        Ensemble.load(directory)
    with stage.writing():
        pass
    return Ensemble.load(target)


def _copy(source: Path, target: Path) -> None:
    # copyfile: safetensors are written for their owner only, but whoever serves the ensemble may be another user.
    ignore = shutil.ignore_patterns(*_NOT_EXPORTED)
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile)
