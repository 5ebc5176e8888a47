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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decar.router.errors import TrainingError
from decar.training.config import Recipe, TrainConfig, TrainingConfig
from decar.training.data.blocks import Rows, length_quantiles, mean_loss, pack
from decar.training.data.corpus import IMAGES_FIELD
from decar.training.data.image_blocks import read_image_blocks
from decar.training.data.masked_blocks import HeldOutBlocks, MaskedBlocks
from decar.training.data.processor import load_processor, processor_files, reads_images
from decar.training.data.shards import check_marker, count_documents, has_column, read_examples
from decar.training.data.tokenizer import load_tokenizer
from decar.training.expert.image_models import with_vision_model
from decar.training.expert.model import build_model, keeps_apart, model_config, round_weights, saved_dtype
from decar.training.expert.options import check_options
from decar.training.expert.report import ExpertReport, versions
from decar.training.expert.watch import Prompts, curve, plot_curve, read_prompts, sample_key
from decar.training.fingerprints import expert_fingerprint, partition_fingerprint, tokenizer_fingerprint
from decar.training.run import SPLITS, Run, adapter_folder, complete_file, plot_file, report_file, require
from decar.training.stages import Stage, digest, is_full_disk, sha256, write_atomically

_DIVERGED = (
    "nothing of it is kept as finished. "
    "Lower training.learning_rate or training.max_grad_norm, or raise training.warmup"
)


def expert_stage(config: TrainConfig, name: str) -> Stage:
    """The stage of expert ``name`` as ``config``, its shard and the tokenizer are now.

    Raises:
        TrainingError: no such expert, or its shard or the tokenizer is missing or was made with another configuration.
    """
    run, settings = config.run, expert_fingerprint(config.recipe(name))
    files = [run.shard(name, split) for split in SPLITS]
    require(run.partition, *files)
    require(run.tokenizer, *run.tokenizer_files)
    check_marker(run.partition, partition_fingerprint(config))
    check_marker(run.tokenizer, tokenizer_fingerprint(config.tokenizer))
    files += run.tokenizer_files + processor_files(run.tokenizer)
    return Stage(run.expert(name), settings, digest(*files))


def train_expert(config: TrainConfig, name: str, stage: Stage, callbacks: Iterable[Any] = ()) -> ExpertReport:
    """Train expert ``name``, from its last complete checkpoint if there is one, and put it in place.

    Args:
        callbacks: transformers ``TrainerCallback`` objects, e.g. a progress bar.

    Raises:
        TrainingError: an unusable model, shard or tokenizer, a loss that is not finite, or a full disk.
    """
    return train_model(config.recipe(name), [name], stage, callbacks)


