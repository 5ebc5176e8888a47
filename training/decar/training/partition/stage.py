"""The partition stage: documents into one shard per expert, by what they are like, by chance or by the user's domains.

Knows nothing about tokens or models. Texts and images pass through memory in batches; sources, features and labels
stay in it.

Shapes: N documents, K experts, D features.
"""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decar.router.errors import TrainingError
from decar.training.config import PartitionConfig, TrainConfig
from decar.training.data.corpus import (
    BATCH_DOCUMENTS,
    Corpus,
    DocumentWriter,
    Progress,
    digest_of,
    read_batches,
    read_document,
    spool,
)
from decar.training.data.features import DocumentFeatures, document_features, embedding_files
from decar.training.data.hub import local_files
from decar.training.data.sources import (
    BadLines,
    Document,
    Tally,
    input_files,
    read_documents,
)
from decar.training.fingerprints import partition_fingerprint
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
from decar.training.stages import Stage, digest, fingerprint

Labels = NDArray[np.int64]
Marks = NDArray[np.bool_]
Rows = NDArray[np.float32]
_NAMED_IN_ERRORS = 10
_SHEET_CANDIDATES = 8 * SHEET_COLUMNS


@dataclass(frozen=True)
class Dealt:
    """Who gets which document.

    Args:
        labels: [N], the expert of each, as its place in ``experts``.
        held_out: [N], which of them are held out.
        duplicates: [N], which of the held-out ones are among the training documents too.
        kept: [N], which of all documents are written to a shard.
    """

    experts: Sequence[str]
    labels: Labels
    held_out: Marks
    duplicates: Marks
    kept: Marks


def partition_stage(config: TrainConfig) -> Stage:
    """The stage as ``config`` and the input files are now.

    Raises:
        TrainingError: ``data.files`` matches nothing, there is no usable embedding model, or no partition at
            ``partition.held_out_as``.
    """
    files = input_files(config.data)
    for dataset in config.data.hub:
        files += local_files(dataset)
    files += embedding_files(config.partition.embedding, "partition.embedding")
    files += embedding_files(config.partition.image_embedding, "partition.image_embedding")
    files += _held_out_shards(config.partition)
    return Stage(
        config.run.partition,
        partition_fingerprint(config),
        # The built-in sources change with Python.
        fingerprint(digest(*files), sys.version if config.data.builtin else ""),
    )


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
    settings, experts, seed = config.partition, config.expert_names, config.seed
    bad, tally = BadLines(skip=config.data.on_bad_line == "skip"), Tally()
    with stage.writing() as directory:
        documents = read_documents(config.data, config.documents, seed, settings.field, bad, tally)
        corpus = spool(documents, spool_file(directory), settings.sample, seed, progress)
        num_training = int((~corpus.given_held_out).sum())
        if num_training < len(experts):
            raise TrainingError(
                f"{num_training} documents cannot be split among {len(experts)} experts; "
                "add data, have texts cut (documents.max_chars) or list fewer experts"
            )
        features = document_features(settings, corpus, seed)
        labels, sample_features = _deal_out(settings, experts, seed, corpus, features, progress)
        held_out = _choose_held_out(corpus, labels, settings, config.held_out_share, seed)
        duplicates = held_out & np.isin(corpus.digests, corpus.digests[~held_out])
        kept = ~duplicates if settings.held_out_duplicates == "remove" else np.ones_like(held_out)
        dealt = Dealt(experts, labels, held_out, duplicates, kept)
        _check_none_is_empty(dealt, bool(config.data.held_out_files))
        _write_shards(dealt, corpus, directory, progress)
        progress("report", 0, None)
        report = _report(settings, seed, corpus, dealt, sample_features, bad, tally)
        if corpus.has_images:
            title = f"{config.name}: nearest to each expert's centroid"
            _draw_nearest(dealt, corpus, sample_features, title, plot_file(directory, "nearest"))
        report_file(directory).write_text(report.model_dump_json(indent=2) + "\n")
        title = f"{config.name}: {settings.method}, {len(corpus.sample):,} of {len(corpus):,} documents"
        sampled = labels[corpus.sampled]
        draw_map(sample_features, sampled, experts, title, seed, plot_file(directory, "map"))
        corpus.file.unlink()
        progress("report", 1, 1)
    return report


