"""Raw text from files and from Python itself, cut into documents. Knows nothing about experts or tokens."""

from __future__ import annotations

import ast
import difflib
import glob
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig

Messages = list[dict[str, Any]]
"""One chat: ``{"role": ..., "content": ...}`` each, and what else a chat template reads."""

MESSAGES_FIELD = "messages"
_TEXT_SUFFIXES = {".txt", ".md"}
# Tables, test data and third-party code, which say little about Python.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """``text``, the data ``source`` it comes from, and the number of the input text it is a piece of.

    A chat is one document with its ``messages``; its text is what they say.
    """

    text: str
    source: str
    origin: int
    messages: Messages | None = None


def input_files(config: DataConfig) -> list[Path]:
    """The files that ``config.files`` names, each once, sorted within each pattern.

    Raises:
        TrainingError: a path or glob matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in config.files:
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if not matches:
            raise TrainingError(f"data.files: {pattern!r} matches no file")
        found.update(dict.fromkeys(matches))
    return list(found)


def read_documents(data: DataConfig, cutting: DocumentConfig, seed: int) -> list[Document]:
    """All documents of all sources, in a fixed order.

    Raises:
        TrainingError: a file that cannot be read (named, with the line where there is one), or no text at all.
    """
    documents: list[Document] = []
    origin = 0
    for source, inputs in _sources(data, seed):
        for given in inputs:
            if isinstance(given, str):
                pieces = (
                    piece
                    for piece in cut(given, cutting.max_chars)
                    if len(piece.strip()) >= cutting.min_chars
                )
                documents += [Document(piece, source, origin) for piece in pieces if piece.strip()]
            else:
                said = "\n\n".join(message["content"] for message in given)
                documents.append(Document(said, source, origin, given))
            origin += 1
    if not documents:
        raise TrainingError("the data holds no documents; check data.files and documents.min_chars")
    return documents


