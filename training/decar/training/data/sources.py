"""Raw text and images from files and from Python itself, cut into documents. Knows nothing about experts or tokens."""

from __future__ import annotations

import ast
import glob
import json
import random
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decar.router.errors import TrainingError, did_you_mean
from decar.router.images import UnreadableImage, decode_image
from decar.training.config import DataConfig, DocumentConfig

Messages = list[dict[str, Any]]
"""One chat: ``{"role": ..., "content": ...}`` each, and what else a chat template reads."""

Tools = list[dict[str, Any]]
"""What a chat's assistant may call, as OpenAI's API describes it."""

MESSAGES_FIELD = "messages"
TOOLS_FIELD = "tools"
IMAGE_MARK = "<image>"
"""Stands in a message where an image belongs."""
# LLaVA's name for a chat, and its names for who speaks.
_CONVERSATIONS_FIELD = "conversations"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_TEXT_SUFFIXES = {".txt", ".md"}
# Tables, test data and third-party code, which say little about Python.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_ROWS_AT_ONCE = 256
_READ_BUFFER_BYTES = 1 << 20


# Why texts are dropped, as it goes on after "dropped 40 of 52 texts".
SHORT = "shorter than documents.min_chars"
EMPTY = "without any text"
UNLEARNED = "whose answers all have weight 0"


class NoDocuments(TrainingError):
    """The data can be read, and hold no text."""


@dataclass(frozen=True)
class Document:
    """``text``, the data ``source`` it comes from, the number of the input text it is a piece of, and that input's
    ``domain``: the value of the field that was asked for.

    A chat is one document with its ``messages`` and ``tools``; its text is what they say. Its ``images``, encoded,
    belong in order where its messages have an `IMAGE_MARK`. Of an input text that was cut, ``piece`` counts the pieces
    from 0. ``format`` is how the data hold it.
    """

    text: str
    source: str
    origin: int
    domain: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    images: tuple[bytes, ...] = ()
    piece: int = 0
    is_last: bool = True
    format: str = "text"


@dataclass
class Tally:
    """How many texts and chats were ``read``, and how many of them ``dropped``, by reason."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass
class BadLines:
    """Lines and rows that cannot be used: the first ends the run, or all are counted by file."""

    skip: bool
    counts: Counter[str] = field(default_factory=Counter)
    first: str | None = None

    def found(self, file: Path, where: str, problem: str) -> None:
        """Count one, ``where`` in ``file``.

        Raises:
            TrainingError: bad lines are not to be skipped.
        """
        message = f"{file}, {where}: {problem}"
        if not self.skip:
            raise TrainingError(f"{message}; mend it, or set data.on_bad_line to skip")
        self.counts[file.name] += 1
        self.first = self.first or message


def input_files(config: DataConfig) -> list[Path]:
    """The files that ``config.files`` names, each once, sorted within each pattern.

    What of a path exists is taken literally, brackets included; the rest of it is a glob.

    Raises:
        TrainingError: a path or glob matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in config.files:
        found_by_glob = glob.glob(_escaped(pattern), recursive=True)
        matches = sorted(Path(match) for match in found_by_glob if Path(match).is_file())
        if not matches:
            raise TrainingError(f"data.files: {pattern!r} matches no file")
        found.update(dict.fromkeys(matches))
    return list(found)


def _escaped(pattern: str) -> str:
    """``pattern`` as a glob in which the leading parts that exist stand for themselves."""
    existing, *rest = Path(), *Path(pattern).parts
    while rest and (existing / rest[0]).exists():
        existing /= rest.pop(0)
    return str(Path(glob.escape(str(existing)), *rest))


