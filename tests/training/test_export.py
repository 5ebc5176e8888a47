"""Exports: averaged models, model cards, and experts that do not fit together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decar.router import Ensemble
from decar.router.errors import DecarError, EnsembleError, TrainingError
from decar.training.config import TrainConfig, load_config
from decar.training.data.tokenizer import make_tokenizer, tokenizer_stage
from decar.training.expert.report import read_expert_report
from decar.training.expert.stage import expert_stage, train_expert
from decar.training.export.stage import export, export_average, export_stage
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig
from tests.training.test_run import command, modified

MERGED_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""Of one model that experts are merged into."""


def trained(config: TrainConfig) -> TrainConfig:
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    for name in config.expert_names:
        train_expert(config, name, expert_stage(config, name))
    return config


@pytest.fixture
def config(write_config: WriteConfig) -> TrainConfig:
    return trained(load_config(write_config(experts=["code", "prose", "third"])))


def test_the_average_is_the_mean_of_the_weights(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "export", tmp_path / "config.yaml", "--merge", "average") == 0
    target = config.run.ensemble.with_name("ensemble-average")
    assert str(target) in "".join(capsys.readouterr().out.split("\n"))
    experts = [load_file(config.run.expert(name) / "model.safetensors") for name in config.expert_names]
    averaged = load_file(target / "model.safetensors")
    assert averaged.keys() == experts[0].keys()
    for name, value in averaged.items():
        expected = (experts[0][name] + experts[1][name] + experts[2][name]) / 3
        assert not torch.equal(expected, experts[0][name]) or "norm" in name
        assert torch.equal(value, expected), name
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert {file.name for file in target.iterdir()} == MERGED_FILES
    export_average(config)  # replaces itself


def test_what_keeps_experts_from_being_averaged_is_named(write_config: WriteConfig) -> None:
    prose = {"name": "prose", "model": {"hidden_size": 64, "num_hidden_layers": 2}}
    config = trained(load_config(write_config(experts=["code", prose])))
    with pytest.raises(
        TrainingError,
        match=r"'code' and 'prose' cannot be averaged, they differ in hidden_size \(32 and 64\), .*"
        r"num_hidden_layers \(1 and 2\); .*export without --merge",
    ):
        export_average(config)
    assert not list(config.work_dir.glob("*average*"))
    assert not list(config.work_dir.glob(".*"))
    export(config, export_stage(config))


def test_damaged_weights_are_not_averaged(config: TrainConfig) -> None:
    file = config.run.expert("prose") / "model.safetensors"
    tensors = load_file(file)
    whole = dict(tensors)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(TrainingError, match=r"only 'code' has the weights model.norm.weight"):
        export_average(config)
    save_file(whole | {"model.norm.weight": norm[:16].clone()}, file)
    with pytest.raises(TrainingError, match=r"model.norm.weight have the shapes \[32\] and \[16\]"):
        export_average(config)
    save_file(whole | {"model.steps": torch.tensor([1])}, file)
    with pytest.raises(TrainingError, match=r"only 'prose' has the weights model\.steps"):
        export_average(config)
    for name, steps in (("code", 1), ("prose", 1), ("third", 2)):
        weights = config.run.expert(name) / "model.safetensors"
        save_file(load_file(weights) | {"model.steps": torch.tensor([steps])}, weights)
    with pytest.raises(TrainingError, match=r"cannot be averaged: the integers model\.steps differ"):
        export_average(config)
    assert not list(config.work_dir.glob("*average*"))


def front_matter(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    data: dict[str, Any] = yaml.safe_load(header)
    return data


def test_cards_say_what_was_done(config: TrainConfig) -> None:
    export(config, export_stage(config))
    ensemble = (config.run.ensemble / "README.md").read_text()
    merged = (export_average(config) / "README.md").read_text()
    assert front_matter(ensemble)["tags"] == ["decar", "ensemble"]
    assert front_matter(merged)["pipeline_tag"] == "text-generation"
    for card in (ensemble, merged):
        for name in config.expert_names:
            report = read_expert_report(config.run.expert(name))
            assert f"{report.train_tokens:,}" in card
            assert f"{report.train_documents:,}" in card
            assert f"{report.held_out_loss:.4f}" in card
            for split in ("train", "held_out"):
                shard = config.work_dir / "partition" / name / f"{split}.parquet"
                assert hashlib.sha256(shard.read_bytes()).hexdigest() in card
        assert torch.__version__ in card
        assert "learning_rate: 0.001" in card
        assert "seed: 0" in card
    assert "decar serve . --port 8000" in ensemble
    assert "vllm serve ." in merged
    prior = Ensemble.load(config.run.ensemble).experts[0].prior
    assert f"| code | {prior:.4f} |" in ensemble


def test_an_older_report_still_makes_a_card(config: TrainConfig) -> None:
    file = config.run.expert("code") / "report.json"
    report = json.loads(file.read_text())
    for key in ("train_documents", "held_out_documents", "shards", "versions"):
        del report[key]
    file.write_text(json.dumps(report))
    export(config, export_stage(config))
    assert "| code | 29,536 | unknown |" in (export_average(config) / "README.md").read_text()


def _other_vocabulary(directory: Path) -> None:
    file = directory / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(data))


def _other_template(directory: Path) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "x", "eos_token": "<|end|>"}))


def _too_few_rows(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 200}))


def _truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_vocabulary, "experts 'code' and 'prose' have different tokenizers"),
        (_other_template, r"'code' and 'prose' were trained with different .* \(chat_template, eos_token\)"),
        (
            _too_few_rows,
            "expert 'prose': its tokenizer has ids up to 299, but its output layer has only 200 rows",
        ),
        (_truncated, "expert 'prose': weights .*/work/experts/prose/model.safetensors are truncated"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: (d / "tokenizer_config.json").unlink(), "tokenizer_config.json cannot be read"),
        (lambda d: (d / "config.json").unlink(), "work/experts/prose/config.json is missing"),
    ],
    ids=["vocabulary", "template", "rows", "truncated", "tokenizer", "settings", "config"],
)
def test_experts_that_do_not_fit_together_leave_the_old_export(
    config: TrainConfig, spoil: Callable[[Path], object], message: str
) -> None:
    export(config, export_stage(config))
    before = modified(config.run.ensemble)
    spoil(config.run.expert("prose"))
    for write in (lambda: export(config, export_stage(config)), lambda: export_average(config)):
        with pytest.raises((EnsembleError, TrainingError), match=message) as caught:
            write()
        assert isinstance(caught.value, DecarError)
        assert "\n" not in str(caught.value)
    assert modified(config.run.ensemble) == before
    assert not list(config.work_dir.glob(".*"))
    assert not list(config.work_dir.glob("*average*"))


def test_the_average_spares_what_is_no_model(config: TrainConfig) -> None:
    mine = config.run.ensemble.with_name("ensemble-average")
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(TrainingError, match="ensemble-average exists and is not a model; move it away"):
        export_average(config)
    assert (mine / "thesis.tex").read_text() == "x"


def test_untrained_and_stale_experts_are_not_averaged(write_config: WriteConfig) -> None:
    config = load_config(write_config())
    with pytest.raises(
        TrainingError, match="expert 'code' is not trained; run `decar-train expert code` first"
    ):
        export_average(config)
    trained(config)
    with pytest.raises(TrainingError, match="expert 'code' was trained with another configuration"):
        export_average(load_config(write_config(), ["seed=3"]))
