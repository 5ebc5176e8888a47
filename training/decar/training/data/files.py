"""Which files the data are, and what lies in them: lines of a text, or rows. Knows endings, compression and tables, not
what a row says."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from decar.router.errors import TrainingError

KINDS = ".txt, .md, .jsonl, .json, .csv, .tsv or .parquet"
"""What errors advise."""
# Of a folder these are read as texts; a file of any other ending only where it is named.
_TEXT_ENDINGS = """
    txt text md markdown rst adoc org tex html htm
    py pyi c h cc cpp cxx hh hpp cu cs java kt scala go rs swift m mm js mjs jsx ts tsx vue rb php pl pm lua r jl hs ml
    mli fs clj ex exs erl el lisp scm dart zig nim f90 asm s sql sh bash zsh fish ps1 bat css scss less
    yaml yml toml ini cfg cmake proto graphql tf nix
"""
_TEXT_KINDS = frozenset(f".{ending}" for ending in _TEXT_ENDINGS.split())
_ROW_KINDS = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"})
_COMPRESSIONS = (".gz", ".zst")
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_BOM = b"\xef\xbb\xbf"
_ROWS_AT_ONCE = 256
_READ_BUFFER_BYTES = 1 << 20
_SHOWN_CHARS = 500  # of what is wrong with a row, which may quote any of it

Columns = Callable[[Sequence[str]], list[str]]
"""Of a table's columns, those that are wanted. Raises `BadRow` where they make neither a text nor a chat."""


class BadRow(Exception):
    """What is wrong with a row."""


@dataclass(frozen=True)
class Found:
    """The ``files`` that patterns name, and how many files and folders were ``left_out`` of named folders and globs, by
    what they are."""

    files: list[Path]
    left_out: Counter[str]


def find_files(patterns: Iterable[str], setting: str) -> Found:
    """The files that ``patterns`` name, each once, sorted within each pattern.

    What of a path exists is taken literally, brackets included; the rest of it is a glob. A folder stands for the texts
    and tables in it and below it; what a glob matches are files, or folders where it matches no file; else its folders
    are left out.

    Raises:
        TrainingError: a pattern matches nothing that can be read.
    """
    found: dict[str, Path] = {}
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        matches = sorted(Path(match) for match in glob.glob(_escaped(pattern), recursive=True))
        files = [match for match in matches if match.is_file()]
        folders = [match for match in matches if match.is_dir()]
        not_read: Counter[str] = Counter()
        if files:
            # A ** matches folders and what is in them.
            read_from = {folder for file in files for folder in file.parents}
            beside = sum(folder not in read_from for folder in folders)
            not_read += Counter({"folders that a glob matches beside files": beside})
        else:
            for folder in folders:
                files += _files_below(folder, not_read)
        if not files:
            what = "; the folder is empty" if folders else ""
            if not_read:
                what = f"; of its folder were left out {describe(not_read)}"
            raise TrainingError(f"{setting}: {pattern!r} matches no file{what}")
        left_out += not_read
        for file in files:
            if file.stat().st_size == 0 and not is_text(file):  # an empty text is counted as one
                left_out["empty files"] += 1
            found.setdefault(os.path.abspath(file), file)
    return Found(list(found.values()), left_out)


def describe(left_out: Counter[str]) -> str:
    """As in "3 files ending in .png, 1 hidden files and folders"."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items()))


def _escaped(pattern: str) -> str:
    """``pattern`` as a glob in which the leading parts that exist stand for themselves."""
    existing, *rest = Path(), *Path(pattern).parts
    while rest and (existing / rest[0]).exists():
        existing /= rest.pop(0)
    return str(Path(glob.escape(str(existing)), *rest))


def _files_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Texts and tables in ``folder``, sorted; everything else is counted."""
    files = []
    with readable(folder):
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if name.startswith("."):
                left_out["hidden files and folders"] += 1
            elif path.is_dir():
                if path.is_symlink():  # it may lead back to where it lies
                    left_out["links to folders"] += 1
                else:
                    files += _files_below(path, left_out)
            elif not path.is_file():
                left_out["files that are no regular ones"] += 1
            elif kind_of(path) in _TEXT_KINDS | _ROW_KINDS:
                files.append(path)
            else:
                ending = path.suffix.lower()
                left_out[f"files ending in {ending}" if ending else "files without an ending"] += 1
    return files


