"""Prompts cut from text: their length, their order, and what is said of files that have none."""

import json
from pathlib import Path

import pytest

from decar.benchmarks.texts import BadPrompts, Texts
from tests.reference import Reference, stdlib_text

LENGTH = 16


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A plain text, and rows of two documents and of one that is too short."""
    plain, rows = tmp_path / "heapq.txt", tmp_path / "rows.jsonl"
    plain.write_text(stdlib_text("heapq"))
    texts = [stdlib_text("string")[:2000], "short", stdlib_text("calendar")[:2000]]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [plain, rows]


def test_files_take_turns_and_nothing_comes_twice(duo: Reference, files: list[Path], tmp_path: Path) -> None:
    texts = Texts(files, duo.directory / "experts/code", LENGTH)
    written = [texts.write(tmp_path / "out.jsonl", 10).read_text() for _ in range(2)]
    prompts = [json.loads(line)["prompt"] for text in written for line in text.splitlines()]
    assert len(set(prompts)) == 20
    sources = [stdlib_text("heapq"), stdlib_text("string", "calendar")]
    for i, prompt in enumerate(prompts):
        assert prompt in sources[i % 2]
        assert len(duo.encode(prompt)) <= LENGTH


def test_parquet_of_a_partition_is_read(duo: Reference, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "held_out.parquet"
    parquet.write_table(pyarrow.table({"text": [stdlib_text("heapq")], "source": ["stdlib"]}), file)
    (prompt,) = Texts([file], duo.directory / "experts/code", LENGTH).pick(1)
    assert prompt in stdlib_text("heapq")


def test_a_file_without_prompts_or_with_too_few_is_named(
    duo: Reference, files: list[Path], tmp_path: Path
) -> None:
    tokenizer = duo.directory / "experts/code"
    with pytest.raises(BadPrompts, match=r"no-such\.txt"):
        Texts([tmp_path / "no-such.txt"], tokenizer, LENGTH)
    with pytest.raises(BadPrompts, match="lower --input-len"):
        Texts(files, tokenizer, 10_000)
    with pytest.raises(BadPrompts, match="prompts of this length and 5000 are needed"):
        Texts(files, tokenizer, LENGTH).check(10_000)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"body": "text"}))
    with pytest.raises(BadPrompts, match="give rows with a text field"):
        Texts([wrong], tokenizer, LENGTH)
