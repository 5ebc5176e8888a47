"""Weights of image-text models under names that vLLM reads. Knows safetensors files, never a model's code."""

from __future__ import annotations

import json
from pathlib import Path

from decar.training.checkpoint_files import INDEX_NAME

# transformers 5 took this level out of these encoders: it reads names with and without it, and writes them without.
# vLLM 0.32 wants it.
_TOWER, _LEVEL = "vision_tower.", "vision_model."
_ENCODERS = ("clip_vision_model", "siglip_vision_model")


def with_vision_model(directory: Path) -> None:
    """Rename the weights of a CLIP or SigLIP encoder in ``directory``, a saved model, to names that vLLM reads too."""
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text())
    if config["vision_config"].get("model_type") not in _ENCODERS:
        return
    for file in sorted(directory.glob("*.safetensors")):
        save_file(
            {_vllm_name(name): tensor for name, tensor in load_file(file).items()},
            file,
            metadata={"format": "pt"},
        )
    index = directory / INDEX_NAME
    if index.is_file():
        data = json.loads(index.read_text())
        data["weight_map"] = {_vllm_name(name): file for name, file in data["weight_map"].items()}
        index.write_text(json.dumps(data, indent=2) + "\n")


def _vllm_name(name: str) -> str:
    before, tower, rest = name.partition(_TOWER)
    if tower and not rest.startswith(_LEVEL):
        return f"{before}{tower}{_LEVEL}{rest}"
    return name