def cut(text: str, max_chars: int) -> Iterator[str]:
    """``text`` in pieces of at most ``max_chars``, cut at line ends unless a line is longer; joined, the same text."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > max_chars:
            yield piece
            piece = ""
        while len(line) > max_chars:
            yield line[:max_chars]
            line = line[max_chars:]
        piece += line
    if piece:
        yield piece


def _sources(data: DataConfig, seed: int) -> Iterator[tuple[str, Iterable[str | Messages]]]:
    for file in input_files(data):
        yield file.name, _read_file(file, data.text_field)
    for name in data.builtin:
        yield name, _capped(_BUILTIN[name](seed), data.builtin_max_bytes)


def _capped(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text.encode("utf-8", errors="ignore"))
        if total > max_bytes:
            return
        yield text


def _read_file(file: Path, text_field: str) -> Iterable[str | Messages]:
    """Its texts; of .jsonl and .parquet also the chats, in ``text_field`` or, where that is not, in ``messages``."""
    try:
        if file.suffix in _TEXT_SUFFIXES:
            return [file.read_text(encoding="utf-8")]
        if file.suffix == ".jsonl":
            return _read_jsonl(file, text_field)
        if file.suffix == ".parquet":
            return _read_parquet_rows(file, text_field)
    except UnicodeDecodeError as error:
        raise TrainingError(f"{file} is not UTF-8 text ({error})") from None
    except OSError as error:
        raise TrainingError(f"{file} cannot be read ({error})") from None
    raise TrainingError(f"{file}: unknown kind of file; use .txt, .md, .jsonl or .parquet")


def _read_jsonl(file: Path, text_field: str) -> list[str | Messages]:
    found: list[str | Messages] = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TrainingError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise TrainingError(f"{where}: expected an object with a {text_field!r} field")
        field = _field_of(row, text_field)
        if field not in row:
            raise TrainingError(f"{where}: {_no_field(text_field, row)}")
        found.append(_text_or_chat(row[field], f"{where}: field {field!r}"))
    return found


def _field_of(names: Iterable[str], text_field: str) -> str:
    names = list(names)
    return MESSAGES_FIELD if text_field not in names and MESSAGES_FIELD in names else text_field


def _text_or_chat(value: Any, where: str) -> str | Messages:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TrainingError(f"{where} is not a string")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise TrainingError(f"{where}: message {number} needs a role and a content, both strings")
    roles = [message["role"] for message in value]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise TrainingError(
            f"{where}: a chat needs an assistant's message after another's; its roles are {roles}"
        )
    return value


def _read_parquet_rows(file: Path, text_field: str) -> list[str | Messages]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        schema = parquet.read_schema(file)
        field = _field_of(schema.names, text_field)
        if field not in schema.names or not pyarrow.types.is_nested(schema.field(field).type):
            return list(read_parquet(file, field))
        column = parquet.read_table(file, columns=[field]).column(field).to_pylist()
    except pyarrow.ArrowException as error:
        raise TrainingError(f"{file} is not a parquet file ({error})") from None
    chats: list[str | Messages] = []
    for number, row in enumerate(column, start=1):
        # A parquet column has the same keys in every message, null where one has none.
        if isinstance(row, list) and all(isinstance(message, dict) for message in row):
            row = [{key: value for key, value in message.items() if value is not None} for message in row]
        chats.append(_text_or_chat(row, f"{file}, row {number}: field {field!r}"))
    return chats


def read_parquet(file: Path, text_field: str) -> list[str]:
    """The strings of one column.

    Raises:
        FileNotFoundError: no such file.
        TrainingError: not a parquet file, no such column, or a row of it is no string.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(file).names
        if text_field not in names:
            raise TrainingError(f"{file}: {_no_field(text_field, names)}")
        column = parquet.read_table(file, columns=[text_field]).column(text_field).to_pylist()
    except pyarrow.ArrowException as error:
        raise TrainingError(f"{file} is not a parquet file ({error})") from None
    for number, text in enumerate(column, start=1):
        if not isinstance(text, str):
            raise TrainingError(f"{file}, row {number}: field {text_field!r} is not a string")
    return column


def _no_field(text_field: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(text_field, list(names), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(map(str, names)) or 'none'}"
    return f"no field {text_field!r} (data.text_field){hint}"


def _library_sources(seed: int) -> Iterator[str]:
    """The standard library's modules, in an order that depends on ``seed`` alone."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file for file in root.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(root).parts)
    )
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a few files hold broken code on purpose
        yield text


def _docstring_nodes(text: str) -> list[tuple[ast.Expr, str]]:
    """(statement, cleaned text) of each docstring, in the order of the file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                statement = node.body[0]
                assert isinstance(statement, ast.Expr)
                found.append((statement, docstring))
    return sorted(found, key=lambda pair: pair[0].lineno)


def _library_code(seed: int) -> Iterator[str]:
    """Modules without their docstrings, so that no text is in two sources."""
    for text in _library_sources(seed):
        lines = text.splitlines(keepends=True)
        for statement, _ in _docstring_nodes(text):
            assert statement.end_lineno is not None
            lines[statement.lineno - 1 : statement.end_lineno] = [""] * (
                statement.end_lineno - statement.lineno + 1
            )
        yield "".join(lines)


def _library_docstrings(seed: int) -> Iterator[str]:
    """Per module: its docstrings, one after another; single lines are left out."""
    for text in _library_sources(seed):
        docstrings = [docstring for _, docstring in _docstring_nodes(text) if "\n" in docstring]
        if docstrings:
            yield "\n\n".join(docstrings) + "\n"


def _pydoc_topics(_seed: int) -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


_BUILTIN: dict[str, Callable[[int], Iterator[str]]] = {
    "python-stdlib": _library_code,
    "python-docstrings": _library_docstrings,
    "pydoc-topics": _pydoc_topics,
}
