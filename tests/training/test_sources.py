"""Documents from files and from Python: what is read, how it is cut, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig
from decar.training.data.sources import BadLines, cut, read_documents

SHORT = DocumentConfig(min_chars=1)
CUT = DocumentConfig(min_chars=0, max_chars=40)


def read(**data: Any) -> list[tuple[str, str]]:
    return [
        (document.text, document.source) for document in read_documents(DataConfig(**data), SHORT, seed=0)
    ]


def test_txt_jsonl_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n\n{"body": "four", "x": 1}\n')
    Dataset.from_dict({"body": ["five"], "x": [2]}).to_parquet(str(tmp_path / "c.parquet"))
    found = read(files=[str(tmp_path / "*"), str(tmp_path / "a.txt")], text_field="body")
    assert found == [("one\ntwo", "a.txt"), ("three", "b.jsonl"), ("four", "b.jsonl"), ("five", "c.parquet")]


def test_pieces_keep_the_text_and_the_limit() -> None:
    text = "short\n" * 5 + "x" * 40 + "\r\nlast"
    pieces = list(cut(text.splitlines(keepends=True), 16))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 16
    assert pieces[0] == "short\nshort\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x.jsonl, line 2: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', r"x.jsonl, line 3: not valid JSON"),
        ("x.jsonl", b'{"text": 3}\n', r"x.jsonl, line 1: field 'text' is not a string"),
        ("x.jsonl", b'{"texts": "a"}\n', r"x.jsonl, line 1: no field 'text' .*did you mean 'texts'\?"),
        ("x.jsonl", b'["a"]\n', r"x.jsonl, line 1: expected an object"),
        ("x.txt", b"\xff\xfe", r"x.txt is not UTF-8"),
        ("x.parquet", b"PAR1 not really", r"x.parquet is not a parquet file"),
        (
            "x.csv",
            b"a,b",
            r"x.csv, line 1: no field 'text' .*it has a, b; the first line has to name the columns",
        ),
        (
            "x.bin",
            b"a\0b",
            r"x.bin: unknown kind of file, and no text \(it holds NUL\); use .txt, .md, .jsonl",
        ),
        ("x.jsonl", b'{"text": "\\ud800"}\n', r"x.jsonl, line 1: .*half of a surrogate pair"),
        ("x.txt", b" \n", r"holds no documents"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        read(files=[str(tmp_path / name)])


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_bad_lines_end_the_run_with_the_way_out_or_are_counted(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "x.jsonl":
        file.write_bytes(b'{"text": "one"}\n{"text": \n{"text": "two"}\n{"text": 3}\n')
        first = "line 2: not valid JSON"
    else:
        Dataset.from_dict({"text": ["one", None, "two", None]}).to_parquet(str(file))
        first = "row 2: field 'text' is not a string"
    with pytest.raises(TrainingError, match=rf"{name}, {first}.*; mend it, or set data.on_bad_line to skip"):
        read(files=[str(file)])
    config = DataConfig(files=[str(file)], on_bad_line="skip")
    bad = BadLines(skip=True)
    documents = list(read_documents(config, SHORT, 0, bad=bad))
    assert [(document.text, document.origin) for document in documents] == [("one", 0), ("two", 1)]
    assert bad.counts == {name: 2}
    assert f"{name}, {first}" in str(bad.first)


def test_nothing_but_bad_lines_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"texts": "a"}\n' * 3)
    message = r"no documents; .*3 bad lines were skipped, the first: .*line 1: no field 'text' .*'texts'"
    with pytest.raises(TrainingError, match=message):
        read(files=[str(tmp_path / "x.jsonl")], on_bad_line="skip")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\x0b", "\u2028", ""])
def test_a_text_file_is_cut_line_by_line_as_it_would_be_whole(tmp_path: Path, line_end: str) -> None:
    text = "".join(f"line {i}{line_end}" for i in range(30)) + "end\n" + "x" * 100
    (tmp_path / "a.txt").write_bytes(text.encode())
    documents = list(read_documents(DataConfig(files=[str(tmp_path / "a.txt")]), CUT, 0))
    whole = (tmp_path / "a.txt").read_text()
    assert [document.text for document in documents] == list(cut(whole.splitlines(keepends=True), 40))
    assert "".join(document.text for document in documents) == whole


def test_a_fields_value_is_the_domain(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "one", "lang": "en"}\n{"text": "two", "lang": 7}\n')
    Dataset.from_dict({"text": ["three"], "lang": ["de"]}).to_parquet(str(tmp_path / "c.parquet"))
    config = DataConfig(files=[str(tmp_path / "*")])
    assert [document.domain for document in read_documents(config, SHORT, 0, "lang")] == ["en", "7", "de"]
    assert {document.domain for document in read_documents(config, SHORT, 0)} == {None}
    with pytest.raises(
        TrainingError, match=r"line 1: no field 'lnag' \(partition.field\); did you mean 'lang'"
    ):
        list(read_documents(config, SHORT, 0, "lnag"))
    (tmp_path / "d.txt").write_text("four")
    with pytest.raises(TrainingError, match=r"d.txt has no fields, so no 'lang' \(partition.field\)"):
        list(read_documents(config, SHORT, 0, "lang"))


def test_parquet_without_the_field(tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["five"]}).to_parquet(str(tmp_path / "c.parquet"))
    with pytest.raises(TrainingError, match=r"c.parquet: no field 'text' .*it has body"):
        read(files=[str(tmp_path / "c.parquet")])


def test_a_pattern_without_files() -> None:
    with pytest.raises(TrainingError, match=r"'/nowhere/\*.txt' matches no file"):
        read(files=["/nowhere/*.txt"])


def test_builtin_sources_are_capped_and_share_no_docstring() -> None:
    config = DataConfig(builtin=["python-stdlib", "python-docstrings"], builtin_max_bytes=60_000)
    documents = list(read_documents(config, DocumentConfig(max_chars=10**6), seed=0))
    by_source = {name: [d.text for d in documents if d.source == name] for name in config.builtin}
    for texts in by_source.values():
        assert texts
        assert sum(len(text.encode()) for text in texts) <= 60_000
    code = "".join(by_source["python-stdlib"])
    for docstring in by_source["python-docstrings"]:
        longest = max(docstring.splitlines(), key=len)
        assert longest not in code
