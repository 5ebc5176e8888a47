"""--dry-run: numbers that hold, a batch that is the first one, and nothing written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, TrainerCallback

from decar.training.config import load_config
from decar.training.data.blocks import Blocks
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.dry_run import estimate, shown
from decar.training.expert.model import build_model
from decar.training.expert.stage import expert_stage, train_expert
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig
from tests.training.test_expert import StopAt
from tests.training.test_run import command, modified


def test_run_says_what_it_would_do_and_writes_nothing(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(training={"gradient_accumulation": 3})
    before = modified(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "run", path, "--dry-run", "--set", "seed=5") == 0
    assert modified(tmp_path) == before
    assert not (tmp_path / "work").exists()
    out = capsys.readouterr().out
    config = yaml.safe_load(out[: out.index("\n\n")])
    assert config["seed"] == 5
    assert config["training"]["warmup"] == 0.05  # a default, resolved
    assert re.search(r"code +to train +29,536 .* 6 × 192 ", out)
    assert re.search(r"prose +to train +29,536 .* 6 × 192 ", out)
    assert "the first batch of code:\n[0] " in out
    assert out.endswith("dry run: nothing was trained, nothing was written\n")


def test_an_expert_needs_its_shard(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "expert", "code", write_config(), "--dry-run") == 1
    assert "run `decar-train partition` first" in capsys.readouterr().err


def test_states_steps_and_sizes(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(training={"max_steps": None, "epochs": 2.0, "batch_size": 4})
    config = load_config(path)
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    report = train_expert(config, "code", expert_stage(config, "code"))
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "prose", expert_stage(config, "prose"), [StopAt(5)])
    before = modified(tmp_path)
    code, prose = (estimate(config, name, config, {}) for name in config.expert_names)
    assert (code.is_done, code.steps, code.train_tokens) == (True, report.steps, report.train_tokens)
    assert (prose.is_done, prose.steps_done) == (False, 4)
    assert code.tokens_per_step == 4 * 32
    assert code.time_s == 0
    assert prose.time_s == pytest.approx((prose.steps - 4) * prose.cost.step_time_s)
    model = build_model(config.recipe("code"), load_tokenizer(config.work_dir / "tokenizer"))
    assert code.cost.num_parameters == code.cost.num_trained == model.num_parameters()
    # Weights, gradients and two moments are 16 bytes a parameter. On top come activations: for 128 tokens at least
    # the logits and their logarithms, at most some hundred numbers for each of the width's 32.
    states = 16 * model.num_parameters()
    tokens = 4 * 32
    if not torch.cuda.is_available():
        assert (
            states + 2 * 4 * tokens * 300
            < code.cost.memory_bytes
            < states + 4 * tokens * (4 * 300 + 100 * 32)
        )
    assert command(monkeypatch, "expert", "prose", path, "--dry-run") == 0
    assert "continues at 4" in capsys.readouterr().out
    assert modified(tmp_path) == before


def test_the_batch_shown_is_the_first_one_trained_on(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    predicted = estimate(config, "code", config, {}).batch

    fetched: list[dict[str, Any]] = []
    get = Blocks.__getitem__
    monkeypatch.setattr(Blocks, "__getitem__", lambda self, i: fetched.append(get(self, i)) or fetched[-1])
    train_expert(config, "code", expert_stage(config, "code"), [TrainerCallback()])
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    assert predicted == [shown(r["input_ids"].tolist(), r["labels"].tolist(), tokenizer) for r in fetched[:2]]


def test_what_is_learned_is_marked(write_config: WriteConfig) -> None:
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    question, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("def f", "return")
    )
    pads = [tokenizer.pad_token_id] * 3
    none = [-100] * len(question)
    assert shown(question + answer + pads, [*none, *answer, -100, -100, -100], tokenizer) == (
        "def f⟦return⟧ (padding × 3)"
    )
    assert shown(question, question, tokenizer) == "def f"


def test_all_that_is_missing_is_named_beside_what_is_known(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ).save_pretrained(base)
    path = write_config(
        data={"files": [str(tmp_path / "none.jsonl")]},
        tokenizer={"path": "nowhere"},
        router={"image_embedding": "nowhere"},
        experts=[
            {"name": "code", "model": {"checkpoint": str(base)}},
            {"name": "prose", "model": {"hiden_size": 1}},
        ],
    )
    assert command(monkeypatch, "run", path, "--dry-run") == 1
    out, err = capsys.readouterr()
    assert yaml.safe_load(out[: out.index("\n\n")])["experts"][0]["name"] == "code"
    problems = [line.removeprefix("problem: ") for line in out.splitlines() if line.startswith("problem: ")]
    assert problems == [
        f"data.files: '{tmp_path}/none.jsonl' matches no file",
        "tokenizer.path: nowhere holds no tokenizer.json; save a fast tokenizer there",
        "router.image_embedding: nowhere holds no config.json with *.safetensors; save a model there",
        "model.hiden_size: unknown field of llama; did you mean 'hidden_size'?",
        f"the checkpoint of 'code', {base}, holds no weights (*.safetensors)",
    ]
    # Embeddings and output 2 · 10 · 8, attention 4 · 8 · 8, MLP 3 · 8 · 8, three norms of 8.
    assert "code: 632 parameters" in out
    assert err.startswith("error: this cannot be run (5 problems); the first: data.files")
