"""The table of docs/clients.md, made of what ran. Knows neither clients nor a server."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


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
    day: str = field(default_factory=today)


def kept(path: Path, rows: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """The newest row of each client in ``order``: of ``rows``, or else of those that ``path`` has, which keeps them."""
    known = {row["client"]: Row(**{**row, "notes": tuple(row["notes"])}) for row in _read(path)}
    known |= {row.client: row for row in rows}
    newest = [known[name] for name in order if name in known]
    path.write_text(json.dumps([asdict(row) for row in newest], indent=1))
    return newest


def _read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def table_of(rows: Sequence[Row], served: str) -> str:
    """Markdown: the machine, the table, and its notes.

    Args:
        served: what was served, and by which versions.
    """
    lines = [
        f"{served}, on {machine()}.",
        "",
        "| client | version | result | checked | on |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row.client, row.version, row.result, row.remark, row.day)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
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
