"""What training would take, found out without training: sizes, steps, memory, time, documents to look at.

Measures two optimiser steps of a model that is thrown away, and writes nothing outside a temporary directory. Of an
expert with more than `SAMPLE` documents, a sample is tokenized.
"""

from __future__ import annotations

import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig
from decar.training.data.blocks import IGNORED, PackedDocument, encode, length_quantiles
from decar.training.data.corpus import read_document
from decar.training.data.features import embedding_files
from decar.training.data.image_blocks import ImageRenderer, image_size, without_images
from decar.training.data.shards import as_example
from decar.training.data.sources import Document, input_files
from decar.training.data.tokenizer import check_given, load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert.model import auto_class, build_model, check_model, check_weights, keeps_apart
from decar.training.expert.options import check_options
from decar.training.expert.stage import (
    complete_checkpoints,
    expert_processor,
    expert_stage,
    make_trainer,
    read_blocks,
    step_of,
)
from decar.training.partition.report import FormatReport, PartitionReport
from decar.training.partition.stage import make_partition, partition_stage
from decar.training.run import SPLITS, read_report, report_file

SAMPLE = 20_000
"""How many documents of an expert are tokenized, about; their number is stated."""
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
class Lengths:
    """The training documents of one ``kind``, ``number`` of them, and what of them is not learned; in tokens.

    ``p50`` and ``p99`` are lengths that some document has; ``begins`` is the start of the longest. ``longer`` documents
    are longer than a row, ``continued`` ones go over the end of a row. For ``targets``, ``unlearned`` and ``detached``
    see `PackedDocument`; ``cut_off`` tokens of ``cut`` documents are not even read.
    """

    kind: str
    number: int
    mean: float
    p50: int
    p99: int
    longest: int
    begins: str
    longer: int
    continued: int
    cut: int
    cut_off: int
    targets: int
    unlearned: int
    detached: int


@dataclass(frozen=True)
class Shown:
    """The first training document of an expert in one format, of ``tokens``, as the expert sees it."""

    first: FormatReport
    tokens: int
    text: str


