"""A training configuration so small that every stage takes a second or two."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from decar.training.config import TrainConfig, load_config
from tests.reference import Reference

CODE = [
    "def",
    "return",
    "self",
    "None",
    "import",
    "for",
    "while",
    "yield",
    "class",
    "(",
    ")",
    "[",
    "]",
    "=",
    ":",
]
PROSE = ["the", "of", "and", "whale", "ocean", "captain", "sailor", "wind", "morning", "quiet", ",", ".", ";"]

WriteConfig = Callable[..., Path]


def tiny_config(root: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "work_dir": str(root / "work"),
        "data": {"files": [str(root / "code.jsonl"), str(root / "prose.jsonl")]},
        "documents": {"min_chars": 1},
        "tokenizer": {"vocab_size": 300},
        "partition": {"held_out": 0.2, "name_by": {"code": "code.jsonl"}},
        "experts": ["code", "prose"],
        "model": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 128,
        },
        "training": {"max_steps": 6, "batch_size": 2, "sequence_length": 32, "save_steps": 2, "log_steps": 1},
    }


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    return config_writer(tmp_path)


def config_writer(root: Path) -> WriteConfig:
    """Writes 15 documents of code-like and 15 of prose-like words, and a configuration changed by its arguments."""
    rng = random.Random(0)
    for name, words in (("code", CODE), ("prose", PROSE)):
        rows = [{"text": " ".join(rng.choices(words, k=30))} for _ in range(15)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**changes: Any) -> Path:
        data = tiny_config(root)
        for key, value in changes.items():
            data[key] = (
                data[key] | value if isinstance(value, dict) and isinstance(data.get(key), dict) else value
            )
        path = root / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.fixture
def config(write_config: WriteConfig) -> TrainConfig:
    return load_config(write_config())


@pytest.fixture
def here(trio: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with checkpoints a (Llama), b (Qwen2) and c (Llama with padding rows) of one tokenizer."""
    for name, expert in {"a": "code", "b": "prose", "c": "maths"}.items():
        shutil.copytree(trio.directory / "experts" / expert, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    yield tmp_path
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden <= before, "something half written is left"