def _deal_out(
    settings: PartitionConfig,
    experts: Sequence[str],
    seed: int,
    corpus: Corpus,
    features: DocumentFeatures,
    progress: Progress,
) -> tuple[Labels, Rows]:
    """(the expert of every document [N], the features of the sample)."""
    if settings.method == "by-field":
        return _by_field(settings, experts, corpus), _sample_features(corpus, features, progress)
    if settings.method == "random":
        rng = np.random.default_rng(seed)
        labels = np.empty(len(corpus), dtype=np.int64)
        training = ~corpus.given_held_out
        dealt = rng.permutation(int(training.sum())) % len(experts)
        labels[training] = _name_clusters(dealt, corpus, settings.name_by, experts, training)
        labels[~training] = rng.permutation(int((~training).sum())) % len(experts)
        return labels, _sample_features(corpus, features, progress)
    rows = _in_batches(features, corpus.batches(), len(corpus), progress)
    progress("clustering", 0, None)
    labels = np.empty(len(corpus), dtype=np.int64)
    # Documents with and without images have nothing in common to compare, so each kind is dealt out evenly.
    for kind in (corpus.with_images, ~corpus.with_images):
        # What is given as held out changes nothing for the others: it goes to the nearest expert.
        given = kind & corpus.given_held_out
        kind = kind & ~given
        if kind.any():
            mine = rows if kind.all() else rows[kind]
            clusters = _cluster(mine, settings, len(experts), seed)
            labels[kind] = _name_clusters(clusters, corpus, settings.name_by, experts, kind)
        if given.any():
            if not kind.any():
                raise TrainingError(
                    "data.held_out_files has documents with images, or without, and the training data have none of "
                    "that kind; leave them out, or add such data to data.files"
                )
            middles = centroids(rows[kind], labels[kind], len(experts))
            labels[given] = (rows[given] @ middles.T).argmax(axis=1)
    progress("clustering", 1, 1)
    return labels, rows[corpus.sampled]


def _cluster(rows: Rows, settings: PartitionConfig, num_experts: int, seed: int) -> Labels:
    if len(rows) < num_experts:
        return np.arange(len(rows))
    restarts, max_iterations = settings.restarts, settings.max_iterations
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


def _by_field(settings: PartitionConfig, experts: Sequence[str], corpus: Corpus) -> Labels:
    """The expert of every document, by its domain."""
    wanted = settings.domains or {name: [name] for name in experts}
    field = settings.field or "source"
    expert_of = []
    for domain in corpus.domains:
        takers = [name for name in experts if domain in wanted[name]] or [
            name for name in experts if any(fnmatch.fnmatchcase(domain, pattern) for pattern in wanted[name])
        ]
        what = f"{field} {domain!r}"
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
        expert_of.append(experts.index(takers[0]))
    for k, name in enumerate(experts):
        if k not in expert_of:
            raise TrainingError(
                f"expert {name!r} is left without documents: no {field} is "
                f"{' or '.join(map(repr, wanted[name]))}; there are {_some_of(corpus.domains)}"
            )
    return np.array(expert_of)[corpus.domain_of]


def _name_clusters(
    labels: Labels, corpus: Corpus, name_by: Mapping[str, str], experts: Sequence[str], members: Marks
) -> Labels:
    """The expert of every member: clusters go as ``name_by`` asks, the rest in order of their first document.

    Args:
        labels: the clusters of the ``members`` [N] of the corpus, one each.
    """
    from scipy.optimize import linear_sum_assignment

    order = list(dict.fromkeys(labels.tolist()))
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
    named |= zip([name for name in experts if name not in named], rest, strict=False)
    expert_of = np.empty(len(order), dtype=np.int64)
    for k, name in enumerate(experts):
        if name in named:
            expert_of[named[name]] = k
    return expert_of[labels]


