"""Checkpoints by folder or by Hub id: where their files are, and why one cannot be an expert.

Knows what transformers, peft and the Hub write, never a model's weights.
"""

from __future__ import annotations

import fnmatch
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decar.router.errors import DecarError, EnsembleError, did_you_mean
from decar.router.inside import check_file_name
from decar.router.manifest import MANIFEST_NAME, ExpertCheckpoint, config_problem
from decar.training.checkpoint_files import INDEX_NAME

WEIGHTS_NAME = "model.safetensors"
KEPT = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*preprocessor_config.json", "processor_config.json", INDEX_NAME),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Patterns of what an expert keeps of its checkpoint, beside weights."""
_ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{0}').merge_and_unload().save_pretrained('{0}-merged')\" and copy "
    "tokenizer and chat template there"
)
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{0}').save_pretrained('{0}-safetensors')\" and copy tokenizer and chat template there"
)
# Endings of classes that predict something else than the next token.
_OTHER_TASKS = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"),
    *("ForMultipleChoice", "ForImageClassification", "Model"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Files that an expert is made of.

    Attributes:
        given: as the user named it.
        folder: where its files are.
        commit: of the Hub's repository, where it comes from there.
        config: ``config.json``.
    """

    name: str
    given: str
    folder: Path
    commit: str | None
    config: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """Names of all that an expert keeps: weights, and files by `KEPT`.

        Raises:
            EnsembleError: it has no weights that can be used.
        """
        return [*self.other_files, *weight_names(self)]

    @property
    def other_files(self) -> list[str]:
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in KEPT)
        )

    def read_json(self, name: str) -> dict[str, Any]:
        """A file of settings; empty where there is none.

        Raises:
            EnsembleError: it is no JSON object.
        """
        return _read_json(self.name, self.folder / name) if (self.folder / name).is_file() else {}


def find(name: str, given: str) -> Checkpoint:
    """The checkpoint that ``given`` means: a folder, or else ``ORG/MODEL`` or ``ORG/MODEL@REVISION`` of the Hub.

    Of the Hub's, all but weights is downloaded: `fetch_weights` does the rest, when all experts are found to fit.

    Raises:
        EnsembleError: there is none, or it cannot be an expert; with the fix.
    """
    path = Path(given).expanduser()
    commit = None
    if path.is_dir():
        folder = path
    elif path.exists():
        raise EnsembleError(f"expert {name!r}: {_why_no_folder(path)}")
    elif _is_path(given):
        raise EnsembleError(f"expert {name!r}: {given} does not exist{_nearby(path)}")
    else:
        folder = _download(name, given, [*KEPT, _ADAPTER])
        commit = folder.name  # as the cache calls a snapshot
    _check_kind(name, given, folder)
    checkpoint = Checkpoint(name, given, folder, commit, _read_json(name, folder / "config.json"))
    _check_config(checkpoint)
    return checkpoint


def fetch_weights(checkpoint: Checkpoint) -> None:
    """Download the weights of a checkpoint of the Hub.

    Raises:
        EnsembleError: they cannot be had.
    """
    if checkpoint.commit is not None:
        index = checkpoint.folder / INDEX_NAME
        wanted = weight_names(checkpoint) if index.exists() else [WEIGHTS_NAME]
        if not all((checkpoint.folder / file).is_file() for file in wanted):
            _download(checkpoint.name, checkpoint.given, wanted)


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """The safetensors files that transformers would load.

    Raises:
        EnsembleError: there are none, or what there is cannot be used.
    """
    folder, whose = checkpoint.folder, f"expert {checkpoint.name!r}"
    if (folder / INDEX_NAME).is_file():
        named = checkpoint.read_json(INDEX_NAME).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise EnsembleError(f"{whose}: {folder / INDEX_NAME} names no weights; download or save it again")
        try:
            return sorted({check_file_name(file) for file in named.values()})
        except (DecarError, TypeError) as error:
            raise EnsembleError(f"{whose}: {folder / INDEX_NAME}: {error}") from None
    if (folder / WEIGHTS_NAME).is_file():
        return [WEIGHTS_NAME]
    raise EnsembleError(f"{whose}: {_why_no_weights(checkpoint)}")


def _is_path(given: str) -> bool:
    """Whether ``given``, which does not exist, can only mean a path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    parts = Path(given).parts
    if given.startswith((".", "~", os.sep)) or (len(parts) > 1 and Path(parts[0]).exists()):
        return True
    try:
        validate_repo_id(given.partition("@")[0])
    except HFValidationError:
        return True
    return False


def _nearby(path: Path) -> str:
    siblings = (
        [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    )
    near = did_you_mean(path.name, siblings)
    return near or "; give a folder that holds config.json and *.safetensors, or ORG/MODEL of the Hub"


def _why_no_folder(path: Path) -> str:
    if path.suffix == ".gguf":
        return (
            f"{path} is a GGUF file, which is quantized; give the folder of the checkpoint it was made from"
        )
    return f"{path} is a file; give the folder of the checkpoint, {path.parent}"


def _check_kind(name: str, given: str, folder: Path) -> None:
    whose = f"expert {name!r}"
    if (folder / _ADAPTER).is_file():
        base = _read_json(name, folder / _ADAPTER).get("base_model_name_or_path", "a model")
        raise EnsembleError(
            f"{whose}: {given} is a LoRA adapter of {base} and no model of its own; merge it: {_MERGE.format(given)}"
        )
    if (folder / "config.json").is_file():
        return
    if (folder / MANIFEST_NAME).is_file():
        experts = sorted(path.parent for path in folder.glob("*/*/config.json"))
        hint = f", e.g. {name}={experts[0]}" if experts else ""
        raise EnsembleError(f"{whose}: {given} is an ensemble; give one of its experts{hint}")
    if any(folder.glob("*.gguf")):
        raise EnsembleError(
            f"{whose}: {given} holds GGUF files, which are quantized; give the checkpoint they were made from"
        )
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    hint = (
        f"did you mean {name}={inner[-1]}?"
        if inner
        else "give a folder as save_pretrained() of transformers writes it"
    )
    raise EnsembleError(f"{whose}: {given} is no checkpoint, as it holds no config.json; {hint}")


def _check_config(checkpoint: Checkpoint) -> None:
    config, whose = checkpoint.config, f"expert {checkpoint.name!r}: {checkpoint.given}"
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise EnsembleError(
            f"{whose} is quantized ({method or 'by quantization_config'}), which ensembles are not made of; "
            "give the checkpoint in bfloat16, float16 or float32 that it was made from"
        )
    expert = ExpertCheckpoint(checkpoint.name, checkpoint.folder, 1.0, config)
    problem = config_problem(expert)
    if problem:
        raise EnsembleError(
            f"{whose}: its config.json {problem}; give a language model as transformers saves it"
        )
    architecture = expert.architecture
    if config.get("is_encoder_decoder"):
        raise EnsembleError(
            f"{whose} is {architecture}, an encoder with a decoder; give a decoder alone (…ForCausalLM)"
        )
    if architecture.endswith(_OTHER_TASKS):
        raise EnsembleError(
            f"{whose} is {architecture}, which predicts no next token; give a language model (…ForCausalLM)"
        )


def _why_no_weights(checkpoint: Checkpoint) -> str:
    folder, given = checkpoint.folder, checkpoint.given
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{given} has its weights as pickle ({pickles[0]}), which can run code when it is read; "
            f"if you trust it, write safetensors: {_CONVERT.format(given)}"
        )
    if any(folder.glob("*.gguf")):
        return f"{given} holds GGUF files, which are quantized; give the checkpoint they were made from"
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if parts:
        return (
            f"{given} has {parts[0]}, but neither {WEIGHTS_NAME} nor {INDEX_NAME}; copy what is missing there"
        )
    if checkpoint.commit is not None:
        return (
            f"{given} has no safetensors on the Hub (pickle, GGUF or nothing); give a model or revision that has, "
            f"or write them from pickle: {_CONVERT.format(given)}"
        )
    return f"{given} holds no weights (*.safetensors); copy them there"


def _read_json(name: str, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EnsembleError(
            f"expert {name!r}: {file} cannot be read ({error}); copy or save it again"
        ) from None
    if not isinstance(data, dict):
        raise EnsembleError(f"expert {name!r}: {file} is no JSON object; copy or save it again")
    return data


def _download(name: str, given: str, patterns: list[str]) -> Path:
    """The folder of the Hub cache that holds what of the repository ``given`` fits ``patterns``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = given.partition("@")
    whose = f"expert {name!r}"
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError:
        reason = f"{repository} is for those who have asked for it; ask on its page on the Hub, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = f"there is no folder {given}, and no model {repository} on the Hub; for a private one, `hf auth login`"
    except RevisionNotFoundError:
        reason = f"{repository} has no revision {revision!r}; its page on the Hub lists them"
    except LocalEntryNotFoundError:
        reason = (
            f"there is no folder {given}, and the Hub cannot be asked for a model of that name; download it where "
            f"there is a network (`hf download {repository}`), or give a folder"
        )
    except Exception as error:  # the Hub's client has had several HTTP libraries, each with its own errors
        reason = (
            f"{repository} cannot be downloaded ({' '.join(str(error).split())}); try again, or give a folder"
        )
    raise EnsembleError(f"{whose}: {reason}")
