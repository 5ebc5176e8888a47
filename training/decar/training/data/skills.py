"""Questions of two skills that a very small model learns in a minute: data that the demo makes, without a download.

    python -m decar.training.data.skills data/demo

Knows nothing about training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from decar.training.stages import replaced_directory

LARGEST = 3_999  # that Roman numerals have a usual way to write
QUESTIONS_NAME = "questions.jsonl"
REPEATS = (8, 8, 2, 1)
"""Rows about a number, by how many digits it has: of short ones there are few."""

_ROMAN = [
    (1000, "M"),
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
]
_SMALL = [
    *(
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_roman(number: int) -> str:
    """``number`` from 1 to 3,999 in Roman numerals."""
    written = ""
    for value, letters in _ROMAN:
        written += letters * (number // value)
        number %= value
    return written


def in_words(number: int) -> str:
    """``number`` from 0 to 9,999 in English words, as Americans write them."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens = _TENS[number // 10 - 2]
        return tens if number % 10 == 0 else f"{tens}-{_SMALL[number % 10]}"
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    whole = f"{_SMALL[number // unit]} {name}"
    return whole if number % unit == 0 else f"{whole} {in_words(number % unit)}"


class Skill(NamedTuple):
    """``ask``: the question about a number, without its end of line; ``answer``: of one line."""

    ask: Callable[[int], str]
    answer: Callable[[int], str]


SKILLS = {
    "roman": Skill(lambda number: f"{number} in Roman numerals?", in_roman),
    "words": Skill(lambda number: f"{number} in words?", in_words),
}


def write_skills(directory: Path, seed: int = 0, questions: int = 100) -> dict[str, int]:
    """Write ``directory``, replacing it: a file SKILL.jsonl for each skill, and questions.jsonl.

    A skill's rows have fields ``skill`` and ``messages``: a question and its answer, about every number but those that
    ``questions`` questions of each skill are about, which no row of any skill is. These have fields ``skill``,
    ``question`` and ``answer``. What is asked, and the order, is drawn by ``seed``.

    Returns:
        the number of rows by file.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.arange(1, LARGEST + 1))
    asked, taught = np.split(numbers, [questions * len(SKILLS)])
    unseen = np.split(asked, len(SKILLS))
    files: dict[str, list[dict[str, Any]]] = {}
    for name, skill in SKILLS.items():
        rows = [n for n in taught.tolist() for _ in range(REPEATS[len(str(n)) - 1])]
        order = rng.permutation(rows).tolist()
        files[f"{name}.jsonl"] = [_row(name, skill, n) for n in order]
    files[QUESTIONS_NAME] = [
        {"skill": name, "question": skill.ask(n), "answer": skill.answer(n)}
        for (name, skill), of_skill in zip(SKILLS.items(), unseen, strict=True)
        for n in of_skill.tolist()
    ]
    with replaced_directory(directory) as target:
        for file, rows in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (target / file).write_text(lines, encoding="utf-8")
    return {file: len(rows) for file, rows in files.items()}


def _row(name: str, skill: Skill, number: int) -> dict[str, Any]:
    says = ("user", skill.ask(number)), ("assistant", skill.answer(number))
    return {"skill": name, "messages": [{"role": role, "content": content} for role, content in says]}


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="made anew")],
    seed: Annotated[int, typer.Option(help="of what is asked, and of the order")] = 0,
) -> None:
    """Write numbers and their names, in Roman numerals and in English words, as questions and answers."""
    if directory.exists() and not (directory / QUESTIONS_NAME).is_file():
        raise typer.BadParameter(f"{directory} exists and holds no {QUESTIONS_NAME}; name another directory")
    for file, rows in write_skills(directory, seed).items():
        typer.echo(f"{directory / file}: {rows:,} rows")


if __name__ == "__main__":
    typer.run(main)