def read_documents(
    data: DataConfig,
    cutting: DocumentConfig,
    seed: int,
    domain_field: str | None = None,
    bad: BadLines | None = None,
    tally: Tally | None = None,
) -> Iterator[Document]:
    """All documents of all sources, in a fixed order, read one by one.

    Args:
        domain_field: the field of a .jsonl or .parquet row that becomes `Document.domain`.
        bad: counts what ``data.on_bad_line`` has skipped.
        tally: counts what was read, and what of it was dropped.

    Raises:
        TrainingError: a file that cannot be read (named, with the line where there is one), or no text at all.
    """
    bad = bad or BadLines(skip=data.on_bad_line == "skip")
    tally = tally or Tally()
    any_found = False
    for origin, (source, domain, given) in enumerate(_inputs(data, seed, domain_field, bad)):
        tally.read += 1
        if isinstance(given, Chat):
            if not any(is_learned(message) for message in given.messages):
                tally.dropped[UNLEARNED] += 1
                continue
            any_found = True
            says = [message["content"] for message in given.messages]
            if given.images:
                says = ["".join(split_at_images(content)) for content in says]
            said = "\n\n".join(says)
            yield Document(
                said, source, origin, domain, given.messages, given.tools, given.images, format=given.format
            )
            continue
        pieces = _pieces(given, cutting, tally)
        for number, (piece, is_last) in enumerate(pieces):
            any_found = True
            yield Document(piece, source, origin, domain, piece=number, is_last=is_last)
    if not any_found:
        skipped = (
            f"; {bad.counts.total()} bad lines were skipped, the first: {bad.first}" if bad.first else ""
        )
        dropped = "".join(
            f"; dropped {count:,} of {tally.read:,} texts {reason}" for reason, count in tally.dropped.items()
        )
        raise NoDocuments(
            f"the data holds no documents; check data.files and documents.min_chars{dropped}{skipped}"
        )


def is_learned(message: dict[str, Any]) -> bool:
    """Whether an expert learns ``message``: an assistant's, unless OpenAI's ``weight`` of it is 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _pieces(lines: Iterable[str], cutting: DocumentConfig, tally: Tally) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last) of a text; nothing where the whole of it is too short.

    A piece that is too short by itself, a tail above all, stays with the one before it.
    """

    def is_enough(piece: str) -> bool:
        said = piece.strip()
        return bool(said) and len(said) >= cutting.min_chars

    whole = tail = ""
    for piece in cut(lines, cutting.max_chars):
        tail += piece
        if is_enough(tail):
            if whole:
                yield whole, False
            whole, tail = tail, ""
    if whole:
        yield whole + tail, True
    else:
        tally.dropped[SHORT if tail.strip() else EMPTY] += 1


def cut(lines: Iterable[str], max_chars: int | None) -> Iterator[str]:
    """A text, given as ``lines`` with their ends, in pieces of at most ``max_chars``; joined, the same text.

    Cut at line ends; a longer line before a word, and only a longer word anywhere.
    """
    if max_chars is None:
        whole = "".join(lines)
        if whole:
            yield whole
        return
    piece = ""
    for line in lines:
        if piece and len(piece) + len(line) > max_chars:
            yield piece
            piece = ""
        start = 0
        while len(line) - start > max_chars:
            end = start + max_chars
            # The space stays with the word that follows it, as tokenizers have it.
            end = next((i for i in range(end, start, -1) if line[i].isspace()), end)
            yield line[start:end]
            start = end
        piece += line[start:]
    if piece:
        yield piece


def split_at_images(text: str) -> list[str]:
    """What stands before, between and after the images of ``text``; a line end that follows a mark belongs to it."""
    first, *rest = text.split(IMAGE_MARK)
    return [first, *(piece.removeprefix("\n") for piece in rest)]


@dataclass(frozen=True)
class Chat:
    """A chat instead of a text, with the ``tools`` that its template is told of and its ``images``, encoded."""

    messages: Messages
    tools: Tools | None = None
    images: tuple[bytes, ...] = ()
    format: str = "messages"


@dataclass(frozen=True)
class Piece:
    """A text that is not the whole of its input text: the ``number``-th piece, from 0, of input ``origin``."""

    text: str
    origin: int
    number: int
    is_last: bool


Example = str | Piece | Chat
"""What an expert is trained on: a whole text, a piece of one, or a chat."""


# (source, domain, lines of a text or a chat)
_Input = tuple[str, str | None, Iterable[str] | Chat]
_Row = tuple[str | Chat, str | None]


def _inputs(data: DataConfig, seed: int, domain_field: str | None, bad: BadLines) -> Iterator[_Input]:
    for file in input_files(data):
        yield from _read_file(file, data, domain_field, bad)
    for name in data.builtin:
        _refuse_fields(name, domain_field)
        for text in _capped(_BUILTIN[name](seed), data.builtin_max_bytes):
            yield name, None, text.splitlines(keepends=True)


def _refuse_fields(source: str | Path, domain_field: str | None) -> None:
    if domain_field is not None:
        raise TrainingError(
            f"{source} has no fields, so no {domain_field!r} (partition.field); "
            "use .jsonl or .parquet files, or drop partition.field to tell by source"
        )


def _capped(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text.encode("utf-8", errors="ignore"))
        if total > max_bytes:
            return
        yield text


