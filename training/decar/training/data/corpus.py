"""Documents on disk, and in memory only what is small of each. Knows parquet and samples, nothing about experts.

Shapes: N documents.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decar.router.errors import TrainingError
from decar.training.data.formats import MESSAGES_FIELD, TOOLS_FIELD
from decar.training.data.sources import Document
from decar.training.run import require

Ints = NDArray[np.int64]
Progress = Callable[[str, int, int | None], None]
"""(step, done, total or None where that is unknown); in documents, where the step goes through them."""

# What is read or written at once, whichever is reached first.
BATCH_DOCUMENTS = 512
BATCH_CHARS = 1_000_000
IMAGES_FIELD = "images"
PIECE_COLUMNS = ("origin", "piece", "is_last")
_JSON_COLUMNS = (MESSAGES_FIELD, TOOLS_FIELD)


@dataclass
class DocumentWriter:
    """Writes the ``columns`` of documents to a parquet ``file``, a row group of bounded size at a time."""

    file: Path
    columns: Sequence[str] = ("text", "source")
    _pending: list[Document] = field(default_factory=list)
    _pending_chars: int = 0

    def __enter__(self) -> DocumentWriter:
        import pyarrow
        from pyarrow import parquet

        kinds = {
            "origin": pyarrow.int64(),
            "piece": pyarrow.int64(),
            "is_last": pyarrow.bool_(),
            IMAGES_FIELD: pyarrow.list_(pyarrow.binary()),
        }
        self._schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in self.columns])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        repeated = [name for name in self.columns if name not in ("text", IMAGES_FIELD)]
        self._writer = parquet.ParquetWriter(self.file, self._schema, use_dictionary=repeated)
        return self

    def add(self, document: Document) -> None:
        self._pending.append(document)
        # Images count as their bytes. Whoever wants one of them reads its row group.
        self._pending_chars += len(document.text) + sum(map(len, document.images))
        if len(self._pending) >= BATCH_DOCUMENTS or self._pending_chars >= BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if not self._pending:
            return
        columns = {name: [_column(document, name) for document in self._pending] for name in self.columns}
        self._writer.write_table(pyarrow.table(columns, schema=self._schema))
        self._pending, self._pending_chars = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.close()


def _column(document: Document, name: str) -> Any:
    """A field of ``document`` as it is written: a chat and its tools as JSON, or null."""
    value = getattr(document, name)
    return json.dumps(value) if name in _JSON_COLUMNS and value is not None else value


@dataclass(frozen=True)
class Corpus:
    """The documents in ``file``; ``sample`` and ``sampled``, a uniform sample of them and their numbers, ascending.

    The sample is kept without its images. ``source_of``, ``domain_of``, ``format_of`` [N] index ``sources``,
    ``domains`` and ``formats``; ``origins``, ``chars`` [N]; ``with_images`` [N], whether a document has any;
    ``digests`` [N], equal where documents say the same; ``given_held_out`` [N], whether one comes from
    ``data.held_out_files``, of which none is in the sample.
    """

    file: Path
    sources: list[str]
    source_of: Ints
    domains: list[str]
    domain_of: Ints
    formats: list[str]
    format_of: Ints
    origins: Ints
    chars: Ints
    digests: Ints
    sample: list[Document]
    sampled: Ints
    with_images: NDArray[np.bool_]
    given_held_out: NDArray[np.bool_]
    has_chats: bool
    has_tools: bool
    has_pieces: bool

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def has_images(self) -> bool:
        return bool(self.with_images.any())

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of a shard: a corpus of whole texts has neither chats, tools, images nor pieces."""
        chats, tools = [MESSAGES_FIELD] * self.has_chats, [TOOLS_FIELD] * self.has_tools
        pieces, images = PIECE_COLUMNS if self.has_pieces else (), [IMAGES_FIELD] * self.has_images
        return "text", "source", *chats, *tools, *pieces, *images

    def batches(self) -> Iterator[list[Document]]:
        """All documents, in order, in batches that were written at once."""
        yield from read_batches(self.file)

    def sample_of(self, kind: NDArray[np.bool_]) -> Iterator[list[Document]]:
        """The sampled documents among those that ``kind`` [N] marks, whole, in batches; where there are none, the
        first ones it marks."""
        if kind.all() and not self.has_images:
            yield self.sample
            return
        sampled = self.sampled[kind[self.sampled]]
        yield from self.chosen(sampled if len(sampled) else np.flatnonzero(kind)[: len(self.sample)])

    def chosen(self, numbers: Ints) -> Iterator[list[Document]]:
        """The documents of ascending ``numbers``, in batches."""
        done = 0
        for batch in self.batches():
            mine = numbers[np.searchsorted(numbers, done) : np.searchsorted(numbers, done + len(batch))]
            if len(mine):
                yield [batch[number - done] for number in mine]
            done += len(batch)