def source_names(files: Sequence[Path]) -> dict[Path, str]:
    """Each file's name, or where several share it, the shortest end of the path that no other has."""
    same: dict[str, list[Path]] = {}
    for file in files:
        same.setdefault(file.name, []).append(file)
    names: dict[Path, str] = {}
    for group in same.values():
        parts = {file: PurePath(os.path.abspath(file)).parts for file in group}
        left, depth = list(parts), 1
        while left:
            ends = {file: parts[file][-depth:] for file in left}
            counts = Counter(ends.values())
            names |= {file: "/".join(end) for file, end in ends.items() if counts[end] == 1}
            left = [file for file in left if counts[ends[file]] > 1]
            depth += 1
    return names


def kind_of(file: Path) -> str:
    """What ``file`` ends in, in lower case and without the ending of its compression: ``.jsonl`` of ``a.JSONL.gz``."""
    return PurePath(file.name.lower().removesuffix(_compression(file))).suffix


def is_text(file: Path) -> bool:
    """Whether ``file`` is one text, as all are that are no tables."""
    return kind_of(file) not in _ROW_KINDS


def _compression(file: Path) -> str:
    return next((ending for ending in _COMPRESSIONS if file.name.lower().endswith(ending)), "")


@dataclass
class _Place:
    """Up to where a file was read."""

    where: str = ""


