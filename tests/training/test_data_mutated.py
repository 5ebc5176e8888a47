"""Rows and files with something wrong: each is data, or one line that names file and row. The same for a seed."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig
from decar.training.data.corpus import spool
from decar.training.data.sources import BadLines, NoDocuments, Tally, read_documents
from tests.mutations import BY_TYPE
from tests.training.test_data_files import zstd
from tests.training.test_data_formats import ROWS

COUNT = 400
_VALUES = [value for values in BY_TYPE.values() for value in values]
_NAMES = sorted(
    {key for row, _, _ in ROWS.values() for key in row} | {"role", "from", "value", "type", "label", "image"}
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _mutate_row(draw: random.Random, row: dict[str, Any]) -> None:
    places = list(_places(row))
    kind = draw.choice(["drop", "retype", "add", "wrap", "rename", "repeat"])
    if not places or kind == "add":
        row[draw.choice(_NAMES)] = copy.deepcopy(draw.choice(_VALUES))
        return
    container, key = draw.choice(places)
    if kind == "drop":
        del container[key]
    elif kind == "retype":
        container[key] = copy.deepcopy(draw.choice(_VALUES))
    elif kind == "wrap":
        for _ in range(draw.choice([1, 2, 50, 150])):
            container[key] = [container[key]] if draw.random() < 0.5 else {"x": container[key]}
    elif kind == "rename" and isinstance(container, dict):
        container[draw.choice(_NAMES)] = container.pop(key)
    elif isinstance(container, list):
        container.append(copy.deepcopy(container[key]))


def _mutate_text(draw: random.Random, text: str) -> str:
    """JSON that no library writes: a key twice, thousands of lists within each other or of digits."""
    twice = text[:1] + '"text": "a", "text": "b", ' + text[1:]
    deep = text[:1] + '"x": ' + "[" * 3_000 + "]" * 3_000 + ", " + text[1:]
    return draw.choice(
        [twice, deep, text.replace("}", ', "n": ' + "9" * 6_000 + "}", 1), text.replace('"', "'", 2)]
    )


def _mutate_bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    return draw.choice(
        [
            content[:at],
            content[at:],
            content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            content[:at] + b"\xff\x00\xed\xa0\x80" + content[at:],
            b"\xef\xbb\xbf" + content,
            content.replace(b"\n", b"\r\n"),
            b"",
            content + content,
            content.decode("utf-8", "replace").encode("utf-16"),
        ]
    )


def _as_file(draw: random.Random, kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == ".json":
        return f"[{', '.join(map(json.dumps, rows))}]".encode()
    if kind in (".csv", ".tsv"):
        stream = io.StringIO()
        names = sorted({name for row in rows for name in row})
        writer = csv.writer(stream, delimiter="," if kind == ".csv" else "\t", escapechar="\\")
        writer.writerow(names)
        for row in rows:
            cells = [
                value if isinstance(value := row.get(name, ""), str) else json.dumps(value) for name in names
            ]
            writer.writerow(cells[: draw.choice([len(cells), len(cells), len(cells), 1])])
        return stream.getvalue().encode("utf-8", "surrogatepass")
    if kind == ".parquet":
        tables = []
        for row in rows:
            try:
                tables.append(pyarrow.Table.from_pylist([row]))
            except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, RecursionError):
                continue  # what no table can hold
        (largest,) = draw.sample(tables, 1) if tables else [pyarrow.table({})]
        stream_ = io.BytesIO()
        try:
            parquet.write_table(largest, stream_)
        except pyarrow.ArrowException:
            parquet.write_table(pyarrow.table({"text": ["a"]}), stream_)
        return stream_.getvalue()
    lines = [_mutate_text(draw, json.dumps(row)) if draw.random() < 0.1 else json.dumps(row) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def mutated(folder: Path, count: int, seed: int) -> Iterator[Path]:
    """``count`` files, of every kind and format."""
    draw = random.Random(seed)
    good = [row for row, _, _ in ROWS.values()]
    for number in range(count):
        kind = draw.choice([".jsonl", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".x"])
        rows = [copy.deepcopy(draw.choice(good)) for _ in range(3)]
        if draw.random() < 0.5:  # else rows of several formats
            rows = [copy.deepcopy(rows[0]) for _ in range(3)]
        for _ in range(draw.choice([0, 1, 1, 2, 5])):
            _mutate_row(draw, draw.choice(rows))
        content = _as_file(draw, kind, rows)
        if draw.random() < 0.3:
            content = _mutate_bytes(draw, content)
        compression = draw.choice(["", "", "", ".gz", ".zst"])
        real = draw.choice(["", ".gz", ".zst"]) if draw.random() < 0.1 else compression
        content = gzip.compress(content) if real == ".gz" else zstd(content) if real == ".zst" else content
        if draw.random() < 0.1:
            content = _mutate_bytes(draw, content)
        file = folder / f"{number}{kind}{compression}"
        file.write_bytes(content)
        yield file


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_files_are_data_or_one_line(tmp_path: Path, seed: int) -> None:
    read = named = skipped = 0
    formats: set[str] = set()
    for file in mutated(tmp_path, COUNT, seed):
        tally = Tally()
        line = _read(file, BadLines(skip=False), tally)
        if line is None:
            read += 1
            formats |= tally.formats.keys()
            continue
        named += 1
        if "set data.on_bad_line to skip" in line:
            assert re.search(rf"^{re.escape(str(file))}, (line|row) \d+: ", line), line
            bad = BadLines(skip=True)
            _read(file, bad, Tally())
            assert bad.counts.keys() == {file.name}
            skipped += bad.counts[file.name]
    # The mutations leave enough of each.
    assert read > COUNT / 4
    assert named > COUNT / 3
    assert skipped > COUNT / 10
    assert len(formats) > 8, formats


def _read(file: Path, bad: BadLines, tally: Tally) -> str | None:
    """Why ``file`` cannot be read and written to disk, as a partition does it; None where it can."""
    data = DataConfig(files=[str(file)], on_bad_line="skip" if bad.skip else "error")
    documents = read_documents(data, DocumentConfig(min_chars=1), 0, bad=bad, tally=tally)
    try:
        spool(documents, file.with_name("spool.parquet"), 10, 0, lambda *_: None)
    except NoDocuments:
        return "no documents"
    except TrainingError as error:
        line = str(error)
    else:
        return None
    assert "\n" not in line
    assert str(file) in line
    line.encode()  # a terminal can show it
    return line