def _read_file(file: Path, data: DataConfig, domain_field: str | None, bad: BadLines) -> Iterator[_Input]:
    """Its texts; of .jsonl and .parquet also the chats, in ``data.text_field`` or, where that is not, in ``messages``
    or ``conversations``."""
    if file.suffix in _TEXT_SUFFIXES:
        _refuse_fields(file, domain_field)
        yield file.name, None, _read_lines(file)
    elif file.suffix in _ROW_READERS:
        for given, domain in _ROW_READERS[file.suffix](file, data, domain_field, bad):
            lines = given.splitlines(keepends=True) if isinstance(given, str) else given
            yield file.name, domain, lines
    else:
        raise TrainingError(f"{file}: unknown kind of file; use .txt, .md, .jsonl or .parquet")


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise TrainingError(f"{file} is not UTF-8 text ({error})") from None
    except OSError as error:
        raise TrainingError(f"{file} cannot be read ({error})") from None


def _read_lines(file: Path) -> Iterator[str]:
    with _readable(file), file.open(encoding="utf-8") as stream:
        for line in stream:
            yield from line.splitlines(keepends=True)  # a stream knows fewer kinds of line ends


def _fields(names: Iterable[str], text_field: str) -> list[str]:
    """Which of ``names`` may hold a row's text or chat, the first choice first."""
    wanted = dict.fromkeys((text_field, MESSAGES_FIELD, _CONVERSATIONS_FIELD))
    return [name for name in wanted if name in names]


def _is_nothing(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _text_or_chat(value: Any, field: str) -> str | Messages:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _BadRow(f"field {field!r} is not a string")
    if field == _CONVERSATIONS_FIELD:
        value = [_from_llava(message, number) for number, message in enumerate(value, start=1)]
    messages = [
        _message(message, f"field {field!r}: message {i}") for i, message in enumerate(value, start=1)
    ]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise _BadRow(
            f"field {field!r}: a chat needs an assistant's message after another's; its roles are {roles}"
        )
    return messages


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message as chat templates want it, and as a server makes it of a request.

    Args:
        where: names it in errors.
    """
    if not isinstance(given, dict):
        raise _BadRow(f"{where} needs a role and a content, both strings")
    # A parquet column has the same keys in every message, null where one has none.
    message = {key: said for key, said in given.items() if said is not None}
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if "tool_calls" in message:
        message.setdefault("content", "")
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise _BadRow(f"{where} needs a role and a content, both strings")
    if message.get("weight", 1) not in (0, 1):
        raise _BadRow(f"{where} has the weight {message['weight']!r}; it is 1, or 0 where it is not learned")
    return message


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """``calls`` with their arguments as objects: OpenAI writes them as JSON, which a template would quote again."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function", call), dict) for call in calls
    ):
        raise _BadRow(f"{where} has tool_calls that are not a list of objects, each with a function")
    parsed = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _BadRow(
                    f"{where} calls a tool with arguments that are not valid JSON ({error})"
                ) from None
        if not isinstance(arguments, dict):
            raise _BadRow(f"{where} calls a tool with arguments that are not an object")
        function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def _tools(value: Any) -> Tools | None:
    """The tools of a row, which may write them as JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _BadRow(f"field {TOOLS_FIELD!r} is not valid JSON ({error})") from None
    if _is_nothing(value):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _BadRow(f"field {TOOLS_FIELD!r} is not a list of objects")
    return value


def _from_llava(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise _BadRow(
            f"field {_CONVERSATIONS_FIELD!r}: message {number} needs a from and a value, both strings"
        )
    if message.get("from") not in list(_ROLES):  # a list compares with anything, a mapping hashes it
        raise _BadRow(
            f"field {_CONVERSATIONS_FIELD!r}: message {number} is from {message.get('from')!r}, which is none of "
            f"{', '.join(_ROLES)}"
        )
    return {"role": _ROLES[message["from"]], "content": message["value"]}


def _read_images(value: Any, data: DataConfig, file: Path) -> tuple[bytes, ...]:
    """The encoded images that a row of ``file`` names or, in parquet, holds."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_read_image(image, data, file) for image in given)


def _read_image(given: Any, data: DataConfig, file: Path) -> bytes:
    encoded = given.get("bytes") or given.get("path") if isinstance(given, dict) else given
    if isinstance(encoded, str):
        path = (data.image_dir or file.parent) / encoded
        what = f"image {path}"
        try:
            encoded = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise _BadRow(
                f"{what} cannot be read ({reason}); paths are relative to the file's folder, or to data.image_dir"
            ) from None
    else:
        what = f"field {data.image_field!r}"
    if not isinstance(encoded, bytes):
        raise _BadRow(f"{what} is neither a path nor a list of paths")
    try:
        decode_image(encoded)
    except UnreadableImage as error:
        raise _BadRow(f"{what} cannot be decoded ({error})") from None
    return encoded


