"""The partition stage: documents into one shard per expert, by what they are like, by chance or by the user's domains.

Knows nothing about tokens or models. Texts and images pass through memory in batches; sources, features and labels
stay in it.

Shapes: N documents, K experts, D features.
"""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decar.router.errors import TrainingError
from decar.training.config import PartitionConfig, TrainConfig
from decar.training.data.corpus import (
    BATCH_DOCUMENTS,
    PIECE_COLUMNS,
    Corpus,
    DocumentWriter,
    Progress,
    digest_of,
    read_batches,
    read_columns,
    read_document,
    read_texts,
    spool,
)
from decar.training.data.features import DocumentFeatures, document_features, embedding_files
from decar.training.data.sources import (
    MESSAGES_FIELD,
    TOOLS_FIELD,
    BadLines,
    Chat,
    Document,
    Example,
    Piece,
    Tally,
    input_files,
    read_documents,
)
from decar.training.partition.cluster import balanced_kmeans, two_stage_kmeans
from decar.training.partition.report import (
    SHEET_COLUMNS,
    FormatReport,
    PartitionReport,
    Repeated,
    ShardReport,
    centroids,
    draw_map,
    draw_sheet,
    nearest,
    nearest_members,
    silhouette,
    snippet,
    top_terms,
)
from decar.training.run import SPLITS, plot_file, read_report, report_file, shard_file, spool_file
from decar.training.stages import Stage, digest, fingerprint, read_marker

Labels = NDArray[np.int64]
Rows = NDArray[np.float32]
_NAMED_IN_ERRORS = 10
_SHEET_CANDIDATES = 8 * SHEET_COLUMNS