def spool(
    documents: Iterator[Document], file: Path, sample_size: int, seed: int, progress: Progress
) -> Corpus:
    """Write ``documents`` to ``file`` as they come.

    Documents that share an image have one origin: held out whole, no image is on both sides.
    The sample is Vitter's ("Random sampling with a reservoir", 1985, algorithm R): memory holds it, whatever N.
    """
    rng = np.random.default_rng(seed)
    sources: dict[str, int] = {}
    domains: dict[str, int] = {}
    formats: dict[str, int] = {}
    source_of, domain_of, format_of, origins, chars, digests = (array("q") for _ in range(6))
    sample: dict[int, tuple[int, Document]] = {}
    with_images, given_held_out = array("b"), array("b")
    num_sampled_from = 0
    has_chats = has_tools = has_pieces = False
    same = _Groups()
    columns = "text", "source", "domain", *_JSON_COLUMNS, *PIECE_COLUMNS, IMAGES_FIELD
    with DocumentWriter(file, columns) as writer:
        for number, document in enumerate(documents):
            writer.add(document)
            has_chats = has_chats or document.messages is not None
            has_tools = has_tools or document.tools is not None
            has_pieces = has_pieces or not document.is_last
            source_of.append(sources.setdefault(document.source, len(sources)))
            # Without a field, the source is the domain.
            domain = document.source if document.domain is None else document.domain
            domain_of.append(domains.setdefault(domain, len(domains)))
            format_of.append(formats.setdefault(document.format, len(formats)))
            origins.append(document.origin)
            with_images.append(bool(document.images))
            same.join(document.origin, document.images)
            chars.append(len(document.text))
            digests.append(digest_of(document))
            given_held_out.append(document.is_given_held_out)
            if not document.is_given_held_out:
                seen = num_sampled_from
                place = seen if seen < sample_size else int(rng.integers(seen + 1))
                if place < sample_size:
                    sample[place] = number, replace(document, images=())
                num_sampled_from += 1
            if number % BATCH_DOCUMENTS == 0:
                progress("reading", number, None)
    progress("reading", len(origins), len(origins))
    chosen = sorted(sample.values(), key=lambda pair: pair[0])
    return Corpus(
        file,
        list(sources),
        _ints(source_of),
        list(domains),
        _ints(domain_of),
        list(formats),
        _ints(format_of),
        same.of(_ints(origins)),
        _ints(chars),
        _ints(digests),
        [document for _, document in chosen],
        np.array([number for number, _ in chosen], dtype=np.int64),
        _bools(with_images),
        _bools(given_held_out),
        has_chats,
        has_tools,
        has_pieces,
    )


def digest_of(document: Document) -> int:
    """64 bits of what ``document`` says: its text, its messages with their tools, its images."""
    total = hashlib.blake2b(digest_size=8)
    for part in (document.text, json.dumps([document.messages, document.tools])):
        total.update(hashlib.blake2b(part.encode()).digest())
    for image in document.images:
        total.update(hashlib.blake2b(image).digest())
    return int.from_bytes(total.digest(), "big", signed=True)


class _Groups:
    """Origins that share images, directly or through others: a union-find (Tarjan 1975) over them."""

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        self._parent: dict[int, int] = {}

    def join(self, origin: int, images: Sequence[bytes]) -> None:
        for image in images:
            first = self._first.setdefault(hashlib.blake2b(image, digest_size=16).digest(), origin)
            one, other = sorted((self._root(first), self._root(origin)))
            if one != other:
                self._parent[other] = one

    def _root(self, origin: int) -> int:
        while origin in self._parent:
            up = self._parent[origin]
            self._parent[origin] = self._parent.get(up, up)
            origin = up
        return origin

    def of(self, origins: Ints) -> Ints:
        """``origins``, each replaced by its group's first."""
        if not self._parent:
            return origins
        return np.array([self._root(origin) for origin in origins.tolist()], dtype=np.int64)


def _ints(values: array[int]) -> Ints:
    return np.frombuffer(values, dtype=np.int64) if values else np.zeros(0, dtype=np.int64)


def _bools(values: array[int]) -> NDArray[np.bool_]:
    return np.frombuffer(values, dtype=np.bool_) if values else np.zeros(0, dtype=np.bool_)


def read_columns(file: Path) -> list[str]:
    """The names of a shard's columns.

    Raises:
        TrainingError: it is missing or damaged.
    """
    import pyarrow
    from pyarrow import parquet

    require(file.parents[1], file)
    try:
        return list(parquet.read_schema(file).names)
    except pyarrow.ArrowException as error:
        raise _damaged(file, error) from None


def read_batches(file: Path, columns: list[str] | None = None) -> Iterator[list[Document]]:
    """The documents of a spool file, or of a shard (which says nothing of origins), a row group at a time.

    Raises:
        TrainingError: ``file`` is damaged.
    """
    for rows in read_row_groups(file, columns):
        yield _documents(rows)


def read_document(file: Path, row: int) -> Document:
    """The document in ``row``, from 0, of a spool file or shard, of which nothing but its row group is read.

    Raises:
        TrainingError: ``file`` is missing or damaged.
    """
    import pyarrow
    from pyarrow import parquet

    require(file.parents[1], file)
    try:
        with parquet.ParquetFile(file) as table:
            group = 0
            while row >= (size := table.metadata.row_group(group).num_rows):
                row, group = row - size, group + 1
            return _documents(table.read_row_group(group).slice(row, 1))[0]
    except pyarrow.ArrowException as error:
        raise _damaged(file, error) from None


def _documents(table: Any) -> list[Document]:
    rows = table.to_pylist()
    for row in rows:
        row.setdefault("origin", 0)
        for name in {*_JSON_COLUMNS} & row.keys():
            row[name] = row[name] and json.loads(row[name])
        row[IMAGES_FIELD] = tuple(row.get(IMAGES_FIELD) or ())
    return [Document(**row) for row in rows]


def read_row_groups(file: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """pyarrow tables.

    Raises:
        TrainingError: ``file`` is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                yield table.read_row_group(group, columns=columns)
    except (pyarrow.ArrowException, KeyError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{file} is damaged ({error}); delete its directory and run `decar-train partition` again"
    )