def _check_marks(messages: Messages, images: tuple[bytes, ...]) -> None:
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != len(images):
        raise _BadRow(
            f"{marks} {IMAGE_MARK} marks in the messages, but {len(images)} images; each image needs one"
        )
    if any(message["role"] == "assistant" and IMAGE_MARK in message["content"] for message in messages):
        raise _BadRow(f"an {IMAGE_MARK} mark in an answer; a model is asked about images and answers in text")


def _read_jsonl(file: Path, data: DataConfig, domain_field: str | None, bad: BadLines) -> Iterator[_Row]:
    with _readable(file), file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise _BadRow(f"expected an object with a {data.text_field!r} field")
                used = _use_row(row, data, domain_field, file)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                bad.found(file, f"line {number}", f"not valid JSON ({error})")
            except _BadRow as error:
                bad.found(file, f"line {number}", str(error))
            else:
                yield used


class _BadRow(Exception):
    """What is wrong with a row."""


def _use_row(row: dict[str, Any], data: DataConfig, domain_field: str | None, file: Path) -> _Row:
    """(text or chat, domain) of ``row``."""
    fields = _fields(row, data.text_field)
    if not fields:
        raise _BadRow(_no_field(data.text_field, "data.text_field", row))
    # An empty text beside a chat, or an empty chat beside a text, is none.
    field = next((name for name in fields if not _is_nothing(row[name])), fields[0])
    given = _text_or_chat(row[field], field)
    tools = None if isinstance(given, str) else _tools(row.get(TOOLS_FIELD))
    try:
        json.dumps([given, tools], ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell half of a character, which no file can hold
        raise _BadRow(f"field {field!r} holds half of a surrogate pair") from None
    if isinstance(given, str):
        if row.get(data.image_field) and field != data.image_field:
            raise _BadRow(
                f"field {data.image_field!r} (data.image_field): an image needs a chat to stand in, but "
                f"{field!r} is a text; give it messages, or name another field in data.image_field"
            )
        used: str | Chat = given
    else:
        known_as = "LLaVA" if field == _CONVERSATIONS_FIELD else "messages"
        used = Chat(given, tools, _images_of(given, row, field, data, file), known_as)
    if domain_field is None:
        return used, None
    if row.get(domain_field) is None:
        raise _BadRow(_no_field(domain_field, "partition.field", row))
    return used, str(row[domain_field])


def _images_of(
    messages: Messages, row: dict[str, Any], field: str, data: DataConfig, file: Path
) -> tuple[bytes, ...]:
    images = _read_images(row.get(data.image_field), data, file)
    # Text that never heard of images may well speak of <image>.
    if images or field == _CONVERSATIONS_FIELD:
        _check_marks(messages, images)
    return images


def _read_parquet(file: Path, data: DataConfig, domain_field: str | None, bad: BadLines) -> Iterator[_Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Buffered: else a whole row group is read at once, and a file may be one row group.
        with _readable(file), parquet.ParquetFile(file, buffer_size=_READ_BUFFER_BYTES) as table:
            names = table.schema_arrow.names
            fields = dict.fromkeys(_fields(names, data.text_field) or [data.text_field], "data.text_field")
            if domain_field is not None:
                fields[domain_field] = "partition.field"
            for name, setting in fields.items():
                if name not in names:
                    raise TrainingError(f"{file}: {_no_field(name, setting, names)}")
            columns = [*fields, *({data.image_field, TOOLS_FIELD} & set(names) - set(fields))]
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    # Messages and tools of one column share their keys, and are null where one has none.
                    chat = {name: _without_nulls(row[name]) for name in row if isinstance(row[name], list)}
                    try:
                        used = _use_row(row | chat, data, domain_field, file)
                    except _BadRow as error:
                        bad.found(file, f"row {number}", str(error))
                    else:
                        yield used
    except pyarrow.ArrowException as error:
        raise TrainingError(f"{file} is not a parquet file ({error})") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_ROW_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _no_field(name: str, setting: str, names: Iterable[str]) -> str:
    names = list(names)
    hint = did_you_mean(name, names) or f"; it has {', '.join(map(str, names)) or 'none'}"
    return f"no field {name!r} ({setting}){hint}"


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
