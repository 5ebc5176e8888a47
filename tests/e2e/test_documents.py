"""Python and curl in documents, run against a real server. `tests/test_documents.py` checks the rest."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.documents import DOCUMENTS, Block, commands, every_block, name_of
from tests.helpers import ADMIN_KEY, Server, wait_until
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

CURLS = [
    pytest.param(words, id=f"{block}-{number}")
    for block in every_block("bash")
    for number, words in enumerate(commands(block.text))
    if words[0] == "curl"
]


def here(text: str, server: Server, reference: Reference) -> str:
    """``text`` with what documents call things by replaced by what this server calls them by, and by nothing else."""
    for said, meant in {
        r"http://(127\.0\.0\.1|localhost):8000": server.url,
        r"\bruns/demo/ensemble\b": str(reference.directory),
        r"(?<=[\"'/])demo\b": reference.directory.name,
        r"(?<=[\"'/])roman\b": "code",
        r"(?<=[\"'/])words\b": "prose",
        r"\bKEY\b|\$\{?\w*KEY\b\}?": ADMIN_KEY,
    }.items():
        text = re.sub(said, lambda _, meant=meant: meant, text)
    return text


@pytest.mark.parametrize(
    "document",
    [
        document
        for document in DOCUMENTS
        if any(block.document == document for block in every_block("python"))
    ],
    ids=name_of,
)
def test_python_blocks_run(
    document: Path, duo: Reference, duo_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document's, one after the other: a later one may use what an earlier one has defined."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in every_block("python"):
        if block.document == document:
            _run(block, here(block.text, duo_server, duo), names)
    wait_until(duo_server.is_idle, 30, "what documents ask holds nothing")


def _run(block: Block, text: str, names: dict[str, Any]) -> None:
    lines_above = "\n" * block.line  # so that a traceback names the document's line
    exec(compile(lines_above + text, str(block.document), "exec"), names)


@pytest.mark.parametrize("words", CURLS)
def test_curl_commands_are_answered(words: list[str], duo: Reference, duo_server: Server) -> None:
    command = [here(word, duo_server, duo) for word in words]
    done = subprocess.run(
        [*command, "--fail-with-body", "--silent", "--show-error"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout


def test_there_is_something_to_run() -> None:
    assert CURLS
    assert "README.md" in {name_of(block.document) for block in every_block("python")}
