"""The tables of `--dry-run`. Knows rich and what the numbers mean, not how they came about."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from decar.training.config import TrainConfig
from decar.training.data.blocks import CHATS, TEXTS
from decar.training.data.image_blocks import IMAGE_CHATS
from decar.training.dry_run import Estimate, Lengths, Shown
from decar.training.partition.report import PartitionReport

_SHOWN_CHARS = 600
_NONE = "–"


def show_data(
    console: Console, config: TrainConfig, report: PartitionReport | None, estimates: list[Estimate]
) -> None:
    """Print what ``estimates`` say of the training documents, and the ``report`` of all documents.

    ``console`` has no markup, as documents may hold brackets.
    """
    length = config.training.sequence_length
    rows = [(estimate, lengths) for estimate in estimates for lengths in estimate.lengths]
    _section(console, f"training documents, in tokens; a row has {length:,}", _lengths_table(rows))
    for estimate, lengths in rows:
        _line(console, f"the longest of {estimate.expert}'s {lengths.kind}: {_quoted(lengths.begins)}")
    sampled = [
        f"{estimate.expert} {estimate.sampled:,} of {estimate.documents:,} documents"
        for estimate in estimates
        if estimate.is_sampled
    ]
    if sampled:
        console.print(
            f"- only a sample was tokenized: {', '.join(sampled)}; documents, rows and tokens are counted in it, and ≈ "
            "below is scaled up from it",
            style="yellow",
            highlight=False,
        )
    _section(console, "what the end of a row does to them", _unlearned_table(rows))
    for line in dict.fromkeys(line for row in rows for line in _advice(*row, length)):
        console.print(f"- {line}", highlight=False)
    _show_left_out(console, report, estimates)
    if report is None:
        console.print(
            "\nthe partition's report is not here: duplicates, formats and what was left out before are unknown"
        )
        return
    _show_duplicates(console, report)
    formats = dict.fromkeys(shown.first.format for estimate in estimates for shown in estimate.formats)
    if formats:
        console.print("\nthe first document of each format, as an expert sees it", style="bold")
    for known_as in formats:
        same = [each for estimate in estimates for each in estimate.formats if each.first.format == known_as]
        console.print(_panel(same, report))


def shortened(text: str) -> str:
    """``text``, or its beginning, the first that is learned of it (⟦) where that comes later, and how long it is."""
    if len(text) <= _SHOWN_CHARS:
        return text
    half = _SHOWN_CHARS // 2
    learned = text.find("⟦")
    kept = text[:_SHOWN_CHARS] if learned <= half else f"{text[:half]} … {text[learned : learned + half]}"
    return f"{kept} … ({len(text):,} characters)"


def _section(console: Console, title: str, table: Table) -> None:
    console.print(f"\n{title}", style="bold", highlight=False)
    console.print(table)


def _table(*columns: str, numbers_from: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i >= numbers_from else "left")
    return table


def _lengths_table(rows: list[tuple[Estimate, Lengths]]) -> Table:
    columns = "expert", "documents", "mean", "p50", "p99", "longest", "longer than a row"
    table = _table(*columns, numbers_from=2)
    for estimate, of in rows:
        numbers = f"{of.mean:,.0f}", f"{of.p50:,}", f"{of.p99:,}", f"{of.longest:,}"
        table.add_row(estimate.expert, _documents(of), *numbers, _share(of.longer, of.number))
    return table


def _unlearned_table(rows: list[tuple[Estimate, Lengths]]) -> Table:
    columns = (
        "expert",
        "documents",
        "go on in the\nnext row",
        "cut off",
        "tokens\nto learn",
        "never\nlearned",
    )
    table = _table(*columns, numbers_from=2)
    for estimate, of in rows:
        table.add_row(
            estimate.expert,
            _documents(of),
            _share(of.continued, of.number),
            f"{of.cut:,}, by {of.cut_off:,} tokens" if of.cut else _NONE,
            f"{of.targets:,}",
            _share(of.unlearned, of.targets),
        )
    return table


def _advice(estimate: Estimate, of: Lengths, length: int) -> Iterator[str]:
    """What becomes of documents of a kind that do not fit, and what would change it."""
    most = estimate.max_positions
    these = f"all of {estimate.expert}'s {of.kind}{' in the sample' if estimate.is_sampled else ''}"
    fits = f"training.sequence_length: {of.longest} keeps {these} whole"
    if most is not None and of.longest > most:
        fits = (
            f"the longest has {of.longest:,} tokens and the model {most:,} positions, so training.sequence_length "
            f"cannot keep {these} whole"
        )
    if of.kind == IMAGE_CHATS:
        if of.cut:
            yield f"an image chat is cut at the end of its row; {fits}"
    elif of.continued:
        yield (
            "what goes on in the next row does not see the row before, and its first token there is never learned"
        )
        if of.kind == CHATS and of.detached:
            yield (
                f"{estimate.expert} learns {of.detached:,} tokens of answers in a later row than their chat begins "
                f"in, without what was said there; {fits}"
            )
        elif of.kind == TEXTS and estimate.keeps_apart:
            if length < (most or length + 1):
                yield "a larger training.sequence_length has fewer texts go on in the next row"
        else:
            yield fits


def _show_left_out(console: Console, report: PartitionReport | None, estimates: list[Estimate]) -> None:
    table = _table("what", "of", "number", numbers_from=2)
    if report is not None:
        for reason, count in report.dropped.items():
            table.add_row(f"texts {reason}", "the data", f"{count:,} of {report.texts:,}")
        for what, count in report.left_out.items():
            table.add_row(what, "folders", f"{count:,}")
        for file, count in report.skipped_lines.items():
            table.add_row("bad lines", file, f"{count:,}")
        if report.held_out_duplicates and report.duplicates_removed:
            what = "held-out documents that are trained on too"
            table.add_row(what, "all experts", f"{report.held_out_duplicates:,}")
    for estimate in estimates:
        for reason, count in estimate.dropped.items():
            table.add_row(reason, estimate.expert, f"{count:,}")
    if table.rows:
        _section(console, "what is left out", table)
    else:
        console.print(f"\nnothing is left out of the {'shard' if report is None else 'data'}")
    if report is not None and report.first_skipped:
        console.print(f"- the first bad line: {report.first_skipped}", highlight=False)


def _show_duplicates(console: Console, report: PartitionReport) -> None:
    if report.duplicates is None:
        console.print("\nduplicates and formats: not counted by the version that made the partition")
        return
    if not report.duplicates and not report.held_out_duplicates:
        console.print("\nno training document repeats another, and no held-out document is among them")
        return
    table = _table("which", "number", numbers_from=1)
    examples = []
    if report.most_repeated is not None:
        table.add_row("training documents, kept", f"{report.duplicates:,}")
        times = f"{report.most_repeated.times:,} times"
        examples.append(f"the most frequent one, there {times}: {_quoted(report.most_repeated.begins)}")
    if report.held_out_duplicate is not None:
        what = "removed" if report.duplicates_removed else "kept"
        table.add_row(
            f"held-out documents that are trained on too, {what}", f"{report.held_out_duplicates:,}"
        )
        examples.append(f"the first one held out: {_quoted(report.held_out_duplicate)}")
    _section(console, "documents in the same words as another", table)
    for example in examples:
        _line(console, example)


def _panel(same: list[Shown], report: PartitionReport) -> Panel:
    """The first of the experts' first documents in one format."""
    shown = min(same, key=lambda each: each.first.text)
    first = shown.first
    title = (
        f"{first.format} ({sum(each.first.documents for each in same):,} documents): {first.source}, "
        f"text {first.text:,} of {report.texts:,}"
    )
    return Panel(
        Text(shortened(shown.text)),
        title=Text(title),
        title_align="left",
        subtitle=Text(f"{shown.tokens:,} tokens, what is learned in ⟦ ⟧"),
        subtitle_align="right",
    )


def _documents(of: Lengths) -> str:
    return f"{of.number:,} {of.kind}"


def _share(count: int, of: int) -> str:
    if not count:
        return _NONE
    share = count / of
    return f"{count:,} ({share:.1%})" if share >= 0.001 else f"{count:,} (<0.1%)"


def _line(console: Console, line: str) -> None:
    console.print(f"- {line}", no_wrap=True, overflow="ellipsis", highlight=False)


def _quoted(text: str) -> str:
    return f"'{' '.join(text.split())}'"
