"""The table of docs/clients.md is made of what ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from .__main__ import CHECKS, row_of
from .clients import CLIENTS, ENVIRONMENTS
from .table import BEGIN, END, Row, kept, table_of, write

OPENAI, LANGCHAIN = CLIENTS[0], next(client for client in CLIENTS if "LangChain" in client.name)


def test_every_client_has_an_environment_and_a_check() -> None:
    assert len({client.name for client in CLIENTS}) == len(CLIENTS)
    for client in CLIENTS:
        assert client.environment in ENVIRONMENTS
        assert (CHECKS / client.check).is_file()
    assert {path.name for path in CHECKS.glob("*_*.*")} == {client.check for client in CLIENTS}


@pytest.mark.parametrize(
    ("code", "output", "result", "remark"),
    [
        (0, "seen: a\nremark: a, b\n", "works", "a, b"),
        (1, "seen: a\nTraceback\nAssertionError: x | y\n\n", "fails", "AssertionError: x | y"),
        (3, "", "fails", "exit code 3"),
    ],
)
def test_a_row_says_what_a_check_came_to(code: int, output: str, result: str, remark: str) -> None:
    assert row_of(OPENAI, "1.2", code, output) == Row(OPENAI.name, "1.2", result, remark)


def test_langchains_tests_are_counted_and_those_that_fail_named() -> None:
    output = "x.\nXFAIL checks/langchain_check.py::TestDecar::test_a - no images\n"
    output += "== 3 passed, 1 xfailed, 2 warnings in 9.1s ==\n"
    row = row_of(LANGCHAIN, "1", 0, output)
    assert (row.result, row.remark, row.notes) == ("works", "3 passed, 1 xfailed", ("test_a - no images",))


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "clients.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rows = [Row("a", "1", "works", "x | y"), Row("b", "", "not installed", "ERROR: none", ("because",))]
    write(document, table_of(rows, "decar 1"))
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| a | 1 | works | x \\| y | " in text
    assert "- b: because" in text
    write(document, table_of(rows, "decar 1"))
    assert document.read_text() == text


def test_what_ran_last_is_kept(tmp_path: Path) -> None:
    file, order = tmp_path / "rows.json", ["a", "b", "c"]
    first = [Row("b", "1", "fails", "x", ("n",), "2026-01-01"), Row("a", "1", "works", "y", (), "2026-01-01")]
    assert kept(file, first, order) == [first[1], first[0]]
    again = Row("b", "2", "works", "z", (), "2026-01-02")
    assert kept(file, [again], order) == [first[1], again]
    assert kept(file, [], order) == [first[1], again]
    assert kept(file, [], ["b"]) == [again]  # a client that is tried no more has no line
