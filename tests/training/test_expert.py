"""Training one expert: packing, resuming to the same weights, not training twice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, load_config
from decar.training.data.blocks import IGNORED, mean_loss, pack
from decar.training.data.shards import read_texts
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert.model import build_model
from decar.training.expert.stage import (
    complete_checkpoints,
    delete_incomplete,
    expert_stage,
    train_expert,
)
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig


@pytest.fixture
def prepared(config: TrainConfig) -> TrainConfig:
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class CountSteps(TrainerCallback):
    steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1


def weights(config: TrainConfig, name: str) -> dict[str, torch.Tensor]:
    return load_file(config.run.expert(name) / "model.safetensors")


def test_packing_keeps_every_token_between_bos_and_eos(prepared: TrainConfig) -> None:
    tokenizer = load_tokenizer(prepared.work_dir / "tokenizer")
    texts = ["def f", "(x):\n    return"]
    blocks = pack(texts, tokenizer, length=8)
    expected: list[int] = []
    learned: list[int] = []
    for text in texts:
        expected += [tokenizer.bos_token_id, *tokenizer.encode(text)[1:], tokenizer.eos_token_id]
        # A document's first token is predicted by no token of the document.
        learned += [*tokenizer.encode(text)[1:], tokenizer.eos_token_id]
    assert tokenizer.encode(texts[0])[0] == tokenizer.bos_token_id
    assert blocks.num_tokens == len(expected)
    assert blocks.input_ids.flatten()[: len(expected)].tolist() == expected
    assert blocks.labels[blocks.labels != IGNORED].tolist() == learned
    assert blocks.input_ids.shape == (math.ceil(len(expected) / 8), 8)
    assert tokenizer.decode(expected, skip_special_tokens=True) == "".join(texts)


def test_training_lowers_the_held_out_loss_it_reports(prepared: TrainConfig) -> None:
    config = prepared.model_copy(
        update={"training": prepared.training.model_copy(update={"learning_rate": 1e-2})}
    )
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    held_out = pack(list(read_texts(config.run.shard("prose", "held_out"))), tokenizer, 32)
    untrained = mean_loss(build_model(config.recipe("prose"), tokenizer), held_out, 2)
    assert untrained == pytest.approx(math.log(len(tokenizer)), rel=0.05)
    report = train_expert(config, "prose", expert_stage(config, "prose"))
    assert report.held_out_loss < untrained - 0.1
    assert report.steps == 6
    assert report.held_out_tokens == held_out.num_tokens


@pytest.mark.parametrize("stop", [3, 5])
def test_an_interrupted_expert_ends_with_the_same_weights(prepared: TrainConfig, stop: int) -> None:
    stage = expert_stage(prepared, "code")
    train_expert(prepared, "code", stage)
    whole = weights(prepared, "code")
    (stage.directory / "DONE").unlink()

    with pytest.raises(KeyboardInterrupt):
        train_expert(prepared, "code", stage, [StopAt(stop)])
    assert not stage.is_done
    counter = CountSteps()
    train_expert(prepared, "code", stage, [counter])
    assert counter.steps == 6 - (stop - 1)
    assert stage.is_done
    resumed = weights(prepared, "code")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert not list((prepared.work_dir / "checkpoints").rglob("checkpoint-*"))


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "COMPLETE").touch()
    delete_incomplete(tmp_path)
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-10"]
    assert not (tmp_path / "checkpoint-12").exists()
    assert complete_checkpoints(tmp_path / "none") == []


def test_an_expert_needs_only_its_own_shard(prepared: TrainConfig) -> None:
    for file in (prepared.work_dir / "partition" / "prose").iterdir():
        file.unlink()
    for file in prepared.data.files:
        Path(file).unlink()
    train_expert(prepared, "code", expert_stage(prepared, "code"))
    with pytest.raises(
        TrainingError, match=r"prose/train.parquet is missing; run `decar-train partition` first"
    ):
        expert_stage(prepared, "prose")


def test_done_until_what_it_depends_on_changes(prepared: TrainConfig, write_config: WriteConfig) -> None:
    train_expert(prepared, "code", expert_stage(prepared, "code"))
    assert expert_stage(prepared, "code").is_done
    assert expert_stage(load_config(write_config(), ["training.save_steps=50"]), "code").is_done
    for change in ("training.max_steps=7", "model.hidden_size=64"):
        assert not expert_stage(load_config(write_config(), [change]), "code").is_done
    for change in ("seed=1", "tokenizer.vocab_size=310", "partition.held_out=0.3"):
        with pytest.raises(TrainingError, match="was made with another configuration"):
            expert_stage(load_config(write_config(), [change]), "code")


def test_a_checkpoint_is_trained_on(prepared: TrainConfig, write_config: WriteConfig) -> None:
    train_expert(prepared, "code", expert_stage(prepared, "code"))
    directory = prepared.run.expert("code")
    model = {"checkpoint": str(directory)}
    config = load_config(
        write_config(tokenizer={"path": str(directory)}, experts=["code", "prose"]), [f"model={model}"]
    )
    tokenizer = load_tokenizer(directory)
    loaded = build_model(config.recipe("prose"), tokenizer)
    assert torch.equal(loaded.state_dict()["lm_head.weight"], weights(prepared, "code")["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.vocab_size=10", "10 output rows for the 300 tokens"),
        ("training.sequence_length=999", "longer than the max_position_embeddings 128 of 'code'"),
        ("model={checkpoint: /nowhere}", "/nowhere, holds no config.json"),
    ],
)
def test_models_that_do_not_fit(
    prepared: TrainConfig, write_config: WriteConfig, change: str, message: str
) -> None:
    tokenizer = load_tokenizer(prepared.work_dir / "tokenizer")
    changes = {"tokenizer": {"path": str(prepared.work_dir / "tokenizer")}}
    with pytest.raises(TrainingError, match=message):
        build_model(load_config(write_config(**changes), [change]).recipe("code"), tokenizer)
