"""An expert's model: before training, fresh, a checkpoint, or one with LoRA adapters; and read back. Knows no data.

A causal language model, or a bidirectional one; or an image-text model, whose language model and vision encoder are
described under ``text_config`` and ``vision_config``.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from decar.router.errors import TrainingError, did_you_mean
from decar.training.checkpoint_files import check_files
from decar.training.config import LoraConfig, Recipe
from decar.training.data.masked_blocks import denoised
from decar.training.data.processor import load_processor, reads_images

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# As safetensors names them.
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMED_IN_ERRORS = 3
_TRIED_TOKENS = 8
# Of the largest logit: rounding is a tenth of it, what a document sees of another many times as much.
_TRIED_TOLERANCE = 1e-4
# BERT was trained to tell whether two texts follow each other, too.
_OTHER_HEADS = ("bert.pooler.", "cls.seq_relationship.")
# What transformers raises at a configuration or checkpoint that makes no model.
_REFUSED = (OSError, ValueError, TypeError, ZeroDivisionError, StrictDataclassError)


def check_model(recipe: Recipe) -> None:
    """Refuse a model description that transformers would misread or refuse.

    Raises:
        TrainingError: unknown ``model_type`` or field, or a checkpoint that is not there.
    """
    from transformers import CONFIG_MAPPING

    name, model = recipe.name, _description(recipe)
    if "checkpoint" in model:
        if not (Path(model["checkpoint"]) / "config.json").is_file():
            raise TrainingError(f"the checkpoint of {name!r}, {model['checkpoint']}, holds no config.json")
        return
    kind = model["model_type"]
    if kind not in CONFIG_MAPPING:
        raise TrainingError(
            f"model.model_type: transformers has no {kind!r}{did_you_mean(kind, CONFIG_MAPPING)}"
        )
    _check_fields(model, CONFIG_MAPPING[kind](), "model")
    if recipe.is_flow:
        _check_bidirectional(CONFIG_MAPPING[kind](), name)
        if model.get("is_decoder"):
            raise TrainingError("model.is_decoder: a decoder does not look at both sides; leave it out")
    try:
        CONFIG_MAPPING[kind](**model)
    except _REFUSED as error:
        raise _cannot_be_built(name, error) from None


def _check_bidirectional(config: Any, name: str) -> None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise TrainingError(
            f"the model of {name!r} is a {config.model_type}, which does not look at both sides of a token, as "
            "model.objective: masked-diffusion needs; take bert or modernbert"
        )


def check_weights(recipe: Recipe) -> None:
    """Refuse a checkpoint that has a configuration and no weights, or files that are not whole.

    Raises:
        TrainingError: it has none, or one is a git-lfs pointer or truncated.
    """
    name, checkpoint = recipe.name, recipe.model.get("checkpoint")
    if checkpoint is None or not (Path(checkpoint) / "config.json").is_file():
        return  # as `check_model` says
    if not any(Path(checkpoint).glob("*.safetensors")) and not any(Path(checkpoint).glob("*.bin")):
        raise TrainingError(f"the checkpoint of {name!r}, {checkpoint}, holds no weights (*.safetensors)")
    check_files(Path(checkpoint), f"the checkpoint of {name!r}")


def _check_fields(model: Mapping[str, Any], default: Any, where: str) -> None:
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    aliases = {"rope_theta", "rope_scaling", *(default.attribute_map or {})}
    known = set(default.to_dict()) | aliases
    for field, value in model.items():
        # transformers keeps a field it does not know and then never reads it.
        if field not in known:
            raise TrainingError(
                f"{where}.{field}: unknown field of {default.model_type}{did_you_mean(field, known)}"
            )
        part = getattr(default, field, None)
        if not isinstance(part, PreTrainedConfig):
            continue
        if not isinstance(value, dict):
            raise TrainingError(f"{where}.{field}: describe it by fields, e.g. hidden_size")
        kind = value.get("model_type", part.model_type)
        if kind not in CONFIG_MAPPING:
            raise TrainingError(
                f"{where}.{field}.model_type: transformers has no {kind!r}{did_you_mean(kind, CONFIG_MAPPING)}"
            )
        _check_fields(value, CONFIG_MAPPING[kind](), f"{where}.{field}")


def _cannot_be_built(name: str, error: Exception) -> TrainingError:
    return TrainingError(f"the model of {name!r} cannot be built ({' '.join(str(error).split())})")


def _description(recipe: Recipe) -> dict[str, Any]:
    """A copy, as transformers writes into what it builds a nested configuration from."""
    return copy.deepcopy(recipe.model)


def model_config(recipe: Recipe, tokenizer: Any) -> Any:
    """The transformers configuration of the model: a checkpoint's, or one for ``tokenizer``.

    Raises:
        TrainingError: transformers refuses it, or misreads it, or the checkpoint is not whole.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    check_model(recipe)
    check_weights(recipe)
    description = _description(recipe)
    own = {"vocab_size": len(tokenizer), **_special_tokens(tokenizer)}
    try:
        if "checkpoint" in description:
            return AutoConfig.from_pretrained(
                description["checkpoint"], local_files_only=True, trust_remote_code=False
            )
        if reads_images(CONFIG_MAPPING[description["model_type"]]()):
            text = {**own, **description.get("text_config", {})}
            return AutoConfig.for_model(**{**description, "text_config": text})
        if recipe.is_flow:
            own |= _ends_of_masked(CONFIG_MAPPING[description["model_type"]](), tokenizer)
        return AutoConfig.for_model(**{**own, **description})
    except _REFUSED as error:
        raise _cannot_be_built(recipe.name, error) from None


