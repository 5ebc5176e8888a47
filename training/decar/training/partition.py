"""The partition stage: documents into one shard per expert, by balanced spherical k-means on TF-IDF features.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.training.cluster import balanced_kmeans
from decar.training.config import PartitionConfig, TrainConfig
from decar.training.features import embed, fit_components, fit_tfidf
from decar.training.sources import (
    MESSAGES_FIELD,
    Document,
    Messages,
    input_files,
    read_documents,
    read_parquet,
)
from decar.training.stages import Stage, digest, fingerprint, read_marker

Labels = NDArray[np.int64]
_TOP_TERMS = 12


class ShardReport(BaseModel):
    """What one expert received."""

    expert: str
    train_documents: int
    held_out_documents: int
    train_chars: int
    sources: dict[str, int]
    top_terms: list[str]


class PartitionReport(BaseModel):
    """``report.json`` of a partition; ``mean_cosine`` is of the documents to their cluster's centroid."""

    mean_cosine: float
    shards: list[ShardReport]


def partition_stage(config: TrainConfig) -> Stage:
    """The stage as ``config`` and the input files are now.

    Raises:
        TrainingError: ``data.files`` matches nothing.
    """
    files = input_files(config.data)
    return Stage(
        config.work_dir / "partition",
        partition_fingerprint(config),
        # The built-in sources change with Python.
        fingerprint(digest(*files), sys.version if config.data.builtin else ""),
    )


def partition_fingerprint(config: TrainConfig) -> str:
    return fingerprint(config.data, config.documents, config.partition, config.expert_names, config.seed)


def check_marker(directory: Path, wanted: str) -> None:
    """Refuse a stage's ``directory`` whose marker names another configuration; one without a marker passes.

    Where an expert is trained on another machine, the partition's marker may not have come along with the shard.

    Raises:
        TrainingError: it was made with another configuration.
    """
    marker = read_marker(directory)
    if marker is not None and marker["config"] != wanted:
        raise TrainingError(
            f"{directory} was made with another configuration; run `decar-train partition` again"
        )


def shard_file(config: TrainConfig, expert: str, split: str) -> Path:
    """The parquet file of a shard; ``split`` is ``train`` or ``held_out``.

    Its columns are ``text``, ``source`` and, where there are chats, ``messages`` (JSON, or null).
    """
    return config.work_dir / "partition" / expert / f"{split}.parquet"


def read_shard(config: TrainConfig, expert: str, split: str) -> list[str]:
    """The texts of a shard.

    Raises:
        TrainingError: the partition has not been made, or is damaged.
    """
    file = shard_file(config, expert, split)
    try:
        return read_parquet(file, "text")
    except FileNotFoundError:
        raise TrainingError(f"{file} is missing; run `decar-train partition` first") from None


def read_examples(config: TrainConfig, expert: str, split: str) -> list[str | Messages]:
    """What of a shard an expert is trained on: its texts, and its chats as messages.

    Raises:
        TrainingError: the partition has not been made, or is damaged.
    """
    import pyarrow.parquet as parquet

    texts = read_shard(config, expert, split)
    file = shard_file(config, expert, split)
    if MESSAGES_FIELD not in parquet.read_schema(file).names:
        return list(texts)
    chats = parquet.read_table(file, columns=[MESSAGES_FIELD]).column(MESSAGES_FIELD).to_pylist()
    return [text if chat is None else json.loads(chat) for text, chat in zip(texts, chats, strict=True)]


