"""What people have is learned whole: dropped texts are counted, documents stay whole, rows say what is in them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig, TrainConfig, load_config
from decar.training.data.blocks import pack
from decar.training.data.shards import read_examples, read_texts
from decar.training.data.sources import EMPTY, SHORT, UNLEARNED, Chat, Document, Piece, Tally, read_documents
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.partition.stage import make_partition, partition_stage, read_partition_report
from decar.training.run import SPLITS
from tests.training.conftest import CODE, PROSE, WriteConfig
from tests.training.test_run import command

ASKED = [{"role": "user", "content": "What is two plus three?"}, {"role": "assistant", "content": "Five."}]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path, tally: Tally | None = None, **cutting: Any) -> list[Document]:
    settings = DocumentConfig(**{"min_chars": 1, **cutting})
    return list(read_documents(DataConfig(files=[str(file)]), settings, 0, tally=tally))


# -------------------------------------------------------------------------------------------- what is dropped


def test_dropped_texts_are_counted_by_reason_everywhere(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(documents={"min_chars": 32})
    unlearned = [ASKED[0], {**ASKED[1], "weight": 0}]
    rows = [{"text": "too short"}] * 4 + [{"text": " \n"}] * 3 + [{"messages": unlearned}] * 2
    with (tmp_path / "code.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    lines = [
        "dropped 4 of 39 texts shorter than documents.min_chars",
        "dropped 3 of 39 texts without any text",
        "dropped 2 of 39 texts whose answers all have weight 0",
    ]
    assert command(monkeypatch, "run", path, "--dry-run") == 0
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        count, what = line.removeprefix("dropped ").split(" texts ")
        assert f"texts {what} the data {count}" in out
    assert command(monkeypatch, "partition", path) == 0
    assert set(lines) <= set(capsys.readouterr().out.splitlines())
    report = read_partition_report(partition_stage(load_config(path)))
    assert (report.texts, report.documents) == (39, 30)
    assert report.dropped == {SHORT: 4, EMPTY: 3, UNLEARNED: 2}


def test_nothing_left_says_what_was_dropped(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [{"text": "short"}] * 3 + [{"text": ""}])
    message = r"no documents; check .*min_chars; dropped 3 of 4 texts shorter .*; dropped 1 of 4 texts without any text"
    with pytest.raises(TrainingError, match=message):
        read(file, min_chars=32)


def test_rows_that_teach_nothing_are_counted(write_config: WriteConfig) -> None:
    config = prepared(write_config())
    tokenizer = load_tokenizer(config.run.tokenizer)
    asked = Chat([{"role": "user", "content": "def " * 40}, {"role": "assistant", "content": "return"}])
    blocks = pack([asked], tokenizer, 32)
    assert sum(blocks.dropped.values()) > 0
    assert not pack(["def return"], tokenizer, 32).dropped


# -------------------------------------------------------------------------------------------- whole documents


def prepared(path: Path) -> TrainConfig:
    config = load_config(path)
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


LONG = [
    pytest.param("word " * 1_000 + "TAIL OF DOC", id="one line"),
    pytest.param("a line of words\n" * 300 + "TAIL OF DOC", id="lines"),
    pytest.param("x" * 4_000 + "TAIL OF DOC", id="one word"),
    pytest.param("\n\n" + " " * 90 + "indented\n" * 200 + "\n\n\nend", id="blank lines"),
    pytest.param("語" * 3_000 + "\r\n終", id="no spaces"),
]


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize(
    "cutting", [{}, {"max_chars": 64}, {"max_chars": 64, "min_chars": 32}, {"max_chars": 5}]
)
def test_a_document_is_one_or_its_pieces_are(tmp_path: Path, text: str, cutting: dict[str, int]) -> None:
    """No character is lost, no word is cut that fits, and no piece is too short to stand alone."""
    file = write_rows(
        tmp_path / "x.jsonl", [{"text": text}, {"text": "another text, as long as it has to be"}]
    )
    pieces = [document for document in read(file, **cutting) if document.origin == 0]
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.piece for piece in pieces] == list(range(len(pieces)))
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.text.strip()) >= cutting.get("min_chars", 1) for piece in pieces)
    if "max_chars" not in cutting:
        assert len(pieces) == 1
    for before, after in pairwise(pieces):
        is_in_a_word = before.text[-1].isalnum() and after.text[0].isalnum()
        word = f" {before.text.split()[-1]}{after.text.split()[0]}"  # with the space before it
        assert not is_in_a_word or len(word) > cutting["max_chars"]


@pytest.mark.parametrize("cutting", [{}, {"max_chars": 60}])
def test_bos_and_eos_stand_at_the_ends_of_documents_alone(
    write_config: WriteConfig, tmp_path: Path, cutting: dict[str, int]
) -> None:
    texts = [" ".join([*CODE * 12, f"number {i}", "TAIL OF DOC"]) for i in range(12)]
    path = write_config(
        data={"files": [str(write_rows(tmp_path / "long.jsonl", [{"text": text} for text in texts]))]},
        documents={"min_chars": 32, **cutting},
        partition={"name_by": {}, "held_out_duplicates": "keep"},
        experts=["all"],
    )
    config = prepared(path)
    tokenizer = load_tokenizer(config.run.tokenizer)
    found: list[int] = []
    for split in SPLITS:
        examples = read_examples(config.run.shard("all", split))
        assert all(isinstance(example, Piece if cutting else str) for example in examples)
        blocks = pack(examples, tokenizer, 32)
        ids = blocks.input_ids.flatten().tolist()
        found += ids[: blocks.num_tokens]
    # Token for token the documents, each as the tokenizer has it whole.
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    starts = [i for i, token in enumerate(found) if token == tokenizer.bos_token_id] + [len(found)]
    assert sorted(found[a:b] for a, b in pairwise(starts)) == sorted(documents)


def test_pieces_apart_have_no_bos_or_eos_of_their_own(write_config: WriteConfig) -> None:
    tokenizer = load_tokenizer(prepared(write_config()).run.tokenizer)
    first, middle, last = (Piece(text, 0, i, i == 2) for i, text in enumerate(["def f", " return", " self"]))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def tokens(*examples: Piece | str) -> list[int]:
        blocks = pack(examples, tokenizer, 64)
        ids: list[int] = blocks.input_ids.flatten().tolist()
        return ids[: blocks.num_tokens]

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert tokens(first) == [bos, *plain("def f")]
    assert tokens(first, last) == [bos, *plain("def f"), *plain(" self"), eos]
    assert tokens(middle, last) == [*plain(" return self"), eos]
    assert tokens(first, middle, last) == [bos, *plain("def f return self"), eos]
    other = Piece(" return", 1, 1, True)
    assert tokens(first, other) == [bos, *plain("def f"), *plain(" return"), eos]


# -------------------------------------------------------------------------------------------- what a row says

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number", "default": None}}}},
    }
]
CALLED = [
    ASKED[0],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
    },
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "Five."},
]
WITH_TOOLS = (
    "{% for tool in tools or [] %}<|system|>{{ tool | tojson }}<|end|>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}call {{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json in a column"])
def test_tools_and_calls_reach_the_template(write_config: WriteConfig, tmp_path: Path, kind: str) -> None:
    tools = json.dumps(TOOLS) if kind == "json in a column" else TOOLS
    rows: list[dict[str, Any]] = []
    for word in [*CODE, *PROSE]:
        question = {"role": "user", "content": f"What is {word}?"}
        rows.append({"messages": [question, *CALLED[1:]], "tools": tools})
        rows.append({"messages": [question, ASKED[1]], "tools": None})
    if kind == "jsonl":
        file = write_rows(tmp_path / "chats.jsonl", rows)
    else:
        file = tmp_path / "chats.parquet"
        Dataset.from_list(rows).to_parquet(str(file))
    path = write_config(
        data={"files": [str(file)]},
        partition={"name_by": {}, "held_out": 0.5},
        experts=["all"],
        tokenizer={"vocab_size": 400, "chat_template": WITH_TOOLS, "eos_token": "<|end|>"},
    )
    config = prepared(path)
    tokenizer = load_tokenizer(config.run.tokenizer)
    chats = [example for split in SPLITS for example in read_examples(config.run.shard("all", split))]
    told = [chat for chat in chats if isinstance(chat, Chat) and chat.tools]
    assert 0 < len(told) < len(chats)
    for chat in told:
        blocks = pack([chat], tokenizer, 512)
        text = tokenizer.decode(blocks.input_ids[0, : blocks.num_tokens])
        assert text == tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
        assert '"name": "add"' in text
        assert '"arguments": {"a": 2}' in text
        learned = tokenizer.decode(blocks.labels[0][blocks.labels[0] >= 0])
        assert learned == 'call {"name": "add", "arguments": {"a": 2}}<|end|>Five.<|end|>'
    # null is a value in JSON, and what a column of a table has where there is none.
    parameter = told[0].tools[0]["function"]["parameters"]["properties"]["a"]  # type: ignore[index]
    assert parameter == {"type": "number"} | ({} if kind == "parquet" else {"default": None})


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"a": {"b": "\\"c\\""}}', {"a": {"b": '"c"'}}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("{}", {}),
    ],
)
def test_arguments_are_objects(tmp_path: Path, arguments: Any, parsed: Any) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}]
    messages = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    (document,) = read(write_rows(tmp_path / "x.jsonl", [{"messages": messages}]))
    assert document.messages is not None
    wanted = {"id": "1", "type": "function", "function": {"name": "add", "arguments": parsed}}
    assert document.messages[1]["tool_calls"] == [wanted]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "message 2 calls a tool .*not valid JSON",
        ),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}, "arguments that are not an object"),
        ({"tool_calls": "f"}, "message 2 has tool_calls that are not a list of objects"),
        ({"weight": 0.5}, "message 2 has the weight 0.5; it is 1, or 0"),
        ({"content": None}, "message 2 needs a role and a content"),
    ],
)
def test_messages_that_cannot_be_used_are_named(tmp_path: Path, change: Any, message: str) -> None:
    file = write_rows(tmp_path / "x.jsonl", [{"messages": [ASKED[0], {**ASKED[1], **change}]}])
    with pytest.raises(TrainingError, match=rf"x.jsonl, line 1: field 'messages': .*{message}"):
        read(file)


@pytest.mark.parametrize("tools", ["{", "3", {"a": 1}, [3]])
def test_tools_that_cannot_be_used_are_named(tmp_path: Path, tools: Any) -> None:
    file = write_rows(tmp_path / "x.jsonl", [{"messages": ASKED, "tools": tools}])
    with pytest.raises(TrainingError, match=r"line 1: field 'tools' is not (valid JSON|a list of objects)"):
        read(file)


MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [WITH_TOOLS, MARKED], ids=["prefixes", "generation"])
def test_messages_of_weight_0_are_not_learned(write_config: WriteConfig, template: str) -> None:
    config = prepared(write_config(tokenizer={"chat_template": template, "eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(config.run.tokenizer)
    for weights in ([0, 1], [1, 0], [None, 0], [1, 1]):
        chat = [
            ASKED[0],
            dict(ASKED[1]),
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
        ]
        for message, weight in zip(chat[1::2], weights, strict=True):
            if weight is not None:
                message["weight"] = weight
        blocks = pack([Chat(chat)], tokenizer, 128)
        learned = tokenizer.decode(blocks.labels[0][blocks.labels[0] >= 0])
        wanted = ["Five.<|end|>" * (weights[0] != 0), "So.<|end|>" * weights[1]]
        assert learned == "".join(wanted)
        plain = [{"role": m["role"], "content": m["content"]} for m in chat]
        assert (
            blocks.input_ids[0, : blocks.num_tokens].tolist()
            == tokenizer.apply_chat_template(plain)["input_ids"]
        )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_an_empty_text_beside_a_chat_is_none_and_the_reverse(
    tmp_path: Path, kind: str, nothing: str | None
) -> None:
    rows: list[dict[str, Any]] = [
        {"text": nothing, "messages": ASKED},
        {"text": "a text", "messages": None},
        {"text": "both", "messages": ASKED},
    ]
    if kind == "jsonl":
        rows.append({"text": "empty chat", "messages": []})
        file = write_rows(tmp_path / "x.jsonl", rows)
    else:
        file = tmp_path / "x.parquet"
        Dataset.from_list(rows).to_parquet(str(file))
    said = "What is two plus three?\n\nFive."
    found = [(document.text, document.messages) for document in read(file)]
    assert found[:3] == [(said, ASKED), ("a text", None), ("both", None)]
    assert found[3:] == [("empty chat", None)] * (kind == "jsonl")


def test_shards_without_pieces_or_tools_have_no_columns_for_them(config: TrainConfig) -> None:
    make_partition(config, partition_stage(config))
    assert all(isinstance(example, str) for example in read_examples(config.run.shard("code", "train")))
    assert read_examples(config.run.shard("code", "train")) == list(
        read_texts(config.run.shard("code", "train"))
    )
