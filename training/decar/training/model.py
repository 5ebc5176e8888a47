"""An expert's model before training: fresh, a checkpoint, or a checkpoint with LoRA adapters. Knows no data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from decar.router.errors import TrainingError
from decar.training.config import LoraConfig, TrainConfig

# What transformers raises at a configuration or checkpoint that makes no model.
_REFUSED = (OSError, ValueError, TypeError, ZeroDivisionError, StrictDataclassError)


def check_model(config: TrainConfig, name: str) -> None:
    """Refuse a model description that transformers would misread or refuse.

    Raises:
        TrainingError: unknown ``model_type`` or field, or a checkpoint that is not there.
    """
    from transformers import CONFIG_MAPPING

    model = config.model_of(name)
    if "checkpoint" in model:
        if not (Path(model["checkpoint"]) / "config.json").is_file():
            raise TrainingError(f"the checkpoint of {name!r}, {model['checkpoint']}, holds no config.json")
        return
    kind = model["model_type"]
    if kind not in CONFIG_MAPPING:
        raise TrainingError(
            f"model.model_type: transformers has no {kind!r}{_did_you_mean(kind, CONFIG_MAPPING)}"
        )
    known = set(CONFIG_MAPPING[kind]().to_dict()) | {"rope_theta", "rope_scaling"}
    for field in model:
        # transformers keeps a field it does not know and then never reads it.
        if field not in known:
            raise TrainingError(f"model.{field}: unknown field of {kind}{_did_you_mean(field, known)}")
    try:
        CONFIG_MAPPING[kind](**model)
    except _REFUSED as error:
        raise _cannot_be_built(name, error) from None


def _cannot_be_built(name: str, error: Exception) -> TrainingError:
    return TrainingError(f"the model of {name!r} cannot be built ({' '.join(str(error).split())})")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def build_model(config: TrainConfig, name: str, tokenizer: Any) -> Any:
    """The untrained model of expert ``name`` in fp32: fresh weights by ``config.seed``, or the checkpoint's.

    With ``config.training.lora`` the checkpoint is frozen and wrapped in peft's model, whose adapters are trained.

    Raises:
        TrainingError: a configuration that transformers or peft refuses, or too small a vocabulary.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, set_seed

    check_model(config, name)
    description = config.model_of(name)
    set_seed(config.seed)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        if "checkpoint" in description:
            model = AutoModelForCausalLM.from_pretrained(
                description["checkpoint"], dtype=torch.float32, local_files_only=True
            )
        else:
            fields = {"vocab_size": len(tokenizer), **special, **description}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
            model.generation_config = GenerationConfig(**special)
    except _REFUSED as error:
        raise _cannot_be_built(name, error) from None
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise TrainingError(
            f"the model of {name!r} has {rows} output rows for the {len(tokenizer)} tokens of the tokenizer; "
            "raise vocab_size or resize the checkpoint's embeddings"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and config.training.sequence_length > longest:
        raise TrainingError(
            f"training.sequence_length {config.training.sequence_length} is longer than the "
            f"max_position_embeddings {longest} of {name!r}"
        )
    return model if config.training.lora is None else _with_adapters(model, config, config.training.lora)


def _with_adapters(model: Any, config: TrainConfig, settings: LoraConfig) -> Any:
    import peft
    from transformers import set_seed

    set_seed(config.seed)
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type=peft.TaskType.CAUSAL_LM,
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=settings.target_modules,
            ),
        )
    except ValueError as error:
        raise TrainingError(f"training.lora cannot be applied ({' '.join(str(error).split())})") from None