def _choose_held_out(
    corpus: Corpus, labels: Labels, config: PartitionConfig, share: float, seed: int
) -> Marks:
    """Marks [N] of whole inputs (or pieces): those that are given as held out, and of the others as many as are drawn
    until every expert has the ``share`` of its documents."""
    given = corpus.given_held_out
    shards = _held_out_shards(config)
    if shards:
        digests = [
            digest_of(document) for file in shards for batch in read_batches(file) for document in batch
        ]
        return given | np.isin(corpus.digests, np.array(digests, dtype=np.int64))
    groups = corpus.origins if config.held_out_by == "document" else np.arange(len(corpus))
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # The documents of each group, one group after another.
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1])
    missing = share * np.bincount(labels[~given], minlength=int(labels.max()) + 1)
    chosen = given.copy()
    for group in order.tolist():
        drawn = members[group][~given[members[group]]]
        experts = labels[drawn]
        if (missing[experts] > 0).any():
            chosen[drawn] = True
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


def _check_none_is_empty(dealt: Dealt, are_given: bool) -> None:
    """``are_given``: whether there are files of held-out documents."""
    for k, name in enumerate(dealt.experts):
        for what, members in (("training", ~dealt.held_out), ("held-out", dealt.held_out)):
            if not (dealt.labels[members] == k).any():
                given = "add such to data.held_out_files, " if are_given else ""
                raise TrainingError(
                    f"expert {name!r} is left without {what} documents; "
                    f"{given}change partition.held_out, add data, or have texts cut (documents.max_chars) and set "
                    "partition.held_out_by to 'piece'"
                )
        if not (dealt.labels[dealt.held_out & dealt.kept] == k).any():
            raise TrainingError(
                f"expert {name!r} is left without held-out documents: all of them are among the training documents "
                "too; add data, or set partition.held_out_duplicates to keep"
            )


def _write_shards(dealt: Dealt, corpus: Corpus, directory: Path, progress: Progress) -> None:
    with ExitStack() as stack:
        writers = [
            [
                stack.enter_context(DocumentWriter(shard_file(directory, name, split), corpus.columns))
                for split in SPLITS
            ]
            for name in dealt.experts
        ]
        number = 0
        for batch in corpus.batches():
            for document in batch:
                if dealt.kept[number]:
                    writers[dealt.labels[number]][int(dealt.held_out[number])].add(document)
                number += 1
            progress("writing", number, len(corpus))


def _draw_nearest(dealt: Dealt, corpus: Corpus, sample_features: Rows, title: str, file: Path) -> None:
    """The images that are nearest to the centroid of each expert's documents with images."""
    names = dealt.experts
    pictured = corpus.with_images[corpus.sampled]
    rows, numbers = sample_features[pictured], corpus.sampled[pictured]
    experts = dealt.labels[numbers]
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
        title,
        file,
    )


def _report(
    settings: PartitionConfig,
    seed: int,
    corpus: Corpus,
    dealt: Dealt,
    sample_features: Rows,
    bad: BadLines,
    tally: Tally,
) -> PartitionReport:
    names, labels, held_out = dealt.experts, dealt.labels, dealt.held_out
    texts = [document.text for document in corpus.sample]
    sampled = labels[corpus.sampled]
    middles = centroids(sample_features, sampled, len(names))
    terms = top_terms(texts, sampled, len(names), settings.num_features, seed)
    sizes = np.bincount(labels[~corpus.given_held_out], minlength=len(names))
    firsts = [_first_of_formats(corpus, (labels == k) & ~held_out) for k in range(len(names))]
    repeats = _repeats(corpus, ~held_out)
    duplicate, repeated = np.flatnonzero(dealt.duplicates)[:1].tolist(), list(repeats)[:1]
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
                held_out_documents=int((members & held_out & dealt.kept).sum()),
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
        method=settings.method,
        texts=tally.read,
        formats=dict(tally.formats.most_common()),
        dropped=dict(tally.dropped),
        left_out=dict(tally.left_out),
        documents=len(corpus),
        held_out_duplicates=int(dealt.duplicates.sum()),
        duplicates_removed=not dealt.kept.all(),
        balance=sizes.max() / sizes.min(),
        sample=len(corpus.sample),
        mean_cosine=float(np.einsum("nd,nd->n", sample_features, middles[sampled]).mean()),
        silhouette=silhouette(sample_features, sampled, seed),
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
