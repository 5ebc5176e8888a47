"""Shards as those read them who learn from them or are measured on them. Knows parquet files, no experts.

Their columns: `Run.shard` in `run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from decar.router.errors import TrainingError
from decar.training.data.corpus import (
    IMAGES_FIELD,
    PIECE_COLUMNS,
    read_batches,
    read_columns,
    read_row_groups,
)
from decar.training.data.formats import MESSAGES_FIELD, TOOLS_FIELD
from decar.training.data.sources import Chat, Document, Example, Piece
from decar.training.run import require
from decar.training.stages import read_marker


def check_marker(directory: Path, wanted: str) -> None:
    """Refuse the ``directory`` of shards, or of their tokenizer, whose marker names another configuration.

    One without a marker passes: where an expert is trained on another machine, the partition's marker may not have come
    along with the shard.

    Raises:
        TrainingError: it was made with another configuration.
    """
    marker = read_marker(directory)
    if marker is not None and marker["config"] != wanted:
        raise TrainingError(
            f"{directory} was made with another configuration; run `decar-train partition` again"
        )


def has_column(shard: Path, name: str) -> bool:
    """Whether a shard has the column ``name``, i.e. whether the corpus has any chats, or images.

    Raises:
        TrainingError: the shard is missing or damaged.
    """
    return name in read_columns(shard)


def read_texts(shard: Path) -> Iterator[str]:
    """The texts of a shard, a row group in memory at a time.

    Raises:
        TrainingError: it is missing or damaged.
    """
    require(shard.parents[1], shard)
    for rows in read_row_groups(shard, ["text"]):
        yield from rows.column("text").to_pylist()


def read_images(shard: Path) -> Iterator[list[bytes]]:
    """The images of each document of a shard, as they came; nothing where the corpus has none.

    Raises:
        TrainingError: it is missing or damaged.
    """
    if has_column(shard, IMAGES_FIELD):
        for rows in read_row_groups(shard, [IMAGES_FIELD]):
            yield from rows.column(IMAGES_FIELD).to_pylist()


def read_examples(shard: Path) -> list[Example]:
    """What of a shard an expert is trained on, a row each; chats without their images.

    Raises:
        TrainingError: it is missing or damaged.
    """
    found = read_columns(shard)
    columns = [
        name for name in ("text", "source", MESSAGES_FIELD, TOOLS_FIELD, *PIECE_COLUMNS) if name in found
    ]
    return [as_example(document) for batch in read_batches(shard, columns) for document in batch]


def as_example(document: Document) -> Example:
    """``document`` as an expert is trained on it, without its images."""
    if document.messages is not None:
        return Chat(document.messages, document.tools)
    if document.piece > 0 or not document.is_last:
        return Piece(document.text, document.origin, document.piece, document.is_last)
    return document.text


def count_documents(shard: Path) -> int:
    """The rows of a shard."""
    import pyarrow.parquet as parquet

    return int(parquet.read_metadata(shard).num_rows)
