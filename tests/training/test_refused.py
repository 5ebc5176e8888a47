"""What would end in a model that learned nothing ends in one line: broken losses, broken checkpoints, full disks."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainerCallback

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, load_config
from decar.training.data.features import embedding_files
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.dry_run import problems
from decar.training.expert import stage as expert
from decar.training.expert.model import build_model
from decar.training.expert.stage import complete_checkpoints, expert_stage, train_expert
from decar.training.partition.stage import make_partition, partition_stage
from decar.training.stages import is_full_disk
from tests.training.conftest import WriteConfig
from tests.training.test_run import command

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 13\n"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def prepared(config: TrainConfig) -> TrainConfig:
    return prepare(config)


def prepare(config: TrainConfig) -> TrainConfig:
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


# ---------------------------------------------------------------------------------------------- losses


def test_training_that_diverges_stops_at_once_and_keeps_no_expert(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    prepare(load_config(path))
    rates = [f"training.{name}" for name in ("learning_rate=1e30", "max_grad_norm=1e9", "max_steps=60")]
    settings = [word for rate in rates for word in ("--set", rate)]
    assert command(monkeypatch, "expert", "code", path, *settings) == 1
    out, error = capsys.readouterr()
    (line,) = error.splitlines()
    found = re.search(
        r"error: the loss is nan at step (\d+) of 60, at learning rate (\S+); nothing of it", line
    )
    assert found is not None, line
    assert 1 < int(found[1]) < 10
    assert 0 < float(found[2]) <= 1e30
    assert "training.learning_rate" in line
    assert "done" not in out
    config = load_config(path, rates)
    assert not config.run.expert("code").exists()


@pytest.mark.parametrize(
    ("value", "accumulation"), [(float("nan"), 1), (float("inf"), 3), (float("-inf"), 1)]
)
def test_any_loss_that_is_not_finite_stops(
    prepared: TrainConfig, monkeypatch: pytest.MonkeyPatch, value: float, accumulation: int
) -> None:
    training = {"gradient_accumulation": accumulation}
    config = prepared.model_copy(update={"training": prepared.training.model_copy(update=training)})
    calls = iter(range(100))
    compute_loss = Trainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        factor = value if next(calls) == 4 * accumulation else 1.0
        return compute_loss(self, *args, **kwargs) * factor

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(TrainingError, match=rf"the loss is {value} at step 5 of 6, at learning rate \d"):
        train_expert(config, "code", expert_stage(config, "code"))
    assert not config.run.expert("code").exists()
    # What came before was sound, and the same command goes on from there.
    stage = expert_stage(config, "code")
    assert [path.name for path in complete_checkpoints(config.run.checkpoints(stage))] == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_weights_that_the_last_step_broke_are_not_kept(prepared: TrainConfig) -> None:
    class Break(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            with torch.no_grad():
                next(given["model"].parameters()).fill_(float("nan"))

    with pytest.raises(
        TrainingError, match=r"the held-out loss of code is nan after step 6; nothing of it is kept"
    ):
        train_expert(prepared, "code", expert_stage(prepared, "code"), [Break()])
    assert not prepared.run.expert("code").exists()


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def from_base(prepared: TrainConfig, write_config: WriteConfig) -> tuple[TrainConfig, Path]:
    """A configuration whose experts start from a trained checkpoint, and that."""
    base = prepared.work_dir.parent / "base"
    build_model(prepared.recipe("code"), load_tokenizer(prepared.run.tokenizer)).save_pretrained(base)
    for file in prepared.run.tokenizer_files:
        (base / file.name).write_bytes(file.read_bytes())
    path = write_config(tokenizer={"path": str(base)})
    return load_config(path, [f"model={json.dumps({'checkpoint': str(base)})}"]), base


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model.safetensors",
            lambda _: POINTER.encode(),
            "model.safetensors is a git-lfs pointer.*`git lfs pull` in",
        ),
        ("config.json", lambda _: POINTER.encode(), "config.json is a git-lfs pointer"),
        ("tokenizer.json", lambda _: POINTER.encode(), "tokenizer.json is a git-lfs pointer"),
        (
            "model.safetensors",
            lambda whole: whole[: len(whole) // 2],
            "model.safetensors is truncated or damaged",
        ),
        ("model.safetensors", lambda whole: whole[:100], "model.safetensors is truncated or damaged"),
        ("model.safetensors", lambda _: b"", "model.safetensors is truncated or damaged"),
        ("model.safetensors", lambda whole: b"x" * len(whole), "model.safetensors is truncated or damaged"),
    ],
    ids=["pointer", "config", "tokenizer", "half", "header", "empty", "noise"],
)
def test_files_that_are_not_whole_are_named(
    from_base: tuple[TrainConfig, Path], file: str, change: Callable[[bytes], bytes], message: str
) -> None:
    config, base = from_base
    tokenizer = load_tokenizer(base)
    (base / file).write_bytes(change((base / file).read_bytes()))
    assert re.search(message, "\n".join(problems(config)))
    with pytest.raises(TrainingError, match=message) as caught:
        build_model(config.recipe("code"), tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match=f"partition.embedding: .*{message}"):
        embedding_files(base, "partition.embedding")


def _renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{prefix}{name}": weight for name, weight in weights.items()}


def _without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _renamed("module."),
            r"12 missing \(lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight, ...\); "
            r"12 unexpected \(module.lm_head.weight, module.model.embed_tokens.weight, ",
        ),
        (
            _renamed("base_model.model."),
            r"12 missing \(lm_head.weight, .*12 unexpected \(base_model.model.lm_head",
        ),
        (
            _without("q_proj"),
            r"json describes: 1 missing \(model.layers.0.self_attn.q_proj.weight\); save it",
        ),
        (_without("lm_head"), r"1 missing \(lm_head.weight\)"),
        (lambda w: {**w, "model.layers.7.x": torch.zeros(1)}, r"1 unexpected \(model.layers.7.x\)"),
        (
            lambda w: {**w, "lm_head.weight": w["lm_head.weight"][:, :16].clone()},
            r"1 of another shape \(lm_head.weight\)",
        ),
    ],
    ids=["prefixed", "peft", "missing", "no head", "unexpected", "shape"],
)
def test_weights_of_other_names_are_an_error_that_shows_three(
    from_base: tuple[TrainConfig, Path], change: Callable[[Weights], Weights], message: str
) -> None:
    config, base = from_base
    file = base / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=message) as caught:
        build_model(config.recipe("code"), load_tokenizer(base))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_tied", [False, True])
def test_tied_weights_and_old_buffers_are_no_error(
    prepared: TrainConfig, write_config: WriteConfig, is_tied: bool
) -> None:
    base = prepared.work_dir.parent / "base"
    tokenizer = load_tokenizer(prepared.run.tokenizer)
    tied = load_config(write_config(), [f"model.tie_word_embeddings={is_tied}"])
    build_model(tied.recipe("code"), tokenizer).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    assert ("lm_head.weight" in weights) != is_tied
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    if is_tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    path = write_config(tokenizer={"path": str(prepared.run.tokenizer)})
    config = load_config(path, [f"model={json.dumps({'checkpoint': str(base)})}"])
    loaded = build_model(config.recipe("code"), tokenizer).state_dict()
    assert torch.equal(loaded["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(loaded["lm_head.weight"], weights["lm_head.weight"])


# ---------------------------------------------------------------------------------------------- full disks

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
]


def test_a_full_disk_is_told_in_every_librarys_words() -> None:
    assert all(is_full_disk(error) for error in FULL)
    others = [OSError(errno.EACCES, "Permission denied"), RuntimeError("shapes"), ValueError("no")]
    assert not any(is_full_disk(error) for error in others)


@pytest.mark.parametrize(
    ("what", "error"),
    [("checkpoint", FULL[0]), ("checkpoint", FULL[3]), ("expert", FULL[2])],
    ids=["OSError", "torch", "safetensors"],
)
def test_a_full_disk_leaves_no_half_checkpoint(
    prepared: TrainConfig, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception
) -> None:
    stage = expert_stage(prepared, "code")
    checkpoints = prepared.run.checkpoints(stage)
    save = PreTrainedModel.save_pretrained

    full = "checkpoint-4" if what == "checkpoint" else ".code.tmp"

    def until_full(self: Any, directory: str | Path, *args: Any, **kwargs: Any) -> None:
        save(self, directory, *args, **kwargs)
        if Path(directory).name == full:
            raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", until_full)
    place = "the checkpoint of step 4" if what == "checkpoint" else "experts/code"
    message = rf"no space is left for .*{place}.*; free some or set work_dir to another disk\. Nothing of it was kept"
    with pytest.raises(TrainingError, match=message) as caught:
        train_expert(prepared, "code", stage)
    assert "\n" not in str(caught.value)
    kept = [path.name for path in sorted(checkpoints.iterdir())]
    assert kept == (["checkpoint-2"] if what == "checkpoint" else ["checkpoint-4", "checkpoint-6"])
    assert not stage.directory.exists()
    hidden = [path for path in prepared.work_dir.rglob(".*") if path.is_dir()]
    assert not hidden
    # With space again, the same command goes on to the same end.
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    train_expert(prepared, "code", stage)
    assert stage.is_done


def test_other_errors_while_saving_stay_what_they_are(
    prepared: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    stage = expert_stage(prepared, "code")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    with pytest.raises(PermissionError):
        train_expert(prepared, "code", stage)
    assert not list(prepared.run.checkpoints(stage).glob("checkpoint-*"))
    assert expert.complete_checkpoints(prepared.run.checkpoints(stage)) == []
