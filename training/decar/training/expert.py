"""The expert stage: one causal language model, trained on its own shard and nothing else.

Knows no other expert, and nothing about how shards were made.
"""

from __future__ import annotations

import difflib
import math
import shutil
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel
from torch import Tensor

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, TrainingConfig
from decar.training.partition import check_marker, partition_fingerprint, read_shard, shard_file
from decar.training.stages import Stage, digest, fingerprint, write_atomically
from decar.training.tokenizer import load_tokenizer

IGNORED = -100
_COMPLETE = "COMPLETE"
# What transformers raises at a configuration or checkpoint that makes no model.
_REFUSED = (OSError, ValueError, TypeError, ZeroDivisionError, StrictDataclassError)


class ExpertReport(BaseModel):
    """``report.json`` of an expert; losses in nats per token."""

    expert: str
    num_parameters: int
    train_tokens: int
    held_out_tokens: int
    steps: int
    train_loss: float
    held_out_loss: float
    train_time_s: float


@dataclass
class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Documents packed one after another into rows of one length.

    ``input_ids`` and ``labels``: [N, T] int64 on the CPU; the tail of the last row is padding, its labels -100.
    """

    input_ids: Tensor
    labels: Tensor
    num_tokens: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def expert_stage(config: TrainConfig, name: str) -> Stage:
    """The stage of expert ``name`` as ``config``, its shard and the tokenizer are now.

    Raises:
        TrainingError: no such expert, or its shard or the tokenizer is missing or was made with another configuration.
    """
    files = [shard_file(config, name, split) for split in ("train", "held_out")]
    files.append(config.work_dir / "tokenizer" / "tokenizer.json")
    files.append(config.work_dir / "tokenizer" / "tokenizer_config.json")
    settings = expert_fingerprint(config, name)
    for file in files:
        if not file.is_file():
            raise TrainingError(f"{file} is missing; run `decar-train partition` first")
    check_marker(config.work_dir / "partition", partition_fingerprint(config))
    check_marker(config.work_dir / "tokenizer", fingerprint(config.tokenizer))
    return Stage(expert_directory(config, name), settings, digest(*files))


def expert_directory(config: TrainConfig, name: str) -> Path:
    return config.work_dir / "experts" / name


def expert_fingerprint(config: TrainConfig, name: str) -> str:
    """What of ``config`` the weights of expert ``name`` depend on. How often it is saved or logged does not count.

    Raises:
        TrainingError: no such expert.
    """
    return fingerprint(
        config.model_of(name), config.training.model_dump(exclude={"save_steps", "log_steps"}), config.seed
    )


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

    Raises:
        TrainingError: a configuration that transformers refuses, or too small a vocabulary.
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
    except (OSError, ValueError, TypeError, ZeroDivisionError) as error:
        raise TrainingError(
            f"the model of {name!r} cannot be built ({' '.join(str(error).split())})"
        ) from None
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
    return model


def pack(texts: list[str], tokenizer: Any, length: int) -> Blocks:
    """``texts``, each between bos (where the tokenizer has one) and eos, in rows of ``length`` tokens."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*start, *ids, tokenizer.eos_token_id]
    num_rows = math.ceil(len(stream) / length)
    padding = num_rows * length - len(stream)
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.tensor(stream + [fill] * padding).view(num_rows, length)
    labels = torch.tensor(stream + [IGNORED] * padding).view(num_rows, length)
    return Blocks(input_ids, labels, len(stream))


@torch.inference_mode()
def mean_loss(model: Any, blocks: Blocks, batch_size: int) -> float:
    """Nats per predicted token of ``blocks``."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        ids, labels = (
            x[start : start + batch_size].to(model.device) for x in (blocks.input_ids, blocks.labels)
        )
        logits = model(input_ids=ids).logits[:, :-1].float()
        targets = labels[:, 1:]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((targets != IGNORED).sum())
    return total / max(count, 1)


def read_expert_report(directory: Path) -> ExpertReport:
    """The report of a finished model in ``directory``.

    Raises:
        TrainingError: it is missing or damaged.
    """
    file = directory / "report.json"
    try:
        return ExpertReport.model_validate_json(file.read_text())
    except (OSError, pydantic.ValidationError):
        raise TrainingError(f"{file} cannot be read; delete its directory and train again") from None


def train_expert(config: TrainConfig, name: str, stage: Stage, callbacks: Iterable[Any] = ()) -> ExpertReport:
    """Train expert ``name``, from its last complete checkpoint if there is one, and put it in place.

    Args:
        callbacks: transformers ``TrainerCallback`` objects, e.g. a progress bar.

    Raises:
        TrainingError: an unusable model, shard or tokenizer.
    """
    train, held_out = (read_shard(config, name, split) for split in ("train", "held_out"))
    return train_model(config, name, train, held_out, stage, callbacks)


def train_model(
    config: TrainConfig,
    name: str,
    train_texts: list[str],
    held_out_texts: list[str],
    stage: Stage,
    callbacks: Iterable[Any] = (),
) -> ExpertReport:
    """Train the model that ``config`` describes for expert ``name`` on any texts, and put it in ``stage``'s place.

    Raises:
        TrainingError: an unusable model or tokenizer.
    """
    from transformers import PrinterCallback

    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    model = build_model(config, name, tokenizer)
    length = config.training.sequence_length
    train = pack(train_texts, tokenizer, length)
    held_out = pack(held_out_texts, tokenizer, length)
    checkpoints = config.work_dir / "checkpoints" / stage.directory.relative_to(config.work_dir)
    trainer = _trainer(config, model, train, checkpoints / f"{stage.config}-{stage.inputs}")
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    last = last_checkpoint(Path(trainer.args.output_dir))
    start_s = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    report = ExpertReport(
        expert=stage.directory.name,
        num_parameters=model.num_parameters(),
        train_tokens=train.num_tokens,
        held_out_tokens=held_out.num_tokens,
        steps=trainer.state.global_step,
        train_loss=result.training_loss,
        held_out_loss=mean_loss(model, held_out, config.training.batch_size),
        train_time_s=time.monotonic() - start_s,
    )
    # The Trainer switches the cache off, and whoever generates with the saved model would generate without one.
    model.config.use_cache = True
    with stage.writing() as directory:
        model.save_pretrained(directory)
        for file in sorted((config.work_dir / "tokenizer").glob("*token*")):
            shutil.copyfile(file, directory / file.name)
        (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def _trainer(config: TrainConfig, model: Any, train: Blocks, checkpoints: Path) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class MarkComplete(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_atomically(checkpoints / f"checkpoint-{state.global_step}" / _COMPLETE, "")

    settings: TrainingConfig = config.training
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_learning_rate_ratio},
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        save_steps=settings.save_steps,
        # The newest may be half written: the one before it has to stay.
        save_total_limit=2,
        logging_steps=settings.log_steps,
        seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=train, callbacks=[MarkComplete()])


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are deleted."""
    found: dict[int, Path] = {}
    for checkpoint in directory.glob("checkpoint-*"):
        if (checkpoint / _COMPLETE).is_file():
            found[int(checkpoint.name.rpartition("-")[2])] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return found[max(found)] if found else None
