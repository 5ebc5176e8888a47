"""The table of docs/clients.md, made of what ran. Knows neither clients nor a server."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- make test-clients: begin -->", "<!-- make test-clients: end -->"


@dataclass(frozen=True)
class Row:
    """What one client's check came to.

    Attributes:
        result: "works", "fails", "not installed" or "timed out".
        notes: of parts that are left out or fail, one each.
    """

    client: str
    version: str
    result: str
    remark: str
    notes: tuple[str, ...] = ()


def table_of(rows: Sequence[Row], served: str) -> str:
    """Markdown: the date and the machine, the table, and its notes.

    Args:
        served: what was served, and by which versions.
    """
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    lines = [
        f"Run on {day}, {machine()}; {served}.",
        "",
        "| client | version | result | checked |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {_cell(row.client)} | {_cell(row.version)} | {row.result} | {_cell(row.remark)} |" for row in rows
    ]
    notes = [f"- {row.client}: {note}" for row in rows for note in row.notes]
    return "\n".join(lines + (["", *notes] if notes else []))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def machine() -> str:
    """Its processor, as Linux names it, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def write(document: Path, table: str) -> None:
    """Put ``table`` between the marks in ``document``."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{document} has no line {BEGIN}"
    assert end, f"{document} has no line {END}"
    document.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