def train_model(
    config: Recipe, shards: Sequence[str], stage: Stage, callbacks: Iterable[Any] = ()
) -> ExpertReport:
    """Train the model that ``config`` describes on any ``shards``, and put it in ``stage``'s place.

    Raises:
        TrainingError: an unusable model, shard or tokenizer, a loss that is not finite, or a full disk.
    """
    from transformers.integrations import TensorBoardCallback

    tokenizer = load_tokenizer(config.run.tokenizer)
    processor = expert_processor(config, tokenizer)
    model = build_model(config, tokenizer)
    apart = config.is_flow or keeps_apart(model)
    blocks = {split: read_blocks(config, shards, split, tokenizer, processor, apart) for split in SPLITS}
    train, held_out = blocks["train"], blocks["held_out"]
    directory = config.run.checkpoints(stage)
    prompts = read_prompts(config.training, config.run.shard(shards[0], "train"), tokenizer, model)
    what = stage.directory.name
    trainer = make_trainer(config, model, train, directory, held_out, prompts, f"{config.ensemble} {what}")
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        delete_incomplete(directory)
    accelerator.wait_for_everyone()
    last = next(reversed(complete_checkpoints(directory)), None)
    writer = None
    if config.training.tensorboard and accelerator.is_main_process:
        writer = _tensorboard_writer(config.run.logs(stage), last, prompts)
        callbacks = [*callbacks, TensorBoardCallback(writer)]
    for callback in callbacks:
        trainer.add_callback(callback)
    p50, p99 = length_quantiles(train.documents, 0.5, 0.99)
    start_s = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    state = trainer.state
    kept_step = state.best_global_step if config.training.keep == "best" else state.global_step
    if kept_step != state.global_step:
        trainer._load_from_checkpoint(str(directory / f"checkpoint-{kept_step}"))
    adapter = adapter_folder(directory)
    if config.training.lora is not None:
        if accelerator.is_main_process:
            model.save_pretrained(adapter)
        model = model.merge_and_unload()
    dtype = saved_dtype(config)
    round_weights(model, dtype)
    held_out_loss = mean_loss(model, held_out, config.training.batch_size)
    said = prompts.log_entry(model)
    log = [*state.log_history, {"step": kept_step, **said}]
    if config.training.eval_steps is None:
        log[-1]["eval_loss"] = held_out_loss
    points = curve(log)
    is_new = last is None or state.global_step > step_of(last)
    report = ExpertReport(
        expert=what,
        num_parameters=model.num_parameters(),
        train_tokens=train.num_tokens,
        held_out_tokens=held_out.num_tokens,
        steps=state.global_step,
        train_loss=result.training_loss
        if is_new
        else next((p.train_loss for p in reversed(points) if p.train_loss), None),
        held_out_loss=held_out_loss,
        train_time_s=time.monotonic() - start_s,
        train_documents=_num_documents(config.run, shards, "train"),
        held_out_documents=_num_documents(config.run, shards, "held_out"),
        dropped=dict(train.dropped),
        document_tokens_p50=p50,
        document_tokens_p99=p99,
        shards=_hashes(config.run, shards),
        versions=versions(),
        kept_step=kept_step,
        curve=points,
        samples=prompts.samples(log),
    )
    if writer is not None:
        writer.add_scalar("held_out_loss", report.held_out_loss, kept_step)
        for key, text in said.items():
            writer.add_text(f"train/{key}", text, kept_step)
        writer.close()
    if not math.isfinite(report.held_out_loss):
        raise TrainingError(
            f"the held-out loss of {report.expert} is {report.held_out_loss} after step {report.steps}; {_DIVERGED}"
        )
    # Where each process holds a part of the weights, all of them have to be asked.
    whole = accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if accelerator.is_main_process:
        # The Trainer switches the cache off, and whoever generates with the saved model would generate without one.
        model.config.use_cache = model.config.get_text_config().use_cache = True
        with stage.writing() as target:
            if whole is None:
                model.to(dtype).save_pretrained(target)
            else:
                model.save_pretrained(
                    target, state_dict={key: value.to(dtype) for key, value in whole.items()}
                )
            if processor is not None:
                with_vision_model(target)
                processor.save_pretrained(target)
            if adapter.is_dir():
                shutil.copytree(adapter, adapter_folder(target))
            for file in sorted(config.run.tokenizer.glob("*token*")):
                shutil.copyfile(file, target / file.name)
            report_file(target).write_text(report.model_dump_json(indent=2) + "\n")
            write_plot(report, target)
        shutil.rmtree(directory.parent, ignore_errors=True)
    accelerator.end_training()
    return report


def write_plot(report: ExpertReport, directory: Path) -> None:
    """Plot the losses of ``report`` into the ``directory`` of its model."""
    kept = report.kept_step if report.kept_step != report.steps else None
    plot_curve(report.curve, f"{report.expert}: loss by step", plot_file(directory, "curve"), kept)


def expert_processor(recipe: Recipe, tokenizer: Any) -> Any | None:
    """The processor of the model, or None where that reads text alone.

    Raises:
        TrainingError: as `load_processor`.
    """
    wanted = model_config(recipe, tokenizer)
    if not reads_images(wanted):
        return None
    return load_processor(recipe.run.tokenizer, recipe.image_token, wanted, tokenizer)


