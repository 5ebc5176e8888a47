"""What training would take, found out without training: sizes, steps, memory, time, a batch to look at.

Measures two optimiser steps of a model that is thrown away, and writes nothing outside a temporary directory.
"""

from __future__ import annotations

import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig
from decar.training.data.blocks import IGNORED
from decar.training.data.features import embedding_files
from decar.training.data.processor import reads_images
from decar.training.data.sources import input_files
from decar.training.data.tokenizer import check_given, load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert.model import build_model, check_model, check_weights, keeps_apart
from decar.training.expert.options import check_options
from decar.training.expert.stage import (
    complete_checkpoints,
    expert_processor,
    expert_stage,
    make_trainer,
    read_blocks,
    step_of,
)
from decar.training.partition.stage import make_partition, partition_stage

_FLOAT_BYTES = 4
_MEASURED_STEPS = 3  # the first one warms caches


@dataclass(frozen=True)
class Cost:
    """What one optimiser step takes of one process.

    ``memory_bytes`` holds weights, gradients, Adam's two moments and activations. On a GPU it is the peak that torch
    counted, elsewhere the sum of these with what the backward pass keeps and the gradient of the logits.
    """

    num_parameters: int
    num_trained: int
    step_time_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What training one expert would take. ``steps_done`` of its ``steps`` lie behind it.

    ``batch`` is its first one, decoded, one text a row.
    """

    expert: str
    is_done: bool
    steps_done: int
    steps: int
    tokens_per_step: int
    train_tokens: int
    num_targets: int
    dropped: dict[str, int]
    cost: Cost
    batch: list[str]

    @property
    def time_s(self) -> float:
        return 0.0 if self.is_done else (self.steps - self.steps_done) * self.cost.step_time_s


@contextmanager
def with_shards(config: TrainConfig) -> Iterator[TrainConfig]:
    """``config``, or one with a temporary ``work_dir`` where its partition or tokenizer still have to be made.

    Raises:
        TrainingError: as partitioning does.
    """
    if partition_stage(config).is_done and tokenizer_stage(config.run, config.tokenizer).is_done:
        yield config
        return
    with TemporaryDirectory(prefix="decar-dry-run-") as directory:
        draft = config.model_copy(update={"work_dir": Path(directory)})
        make_partition(draft, partition_stage(draft))
        make_tokenizer(draft.run, draft.tokenizer, tokenizer_stage(draft.run, draft.tokenizer))
        yield draft


def problems(config: TrainConfig, only: str | None = None) -> list[str]:
    """What keeps ``config`` from being run before any data are read: wrong models, missing inputs; one line each.

    Args:
        only: the expert that is to be trained alone, which needs no data files but its shard.
    """

    needed: list[Callable[[], object]] = [partial(check_options, config.training)]
    if only is None:
        needed += [partial(input_files, config.data), partial(check_given, config.tokenizer)]
        for settings, section in ((config.partition, "partition"), (config.router, "router")):
            needed += [
                partial(embedding_files, getattr(settings, field), f"{section}.{field}")
                for field in ("embedding", "image_embedding")
            ]
    recipes = config.recipes if only is None else [config.recipe(only)]
    needed += [partial(check_model, recipe) for recipe in recipes]
    needed += [partial(check_weights, recipe) for recipe in recipes]
    found = []
    for need in needed:
        try:
            need()
        except TrainingError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def count_parameters(config: TrainConfig, name: str) -> int | None:
    """Of the checkpoint that expert ``name`` starts from, by its ``config.json`` alone; None where it has none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    checkpoint = config.model_of(name).get("checkpoint")
    if checkpoint is None or not (Path(checkpoint) / "config.json").is_file():
        return None
    described = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    auto = AutoModelForImageTextToText if reads_images(described) else AutoModelForCausalLM
    with torch.device("meta"):
        return int(auto.from_config(described, trust_remote_code=False).num_parameters())


