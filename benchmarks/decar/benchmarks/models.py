"""Ensembles of random weights, to measure speed where no trained one is at hand."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "3M": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "40M": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "1B": {  # Llama 3.2 1B's; for a GPU
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "initializer_range": 0.02,  # larger weights would spread bfloat16's rounding over so many layers to nats
    },
}


@contextlib.contextmanager
def given_or_random(directory: Path | None, shape: str) -> Iterator[Path]:
    """``directory``; without one, a `build_ensemble` of ``shape`` for as long as the context lasts."""
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="decar-bench-") as made:
        yield build_ensemble(Path(made), shape)


def build_ensemble(directory: Path, shape: str, experts: int = 2) -> Path:
    """Random-weight Llamas of ``shape`` that share a tokenizer of numbered words; return ``directory``."""
    sizes = SHAPES[shape]
    vocabulary = {f"w{i}": i for i in range(sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w0")
    sizes = {"tie_word_embeddings": False, "dtype": "float32", "initializer_range": 0.1, **sizes}
    config = LlamaConfig(**sizes, max_position_embeddings=1024, eos_token_id=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a billion random numbers take minutes on a CPU
    entries = []
    for i in range(experts):
        name = chr(ord("a") + i)
        torch.manual_seed(i)
        path = directory / "experts" / name
        with torch.device(device):
            model = LlamaForCausalLM(config)
        model.to(getattr(torch, sizes["dtype"])).save_pretrained(path)
        fast.save_pretrained(path)
        entries.append({"name": name, "path": f"experts/{name}", "prior": 1 / experts})
    manifest = {"format_version": 1, "name": shape, "experts": entries, "router": {"kind": "prior"}}
    (directory / "ensemble.json").write_text(json.dumps(manifest))
    return directory
