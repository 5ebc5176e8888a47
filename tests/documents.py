"""Code in documents: which there is, and what a shell block commands. Knows no server.

A block is run or checked by its language (`tests/test_documents.py`, `tests/e2e/test_documents.py`). One that cannot be
has a comment on the line above it, which readers do not see:

    <!-- not run: WHY -->

and is counted in `tests/test_documents.py`. What programs print is `text`; after `$ ` stands a command there too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
OWN = {"decar", "decar-train", "make", "curl"}
"""Programs whose commands are checked also where they stand in a line; so are scripts of this repository."""

_NOT_RUN = re.compile(r"\s*<!-- not run: (\S.*?) -->\s*$")
_ARRAY = re.compile(r"\b\w+=\([^)]*\)")
_ASSIGNMENT = re.compile(r"\w+=.*", re.DOTALL)
_SKIPPED = {"do", "then", "else", "if", "while", "until", "!", "time", "nohup", "exec", "sudo", "env"}
_NO_COMMANDS = {"for", "done", "fi", "case", "esac", "function", "[", "[["}


@dataclass(frozen=True)
class Block:
    """A code block of a document.

    Attributes:
        line: of the document, from 1, above its first one.
        not_run: why it is not, if it is not.
    """

    document: Path
    line: int
    language: str
    text: str
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{name_of(self.document)}:{self.line}"


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@cache
def blocks(document: Path) -> tuple[Block, ...]:
    """All code blocks; an indented one counts if it begins with one of `OWN` (others are formulas), as `bash`."""
    text = document.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    for token in MarkdownIt("commonmark").parse(text):
        if token.map is None or token.type not in ("fence", "code_block"):
            continue
        start = token.map[0]
        if token.type == "fence":
            language, above = (token.info.split() or [""])[0], lines[start - 1] if start else ""
        elif token.content.split()[0] in OWN:
            language, above = "bash", lines[start - 2] if start > 1 else ""
        else:
            continue
        marked = _NOT_RUN.match(above)
        line = start + (token.type == "fence")
        found.append(Block(document, line, language, token.content, marked[1] if marked else None))
    return tuple(found)


def every_block(*languages: str) -> list[Block]:
    """Blocks of ``languages`` that are not marked, of all documents."""
    all_blocks = (block for document in DOCUMENTS for block in blocks(document))
    return [block for block in all_blocks if block.language in languages and not block.not_run]


@cache
def inline_commands(document: Path) -> tuple[str, ...]:
    """Commands of `OWN` and of this repository's scripts that stand in a line and leave nothing out."""
    tokens = MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8"))
    spans = [
        " ".join(child.content.split())
        for token in tokens
        for child in token.children or ()
        if child.type == "code_inline"
    ]
    return tuple(span for span in spans if _is_command(span) and not re.search(r"…|\.\.\.|\|", span))


def _is_command(span: str) -> bool:
    first, _, rest = span.partition(" ")
    return bool(rest) and (first in OWN or first.startswith("tools/") or span.startswith("python -m decar"))


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, each as its words, without redirections and what comes before a program.

    Knows quotes, continued lines, comments, pipes, lists, loops and what ssh is to run; no here-documents.

    Raises:
        ValueError: a quote that does not end.
    """
    pending = ""
    for line in script.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            words = _split(pending)
        except ValueError:
            pending += "\n"
            continue
        pending = ""
        yield from _simple(words)
    if pending.strip():
        raise ValueError(f"what does {pending!r} end with?")


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(_ARRAY.sub("", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _simple(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    rest = iter([*words, ";"])
    for word in rest:
        if set(word) <= set("<>&") and set(word) & set("<>"):
            next(rest)  # where to, or where from
            if command and command[-1].isdigit():
                command.pop()
        elif word and set(word) <= set(";|&()"):
            yield from _programs(command)
            command = []
        else:
            command.append(word)


def _programs(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in _SKIPPED or _ASSIGNMENT.fullmatch(words[0])):
        words = words[1:]
    if words and words[0] not in _NO_COMMANDS:
        yield words
        if words[0] == "ssh":
            yield from commands(words[-1])
