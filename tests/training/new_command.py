"""`decar new` as the tests run it: in this process. Knows nothing of its inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from decar.router.errors import DecarError
from decar.training.new.cli import new

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(new)


@dataclass(frozen=True)
class Said:
    """What a run printed; ``error``, with which it ended, if it did, and which `decar` prints as one line."""

    out: str
    err: str
    error: str | None

    @property
    def warnings(self) -> list[str]:
        mark = "decar: warning: "
        return [line.removeprefix(mark) for line in self.err.splitlines() if line.startswith(mark)]

    @property
    def problems(self) -> list[str]:
        mark = "problem: "
        return [line.removeprefix(mark) for line in self.err.splitlines() if line.startswith(mark)]


def run_new(*words: str | Path) -> Said:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, DecarError | SystemExit):
        raise done.exception
    error = str(done.exception) if isinstance(done.exception, DecarError) else None
    return Said(done.stdout, done.stderr, error)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    edit(data)
    path.write_text(json.dumps(data))


def only_error(said: Said, *words: str) -> str:
    """The one line of a run that refused; it wrote nothing."""
    assert said.error is not None, said.out
    assert "\n" not in said.error
    for word in words:
        assert word in said.error, said.error
    assert "is written" not in said.out
    return said.error