@dataclass(frozen=True)
class Estimate:
    """What training one expert would take. ``steps_done`` of its ``steps`` lie behind it.

    ``sampled`` of its training ``documents`` were tokenized. ``lengths``, ``dropped`` and ``batch``, the first one,
    decoded, one text a row, are of these; ``train_tokens``, ``num_targets`` and ``steps`` are scaled up to all. A model
    that ``keeps_apart`` documents has several in a row; ``max_positions`` is the longest row that it can have, if it
    says.
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
    documents: int
    sampled: int
    lengths: list[Lengths]
    keeps_apart: bool
    max_positions: int | None
    formats: list[Shown]

    @property
    def is_sampled(self) -> bool:
        return self.sampled < self.documents

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


def partition_report(shards: TrainConfig) -> PartitionReport | None:
    """That of the partition, which does not have to be where an expert is trained apart."""
    if not report_file(shards.run.partition).is_file():
        return None
    return read_report(shards.run.partition, PartitionReport)


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
    from transformers import AutoConfig

    checkpoint = config.model_of(name).get("checkpoint")
    if checkpoint is None or not (Path(checkpoint) / "config.json").is_file():
        return None
    described = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return int(
            auto_class(described, config.is_flow)
            .from_config(described, trust_remote_code=False)
            .num_parameters()
        )


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
    apart = recipe.is_flow or keeps_apart(model)
    with (
        _sampled(shards, name) as (some, sampled, documents),  # images are read from it as they are needed
        TemporaryDirectory(prefix="decar-dry-run-") as directory,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        train = read_blocks(some.recipe(name), [name], "train", tokenizer, processor, apart)
        read_blocks(some.recipe(name), [name], "held_out", tokenizer, processor, apart)
        trainer = make_trainer(recipe, model, train, Path(directory))
        loader = trainer.get_train_dataloader()
        steps = trainer.set_initial_training_values(trainer.args, loader)[-1]
        first = next(iter(loader))
        key = str(config.model_of(name))
        if key not in known:
            known[key] = _measure(trainer, model)
    settings = config.training
    scale = documents / sampled
    return Estimate(
        expert=name,
        is_done=stage.is_done,
        steps_done=step_of(checkpoints[-1]) if checkpoints else 0,
        steps=steps if settings.max_steps else round(steps * scale),
        tokens_per_step=round(settings.batch_size * settings.gradient_accumulation * train.row_tokens[0]),
        train_tokens=round(train.num_tokens * scale),
        num_targets=round(train.num_targets * scale),
        dropped=dict(train.dropped),
        cost=known[key],
        batch=[
            shown(ids, labels, tokenizer, getattr(processor, "image_token", None))
            for ids, labels in zip(first["input_ids"].tolist(), first["labels"].tolist(), strict=True)
        ],
        documents=documents,
        sampled=sampled,
        lengths=lengths_by_kind(train.documents, settings.sequence_length),
        keeps_apart=apart,
        max_positions=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        formats=_formats(shards, name, tokenizer, processor),
    )


@contextmanager
def _sampled(config: TrainConfig, name: str) -> Iterator[tuple[TrainConfig, int, int]]:
    """(``config``, or one whose shards of expert ``name`` are every so many row groups of its own; how many training
    documents these are; of how many)."""
    from pyarrow import parquet

    number = parquet.read_metadata(config.run.shard(name, SPLITS[0])).num_rows
    if number <= SAMPLE:
        yield config, number, number
        return
    with TemporaryDirectory(prefix="decar-dry-run-") as directory:
        draft = config.model_copy(update={"work_dir": Path(directory)})
        sampled = []
        for split in SPLITS:
            target = draft.run.shard(name, split)
            target.parent.mkdir(parents=True, exist_ok=True)
            with parquet.ParquetFile(config.run.shard(name, split)) as table:
                every = math.ceil(table.metadata.num_rows / SAMPLE)
                groups = [table.read_row_group(g) for g in range(0, table.num_row_groups, every)]
                with parquet.ParquetWriter(target, table.schema_arrow) as writer:
                    for group in groups:
                        writer.write_table(group)
            sampled.append(sum(map(len, groups)))
        yield draft, sampled[0], number


def lengths_by_kind(documents: Sequence[PackedDocument], length: int) -> list[Lengths]:
    """Of ``documents`` in rows of ``length`` tokens."""
    found = []
    for kind in dict.fromkeys(document.kind for document in documents):
        members = [document for document in documents if document.kind == kind]
        tokens = np.array([document.tokens for document in members])
        p50, p99 = length_quantiles(members, 0.5, 0.99)
        found.append(
            Lengths(
                kind=kind,
                number=len(members),
                mean=float(tokens.mean()),
                p50=p50,
                p99=p99,
                longest=int(tokens.max()),
                begins=members[int(tokens.argmax())].begins,
                longer=int((tokens > length).sum()),
                continued=sum(document.rows > 1 for document in members),
                cut=sum(document.cut_off > 0 for document in members),
                cut_off=sum(document.cut_off for document in members),
                targets=sum(document.targets for document in members),
                unlearned=sum(document.unlearned for document in members),
                detached=sum(document.detached for document in members),
            )
        )
    return found


def _formats(config: TrainConfig, name: str, tokenizer: Any, processor: Any) -> list[Shown]:
    """What the partition's report says to be the first of expert ``name`` in each format."""
    report = partition_report(config)
    firsts = [f for shard in report.shards if shard.expert == name for f in shard.formats] if report else []
    found = []
    for first in firsts:
        document = read_document(config.run.shard(name, SPLITS[0]), first.row)
        ids, labels = _seen(document, tokenizer, processor, not config.is_flow)
        if document.images:
            ids, labels = (each[: config.training.sequence_length] for each in (ids, labels))
        text = shown(ids, labels, tokenizer, getattr(processor, "image_token", None), padded=False)
        found.append(Shown(first, len(ids), text))
    return found


def _seen(document: Document, tokenizer: Any, processor: Any, causal: bool) -> tuple[list[int], list[int]]:
    """The tokens and labels of the whole of ``document``."""
    if document.images:
        assert document.messages is not None
        sizes = [image_size(encoded) for encoded in document.images]
        ids, labels, _ = ImageRenderer(processor)(document.messages, sizes, document.tools)
        return ids, labels
    example = as_example(document)
    return encode(
        example if processor is None else without_images(example, processor.image_token), tokenizer, causal
    )


def shown(
    ids: list[int], labels: list[int], tokenizer: Any, image_token: str | None = None, padded: bool = True
) -> str:
    """A row decoded. If only some of it is learned, that stands in ⟦ ⟧; padding and an image's tokens are counted.

    Args:
        padded: whether there may be padding, which a document by itself has not.
    """
    padding = 0
    while padded and padding < len(ids) and ids[-1 - padding] == ids[-1] and labels[-1 - padding] == IGNORED:
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
