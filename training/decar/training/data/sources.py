"""Documents from files, from the Hugging Face Hub and from Python itself, whole or cut. Knows nothing about experts or
tokens."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig
from decar.training.data.builtin import builtin_texts
from decar.training.data.files import (
    BadRow,
    Found,
    describe,
    find_files,
    is_text,
    one_line,
    read_lines,
    read_rows,
    source_names,
)
from decar.training.data.formats import (
    IMAGE_MARK,
    TEXT,
    Chat,
    Messages,
    RowReader,
    Tools,
    domain_of_path,
    is_of_path,
)
from decar.training.data.hub import hub_rows

# Why texts are dropped, as it goes on after "dropped 40 of 52 texts".
SHORT = "shorter than documents.min_chars"
EMPTY = "without any text"
UNLEARNED = "whose answers all have weight 0"
UNANSWERED = "whose answers are all empty"


class NoDocuments(TrainingError):
    """The data can be read, and hold no text."""


@dataclass(frozen=True)
class Document:
    """``text``, the data ``source`` it comes from, the number of the input text it is a piece of, and that input's
    ``domain``: the value of the field that was asked for.

    A chat is one document with its ``messages`` and ``tools``; its text is what they say. Its ``images``, encoded,
    belong in order where its messages have an `IMAGE_MARK`. Of an input text that was cut, ``piece`` counts the pieces
    from 0. ``format`` is how the data hold it (data/formats.py); ``is_given_held_out`` says that it comes from
    ``data.held_out_files``.
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
    format: str = TEXT
    is_given_held_out: bool = False


