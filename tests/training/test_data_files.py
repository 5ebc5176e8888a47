"""Files as people keep them: kinds, compression, folders, equal names; and what is wrong with one is said in a line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig, TrainConfig, load_config
from decar.training.data.files import find_files, source_names
from decar.training.data.shards import read_texts
from decar.training.data.sources import BadLines, Document, Tally, input_files, read_documents
from decar.training.partition.stage import make_partition, partition_stage, read_partition_report
from tests.training.conftest import WriteConfig
from tests.training.test_run import command

TEXTS = ["one", 'a "quoted" text, with\na second line', "drei 語", "x" * 200_000, "five"]
"""A comma, quotes, a line end, other scripts, and more than a csv module takes by itself."""


def read(*patterns: Path | str, tally: Tally | None = None, **data: Any) -> list[Document]:
    config = DataConfig(files=[str(pattern) for pattern in patterns], **data)
    return list(read_documents(config, DocumentConfig(min_chars=1), 0, tally=tally))


def said(*patterns: Path | str, **data: Any) -> list[str]:
    return [document.text for document in read(*patterns, **data)]


def error(*patterns: Path | str, **data: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        read(*patterns, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_csv(delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(TEXTS)])
    return stream.getvalue().encode()  # with the \r\n of RFC 4180


def write_parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLES = {
    "jsonl": LINES,
    "ndjson": LINES,
    "json": json.dumps(ROWS, indent=2).encode(),
    "csv": write_csv(","),
    "tsv": write_csv("\t"),
    "parquet": write_parquet(text=TEXTS),
}


def as_it_is(content: bytes) -> bytes:
    return content


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": as_it_is,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
@pytest.mark.parametrize("kind", list(TABLES))
def test_tables(tmp_path: Path, kind: str, compression: str) -> None:
    name = f"x.{kind.upper() if compression.isupper() else kind}{compression}"
    (tmp_path / name).write_bytes(COMPRESSIONS[compression](TABLES[kind]))
    documents = read(tmp_path / name)
    assert [document.text for document in documents] == TEXTS
    assert {document.source for document in documents} == {name}


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
@pytest.mark.parametrize("ending", ["txt", "md", "py", "rst", "html", "unheard-of", ""])
def test_texts(tmp_path: Path, ending: str, compression: str) -> None:
    file = tmp_path / f"x.{ending}{compression}"
    file.write_bytes(COMPRESSIONS[compression]("a text\r\nof two lines, 語".encode()))
    assert said(file) == ["a text\nof two lines, 語"]


JSON = {
    "wrapped": (json.dumps({"version": 2, "data": ROWS}), TEXTS),
    "one row": (json.dumps({"text": "one", "tags": [{"a": 1}]}), ["one"]),
    "one chat": (
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ["a\n\nb"],
    ),
    "lines": (LINES.decode(), TEXTS),
    "one line": ('{"text": "one"}\n', ["one"]),
}


@pytest.mark.parametrize("name", list(JSON))
def test_json(tmp_path: Path, name: str) -> None:
    content, texts = JSON[name]
    (tmp_path / "x.json").write_text(content)
    assert said(tmp_path / "x.json") == texts


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, kind: str, compression: str) -> None:
    content = {**TABLES, "txt": b"one"}[kind].replace(b"id,", b"").replace(b"id\t", b"")
    if kind in ("csv", "tsv"):
        content = b'"text"\r\none\r\n'  # the mark before a quote
    file = tmp_path / f"x.{kind}{compression}"
    file.write_bytes(COMPRESSIONS[compression](b"\xef\xbb\xbf" + content))
    assert said(file)[0] == "one"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_line_ends(tmp_path: Path, kind: str, line_end: bytes) -> None:
    contents = {
        "jsonl": b'{"text": "one"}\n\n{"text": "two"}\n',
        "json": b'[\n{"text": "one"},\n{"text": "two"}]\n',
        "csv": b"text\none\n\ntwo\n",
        "txt": b"one\ntwo\n",
    }
    (tmp_path / f"x.{kind}").write_bytes(contents[kind].replace(b"\n", line_end))
    assert said(tmp_path / f"x.{kind}") == (["one\ntwo\n"] if kind == "txt" else ["one", "two"])


def test_chats_in_a_csv(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with (tmp_path / "x.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["instruction", "input", "output", "messages"])
        writer.writerow(["Add.", "", "5", ""])
        writer.writerow(["", "", "", json.dumps(chat)])
    assert [(d.format, d.text) for d in read(tmp_path / "x.csv")] == [
        ("Alpaca", "Add.\n\n5"),
        ("messages", "a\n\nb"),
    ]


# ---------------------------------------------------------------------------------------------------- what is wrong

GOOD = b'{"text": "one"}\n'
WRONG: dict[str, tuple[str, bytes, str]] = {
    # (the file's name, what is in it, what is said)
    "cut gzip": ("x.jsonl.gz", gzip.compress(LINES)[:-20], r"x.jsonl.gz(, after line \d:)? cannot be read \(Comp"),
    "cut zstd": ("x.jsonl.zst", zstd(LINES)[:-20], r"x.jsonl.zst(, after line \d:)? cannot be read \(Truncated"),
    "spoilt gzip": ("x.txt.gz", gzip.compress(b"a" * 99)[:10] + b"\x07" * 20, "x.txt.gz cannot be read"),
    "no gzip": ("x.jsonl.gz", GOOD, r"x.jsonl.gz cannot be read \(Not a gzipped file"),
    "no zstd": ("x.csv.zst", b"text\na", "x.csv.zst cannot be read"),
    "gzip without its name": ("x.jsonl", gzip.compress(GOOD), "x.jsonl holds compressed data; .* the ending .gz"),
    "zstd without its name": ("x.txt", zstd(GOOD), "x.txt holds compressed data; give its name the ending .zst"),
    "no parquet": ("x.parquet.gz", gzip.compress(b"PAR1"), "x.parquet.gz is not a parquet file"),
    "empty parquet": ("x.parquet", b"", "x.parquet is not a parquet file"),
    "ragged row": ("x.csv", b"a,text\n1,2\n1\n", "x.csv, line 3: 1 cells, but the header names 2 columns"),
    "longer row": ("x.tsv", b"a\ttext\n1\t2\t3\n", "x.tsv, line 2: 3 cells, but the header names 2 columns"),
    "open quote": ("x.csv", b'a,text\n1,"2\n3,4\n', r"x.csv, line 2: not valid CSV \(unexpected end of data\)"),
    "text behind a quote": ("x.csv", b'text\n"a"b\n', "x.csv, line 2: not valid CSV"),
    "no header": ("x.csv", b"a text,1\nanother,2\n", "x.csv, line 1: no field 'text' .*has to name the columns"),
    "a name twice": ("x.csv", b"text,text\n1,2\n", "x.csv, line 1: the header names the column 'text' 2 times"),
    "a name of two lines": ("x.csv", b'"a\nb",c\n1,2\n', "x.csv, line 1: no field 'text' .*it has a b, c"),
    "a column of two lines": ("x.parquet", write_parquet(**{"a\nb": ["x"]}), "x.parquet: no field 'text' .*it has a b"),
    "no UTF-8": ("x.csv", b"text\ngood\n\xff\n", "x.csv, line 3: not valid CSV .*utf-8"),
    "header without UTF-8": ("x.csv", b"\xff\n", "x.csv, line 1: its header cannot be read"),
    "UTF-16": ("x.jsonl", GOOD.decode().encode("utf-16"), "x.jsonl, line 1: not valid JSON"),
    "UTF-16 text": ("x.txt", "text".encode("utf-16"), "x.txt is not UTF-8 text"),
    "binary": ("x.bin", b"\x00\x01", r"x.bin: unknown kind of file, and no text \(it holds NUL\); use .txt"),
    "binary without NUL": ("x.bin", b"\xfe\xff\xfe", "x.bin is not UTF-8 text .*use .txt, .md"),
    "half a JSON": ("x.json", b'[{"text": "a"}', "x.json: not valid JSON"),
    "a number": ("x.json", b"3", "x.json: expected a list of objects, or an object with one such list"),
    "two lists": ("x.json", b'{"a": [{"text": "a"}], "b": [{"text": "b"}]}', "x.json: expected a list of objects"),
    "a list of texts": ("x.json", b'["a"]', "x.json, row 1: expected an object"),
    "a key twice": ("x.jsonl", GOOD + b'{"text": "a", "text": "b"}', "line 2: the key 'text' stands twice"),
    "a long number": ("x.jsonl", b'{"text": "a", "n": ' + b"1" * 5_000 + b"}", "line 1: not valid JSON"),
    "deep": ("x.jsonl", b'{"text": ' + b"[" * 99_999, "line 1: not valid JSON"),
    "many lines in one": ("x.jsonl", b'{"a\\nb": 1}', r"line 1: no field 'text' .*it has a b"),
    "half a pair in a name": ("x.jsonl", b'{"\\ud800": 1}', r"line 1: no field 'text' .*it has \\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, name: str) -> None:
    file, content, message = WRONG[name]
    (tmp_path / file).write_bytes(content)
    found = error(tmp_path / file)
    assert re.search(message, found), found
    found.encode()  # a terminal can show it


def test_bad_lines_of_a_csv_are_skipped_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(b'a,text\n1,one\n2\n3,\xff\n4,"x"y\n5,two\n6,"open\n')
    bad = BadLines(skip=True)
    config = DataConfig(files=[str(file)], on_bad_line="skip")
    found = [d.text for d in read_documents(config, DocumentConfig(min_chars=1), 0, bad=bad)]
    assert found == ["one", "two"]
    assert bad.counts == {"x.csv": 4}
    assert str(bad.first).startswith(f"{file}, line 3: 1 cells")
    with pytest.raises(TrainingError, match="line 3: 1 cells"):
        read(file)


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize(
    "row",
    [b'2,"a\n\xff b\n3,c"', b'2,"\xff\n3,c\n"', b'2,"a\n3,c\xc3"', b'"\xed\xa0\x80\n3,c",d', b"\xff"],
)
def test_a_bad_byte_costs_its_row_alone(tmp_path: Path, row: bytes, compression: str) -> None:
    file = tmp_path / f"x.csv{compression}"
    file.write_bytes(COMPRESSIONS[compression](b"a,text\n1,one\n" + row + "\n4,語\n5\n".encode()))
    bad = BadLines(skip=True)
    config = DataConfig(files=[str(file)], on_bad_line="skip")
    found = [d.text for d in read_documents(config, DocumentConfig(min_chars=1), 0, bad=bad)]
    assert found == ["one", "語"]
    assert bad.counts == {file.name: 2}
    assert str(bad.first).startswith(f"{file}, line 3: not valid CSV ('utf-8' codec")
    file.write_bytes(COMPRESSIONS[compression]('a,text\n1,語\n2,"a\nb"\n5\n'.encode()))
    assert error(file).startswith(f"{file}, line 5: 1 cells")


def test_empty_tables_are_said(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json", "c.csv", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "e.jsonl").write_bytes(GOOD)
    tally = Tally()
    assert [d.text for d in read(tmp_path / "*", tally=tally)] == ["one"]
    assert tally.left_out == {"empty files": 3}
    assert tally.dropped == {"without any text": 1}
    assert "left out 1 empty files" in error(tmp_path / "a.jsonl")


# ---------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "my [tree]"
    for name, content in {
        "b.py": "import b",
        "a/x.py": "import x",
        "a/B.PY": "import B",
        "a/rows.jsonl.gz": "",
        "c/deep/read.md": "a text",
        "c/picture.png": "\x00",
        "c/LICENSE": "free",
        ".git/config.py": "hidden",
        "a/.x.py": "hidden",
        "c/data.bin.gz": "\x00",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "a/rows.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (root / "c/back").symlink_to(root)
    return root


@pytest.mark.parametrize("pattern", ["", "../my*"])
def test_a_folder_is_read_with_all_below_it_and_what_is_left_out_is_counted(tree: Path, pattern: str) -> None:
    tally = Tally()
    documents = read(tree / pattern, tally=tally)
    assert [(d.source, d.text) for d in documents] == [
        ("B.PY", "import B"),
        ("rows.jsonl.gz", "one"),
        ("x.py", "import x"),
        ("b.py", "import b"),
        ("read.md", "a text"),
    ]
    assert tally.left_out == {
        "hidden files and folders": 2,
        "files ending in .png": 1,
        "files ending in .gz": 1,
        "files without an ending": 1,
        "links to folders": 1,
    }


def test_a_glob_takes_files_of_any_ending(tree: Path) -> None:
    assert said(tree / "c/LIC*") == ["free"]
    assert said(tree / "*") == ["import b"]
    (tree / "c/back").unlink()  # a glob follows it
    assert said(tree / "**/*.py") == ["import x", "import b"]
    assert "picture.png: unknown kind of file" in error(tree / "c/*.png")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("*", 2), ("[ab]*", 1), ("c/[dLp]*", 1), ("*.py", 0), ("c", 0), ("a/**", 0), ("c/deep/*", 0)],
)
def test_folders_that_a_glob_matches_beside_files_are_counted(tree: Path, pattern: str, count: int) -> None:
    (tree / "c/back").unlink()
    left_out = find_files([str(tree / pattern)], "data.files").left_out
    assert left_out["folders that a glob matches beside files"] == count


def test_a_folder_without_data_says_what_is_in_it(tree: Path) -> None:
    (tree / "c/deep/read.md").unlink()
    (tree / "c/back").unlink()
    assert error(tree / "c").endswith(
        "matches no file; of its folder were left out 1 files ending in .gz, 1 files ending in .png, "
        "1 files without an ending"
    )
    (tree / "bare/below").mkdir(parents=True)
    assert error(tree / "bare").endswith("bare' matches no file; the folder is empty")
    assert error(tree / "none").endswith("none' matches no file")


def test_a_file_is_read_once_by_whatever_name(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    patterns = ["b.py", str(tree / "b.py"), "a/../b.py", "*.py"]
    assert [str(file) for file in input_files(DataConfig(files=patterns))] == ["b.py"]


def test_files_of_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    names = ["a/train.jsonl", "b/train.jsonl", "x/c/valid.jsonl", "y/c/valid.jsonl", "y/c/other.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "one"}\n3\n')
    bad = BadLines(skip=True)
    config = DataConfig(files=[str(tmp_path)], on_bad_line="skip")
    documents = read_documents(config, DocumentConfig(min_chars=1), 0, bad=bad)
    wanted = [*names[:3], "other.jsonl", names[3]]
    assert [document.source for document in documents] == wanted
    assert bad.counts == Counter(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_names_of_sources_are_the_shortest_ends_that_differ(seed: int) -> None:
    rng = random.Random(seed)
    files = {Path("/", *rng.choices("ab", k=rng.randint(0, 4)), rng.choice("xy")) for _ in range(40)}
    ends = {file: ["/".join(file.parts[-d:]) for d in range(1, len(file.parts) + 1)] for file in files}
    count = Counter(end for of_file in ends.values() for end in of_file)
    assert source_names([*files]) == {
        file: next(end for end in of_file if count[end] == 1) for file, of_file in ends.items()
    }


def test_many_files_may_have_one_name() -> None:
    files = [Path(f"/many/{number}/deep/x.py") for number in range(20_000)]
    assert source_names(files) == {file: f"{number}/deep/x.py" for number, file in enumerate(files)}


# ---------------------------------------------------------------------------------------------------- the partition


@pytest.fixture
def languages(write_config: WriteConfig, tmp_path: Path) -> Callable[..., TrainConfig]:
    """20 texts of each of two languages: rows with nested, numeric and true or false fields, in a file of each, and as
    many source files in a folder of each."""
    for number, name in enumerate(("python", "rust")):
        (tmp_path / f"src/{name}").mkdir(parents=True)
        rows = []
        for i in range(20):
            text = f"{name} text number {i}"
            rows.append({"text": text, "meta": {"lang": name, "id": number}, "is_rust": bool(number)})
            (tmp_path / f"src/{name}/{i}.{name[:2]}.txt").write_text(text)
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / f"rows/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(files: str, field: str, domains: dict[str, list[Any]] | None = None) -> TrainConfig:
        settings = {"method": "by-field", "field": field, "name_by": {}, "domains": domains or {}}
        path = write_config(
            data={"files": [str(tmp_path / files)]}, partition=settings, experts=["python", "rust"]
        )
        return load_config(path)

    return make


@pytest.mark.parametrize(
    ("files", "field", "domains"),
    [
        ("rows/*.jsonl", "meta.lang", {}),
        ("rows/*.jsonl", "meta.id", {"python": [0], "rust": [1]}),
        ("rows/*.jsonl", "is_rust", {"python": [False], "rust": [True]}),
        ("rows/*.jsonl", "path.stem", {}),
        ("rows/*.jsonl", "path[-1]", {"python": ["python*"], "rust": ["rust*"]}),
        ("src", "path[-2]", {}),
        ("src/*/*", "path.name", {"python": ["*.py.txt"], "rust": ["*.ru.txt"]}),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_experts_get_what_a_field_or_the_path_says(
    languages: Callable[..., TrainConfig], tmp_path: Path, files: str, field: str, domains: Any, kind: str
) -> None:
    if kind == "parquet":
        for name in ("python", "rust"):
            file = tmp_path / f"rows/{name}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_suffix(".parquet"))
        files = files.replace("jsonl", "parquet")
    config = languages(files, field, domains)
    make_partition(config, partition_stage(config))
    for name in config.expert_names:
        texts = [
            text for split in ("train", "held_out") for text in read_texts(config.run.shard(name, split))
        ]
        assert sorted(texts) == sorted(f"{name} text number {i}" for i in range(20))


@pytest.mark.parametrize(
    ("files", "field", "message"),
    [
        ("rows/*.jsonl", "meta.long", r"python.jsonl, line 1: no field 'meta.long' \(partition.field\)"),
        ("rows/*.jsonl", "text.lang", r"python.jsonl, line 1: no field 'text.lang'"),
        ("src", "lang", r"has no fields, so no 'lang' .*tell files by path\[-2\] or path.suffix"),
        ("src", "path[-99]", r"lies in fewer folders than path\[-99\] \(partition.field\) counts"),
        ("src", "path.suffix", "path.suffix '.txt' belongs to no expert"),
        ("src", "path[1]", r"'path\[1\]' has to count from the end: path\[-1\] is a file's name"),
    ],
)
def test_fields_that_are_not_there(
    languages: Callable[..., TrainConfig], files: str, field: str, message: str
) -> None:
    def run() -> None:
        config = languages(files, field)
        make_partition(config, partition_stage(config))

    with pytest.raises(TrainingError, match=message):
        run()


def test_the_report_and_the_table_say_what_was_read_and_left_out(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for name in ("code", "prose"):
        (tmp_path / f"{name}.jsonl").rename(root / f"{name}.jsonl")
    rows = [{"instruction": f"say {i}", "output": f"the number {i}"} for i in range(1_200)]
    (root / "asked.json").write_text(json.dumps(rows))
    (root / "a.png").touch()
    (root / ".hidden").touch()
    path = write_config(data={"files": [str(root)]})
    assert command(monkeypatch, "partition", path) == 0
    lines = {
        "read 1,200 Alpaca rows, 30 texts",
        "left out 1 files ending in .png",
        "left out 1 hidden files and folders",
    }
    assert lines <= set(capsys.readouterr().out.splitlines())
    report = read_partition_report(partition_stage(load_config(path)))
    assert report.formats == {"Alpaca": 1_200, "text": 30}
    assert report.left_out == {"files ending in .png": 1, "hidden files and folders": 1}


def test_reading_a_csv_leaves_other_readers_as_they_are(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "x.csv").write_bytes(TABLES["csv"])
    assert said(tmp_path / "x.csv") == TEXTS
    assert csv.field_size_limit() in (before, sys.maxsize)
