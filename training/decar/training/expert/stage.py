"""The expert stage: one language model, of text alone or of images and text, trained on its own shard and nothing else.

Knows no other expert, and nothing about how shards were made. Several processes may train one expert together
(``accelerate launch``); the main one writes.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, TrainingConfig
from decar.training.data.blocks import Rows, length_quantiles, mean_loss, pack
from decar.training.data.corpus import IMAGES_FIELD
from decar.training.data.image_blocks import read_image_blocks
from decar.training.data.processor import load_processor, processor_files, reads_images
from decar.training.data.tokenizer import load_tokenizer
from decar.training.expert.model import build_model, keeps_apart, model_config
from decar.training.export.image_models import with_vision_model
from decar.training.partition.stage import (
    check_marker,
    has_column,
    partition_fingerprint,
    read_examples,
)
from decar.training.run import SPLITS, adapter_folder, complete_file, read_report, report_file, require
from decar.training.stages import Stage, digest, fingerprint, is_full_disk, sha256, write_atomically

_DIVERGED = (
    "nothing of it is kept as finished. "
    "Lower training.learning_rate or training.max_grad_norm, or raise training.warmup"
)
# What the trained weights do not depend on.
_NOT_IN_WEIGHTS = {"save_steps", "save_total_limit", "log_steps", "tensorboard", "gradient_checkpointing"}
# Settings that are younger than experts which are finished. Unset they count for nothing, so that those stay finished.
_YOUNGER = ("gradient_accumulation", "lora", "freeze")


class ExpertReport(BaseModel):
    """``report.json`` of an expert; losses in nats per token.

    ``train_loss`` is None where nothing was trained, as in a model that is merged and no more. ``shards`` holds the
    SHA-256 of each file that it was trained or measured on, ``versions`` the software that did. ``dropped`` counts what
    of its training documents it did not learn, by what it is. Half of these documents have at most
    ``document_tokens_p50`` tokens, 99 of 100 at most ``document_tokens_p99``.
    """

    expert: str
    num_parameters: int
    train_tokens: int
    held_out_tokens: int
    steps: int
    train_loss: float | None
    held_out_loss: float
    train_time_s: float
    train_documents: int | None = None
    held_out_documents: int | None = None
    dropped: dict[str, int] = {}
    document_tokens_p50: int | None = None
    document_tokens_p99: int | None = None
    shards: dict[str, str] = {}
    versions: dict[str, str] = {}


def expert_stage(config: TrainConfig, name: str) -> Stage:
    """The stage of expert ``name`` as ``config``, its shard and the tokenizer are now.

    Raises:
        TrainingError: no such expert, or its shard or the tokenizer is missing or was made with another configuration.
    """
    run, settings = config.run, expert_fingerprint(config, name)
    files = [run.shard(name, split) for split in SPLITS]
    require(run.partition, *files)
    require(run.tokenizer, *run.tokenizer_files)
    check_marker(run.partition, partition_fingerprint(config))
    check_marker(run.tokenizer, fingerprint(config.tokenizer))
    files += run.tokenizer_files + processor_files(run.tokenizer)
    return Stage(run.expert(name), settings, digest(*files))


def expert_fingerprint(config: TrainConfig, name: str) -> str:
    """What of ``config`` the weights of expert ``name`` depend on. How often it is saved or logged does not count.

    Raises:
        TrainingError: no such expert.
    """
    settings = config.training.model_dump(mode="json", exclude=_NOT_IN_WEIGHTS)
    for field in _YOUNGER:
        if getattr(config.training, field) == TrainingConfig.model_fields[field].default:
            del settings[field]
    return fingerprint(config.model_of(name), settings, config.seed)


def read_expert_report(directory: Path) -> ExpertReport:
    """The report of a finished model in ``directory``.

    Raises:
        TrainingError: it is missing or damaged.
    """
    return read_report(directory, ExpertReport)


def train_expert(config: TrainConfig, name: str, stage: Stage, callbacks: Iterable[Any] = ()) -> ExpertReport:
    """Train expert ``name``, from its last complete checkpoint if there is one, and put it in place.

    Args:
        callbacks: transformers ``TrainerCallback`` objects, e.g. a progress bar.

    Raises:
        TrainingError: an unusable model, shard or tokenizer, a loss that is not finite, or a full disk.
    """
    return train_model(config, name, [name], stage, callbacks)


def train_model(
    config: TrainConfig, name: str, shards: Sequence[str], stage: Stage, callbacks: Iterable[Any] = ()
) -> ExpertReport:
    """Train the model that ``config`` describes for expert ``name`` on any ``shards``, and put it in ``stage``'s place.

    Raises:
        TrainingError: an unusable model, shard or tokenizer, a loss that is not finite, or a full disk.
    """
    from transformers.integrations import TensorBoardCallback

    tokenizer = load_tokenizer(config.run.tokenizer)
    processor = expert_processor(config, name, tokenizer)
    model = build_model(config, name, tokenizer)
    apart = keeps_apart(model)
    blocks = {split: read_blocks(config, shards, split, tokenizer, processor, apart) for split in SPLITS}
    train, held_out = blocks["train"], blocks["held_out"]
    directory = config.run.checkpoints(stage)
    trainer = make_trainer(config, model, train, directory)
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        delete_incomplete(directory)
    accelerator.wait_for_everyone()
    last = next(reversed(complete_checkpoints(directory)), None)
    writer = None
    if config.training.tensorboard and accelerator.is_main_process:
        writer = _tensorboard_writer(config.run.logs(stage), last)
        callbacks = [*callbacks, TensorBoardCallback(writer)]
    for callback in callbacks:
        trainer.add_callback(callback)
    p50, p99 = length_quantiles(train.documents, 0.5, 0.99)
    start_s = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    adapter = adapter_folder(directory)
    if config.training.lora is not None:
        if accelerator.is_main_process:
            model.save_pretrained(adapter)
        model = model.merge_and_unload()
    report = ExpertReport(
        expert=stage.directory.name,
        num_parameters=model.num_parameters(),
        train_tokens=train.num_tokens,
        held_out_tokens=held_out.num_tokens,
        steps=trainer.state.global_step,
        train_loss=result.training_loss,
        held_out_loss=mean_loss(model, held_out, config.training.batch_size),
        train_time_s=time.monotonic() - start_s,
        train_documents=_num_documents(config, shards, "train"),
        held_out_documents=_num_documents(config, shards, "held_out"),
        dropped=dict(train.dropped),
        document_tokens_p50=p50,
        document_tokens_p99=p99,
        shards=_hashes(config, shards),
        versions=versions(),
    )
    if writer is not None:
        writer.add_scalar("held_out_loss", report.held_out_loss, report.steps)
        writer.close()
    if not math.isfinite(report.held_out_loss):
        raise TrainingError(
            f"the held-out loss of {report.expert} is {report.held_out_loss} after step {report.steps}; {_DIVERGED}"
        )
    if accelerator.is_main_process:
        # The Trainer switches the cache off, and whoever generates with the saved model would generate without one.
        model.config.use_cache = model.config.get_text_config().use_cache = True
        with stage.writing() as target:
            model.save_pretrained(target)
            if processor is not None:
                with_vision_model(target)
                processor.save_pretrained(target)
            if adapter.is_dir():
                shutil.copytree(adapter, adapter_folder(target))
            for file in sorted(config.run.tokenizer.glob("*token*")):
                shutil.copyfile(file, target / file.name)
            report_file(target).write_text(report.model_dump_json(indent=2) + "\n")
        shutil.rmtree(directory.parent, ignore_errors=True)
    accelerator.end_training()
    return report


def expert_processor(config: TrainConfig, name: str, tokenizer: Any) -> Any | None:
    """The processor of expert ``name``, or None where its model reads text alone.

    Raises:
        TrainingError: as `load_processor`.
    """
    wanted = model_config(config, name, tokenizer)
    return load_processor(config, wanted, tokenizer) if reads_images(wanted) else None


def read_blocks(
    config: TrainConfig,
    shards: Sequence[str],
    split: str,
    tokenizer: Any,
    processor: Any = None,
    apart: bool = True,
) -> Rows:
    """The ``split`` of ``shards`` in rows of at most ``config.training.sequence_length`` tokens.

    Args:
        processor: that of an image-text model.
        apart: whether the model keeps documents that share a row apart.

    Raises:
        TrainingError: a shard is missing or damaged, holds images for a model of text, or teaches nothing.
    """
    length = config.training.sequence_length
    examples = [read_examples(config, shard, split) for shard in shards]
    blocks: Rows
    if processor is None and has_column(config, shards[0], split, IMAGES_FIELD):
        raise TrainingError(
            f"the shards of {', '.join(shards)} hold images, which no model of text reads; set model.model_type to an "
            "image-text model, e.g. llava"
        )
    if processor is not None:
        files = [config.run.shard(shard, split) for shard in shards]
        blocks = read_image_blocks(examples, files, processor, length, apart)
    else:
        blocks = pack([example for shard in examples for example in shard], tokenizer, length, apart)
    if not len(blocks):
        raise TrainingError(
            f"the {split} documents of {', '.join(shards)} hold no token to predict; add data, or raise "
            "partition.held_out"
        )
    return blocks


def make_trainer(config: TrainConfig, model: Any, train: Rows, directory: Path) -> Any:
    """A transformers ``Trainer`` of ``model`` on ``train`` that keeps its checkpoints in ``directory``.

    It raises a TrainingError where a loss is not finite, or no space is left for a checkpoint.

    Raises:
        TrainingError: a batch cannot be dealt out to the processes that there are.
    """
    from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

    class ExpertTrainer(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            # The Trainer would log another number in its place, and go on with weights that are not numbers.
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps}, at "
                    f"learning rate {self.lr_scheduler.get_last_lr()[0]:.3g}; {_DIVERGED}"
                )
            return loss

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            step = self.state.global_step
            try:
                super()._save_checkpoint(*args, **kwargs)
            except Exception as error:
                shutil.rmtree(directory / f"checkpoint-{step}", ignore_errors=True)
                if not is_full_disk(error):
                    raise
                raise TrainingError(
                    f"no space is left for the checkpoint of step {step} in {directory}; free some or set work_dir to "
                    "another disk. Nothing of it was kept, and the same command continues from the one before"
                ) from error

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if not (isinstance(self.model, PreTrainedModel) and reads_images(self.model.config)):
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
            # The Trainer takes names as they are on disk, but image-text models save theirs under older ones: it would
            # load nothing, and say so in a warning.
            saved = type(self.model).from_pretrained(
                resume_from_checkpoint, dtype=torch.float32, trust_remote_code=False
            )
            self.model.load_state_dict(saved.state_dict())

    # The Trainer switches off the cache of the outer configuration alone; with one, packed documents see each other.
    model.config.get_text_config().use_cache = False
    settings = config.training
    if settings.batch_size % num_processes():
        raise TrainingError(
            f"training.batch_size {settings.batch_size} cannot be dealt out to {num_processes()} processes; "
            "make it a multiple of their number"
        )
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size // num_processes(),
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_learning_rate_ratio},
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        save_steps=settings.save_steps,
        # Checkpoints are rotated once they are complete, which the Trainer would not wait for.
        save_total_limit=None,
        logging_steps=settings.log_steps,
        seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        # The tower of an image-text model takes no part in a batch of texts, nor its last layers in any.
        ddp_find_unused_parameters=True if reads_images(model.config) else None,
    )
    # A plain process that sees several GPUs uses one of them: torch's DataParallel would multiply the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    keep = _keep_checkpoints(directory, settings.save_total_limit)
    trainer = ExpertTrainer(
        model=model, args=arguments, train_dataset=train, data_collator=train.collate, callbacks=[keep]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def num_processes() -> int:
    """How many processes train this expert together, as ``accelerate launch`` or torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in ``directory`` that were written to their end, the oldest first."""
    checkpoints = directory.glob("checkpoint-*")
    return sorted((each for each in checkpoints if complete_file(each).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser steps that ``checkpoint`` has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def delete_incomplete(directory: Path) -> None:
    """Delete the checkpoints in ``directory`` that a killed process left half written."""
    complete = complete_checkpoints(directory)
    for checkpoint in directory.glob("checkpoint-*"):
        if checkpoint not in complete:
            shutil.rmtree(checkpoint)


def _keep_checkpoints(directory: Path, limit: int) -> Any:
    from accelerate import PartialState
    from transformers import TrainerCallback

    class KeepCheckpoints(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Every process writes its own state of the random numbers.
            PartialState().wait_for_everyone()
            if state.is_world_process_zero:
                write_atomically(complete_file(directory / f"checkpoint-{state.global_step}"), "")
                for old in complete_checkpoints(directory)[:-limit]:
                    shutil.rmtree(old)

    return KeepCheckpoints()


def _tensorboard_writer(directory: Path, last: Path | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    if last is None:
        shutil.rmtree(directory, ignore_errors=True)
    return SummaryWriter(str(directory), purge_step=step_of(last) + 1 if last else None)


def _num_documents(config: TrainConfig, shards: Sequence[str], split: str) -> int:
    import pyarrow.parquet as parquet

    return sum(parquet.read_metadata(config.run.shard(shard, split)).num_rows for shard in shards)


def _hashes(config: TrainConfig, shards: Sequence[str]) -> dict[str, str]:
    files = [config.run.shard(shard, split) for shard in shards for split in SPLITS]
    return {f"{file.parent.name}/{file.name}": sha256(file) for file in files}


def versions() -> dict[str, str]:
    """Of what trains a model, by package, for its report."""
    return {package: _version(package) for package in ("decar", "torch", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
