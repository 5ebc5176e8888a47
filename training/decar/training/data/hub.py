"""Rows of data sets that the library `datasets` loads, from the Hugging Face Hub or a folder. Knows no format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decar.router.errors import TrainingError
from decar.training.config import HubConfig
from decar.training.data.files import BadRow, Columns, one_line, table_rows

_ROWS_AT_ONCE = 256


def hub_rows(dataset: HubConfig, columns: Columns) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(where it is, a row) of every row of a data set.

    Args:
        columns: chooses the columns, as for `decar.training.data.files.read_rows`.

    Raises:
        TrainingError: it cannot be loaded, or none of its rows can be used.
    """
    number = 0
    try:
        found = _loaded(dataset)
        for batch in found.with_format("arrow").iter(_ROWS_AT_ONCE):  # arrow: images stay as they are encoded
            for row in table_rows(batch.select(columns(batch.column_names))):
                number += 1
                yield f"row {number}", row
    except BadRow as problem:
        raise TrainingError(f"data.hub: {_named(dataset)}: {one_line(problem)}") from None
    # `datasets` lets errors of the Hub, of HTTP, of files and of tables through.
    except Exception as error:
        after = f" after row {number}" if number else ""
        raise TrainingError(
            f"data.hub: {_named(dataset)} cannot be loaded{after} ({one_line(error)}); check its name, config, split "
            "and revision, and the way to the Hub"
        ) from None


def _loaded(dataset: HubConfig) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(
        dataset.id,
        dataset.config,
        split=dataset.split,
        revision=dataset.revision,
        streaming=dataset.streaming,
    )


def _named(dataset: HubConfig) -> str:
    config = f" ({dataset.config})" if dataset.config else ""
    revision = f"@{dataset.revision}" if dataset.revision else ""
    return f"{dataset.id}{revision}{config}, split {dataset.split}"


def local_files(dataset: HubConfig) -> list[Path]:
    """The files of a data set that lies in a folder; none of one that is on the Hub."""
    folder = Path(dataset.id)
    return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