@dataclass
class Tally:
    """How many texts and chats were ``read``, of which ``formats``, and how many of them ``dropped``, by reason; what
    of the folders that were named was ``left_out``, by what it is."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class BadLines:
    """Lines and rows that cannot be used: the first ends the run, or all are counted by file."""

    skip: bool
    counts: Counter[str] = field(default_factory=Counter)
    first: str | None = None

    def found(self, source: Path | str, where: str, problem: str, name: str | None = None) -> None:
        """Count one, ``where`` in ``source``, which is called ``name`` (a file's own by default).

        Raises:
            TrainingError: bad lines are not to be skipped.
        """
        message = f"{source}, {where}: {one_line(problem)}"
        if not self.skip:
            raise TrainingError(f"{message}; mend it, or set data.on_bad_line to skip")
        self.counts[name or Path(source).name] += 1
        self.first = self.first or message


def input_files(config: DataConfig) -> list[Path]:
    """The files that ``config.files`` names, each once, and behind them those that ``config.held_out_files`` does.

    Raises:
        TrainingError: a path or glob matches nothing.
    """
    training, held_out = training_files(config), held_out_files(config)
    return training.files + held_out.files


def training_files(config: DataConfig) -> Found:
    """What ``config.files`` names, but for what ``config.held_out_files`` names as well.

    Raises:
        TrainingError: a path or glob matches nothing.
    """
    held_out = {os.path.abspath(file) for file in held_out_files(config).files}
    found = find_files(config.files, "data.files")
    return Found([file for file in found.files if os.path.abspath(file) not in held_out], found.left_out)


def held_out_files(config: DataConfig) -> Found:
    """What ``config.held_out_files`` names.

    Raises:
        TrainingError: a path or glob matches nothing.
    """
    return find_files(config.held_out_files, "data.held_out_files")


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
        domain_field: the field of a row, or the part of a file's path, that becomes `Document.domain`.
        bad: counts what ``data.on_bad_line`` has skipped.
        tally: counts what was read, and what of it was dropped.

    Raises:
        TrainingError: a file that cannot be read (named, with the line where there is one), or no text at all.
    """
    bad = bad or BadLines(skip=data.on_bad_line == "skip")
    tally = tally or Tally()
    any_found = False
    for origin, (source, domain, given, format, is_held_out) in enumerate(
        _inputs(data, seed, domain_field, bad, tally)
    ):
        tally.read += 1
        tally.formats[format] += 1
        if isinstance(given, Chat):
            reason = _why_nothing_is_learned(given.messages)
            if reason:
                tally.dropped[reason] += 1
                continue
            any_found = True
            says = [message["content"] for message in given.messages]
            if given.images:
                says = ["".join(split_at_images(content)) for content in says]
            yield Document(
                "\n\n".join(says),
                source,
                origin,
                domain,
                given.messages,
                given.tools,
                given.images,
                format=format,
                is_given_held_out=is_held_out,
            )
            continue
        pieces = _pieces(given, cutting, tally)
        for number, (piece, is_last) in enumerate(pieces):
            any_found = True
            yield Document(
                piece,
                source,
                origin,
                domain,
                piece=number,
                is_last=is_last,
                format=format,
                is_given_held_out=is_held_out,
            )
    if not any_found:
        skipped = (
            f"; {bad.counts.total()} bad lines were skipped, the first: {bad.first}" if bad.first else ""
        )
        dropped = "".join(
            f"; dropped {count:,} of {tally.read:,} texts {reason}" for reason, count in tally.dropped.items()
        )
        left_out = f"; left out {describe(tally.left_out)}" if tally.left_out else ""
        raise NoDocuments(
            f"the data holds no documents; check data.files and documents.min_chars{dropped}{skipped}{left_out}"
        )


def _why_nothing_is_learned(messages: Messages) -> str | None:
    learned = [message for message in messages if is_learned(message)]
    if not learned:
        return UNLEARNED
    says_anything = any(message["content"].strip() or message.get("tool_calls") for message in learned)
    return None if says_anything else UNANSWERED


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
class Piece:
    """A text that is not the whole of its input text: the ``number``-th piece, from 0, of input ``origin``."""

    text: str
    origin: int
    number: int
    is_last: bool


Example = str | Piece | Chat
"""What an expert is trained on: a whole text, a piece of one, or a chat."""


class _Input(NamedTuple):
    """A text, by its lines, or a chat."""

    source: str
    domain: str | None
    given: Iterable[str] | Chat
    format: str = TEXT
    is_given_held_out: bool = False


def _inputs(
    data: DataConfig, seed: int, domain_field: str | None, bad: BadLines, tally: Tally
) -> Iterator[_Input]:
    training, held_out = training_files(data), held_out_files(data)
    tally.left_out.update(training.left_out + held_out.left_out)
    names = source_names([*training.files, *held_out.files])
    reader = RowReader(data, domain_field)
    for file in training.files:
        yield from _read_file(file, names[file], reader, bad)
    for name in data.builtin:
        _refuse_fields(name, domain_field)
        for text in builtin_texts(name, seed, data.builtin_max_bytes):
            yield _Input(name, None, text.splitlines(keepends=True))
    for dataset in data.hub:
        yield from _read_rows(dataset.id, dataset.id, hub_rows(dataset, reader.columns), reader, bad)
    for file in held_out.files:
        for given in _read_file(file, names[file], reader, bad):
            yield given._replace(is_given_held_out=True)
    reader.check_mapped()


def _refuse_fields(source: str | Path, domain_field: str | None) -> None:
    if domain_field is not None:
        raise TrainingError(
            f"{source} has no fields, so no {domain_field!r} (partition.field); "
            "use files of rows, as .jsonl or .parquet, tell files by path[-2] or path.suffix, or drop partition.field "
            "to tell by source"
        )


def _read_file(file: Path, name: str, reader: RowReader, bad: BadLines) -> Iterator[_Input]:
    if not is_text(file):
        yield from _read_rows(file, name, read_rows(file, reader.columns), reader, bad)
        return
    domain = None
    if reader.domain_field is not None and is_of_path(reader.domain_field):
        domain = domain_of_path(reader.domain_field, file)
    else:
        _refuse_fields(file, reader.domain_field)
    yield _Input(name, domain, read_lines(file))


def _read_rows(
    source: Path | str,
    name: str,
    rows: Iterable[tuple[str, dict[str, Any] | BadRow]],
    reader: RowReader,
    bad: BadLines,
) -> Iterator[_Input]:
    for where, given in rows:
        try:
            if isinstance(given, BadRow):
                raise given
            row = reader(given, source)
        except BadRow as problem:
            bad.found(source, where, str(problem), name)
        else:
            used = row.given.splitlines(keepends=True) if isinstance(row.given, str) else row.given
            yield _Input(name, row.domain, used, row.format)