def estimate(config: TrainConfig, name: str, shards: TrainConfig, known: dict[str, Cost]) -> Estimate:
    """What training expert ``name`` would take.

    Args:
        shards: ``config``, but for where shards and tokenizer are.
        known: costs by model description; what is measured is added.

    Raises:
        TrainingError: an unusable model, shard or tokenizer.
    """
    stage = replace(expert_stage(shards, name), directory=config.run.expert(name))
    checkpoints = complete_checkpoints(config.run.checkpoints(stage))
    tokenizer = load_tokenizer(shards.run.tokenizer)
    recipe = shards.recipe(name)
    processor = expert_processor(recipe, tokenizer)
    model = build_model(recipe, tokenizer)
    apart = keeps_apart(model)
    train = read_blocks(recipe, [name], "train", tokenizer, processor, apart)
    read_blocks(recipe, [name], "held_out", tokenizer, processor, apart)
    with TemporaryDirectory(prefix="decar-dry-run-") as directory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer = make_trainer(recipe, model, train, Path(directory))
        loader = trainer.get_train_dataloader()
        steps = trainer.set_initial_training_values(trainer.args, loader)[-1]
        first = next(iter(loader))
        key = str(config.model_of(name))
        if key not in known:
            known[key] = _measure(trainer, model)
    settings = config.training
    return Estimate(
        expert=name,
        is_done=stage.is_done,
        steps_done=step_of(checkpoints[-1]) if checkpoints else 0,
        steps=steps,
        tokens_per_step=round(settings.batch_size * settings.gradient_accumulation * train.row_tokens[0]),
        train_tokens=train.num_tokens,
        num_targets=train.num_targets,
        dropped=dict(train.dropped),
        cost=known[key],
        batch=[
            shown(ids, labels, tokenizer, getattr(processor, "image_token", None))
            for ids, labels in zip(first["input_ids"].tolist(), first["labels"].tolist(), strict=True)
        ],
    )


def shown(ids: list[int], labels: list[int], tokenizer: Any, image_token: str | None = None) -> str:
    """A row decoded. If only some of it is learned, that stands in ⟦ ⟧; padding and an image's tokens are counted."""
    padding = 0
    while padding < len(ids) and ids[-1 - padding] == ids[-1] and labels[-1 - padding] == IGNORED:
        padding += 1
    ids, labels = ids[: len(ids) - padding], labels[: len(labels) - padding]
    text = ""
    for learned, group in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in group])
        text += f"⟦{piece}⟧" if learned and IGNORED in labels else piece
    if image_token is not None:
        places = re.compile(f"(?:{re.escape(image_token)}){{2,}}")
        text = places.sub(lambda found: f"{image_token} × {len(found[0]) // len(image_token)}", text)
    return text + (f" (padding × {padding})" if padding else "")


def _measure(trainer: Any, model: Any) -> Cost:
    from transformers import TrainerCallback

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    class Meter(TrainerCallback):
        peak_bytes = 0
        times_s: tuple[float, ...] = ()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start_s = time.perf_counter()

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            self.peak_bytes = max(self.peak_bytes, sum(kept.values()))
            kept.clear()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.on_substep_end()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times_s = (*self.times_s, time.perf_counter() - self.start_s)

    meter = Meter()
    trainer.add_callback(meter)
    trainer.args.max_steps = _MEASURED_STEPS
    trainer.args.set_save("no")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.train()
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_all = sum(p.numel() for p in model.parameters())
    args = trainer.args
    vocab_size = model.config.get_text_config().vocab_size
    logits = args.per_device_train_batch_size * trainer.train_dataset.row_tokens[1] * vocab_size
    states = num_all + 3 * num_trained + logits
    return Cost(
        num_parameters=num_all,
        num_trained=num_trained,
        step_time_s=statistics.mean(meter.times_s[1:]),
        memory_bytes=torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else _FLOAT_BYTES * states + meter.peak_bytes,
    )