def read_blocks(
    recipe: Recipe,
    shards: Sequence[str],
    split: str,
    tokenizer: Any,
    processor: Any = None,
    apart: bool = True,
) -> Rows:
    """The ``split`` of ``shards`` in rows of at most ``training.sequence_length`` tokens.

    Args:
        processor: that of an image-text model.
        apart: whether the model keeps documents that share a row apart; of masked diffusion, all do.

    Raises:
        TrainingError: a shard is missing or damaged, holds images for a model of text, or teaches nothing.
    """
    length = recipe.training.sequence_length
    files = [recipe.run.shard(shard, split) for shard in shards]
    examples = [read_examples(file) for file in files]
    blocks: Rows
    if processor is None and has_column(files[0], IMAGES_FIELD):
        raise TrainingError(
            f"the shards of {', '.join(shards)} hold images, which no model of text reads; set model.model_type to an "
            "image-text model, e.g. llava"
        )
    if processor is not None:
        blocks = read_image_blocks(examples, files, processor, length, apart)
    else:
        together = [example for shard in examples for example in shard]
        blocks = packed = pack(together, tokenizer, length, apart, causal=not recipe.is_flow)
        if recipe.schedule is not None:
            masked = MaskedBlocks.of(packed, tokenizer.mask_token_id, recipe.schedule, recipe.seed)
            blocks = masked if split == "train" else HeldOutBlocks.of_masked(masked)
    if not len(blocks):
        raise TrainingError(
            f"the {split} documents of {', '.join(shards)} hold no token to predict; add data, or raise "
            "partition.held_out"
        )
    return blocks


