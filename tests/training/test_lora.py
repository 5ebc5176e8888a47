"""Adapters on a shared base, merged at the end; and the options of real recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decar.router import Ensemble
from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, load_config
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert.model import build_model
from decar.training.expert.stage import expert_stage, train_expert
from decar.training.fingerprints import expert_fingerprint
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig
from tests.training.test_expert import StopAt, weights
from tests.training.test_run import command


@pytest.fixture
def base(write_config: WriteConfig, tmp_path: Path) -> Path:
    """A checkpoint and its tokenizer."""
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    directory = tmp_path / "base"
    shutil.copytree(config.work_dir / "tokenizer", directory)
    build_model(config.recipe("code"), load_tokenizer(directory)).save_pretrained(directory)
    shutil.rmtree(config.work_dir)
    return directory


@pytest.fixture
def write_lora(base: Path, write_config: WriteConfig) -> Any:
    """Writes a configuration of adapters on ``base``."""

    def write(**training: Any) -> Path:
        settings = {"lora": {"rank": 4, "dropout": 0.1}, "learning_rate": 1e-2, **training}
        path = write_config(tokenizer={"path": str(base)}, training=settings)
        text = path.read_text()
        # write_config lays its arguments over the tiny model's, but a checkpoint leaves no room for those.
        before, _, after = text.partition("model:\n")
        rest = after[next(i for i in range(len(after)) if after[i - 1] == "\n" and after[i] not in " \n") :]
        path.write_text(f"{before}model: {{checkpoint: {base}}}\n{rest}")
        return path

    return write


def prepared(path: Path, *overrides: str) -> TrainConfig:
    config = load_config(path, list(overrides))
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


def test_merged_experts_compute_what_base_and_adapter_do(
    write_lora: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lora()
    assert command(monkeypatch, "run", path) == 0
    config = load_config(path)
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    for expert in Ensemble.load(config.run.ensemble).experts:
        assert not (expert.path / "adapter").exists()
        assert (
            load_file(expert.path / "model.safetensors").keys()
            == load_file(base / "model.safetensors").keys()
        )
        adapter = config.run.expert(expert.name) / "adapter"
        with torch.inference_mode():
            fresh = AutoModelForCausalLM.from_pretrained(base).eval()
            untrained = fresh(input_ids=ids).logits
            adapted = PeftModel.from_pretrained(fresh, adapter).eval()(input_ids=ids).logits
            merged = AutoModelForCausalLM.from_pretrained(expert.path).eval()(input_ids=ids).logits
        assert (adapted - untrained).abs().max() > 1e-3
        # fp32: W x + B (A x) against (W + B A) x, sums of some 64 products in another order.
        torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)


def test_an_interrupted_adapter_ends_with_the_same_weights(write_lora: Any) -> None:
    config = prepared(write_lora())
    stage = expert_stage(config, "code")
    train_expert(config, "code", stage)
    whole = weights(config, "code")
    shutil.rmtree(stage.directory)
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "code", stage, [StopAt(5)])
    train_expert(config, "code", stage)
    resumed = weights(config, "code")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_only_adapters_are_trained(write_lora: Any, base: Path) -> None:
    config = prepared(write_lora())
    model = build_model(config.recipe("code"), load_tokenizer(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_mistakes_are_named(write_config: WriteConfig, write_lora: Any, base: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"training.lora adapts a checkpoint, but 'code' starts from fresh"
    ):
        load_config(write_config(training={"lora": {}}))
    with pytest.raises(TrainingError, match=r"training.lora.rnk: unknown field; did you mean 'rank'\?"):
        load_config(write_lora(), ["training.lora.rnk=4"])
    config = load_config(write_lora(), ["training.lora.target_modules=[q_prj]"])
    with pytest.raises(
        TrainingError, match=r"training.lora cannot be applied \(.*q_prj.*not found"
    ) as caught:
        build_model(config.recipe("code"), load_tokenizer(base))
    assert "\n" not in str(caught.value)


def test_what_weights_do_not_depend_on_leaves_experts_finished(write_lora: Any) -> None:
    def fingerprint(*changes: str) -> str:
        return expert_fingerprint(load_config(path, list(changes)).recipe("code"))

    path = write_lora()
    for change in ("save_total_limit=1", "tensorboard=true", "gradient_checkpointing=true"):
        assert fingerprint(f"training.{change}") == fingerprint()
    for change in ("lora.rank=8", "gradient_accumulation=2", "min_learning_rate_ratio=0", "precision=bf16"):
        assert fingerprint(f"training.{change}") != fingerprint()


def trained(config: TrainConfig) -> dict[str, torch.Tensor]:
    stage = expert_stage(config, "code")
    shutil.rmtree(stage.directory, ignore_errors=True)
    train_expert(config, "code", stage)
    return weights(config, "code")


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_activations_give_the_same_weights(
    write_config: WriteConfig, write_lora: Any, lora: bool
) -> None:
    path = write_lora() if lora else write_config(model={"attention_dropout": 0.1})
    plain = trained(prepared(path))
    checkpointed = trained(load_config(path, ["training.gradient_checkpointing=true"]))
    assert all(torch.equal(value, checkpointed[name]) for name, value in plain.items())


def test_accumulated_gradients_are_those_of_one_batch(write_config: WriteConfig) -> None:
    path = write_config(training={"max_steps": 1, "batch_size": 4, "warmup": 0.0})
    whole = trained(prepared(path))
    halves = trained(load_config(path, ["training.batch_size=2", "training.gradient_accumulation=2"]))
    for name, value in whole.items():
        # One step of Adam moves a weight by the learning rate, wherever its gradient is more than rounding.
        assert (value - halves[name]).abs().mean() < 1e-3 * 1e-3, name


def test_bf16_a_schedule_down_to_nothing_and_tensorboard(write_config: WriteConfig) -> None:
    path = write_config(
        training={"precision": "bf16", "min_learning_rate_ratio": 0.0, "warmup": 0.4, "tensorboard": True}
    )
    config = prepared(path)
    assert all(value.dtype == torch.float32 for value in trained(config).values())

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.work_dir / "logs" / "experts" / "code"))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert len(rates) == 6
    assert max(rates) == pytest.approx(1e-3)
    assert rates[0] == 0.0  # three steps of warm-up
    assert rates[-1] < 0.3e-3
    assert [event.step for event in events.Scalars("held_out_loss")] == [6]
