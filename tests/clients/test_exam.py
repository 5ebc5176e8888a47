"""Questions with one right answer: how they are read and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decar.clients.exam import Question, read_questions, shares_right


def test_questions_are_read_and_answers_counted_by_skill(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [("roman", "4?", "IV"), ("roman", "5?", "V"), ("words", "4?", "four")]
    file.write_text("".join(json.dumps(Question(*row)._asdict()) + "\n" for row in rows))
    questions = read_questions(file)
    assert questions == [Question(*row) for row in rows]
    assert shares_right(questions, ["IV", "four", "four"]) == {"roman": 0.5, "words": 1.0}
    with pytest.raises(ValueError, match="argument"):
        shares_right(questions, ["IV"])
