"""The demo's data: numbers in words and Roman numerals, and questions that no row answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from decar.training.data import skills


@pytest.mark.parametrize(
    ("number", "roman", "words"),
    [
        (4, "IV", "four"),
        (90, "XC", "ninety"),
        (400, "CD", "four hundred"),
        (1011, "MXI", "one thousand eleven"),
        (1987, "MCMLXXXVII", "one thousand nine hundred eighty-seven"),
        (3999, "MMMCMXCIX", "three thousand nine hundred ninety-nine"),
    ],
)
def test_numbers_are_written_as_people_write_them(number: int, roman: str, words: str) -> None:
    assert (skills.in_roman(number), skills.in_words(number)) == (roman, words)


def test_every_number_is_written_differently() -> None:
    numbers = range(1, skills.LARGEST + 1)
    for skill in skills.SKILLS.values():
        assert len({skill.answer(number) for number in numbers}) == skills.LARGEST


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def number_in(text: str) -> int:
    return int(re.findall(r"\d+", text)[0])


def test_nobody_is_taught_what_is_asked_later(tmp_path: Path) -> None:
    written = skills.write_skills(tmp_path / "data", seed=3, questions=50)
    questions = rows(tmp_path / "data" / "questions.jsonl")
    asked = {number_in(question["question"]) for question in questions}
    assert len(asked) == 100, "no number is asked twice"
    for name, skill in skills.SKILLS.items():
        taught = rows(tmp_path / "data" / f"{name}.jsonl")
        assert written[f"{name}.jsonl"] == len(taught)
        numbers = {number_in(row["messages"][0]["content"]) for row in taught}
        assert numbers == set(range(1, skills.LARGEST + 1)) - asked
        for row in taught[:20]:
            question, answer = (message["content"] for message in row["messages"])
            assert answer == skill.answer(number_in(question))
    for question in questions:
        assert question["answer"] == skills.SKILLS[question["skill"]].answer(number_in(question["question"]))


def test_a_seed_is_the_same_data(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        skills.write_skills(tmp_path / name, seed)
    texts = [(tmp_path / name / "words.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_the_command_replaces_its_own_directory_and_no_other(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(skills.main)
    directory = tmp_path / "data"
    for _ in range(2):
        assert "words.jsonl" in CliRunner().invoke(app, [str(directory)]).output
    (tmp_path / "other").mkdir()
    refused = CliRunner().invoke(app, [str(tmp_path / "other")])
    assert refused.exit_code == 2
    assert "name another directory" in refused.output