@contextmanager
def readable(file: Path) -> Iterator[_Place]:
    """Turns what can go wrong while ``file`` is read into an error that names it, and the place that was set last."""
    place = _Place()
    try:
        yield place
    except UnicodeDecodeError as error:
        kind = kind_of(file)
        unknown = "" if kind in _TEXT_KINDS | _ROW_KINDS else f"; for other data than text, use {KINDS}"
        raise TrainingError(f"{_named(file, place)} is not UTF-8 text ({error}){unknown}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TrainingError(f"{_named(file, place)} cannot be read ({one_line(error)})") from None


def _named(file: Path, place: _Place) -> str:
    return f"{file}, after {place.where}:" if place.where else str(file)


def one_line(problem: object) -> str:
    """``problem``, which may quote what a row has, as a line that any terminal can show."""
    line = " ".join(str(problem).encode(errors="backslashreplace").decode().split())
    if len(line) > _SHOWN_CHARS:
        line = f"{line[: _SHOWN_CHARS // 2]} ... {line[-_SHOWN_CHARS // 2 :]}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of ``file``, decompressed, without a byte order mark."""
    compression = _compression(file)
    with file.open("rb") as raw:
        stream: io.BufferedReader = raw
        if compression == ".gz":
            stream = cast(io.BufferedReader, gzip.GzipFile(fileobj=raw))
        elif compression == ".zst":
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
        else:
            start = stream.peek(4)
            ending = next((ending for magic, ending in _MAGIC.items() if start.startswith(magic)), None)
            if ending is not None:
                raise TrainingError(f"{file} holds compressed data; give its name the ending {ending}")
        if stream.peek(len(_BOM)).startswith(_BOM):
            stream.read(len(_BOM))
        yield stream


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a text, with their ends.

    Raises:
        TrainingError: it is no UTF-8 text.
    """
    may_hold_nul = kind_of(file) in _TEXT_KINDS
    with readable(file), _opened(file) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            if "\0" in line and not may_hold_nul:
                raise TrainingError(f"{file}: unknown kind of file, and no text (it holds NUL); use {KINDS}")
            yield from line.splitlines(keepends=True)  # a stream knows fewer kinds of line ends


def read_rows(file: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(where it is, a row or what is wrong with it) of every row of ``file``.

    Args:
        columns: chooses those of a table that has a header or schema.

    Raises:
        TrainingError: ``file`` as a whole cannot be used.
    """
    kind = kind_of(file)
    if file.stat().st_size == 0 and kind != ".parquet":
        return
    with readable(file) as place, _opened(file) as stream:
        if kind == ".parquet":
            yield from _parquet_rows(file, stream, columns, place)
        elif kind == ".json":
            yield from _json_rows(file, stream, columns, place)
        elif kind in (".csv", ".tsv"):
            yield from _csv_rows(file, stream, "\t" if kind == ".tsv" else ",", columns, place)
        else:
            yield from _json_lines(stream, place)


def parse_json(text: str | bytes, what: str = "") -> Any:
    """
    Args:
        what: the field that ``text`` stands in, e.g. ``"field 'tools' is "``.

    Raises:
        BadRow: it is no JSON, or an object in it has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError also of numbers with thousands of digits
        raise BadRow(f"{what}not valid JSON ({one_line(error)})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRow(f"the key {twice!r} stands twice in one object")
    return found


def _row(value: Any) -> dict[str, Any] | BadRow:
    return value if isinstance(value, dict) else BadRow('expected an object, as in {"text": "..."}')


def _json_lines(stream: Iterable[bytes], place: _Place) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    for number, line in enumerate(stream, start=1):
        place.where = f"line {number}"
        if not line.strip():
            continue
        try:
            yield place.where, _row(parse_json(line))
        except BadRow as problem:
            yield place.where, problem


def _json_rows(
    file: Path, stream: BinaryIO, columns: Columns, place: _Place
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Of a list of objects, of an object with one such list, or of an object that is a row. Many files of this ending
    hold an object a line."""
    content = stream.read()
    if not content.strip():
        return
    first, _, rest = content.lstrip().partition(b"\n")
    if rest.strip() and _is_object(first):
        yield from _json_lines(content.split(b"\n"), place)
        return
    try:
        whole = parse_json(content)
    except BadRow as problem:
        raise TrainingError(f"{file}: {one_line(problem)}") from None
    rows = _rows_of(whole, columns)
    if rows is None:
        raise TrainingError(
            f"{file}: expected a list of objects, or an object with one such list; if it is no data, name those "
            "that are by a glob"
        )
    for number, value in enumerate(rows, start=1):
        yield f"row {number}", _row(value)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except BadRow:
        return False


def _rows_of(whole: Any, columns: Columns) -> list[Any] | None:
    """The rows that a JSON document holds; None where it holds none."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        return None
    try:
        columns(list(whole))
    except BadRow:
        lists = [
            value
            for value in whole.values()
            if isinstance(value, list) and any(isinstance(item, dict) for item in value)
        ]
        return lists[0] if len(lists) == 1 else None
    return [whole]


def _csv_rows(
    file: Path, stream: BinaryIO, delimiter: str, columns: Columns, place: _Place
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    csv.field_size_limit(sys.maxsize)  # of all readers; else a text of 131,072 characters is refused
    # What is not UTF-8 is found in the cells: were it an error here, the rest of its row would be read as rows.
    lines = (line.decode(errors="surrogateescape") for line in stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
            for cell in cells:
                if not cell.isascii():
                    cell.encode(errors="surrogateescape").decode()
        except StopIteration:
            break
        except (csv.Error, UnicodeDecodeError) as error:
            if header is None:
                raise TrainingError(f"{file}, {where}: its header cannot be read ({error})") from None
            yield where, BadRow(f"not valid {kind_of(file)[1:].upper()} ({error})")
            continue
        place.where = where
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(file, where, header, columns)
        elif len(cells) != len(header):
            yield where, BadRow(f"{len(cells)} cells, but the header names {len(header)} columns")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _check_header(file: Path, where: str, header: list[str], columns: Columns) -> None:
    for name, count in Counter(header).items():
        if count > 1:
            raise TrainingError(
                f"{file}, {where}: the header names the column {one_line(repr(name))} {count} times"
            )
    try:
        columns(header)
    except BadRow as problem:
        raise TrainingError(
            f"{file}, {where}: {one_line(problem)}; the first line has to name the columns"
        ) from None


def _parquet_rows(
    file: Path, stream: BinaryIO, columns: Columns, place: _Place
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    import pyarrow
    from pyarrow import parquet

    # A compressed file has to be read whole: a parquet file's end says what is where.
    source = io.BytesIO(stream.read()) if _compression(file) else file
    try:
        # Buffered: else a whole row group is read at once, and a file may be one row group.
        with parquet.ParquetFile(source, buffer_size=_READ_BUFFER_BYTES) as table:
            wanted = columns(table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                for row in table_rows(batch):
                    number += 1
                    place.where = f"row {number}"
                    yield place.where, row
    except BadRow as problem:
        raise TrainingError(f"{file}: {one_line(problem)}") from None
    except UnicodeDecodeError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:
        raise TrainingError(f"{file} is not a parquet file ({one_line(error)})") from None


def table_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow table or record batch. Objects of one column share their keys there, null where one has
    none; such keys are left out."""
    for row in batch.to_pylist():
        yield {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
