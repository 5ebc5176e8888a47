"""A finished work directory stays finished: the fingerprints in its markers are pinned, of `configs/text.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from decar.training.config import TrainConfig, load_config
from decar.training.data.tokenizer import tokenizer_stage
from decar.training.evaluate.centralized import centralized_stage
from decar.training.expert.report import ExpertReport
from decar.training.expert.stage import expert_stage
from decar.training.export.moe import moe_stage
from decar.training.export.stage import export_stage
from decar.training.fingerprints import evaluate_fingerprint, scores_fingerprint
from decar.training.partition.stage import partition_stage
from decar.training.router.stage import router_stage
from decar.training.run import SPLITS, report_file, shard_file
from decar.training.stages import Stage

ROOT = Path(__file__).parents[2]
MARKERS = {
    "partition": ("19af2fbdda045266", "76bc0239dea63b54"),
    "tokenizer": ("3c8e71b5fb95e054", "5a8676a9ce3523a9"),
    "experts/code": ("c8f008e7762a2239", "407a6c4408ecc4dc"),
    "experts/prose": ("c8f008e7762a2239", "12883328ec6b9d7e"),
    "router": ("0705cea352e1fe07", "bd05ffdb2a15bf8a"),
    "centralized": ("d004342a3324dfc1", "f477b67dc96de8c8"),
    "moe": ("159586ea868dc104", "54cb3101dfe4b007"),
    "export": ("2755f869ccc76b25", "662ea0485624f2d0"),
}
"""What `DONE` held when stages were put into folders, (config, inputs); `inputs` are of the files below."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The export's fingerprint has the place of the ensemble in it, the partition's that of Python's own texts."""
    monkeypatch.setattr(sys, "version", "3.0")
    return load_config(ROOT / "configs/text.yaml", [f"work_dir={tmp_path}", "ensemble_dir=/ensembles/text"])


def finished(stage: Stage, **files: str) -> tuple[str, str]:
    """The stage's marker, when it has written ``files``."""
    with stage.writing() as directory:
        for name, text in files.items():
            (directory / name).write_text(text)
    return stage.config, stage.inputs


def test_markers_are_what_they_were(config: TrainConfig) -> None:
    found = {}
    stage = partition_stage(config)
    with stage.writing() as directory:
        for name in config.expert_names:
            for split in SPLITS:
                file = shard_file(directory, name, split)
                file.parent.mkdir(exist_ok=True)
                file.write_text(f"{name} {split}")
    found["partition"] = stage.config, stage.inputs
    tokenizer = {"tokenizer.json": "tokenizer", "tokenizer_config.json": "settings"}
    found["tokenizer"] = finished(tokenizer_stage(config.run, config.tokenizer), **tokenizer)
    for steps, name in enumerate(config.expert_names, start=1):
        report = ExpertReport(
            expert=name,
            num_parameters=1,
            train_tokens=1,
            held_out_tokens=1,
            steps=steps,
            train_loss=1.0,
            held_out_loss=1.0,
            train_time_s=1.0,
        )
        stage = expert_stage(config, name)
        found[f"experts/{name}"] = finished(stage, **{report_file(Path()).name: report.model_dump_json()})
    found["router"] = finished(router_stage(config))
    found["centralized"] = finished(centralized_stage(config))
    found["moe"] = finished(moe_stage(config))
    found["export"] = finished(export_stage(config))
    assert found == MARKERS


def test_so_are_those_of_what_is_measured(config: TrainConfig) -> None:
    """Their inputs are of an ensemble that can be served, and of what it is compared with."""
    assert scores_fingerprint(config) == "cef1dc3911decc38"
    assert evaluate_fingerprint(config) == "d777c241bb65e21f"