def read_report(stage: Stage) -> PartitionReport:
    """The report of a finished partition.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    file = stage.directory / "report.json"
    try:
        return PartitionReport.model_validate_json(file.read_text())
    except (OSError, pydantic.ValidationError):
        raise TrainingError(f"{file} cannot be read; delete {stage.directory} and run again") from None


def make_partition(config: TrainConfig, stage: Stage) -> PartitionReport:
    """Read the documents, cluster them, and write shards and report.

    Raises:
        TrainingError: unreadable data, fewer documents than experts, or an expert left without training or
            held-out documents.
    """
    documents = read_documents(config.data, config.documents, config.seed)
    if len(documents) < len(config.experts):
        raise TrainingError(
            f"{len(documents)} documents cannot be split among {len(config.experts)} experts; "
            "add data, lower documents.max_chars or list fewer experts"
        )
    vectorizer, tfidf = fit_tfidf([document.text for document in documents], config.partition.num_features)
    components = fit_components(tfidf, config.partition.num_components, config.seed)
    clustering = balanced_kmeans(
        embed(tfidf, components),
        len(config.experts),
        seed=config.seed,
        restarts=config.partition.restarts,
        max_iterations=config.partition.max_iterations,
    )
    cluster_of = _name_clusters(clustering.labels, documents, config)
    held_out = _choose_held_out(documents, config.partition, config.seed)
    shards = []
    with stage.writing() as directory:
        for name in config.expert_names:
            members = clustering.labels == cluster_of[name]
            train, kept = np.flatnonzero(members & ~held_out), np.flatnonzero(members & held_out)
            if not len(train) or not len(kept):
                raise TrainingError(
                    f"expert {name!r} is left without {'training' if not len(train) else 'held-out'} documents; "
                    "change partition.held_out, set partition.held_out_by to 'piece', or add data"
                )
            _write_shard([documents[i] for i in train], directory / name / "train.parquet")
            _write_shard([documents[i] for i in kept], directory / name / "held_out.parquet")
            shards.append(
                ShardReport(
                    expert=name,
                    train_documents=len(train),
                    held_out_documents=len(kept),
                    train_chars=sum(len(documents[i].text) for i in train),
                    sources=dict(Counter(documents[i].source for i in np.flatnonzero(members)).most_common()),
                    top_terms=_top_terms(tfidf, members, list(vectorizer.get_feature_names_out())),
                )
            )
        report = PartitionReport(mean_cosine=clustering.objective, shards=shards)
        (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    return report


def _name_clusters(labels: Labels, documents: list[Document], config: TrainConfig) -> dict[str, int]:
    """The cluster of each expert: as ``name_by`` asks, the rest in order of their first document."""
    from scipy.optimize import linear_sum_assignment

    order = list(dict.fromkeys(labels.tolist()))
    name_by = config.partition.name_by
    per_source = Counter(document.source for document in documents)
    for name, source in name_by.items():
        if source not in per_source:
            raise TrainingError(
                f"partition.name_by.{name}: no source {source!r}; the sources are {', '.join(per_source)}"
            )
    share = np.zeros((len(name_by), len(order)))
    for row, source in enumerate(name_by.values()):
        members = np.array([document.source == source for document in documents])
        share[row] = np.bincount(labels[members], minlength=len(order)) / per_source[source]
    _, columns = linear_sum_assignment(share, maximize=True)
    named = dict(zip(name_by, columns.tolist(), strict=True))
    rest = [cluster for cluster in order if cluster not in named.values()]
    return named | dict(zip([name for name in config.expert_names if name not in named], rest, strict=True))


def _choose_held_out(documents: list[Document], config: PartitionConfig, seed: int) -> NDArray[np.bool_]:
    """Marks [N] of whole inputs (or pieces), drawn until the held-out share of the documents is reached."""
    if config.held_out_by == "document":
        groups = np.array([document.origin for document in documents])
    else:
        groups = np.arange(len(documents))
    ids, sizes = np.unique(groups, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    before = np.concatenate([[0], np.cumsum(sizes[shuffled])[:-1]])
    return np.isin(groups, ids[shuffled[before < config.held_out * len(documents)]])


def _top_terms(tfidf: Any, members: NDArray[np.bool_], terms: list[str]) -> list[str]:
    """The terms whose mean TF-IDF weight stands out most from that of all documents."""
    contrast = np.asarray(tfidf[members].mean(axis=0) - tfidf.mean(axis=0)).ravel()
    return [terms[i] for i in np.argsort(-contrast, kind="stable")[:_TOP_TERMS]]


def _write_shard(documents: list[Document], file: Path) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    file.parent.mkdir(exist_ok=True)
    columns: dict[str, list[Any]] = {
        "text": [d.text for d in documents],
        "source": [d.source for d in documents],
    }
    if any(d.messages for d in documents):
        columns[MESSAGES_FIELD] = [json.dumps(d.messages) if d.messages else None for d in documents]
    Dataset.from_dict(columns).to_parquet(str(file))