def make_trainer(
    config: Recipe,
    model: Any,
    train: Rows,
    directory: Path,
    held_out: Rows | None = None,
    prompts: Prompts | None = None,
    run_name: str | None = None,
) -> Any:
    """A transformers ``Trainer`` of ``model`` on ``train`` that keeps its checkpoints in ``directory``.

    It raises a TrainingError where a loss is not finite, or no space is left for a checkpoint. Its evaluations leave
    the random numbers of training as they were; ``eval_loss`` is as `mean_loss` has it.

    Args:
        held_out: what it measures every ``training.eval_steps``; None: it never does.
        prompts: what it continues then, as further entries of its log.
        run_name: what the run is called where it is reported to; None: it is not reported.

    Raises:
        TrainingError: a batch cannot be dealt out to the processes that there are, or ``training.trainer`` or
            ``training.report_to`` hold what they must not.
    """
    from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

    class ExpertTrainer(Trainer):
        noised_step, forward_pass = -1, 0

        def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
            # From the checkpoint of the last step the Trainer would go on for one more.
            if self.state.global_step < self.state.max_steps:
                super()._run_epoch(*args, **kwargs)

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[None, Tensor, Tensor]:
            assert held_out is not None
            with torch.no_grad():
                return None, *held_out.row_losses(model, self._prepare_inputs(inputs))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not isinstance(train, MaskedBlocks):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            nats, targets = train.row_losses(model, inputs | self._noise(train, len(inputs["labels"])))
            if num_items_in_batch is None:
                return nats.sum() / targets.sum()
            # Processes have their gradients averaged, and `num_items_in_batch` counts the tokens of all.
            return nats.sum() / num_items_in_batch * self.accelerator.num_processes

        def _noise(self, train: MaskedBlocks, rows: int) -> dict[str, Tensor]:
            """That of this process's ``rows`` of a forward pass, whatever the number of processes."""
            step = self.state.global_step
            self.forward_pass = self.forward_pass + 1 if self.noised_step == step else 0
            self.noised_step = step
            noise = train.noise([step, self.forward_pass], rows * self.accelerator.num_processes)
            mine = slice(rows * self.accelerator.process_index, rows * (self.accelerator.process_index + 1))
            return {name: drawn[mine].to(self.args.device) for name, drawn in noise.items()}

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(gpus):
                metrics: dict[str, float] = super().evaluate(*args, **kwargs)
                if prompts is not None and prompts.ids:
                    self.log(prompts.log_entry(self.model))
            if not math.isfinite(metrics["eval_loss"]):
                raise TrainingError(
                    f"the held-out loss is {metrics['eval_loss']} after step {self.state.global_step} of "
                    f"{self.state.max_steps}; {_DIVERGED}"
                )
            return metrics

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
    check_options(config.training)
    if settings.lora is not None and settings.trainer.get("fsdp"):
        raise TrainingError(
            "training.lora cannot be merged into weights that training.trainer.fsdp deals out; drop one of them"
        )
    is_measured = held_out is not None and settings.eval_steps is not None
    ours: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size // num_processes(),
        "per_device_eval_batch_size": settings.batch_size // num_processes(),
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_learning_rate_ratio},
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision == "bf16",
        "save_steps": settings.save_steps,
        # Checkpoints are rotated once they are complete, which the Trainer would not wait for.
        "save_total_limit": None,
        "logging_steps": settings.log_steps,
        "eval_strategy": "steps" if is_measured else "no",
        "eval_steps": settings.eval_steps,
        "metric_for_best_model": "eval_loss" if settings.keep == "best" else None,
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": settings.patience is not None,
        "seed": config.seed,
        "report_to": settings.report_to if run_name is not None else "none",
        "run_name": run_name,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        # The tower of an image-text model takes no part in a batch of texts, nor its last layers in any.
        "ddp_find_unused_parameters": True if reads_images(model.config) else None,
    }
    if "lr_scheduler_type" in settings.trainer:
        del ours["lr_scheduler_kwargs"]  # of a cosine
    try:
        arguments = TrainingArguments(**ours | settings.trainer)
        # A plain process that sees several GPUs uses one of them: torch's DataParallel would multiply the batch.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = ExpertTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=train.collate,
            compute_metrics=lambda rows: {"loss": float(rows.predictions.sum() / rows.label_ids.sum())},
            callbacks=_callbacks(directory, settings),
        )
    except (ValueError, TypeError, ImportError) as error:
        if not settings.trainer:
            raise
        raise TrainingError(f"training.trainer: {' '.join(str(error).split())}") from error
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        raise TrainingError(
            "training.trainer.fsdp: accelerate shards weights over several processes on GPUs alone (`accelerate launch "
            "-m decar.training expert NAME CONFIG.yaml`), and would ignore it here; leave it out"
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


def _callbacks(directory: Path, settings: TrainingConfig) -> list[Any]:
    from accelerate import PartialState
    from transformers import EarlyStoppingCallback, TrainerCallback

    class KeepCheckpoints(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # A checkpoint holds those that were set when it was written.
            state.compute_steps(args, state.max_steps)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            if settings.keep == "best":
                control.should_save |= state.best_metric is None or metrics["eval_loss"] < state.best_metric

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Every process writes its own state of the random numbers.
            PartialState().wait_for_everyone()
            if state.is_world_process_zero:
                write_atomically(complete_file(directory / f"checkpoint-{state.global_step}"), "")
                for old in complete_checkpoints(directory)[: -settings.save_total_limit]:
                    if step_of(old) != state.best_global_step:
                        shutil.rmtree(old)

    class StopEarly(EarlyStoppingCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """It would ask for the Trainer's own way to load the best weights."""

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            super().on_evaluate(args, state, control, metrics)
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                # Training that was interrupted now would go on from such a checkpoint.
                control.should_save = False

    keep = KeepCheckpoints()
    return [keep] if settings.patience is None else [keep, StopEarly(settings.patience)]


def _tensorboard_writer(directory: Path, last: Path | None, prompts: Prompts) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    if last is not None:
        return SummaryWriter(str(directory), purge_step=step_of(last) + 1)
    shutil.rmtree(directory, ignore_errors=True)
    writer = SummaryWriter(str(directory))
    for i, prompt in enumerate(prompts.texts):
        writer.add_text(f"train/{sample_key(i)}", prompt, 0)
    return writer


def _num_documents(run: Run, shards: Sequence[str], split: str) -> int:
    return sum(count_documents(run.shard(shard, split)) for shard in shards)


def _hashes(run: Run, shards: Sequence[str]) -> dict[str, str]:
    files = [run.shard(shard, split) for shard in shards for split in SPLITS]
    return {f"{file.parent.name}/{file.name}": sha256(file) for file in files}
