"""Weights of image-text models under names that vLLM reads. Knows safetensors files, never a model's code."""

from __future__ import annotations

import json
from pathlib import Path

from decar.training.average import INDEX_NAME

# transformers 5 took this level out of CLIP's and SigLIP's encoders, reads names with and without it, and writes them
# without; vLLM 0.32 wants it.
_TOWER, _LEVEL = "vision_tower.", "vision_model."
_ENCODER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")


def with_vision_model(directory: Path) -> None:
    """Rename the weights of the vision encoder in ``directory``, a saved model, to names that vLLM reads too."""
    from safetensors.torch import load_file, save_file

    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        renamed = {vllm_name(name): tensor for name, tensor in tensors.items()}
        if renamed.keys() != tensors.keys():
            save_file(renamed, file, metadata={"format": "pt"})
    index = directory / INDEX_NAME
    if index.is_file():
        data = json.loads(index.read_text())
        data["weight_map"] = {vllm_name(name): file for name, file in data["weight_map"].items()}
        index.write_text(json.dumps(data, indent=2) + "\n")


def vllm_name(name: str) -> str:
    """The weight's ``name`` as vLLM knows it."""
    before, tower, rest = name.partition(_TOWER)
    if tower and rest.startswith(_ENCODER_PARTS):
        return f"{before}{tower}{_LEVEL}{rest}"
    return name