def _special_tokens(tokenizer: Any) -> dict[str, int | None]:
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def _ends_of_masked(default: Any, tokenizer: Any) -> dict[str, int | None]:
    """Some configurations name the tokens that a masked language model's texts begin and end with."""
    ends = {"cls_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.eos_token_id}
    return {name: token for name, token in ends.items() if hasattr(default, name)}


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The untrained model in fp32: fresh weights by the seed, or the checkpoint's.

    With ``training.lora`` the checkpoint is frozen and wrapped in peft's model, whose adapters are trained.

    Raises:
        TrainingError: as `model_config`, or peft refuses it, its weights are not those that it describes, or its
            vocabulary is too small.
    """
    from transformers import GenerationConfig, set_seed

    name, description, training = recipe.name, recipe.model, recipe.training
    wanted = model_config(recipe, tokenizer)
    if recipe.is_flow:
        _check_bidirectional(wanted, name)
    auto, options = _how_it_is_made(wanted, recipe.is_flow)
    if reads_images(wanted):
        processor = load_processor(recipe.run.tokenizer, recipe.image_token, wanted, tokenizer)
        _use_image_token(wanted, processor.image_token_id, description, name)
    set_seed(recipe.seed)
    try:
        if "checkpoint" in description:
            model, loading = auto.from_pretrained(
                description["checkpoint"],
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with their names
                **options,
            )
            if recipe.is_flow:
                loading["unexpected_keys"] = [
                    key for key in loading["unexpected_keys"] if not key.startswith(_OTHER_HEADS)
                ]
            _check_names(loading, f"the checkpoint of {name!r}, {description['checkpoint']},")
        else:
            model = auto.from_config(wanted, dtype=torch.float32, trust_remote_code=False, **options)
            if not recipe.is_flow:
                model.generation_config = GenerationConfig(**_special_tokens(tokenizer))
    except _REFUSED as error:
        raise _cannot_be_built(name, error) from None
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise TrainingError(
            f"the model of {name!r} has {rows} output rows for the {len(tokenizer)} tokens of the tokenizer; "
            "raise vocab_size or resize the checkpoint's embeddings"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and training.sequence_length > longest:
        raise TrainingError(
            f"training.sequence_length {training.sequence_length} is longer than the "
            f"max_position_embeddings {longest} of {name!r}"
        )
    if recipe.is_flow and not keeps_masked_apart(model):
        raise TrainingError(
            f"the model of {name!r} is a {wanted.model_type}, which cannot keep documents that share a row apart; for "
            "model.objective: masked-diffusion take bert or modernbert"
        )
    if training.lora is not None:
        model = _with_adapters(model, training.lora, recipe.seed)
    _freeze(model, training.freeze)
    return model


def load_model(directory: Path, is_flow: bool = False) -> Any:
    """The model in ``directory``; fp32, on the GPU where there is one.

    Args:
        is_flow: it is one that reveals masked tokens, not a causal one.
    """
    from transformers import AutoConfig

    described = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    auto, options = _how_it_is_made(described, is_flow)
    model = auto.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _how_it_is_made(config: Any, is_flow: bool) -> tuple[Any, dict[str, Any]]:
    """(transformers' class that makes a model of ``config``, further arguments of it)."""
    auto = auto_class(config, is_flow)
    # The masks that keep documents apart are true or false, which the attention that is written out cannot take.
    return auto, {"attn_implementation": "sdpa"} if is_flow else {}


def auto_class(config: Any, is_flow: bool) -> Any:
    """transformers' class of a model of ``config``: of images and text, of masked tokens, or causal."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

    if reads_images(config):
        return AutoModelForImageTextToText
    return AutoModelForMaskedLM if is_flow else AutoModelForCausalLM


def saved_dtype(recipe: Recipe) -> torch.dtype:
    """What the finished weights are saved in: with ``base``, that of most of its checkpoint's."""
    if recipe.training.save_dtype != "base":
        return _DTYPES[recipe.training.save_dtype]
    checkpoint = recipe.model.get("checkpoint")
    return torch.float32 if checkpoint is None else _stored_dtype(Path(checkpoint))


def _stored_dtype(checkpoint: Path) -> torch.dtype:
    from safetensors import safe_open
    from transformers import AutoConfig

    numbers: Counter[str] = Counter()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                numbers[part.get_dtype()] += math.prod(part.get_shape())
    if numbers:
        return _STORED.get(numbers.most_common(1)[0][0], torch.float32)
    described = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False).dtype
    return described if described in _STORED.values() else torch.float32


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Give every weight of ``model`` the nearest value that ``dtype`` has; they stay fp32, and buffers as they are.

    Raises:
        TrainingError: a finite weight is beyond what ``dtype`` can hold.
    """
    if dtype == torch.float32:
        return
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtype)
        if torch.isfinite(parameter).all() and not torch.isfinite(rounded).all():
            raise TrainingError(
                f"training.save_dtype: the weights {name} do not fit into {str(dtype).removeprefix('torch.')}; "
                "set it to bf16 or fp32"
            )
        parameter.copy_(rounded)


@torch.inference_mode()
def keeps_apart(model: Any) -> bool:
    """Whether a causal ``model`` keeps documents that share a row apart where their positions start anew, as
    transformers has it of most architectures: tried out, by what it makes of one beside another and alone."""
    if hasattr(model.get_decoder(), "get_rope_index") or hasattr(
        getattr(model, "model", None), "get_rope_index"
    ):
        return False  # its positions are those of images as well, and its own affair

    def beside(ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    return _says_the_same(model, beside, lambda ids: model(input_ids=ids, use_cache=False).logits)


@torch.inference_mode()
def keeps_masked_apart(model: Any) -> bool:
    """As `keeps_apart`, of a bidirectional ``model`` where documents are masked from each other."""

    def beside(ids: Tensor, positions: Tensor) -> Tensor:
        return denoised(model, ids, positions, 0)[..., 1:]

    return _says_the_same(model, beside, lambda ids: model(input_ids=ids).logits[..., 1:])


def _says_the_same(
    model: Any, beside: Callable[[Tensor, Tensor], Tensor], alone: Callable[[Tensor], Tensor]
) -> bool:
    """Whether the logits of ids ``beside`` others, by positions that start anew, are those of ids ``alone``."""
    was_training = model.training
    model.eval()
    ids = (
        torch.arange(2 * _TRIED_TOKENS)[None].to(model.device) % model.get_output_embeddings().weight.shape[0]
    )
    positions = torch.arange(_TRIED_TOKENS).repeat(2)[None].to(model.device)
    try:
        found, wanted = beside(ids, positions)[:, _TRIED_TOKENS:], alone(ids[:, _TRIED_TOKENS:])
    except (TypeError, ValueError, RuntimeError):  # it takes no positions, or not these
        return False
    finally:
        model.train(was_training)
    return bool((found - wanted).abs().max() <= _TRIED_TOLERANCE * wanted.abs().max())


def _check_names(loading: Mapping[str, Iterable[Any]], what: str) -> None:
    """Refuse weights that transformers did not find, has no place for, or found in another shape.

    It would draw the missing ones by chance, say so in a warning, and go on. Tied weights are not missing.
    """
    problems = []
    for key, problem in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "of another shape"),
    ):
        names = sorted(str(found if isinstance(found, str) else found[0]) for found in loading[key])
        if names:
            more = ", ..." if len(names) > _NAMED_IN_ERRORS else ""
            problems.append(f"{len(names):,} {problem} ({', '.join(names[:_NAMED_IN_ERRORS])}{more})")
    if problems:
        raise TrainingError(
            f"{what} does not hold the weights that its config.json describes: {'; '.join(problems)}; save it "
            "again with save_pretrained, or rename them"
        )


def _use_image_token(wanted: Any, token_id: int, description: Mapping[str, Any], name: str) -> None:
    if "checkpoint" in description:
        if wanted.image_token_id != token_id:
            raise TrainingError(
                f"the checkpoint of {name!r} reads images at token {wanted.image_token_id}, but the processor at "
                f"tokenizer.path puts them at {token_id}; give both from one model"
            )
    else:
        wanted.image_token_id = token_id


def _freeze(model: Any, modules: Iterable[str]) -> None:
    for module in modules:
        mine = [p for name, p in model.named_parameters() if module in name.split(".")]
        if not mine:
            parts = {part for name, _ in model.named_parameters() for part in name.split(".")[:-1]}
            raise TrainingError(
                f"training.freeze: the model has no module {module!r}{did_you_mean(module, parts)}"
            )
        for parameter in mine:
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("training.freeze leaves nothing to train; take a module out")


def _with_adapters(model: Any, settings: LoraConfig, seed: int) -> Any:
    import peft
    from transformers import set_seed

    set_seed(seed)
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
