"""Texts that are part of every Python: its library's code, docstrings and reference. Knows no files of users."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

# Tables, test data and third-party code, which say little about Python.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def builtin_texts(name: str, seed: int, max_bytes: int) -> Iterator[str]:
    """The texts of the built-in source ``name``, up to ``max_bytes`` of UTF-8 in all."""
    total = 0
    for text in _BUILTIN[name](seed):
        total += len(text.encode("utf-8", errors="ignore"))
        if total > max_bytes:
            return
        yield text


def _library_sources(seed: int) -> Iterator[str]:
    """The standard library's modules, in an order that depends on ``seed`` alone."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file for file in root.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(root).parts)
    )
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a few files hold broken code on purpose
        yield text


def _docstring_nodes(text: str) -> list[tuple[ast.Expr, str]]:
    """(statement, cleaned text) of each docstring, in the order of the file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                statement = node.body[0]
                assert isinstance(statement, ast.Expr)
                found.append((statement, docstring))
    return sorted(found, key=lambda pair: pair[0].lineno)


def _library_code(seed: int) -> Iterator[str]:
    """Modules without their docstrings, so that no text is in two sources."""
    for text in _library_sources(seed):
        lines = text.splitlines(keepends=True)
        for statement, _ in _docstring_nodes(text):
            assert statement.end_lineno is not None
            lines[statement.lineno - 1 : statement.end_lineno] = [""] * (
                statement.end_lineno - statement.lineno + 1
            )
        yield "".join(lines)


def _library_docstrings(seed: int) -> Iterator[str]:
    """Per module: its docstrings, one after another; single lines are left out."""
    for text in _library_sources(seed):
        docstrings = [docstring for _, docstring in _docstring_nodes(text) if "\n" in docstring]
        if docstrings:
            yield "\n\n".join(docstrings) + "\n"


def _pydoc_topics(_seed: int) -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


_BUILTIN: dict[str, Callable[[int], Iterator[str]]] = {
    "python-stdlib": _library_code,
    "python-docstrings": _library_docstrings,
    "pydoc-topics": _pydoc_topics,
}
