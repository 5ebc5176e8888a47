"""`decar ps`: servers are found by what they have written of themselves, while they live."""

from __future__ import annotations

import io
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from decar.server import ps
from decar.server.protocol import runtime
from decar.server.protocol.runtime import Record, make_folder, records
from tests.clients.fake_server import fake_server

RECORD = Record(
    name="demo",
    directory="/ensembles/demo",
    url="http://127.0.0.1:9",
    pid=os.getpid(),
    started=0.0,
    experts=2,
    log=None,
)


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runtime, "DIRECTORY", tmp_path)
    return tmp_path


def shown(api_key: str | None = None) -> str:
    output = io.StringIO()
    ps.show(Console(file=output, width=120), api_key)
    return output.getvalue()


def test_without_servers_it_says_so() -> None:
    assert "no decar server runs" in shown()


def test_a_server_is_shown_as_it_starts_and_as_it_answers() -> None:
    folder = make_folder()
    replace(RECORD, started=time.time() - 3 * 3600).write(folder)
    line = next(line for line in shown().splitlines() if "demo" in line)
    assert line.split()[:7] == ["demo", "http://127.0.0.1:9/v1", str(os.getpid()), "starting", "0", "of", "2"]
    assert line.split()[-4:] == ["3", "h", "0", "min"]
    replace(RECORD, state="ready").write(folder)
    assert "does not answer" in shown()
    with fake_server() as server:
        replace(RECORD, state="ready", url=f"http://{server.address}").write(folder)
        said = shown()
    assert "2 of 2" in said
    assert "3 of 32" in said


def test_a_server_that_is_gone_is_not_shown(shared_memory: Path) -> None:
    folder = make_folder()
    RECORD.write(folder)
    assert records() == [RECORD]
    prefix = folder.name.split("-")[:2]
    folder.rename(shared_memory / "-".join([*prefix, "4194305", "1", "abcd"]))  # beyond Linux's largest pid
    assert records() == []


@pytest.mark.parametrize("text", ["", "[]", '{"name": "demo"}', '{"another": "version"}'])
def test_what_is_no_record_is_none(text: str) -> None:
    (make_folder() / runtime.RECORD).write_text(text)
    assert records() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.9, "59 s"), (61, "1 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_ages(seconds: float, text: str) -> None:
    assert ps.age(seconds) == text