def partition_stage(config: TrainConfig) -> Stage:
    """The stage as ``config`` and the input files are now.

    Raises:
        TrainingError: ``data.files`` matches nothing, there is no usable embedding model, or no partition at
            ``partition.held_out_as``.
    """
    files = input_files(config.data)
    files += embedding_files(config.partition.embedding, "partition.embedding")
    files += embedding_files(config.partition.image_embedding, "partition.image_embedding")
    files += _held_out_shards(config.partition)
    return Stage(
        config.run.partition,
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


def iter_shard(config: TrainConfig, expert: str, split: str) -> Iterator[str]:
    """The texts of a shard, read as they are asked for.

    Raises:
        TrainingError: the partition has not been made, or is damaged.
    """
    return read_texts(config.run.shard(expert, split))


def read_shard(config: TrainConfig, expert: str, split: str) -> list[str]:
    """The texts of a shard.

    Raises:
        TrainingError: the partition has not been made, or is damaged.
    """
    return list(iter_shard(config, expert, split))


def has_column(config: TrainConfig, expert: str, split: str, name: str) -> bool:
    """Whether a shard has the column ``name``, i.e. whether the corpus has any chats, or images.

    Raises:
        TrainingError: the shard is missing or damaged.
    """
    return name in read_columns(config.run.shard(expert, split))


def read_examples(config: TrainConfig, expert: str, split: str) -> list[Example]:
    """What of a shard an expert is trained on, a row each; chats without their images.

    Raises:
        TrainingError: the partition has not been made, or is damaged.
    """
    file = config.run.shard(expert, split)
    wanted = ("text", "source", MESSAGES_FIELD, TOOLS_FIELD, *PIECE_COLUMNS)
    columns = [name for name in wanted if name in read_columns(file)]
    return [as_example(document) for batch in read_batches(file, columns) for document in batch]


def as_example(document: Document) -> Example:
    """``document`` as an expert is trained on it, without its images."""
    if document.messages is not None:
        return Chat(document.messages, document.tools)
    if document.piece > 0 or not document.is_last:
        return Piece(document.text, document.origin, document.piece, document.is_last)
    return document.text


def read_partition_report(stage: Stage) -> PartitionReport:
    """The report of a finished partition.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    return read_report(stage.directory, PartitionReport)


def make_partition(
    config: TrainConfig, stage: Stage, progress: Progress = lambda *_: None
) -> PartitionReport:
    """Read the documents, deal them out, and write shards, report and map.

    Raises:
        TrainingError: unreadable data, fewer documents than experts, a domain that nobody wants, an expert left without
            training or held-out documents, or a full disk. Nothing is left behind then.
    """
    settings = config.partition
    bad, tally = BadLines(skip=config.data.on_bad_line == "skip"), Tally()
    with stage.writing() as directory:
        documents = read_documents(config.data, config.documents, config.seed, settings.field, bad, tally)
        corpus = spool(documents, spool_file(directory), settings.sample, config.seed, progress)
        if len(corpus) < len(config.experts):
            raise TrainingError(
                f"{len(corpus)} documents cannot be split among {len(config.experts)} experts; "
                "add data, have texts cut (documents.max_chars) or list fewer experts"
            )
        features = document_features(settings, corpus, config.seed)
        labels, sample_features = _deal_out(config, corpus, features, progress)
        held_out = _choose_held_out(corpus, labels, settings, config.seed)
        duplicates = held_out & np.isin(corpus.digests, corpus.digests[~held_out])
        kept = ~duplicates if settings.held_out_duplicates == "remove" else np.ones_like(held_out)
        _check_none_is_empty(config, labels, held_out, kept)
        _write_shards(config, corpus, labels, held_out, kept, directory, progress)
        progress("report", 0, None)
        report = _report(config, corpus, labels, held_out, kept, duplicates, sample_features, bad, tally)
        if corpus.has_images:
            _draw_nearest(config, corpus, labels, sample_features, plot_file(directory, "nearest"))
        report_file(directory).write_text(report.model_dump_json(indent=2) + "\n")
        title = f"{config.name}: {settings.method}, {len(corpus.sample):,} of {len(corpus):,} documents"
        sampled = labels[corpus.sampled]
        draw_map(
            sample_features, sampled, config.expert_names, title, config.seed, plot_file(directory, "map")
        )
        corpus.file.unlink()
        progress("report", 1, 1)
    return report


def _deal_out(
    config: TrainConfig, corpus: Corpus, features: DocumentFeatures, progress: Progress
) -> tuple[Labels, Rows]:
    """(the expert of every document [N], the features of the sample)."""
    settings, num_experts = config.partition, len(config.experts)
    if settings.method == "by-field":
        return _by_field(config, corpus), _sample_features(corpus, features, progress)
    if settings.method == "random":
        labels = np.random.default_rng(config.seed).permutation(len(corpus)) % num_experts
        everything = np.ones(len(corpus), dtype=bool)
        return _name_clusters(labels, corpus, config, everything), _sample_features(
            corpus, features, progress
        )
    rows = _in_batches(features, corpus.batches(), len(corpus), progress)
    progress("clustering", 0, None)
    labels = np.empty(len(corpus), dtype=np.int64)
    # Documents with and without images have nothing in common to compare, so each kind is dealt out evenly.
    for kind in (corpus.with_images, ~corpus.with_images):
        if kind.any():
            mine = rows if kind.all() else rows[kind]
            labels[kind] = _name_clusters(_cluster(mine, config), corpus, config, kind)
    progress("clustering", 1, 1)
    return labels, rows[corpus.sampled]


def _cluster(rows: Rows, config: TrainConfig) -> Labels:
    settings, num_experts = config.partition, len(config.experts)
    if len(rows) < num_experts:
        return np.arange(len(rows))
    seed, restarts, max_iterations = config.seed, settings.restarts, settings.max_iterations
    if settings.method == "two-stage":
        return two_stage_kmeans(
            rows,
            num_experts,
            fine_clusters=settings.fine_clusters,
            seed=seed,
            restarts=restarts,
            max_iterations=max_iterations,
        ).labels
    return balanced_kmeans(
        rows, num_experts, seed=seed, restarts=restarts, max_iterations=max_iterations
    ).labels


def _sample_features(corpus: Corpus, features: DocumentFeatures, progress: Progress) -> Rows:
    if corpus.has_images:
        batches: Iterable[list[Document]] = corpus.chosen(corpus.sampled)
    else:
        starts = range(0, len(corpus.sample), BATCH_DOCUMENTS)
        batches = (corpus.sample[start : start + BATCH_DOCUMENTS] for start in starts)
    return _in_batches(features, batches, len(corpus.sample), progress)


def _in_batches(
    features: DocumentFeatures, batches: Iterable[list[Document]], total: int, progress: Progress
) -> Rows:
    """[total, D]."""
    rows: Rows | None = None
    done = 0
    for batch in batches:
        part = features(batch)
        if rows is None:
            rows = np.empty((total, part.shape[1]), dtype=np.float32)
        rows[done : done + len(batch)] = part
        done += len(batch)
        progress("features", done, total)
    assert rows is not None  # data without documents are refused before
    return rows


def _by_field(config: TrainConfig, corpus: Corpus) -> Labels:
    """The expert of every document, by its domain."""
    wanted = config.partition.domains or {name: [name] for name in config.expert_names}
    expert_of = []
    for domain in corpus.domains:
        takers = [name for name in config.expert_names if domain in wanted[name]] or [
            name
            for name in config.expert_names
            if any(fnmatch.fnmatchcase(domain, pattern) for pattern in wanted[name])
        ]
        what = f"{config.partition.field or 'source'} {domain!r}"
        if not takers:
            near = difflib.get_close_matches(
                domain, [value for values in wanted.values() for value in values]
            )
            hint = f" (is it {near[0]!r} there?)" if near else ""
            raise TrainingError(
                f"{what} belongs to no expert{hint}; list it, or a pattern of it, in partition.domains"
            )
        if len(takers) > 1:
            raise TrainingError(
                f"{what} belongs to {' and '.join(takers)}; list it under one of them in partition.domains"
            )
        expert_of.append(config.expert_names.index(takers[0]))
    for k, name in enumerate(config.expert_names):
        if k not in expert_of:
            raise TrainingError(
                f"expert {name!r} is left without documents: no {config.partition.field or 'source'} is "
                f"{' or '.join(map(repr, wanted[name]))}; there are {_some_of(corpus.domains)}"
            )
    return np.array(expert_of)[corpus.domain_of]


def _name_clusters(labels: Labels, corpus: Corpus, config: TrainConfig, members: NDArray[np.bool_]) -> Labels:
    """The expert of every member: clusters go as ``name_by`` asks, the rest in order of their first document.

    Args:
        labels: the clusters of the ``members`` [N] of the corpus, one each.
    """
    from scipy.optimize import linear_sum_assignment

    order = list(dict.fromkeys(labels.tolist()))
    name_by = config.partition.name_by
    for name, source in name_by.items():
        if source not in corpus.sources:
            raise TrainingError(
                f"partition.name_by.{name}: no source {source!r}; the sources are {_some_of(corpus.sources)}"
            )
    share = np.zeros((len(name_by), len(order)))
    for row, source in enumerate(name_by.values()):
        counts = np.bincount(
            labels[corpus.source_of[members] == corpus.sources.index(source)], minlength=len(order)
        )
        share[row] = counts / max(counts.sum(), 1)
    chosen, columns = linear_sum_assignment(share, maximize=True)  # all names, unless clusters are fewer
    named = dict(zip([list(name_by)[row] for row in chosen], columns.tolist(), strict=True))
    rest = [cluster for cluster in order if cluster not in named.values()]
    named |= zip([name for name in config.expert_names if name not in named], rest, strict=False)
    expert_of = np.empty(len(order), dtype=np.int64)
    for k, name in enumerate(config.expert_names):
        if name in named:
            expert_of[named[name]] = k
    return expert_of[labels]


def _choose_held_out(corpus: Corpus, labels: Labels, config: PartitionConfig, seed: int) -> NDArray[np.bool_]:
    """Marks [N] of whole inputs (or pieces), drawn until every expert has the held-out share of its documents."""
    shards = _held_out_shards(config)
    if shards:
        digests = [
            digest_of(document) for file in shards for batch in read_batches(file) for document in batch
        ]
        return np.isin(corpus.digests, np.array(digests, dtype=np.int64))
    groups = corpus.origins if config.held_out_by == "document" else np.arange(len(corpus))
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # The documents of each group, one group after another.
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1])
    missing = config.held_out * np.bincount(labels)
    chosen = np.zeros(len(corpus), dtype=bool)
    for group in order.tolist():
        experts = labels[members[group]]
        if (missing[experts] > 0).any():
            chosen[members[group]] = True
            np.subtract.at(missing, experts, 1)
    return chosen


def _held_out_shards(config: PartitionConfig) -> list[Path]:
    """The held-out shards of the partition that ``config.held_out_as`` names.

    Raises:
        TrainingError: there are none.
    """
    if config.held_out_as is None:
        return []
    found = sorted(config.held_out_as.glob(f"*/{shard_file(Path(), '', SPLITS[1]).name}"))
    if not found:
        raise TrainingError(
            f"partition.held_out_as: {config.held_out_as} holds no held-out documents; name the partition "
            "directory of a run whose partition is finished"
        )
    return found


def _check_none_is_empty(
    config: TrainConfig, labels: Labels, held_out: NDArray[np.bool_], kept: NDArray[np.bool_]
) -> None:
    for k, name in enumerate(config.expert_names):
        for what, members in (("training", ~held_out), ("held-out", held_out)):
            if not (labels[members] == k).any():
                raise TrainingError(
                    f"expert {name!r} is left without {what} documents; "
                    "change partition.held_out, add data, or have texts cut (documents.max_chars) and set "
                    "partition.held_out_by to 'piece'"
                )
        if not (labels[held_out & kept] == k).any():
            raise TrainingError(
                f"expert {name!r} is left without held-out documents: all of them are among the training documents "
                "too; add data, or set partition.held_out_duplicates to keep"
            )


def _write_shards(
    config: TrainConfig,
    corpus: Corpus,
    labels: Labels,
    held_out: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    directory: Path,
    progress: Progress,
) -> None:
    with ExitStack() as stack:
        writers = [
            [
                stack.enter_context(DocumentWriter(shard_file(directory, name, split), corpus.columns))
                for split in SPLITS
            ]
            for name in config.expert_names
        ]
        number = 0
        for batch in corpus.batches():
            for document in batch:
                if kept[number]:
                    writers[labels[number]][int(held_out[number])].add(document)
                number += 1
            progress("writing", number, len(corpus))


def _draw_nearest(
    config: TrainConfig, corpus: Corpus, labels: Labels, sample_features: Rows, file: Path
) -> None:
    """The images that are nearest to the centroid of each expert's documents with images."""
    names = config.expert_names
    pictured = corpus.with_images[corpus.sampled]
    rows, numbers = sample_features[pictured], corpus.sampled[pictured]
    experts = labels[numbers]
    middles = centroids(rows, experts, len(names))
    wanted = {
        name: numbers[nearest_members(rows, experts, k, middles[k], _SHEET_CANDIDATES)]
        for k, name in enumerate(names)
    }
    ordered = np.unique(np.concatenate(list(wanted.values())))
    found = (document.images[0] for batch in corpus.chosen(ordered) for document in batch)
    image_of = dict(zip(ordered.tolist(), found, strict=True))
    draw_sheet(
        # Several documents may be about one image.
        {
            name: list(dict.fromkeys(image_of[number] for number in chosen.tolist()))[:SHEET_COLUMNS]
            for name, chosen in wanted.items()
        },
        f"{config.name}: nearest to each expert's centroid",
        file,
    )


def _report(
    config: TrainConfig,
    corpus: Corpus,
    labels: Labels,
    held_out: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    duplicates: NDArray[np.bool_],
    sample_features: Rows,
    bad: BadLines,
    tally: Tally,
) -> PartitionReport:
    names, texts = config.expert_names, [document.text for document in corpus.sample]
    sampled = labels[corpus.sampled]
    middles = centroids(sample_features, sampled, len(names))
    terms = top_terms(texts, sampled, len(names), config.partition.num_features, config.seed)
    sizes = np.bincount(labels, minlength=len(names))
    firsts = [_first_of_formats(corpus, (labels == k) & ~held_out) for k in range(len(names))]
    repeats = _repeats(corpus, ~held_out)
    duplicate, repeated = np.flatnonzero(duplicates)[:1].tolist(), list(repeats)[:1]
    numbers = {*(number for each in firsts for number, _, _ in each), *duplicate, *repeated}
    found = {number: read_document(corpus.file, number) for number in numbers}
    shards = []
    for k, name in enumerate(names):
        members = labels == k
        per_source = np.bincount(corpus.source_of[members], minlength=len(corpus.sources)).tolist()
        sources = {s: count for s, count in zip(corpus.sources, per_source, strict=True) if count}
        shards.append(
            ShardReport(
                expert=name,
                train_documents=int((members & ~held_out).sum()),
                held_out_documents=int((members & held_out & kept).sum()),
                train_chars=int(corpus.chars[members & ~held_out].sum()),
                sources=dict(sorted(sources.items(), key=lambda pair: -pair[1])),
                top_terms=terms[k],
                nearest=nearest(texts, sample_features, sampled, k, middles[k]),
                formats=[
                    FormatReport(
                        format=corpus.formats[corpus.format_of[number]],
                        documents=count,
                        row=row,
                        source=found[number].source,
                        text=found[number].origin + 1,
                    )
                    for number, row, count in firsts[k]
                ],
            )
        )
    return PartitionReport(
        method=config.partition.method,
        texts=tally.read,
        dropped=dict(tally.dropped),
        documents=len(corpus),
        held_out_duplicates=int(duplicates.sum()),
        duplicates_removed=not kept.all(),
        balance=sizes.max() / sizes.min(),
        sample=len(corpus.sample),
        mean_cosine=float(np.einsum("nd,nd->n", sample_features, middles[sampled]).mean()),
        silhouette=silhouette(sample_features, sampled, config.seed),
        skipped_lines=dict(bad.counts),
        first_skipped=bad.first,
        shards=shards,
        held_out_duplicate=snippet(found[duplicate[0]].text) if duplicate else None,
        duplicates=sum(repeats.values()) - len(repeats),
        most_repeated=Repeated(times=repeats[repeated[0]], begins=snippet(found[repeated[0]].text))
        if repeated
        else None,
    )


def _first_of_formats(corpus: Corpus, members: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """(number, place among the ``members`` [N], how many of these) of the first member in each format."""
    numbers = np.flatnonzero(members)
    _, places, counts = np.unique(corpus.format_of[numbers], return_index=True, return_counts=True)
    return [
        (int(numbers[place]), int(place), int(count)) for place, count in zip(places, counts, strict=True)
    ]


def _repeats(corpus: Corpus, members: NDArray[np.bool_]) -> dict[int, int]:
    """The numbers of those ``members`` [N] that later ones repeat, and how often each is there, the most frequent
    first."""
    numbers = np.flatnonzero(members)
    _, places, counts = np.unique(corpus.digests[numbers], return_index=True, return_counts=True)
    order = np.lexsort((places, -counts))[: np.count_nonzero(counts > 1)]
    return dict(zip(numbers[places[order]].tolist(), counts[order].tolist(), strict=True))


def _some_of(values: list[str]) -> str:
    more = f" and {len(values) - _NAMED_IN_ERRORS} more" if len(values) > _NAMED_IN_ERRORS else ""
    return ", ".join(values[:_NAMED_IN_ERRORS]) + more
