"""Rows as people keep them: each format becomes a text or a chat, and what cannot is named with the way out."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from decar.router.errors import TrainingError
from decar.training.config import ColumnsConfig, DataConfig, DocumentConfig, load_config
from decar.training.data.sources import UNANSWERED, Document, Tally, read_documents
from tests.training.conftest import WriteConfig
from tests.training.test_image_data import png

Q, A, S = "What is two plus three?", "Five.", "Be brief."
USER, ANSWER = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
SYSTEM = {"role": "system", "content": S}
CHAT = [USER, ANSWER]
FUNCTION = {"name": "add", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "add", "arguments": {"a": 2}}
CALLED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "5"},
    ANSWER,
]


PAIR = "prompt/completion"


def turns(*pairs: tuple[str, str], keys: tuple[str, str] = ("from", "value")) -> list[dict[str, str]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


def read(file: Path, tally: Tally | None = None, **data: Any) -> list[Document]:
    return list(
        read_documents(DataConfig(files=[str(file)], **data), DocumentConfig(min_chars=1), 0, tally=tally)
    )


def read_row(folder: Path, row: dict[str, Any], **data: Any) -> Document:
    file = folder / "x.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (document,) = read(file, **data)
    return document


ROWS: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]] | None]] = {
    # (a row, its format, its messages)
    "text": ({"text": "a text"}, "text", None),
    "messages": ({"messages": CHAT}, "messages", CHAT),
    "messages in JSON": ({"messages": json.dumps(CHAT)}, "messages", CHAT),
    "Alpaca": ({"instruction": Q, "input": "", "output": A}, "Alpaca", CHAT),
    "Alpaca without input": ({"instruction": Q, "output": A}, "Alpaca", CHAT),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "2, 3", "output": A},
        "Alpaca",
        [{"role": "user", "content": "Add.\n\n2, 3"}, ANSWER],
    ),
    "Alpaca with all": (
        {"instruction": Q, "input": None, "output": A, "system": S, "history": [["Hi", "Hello"]]},
        "Alpaca",
        [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *CHAT],
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "2, 3", "response": A, "category": "x"},
        "instruction/response",
        [{"role": "user", "content": "Add.\n\n2, 3"}, ANSWER],
    ),
    "prompt/completion": ({"prompt": Q, "completion": A}, "prompt/completion", CHAT),
    "TRL": ({"prompt": [USER], "completion": [ANSWER]}, "prompt/completion", CHAT),
    "TRL learns the completion alone": (
        {"prompt": [*CHAT, USER], "completion": [ANSWER]},
        "prompt/completion",
        [USER, {**ANSWER, "weight": 0}, *CHAT],
    ),
    "prompt/response": ({"prompt": Q, "response": A}, "prompt/response", CHAT),
    "question/answer": ({"question": Q, "answer": A, "id": 1}, "question/answer", CHAT),
    "OpenOrca": (
        {"system_prompt": S, "question": Q, "response": A},
        "question/response",
        [SYSTEM, *CHAT],
    ),
    "query/response": ({"query": Q, "response": A}, "query/response", CHAT),
    "ShareGPT": ({"conversations": turns(("human", Q), ("gpt", A))}, "ShareGPT", CHAT),
    "ShareGPT with roles": (
        {"conversations": turns(("user", Q), ("assistant", A), keys=("role", "content")), "system": S},
        "ShareGPT",
        [SYSTEM, *CHAT],
    ),
    "ShareGPT in messages": ({"messages": turns(("Human", Q), ("GPT", A))}, "ShareGPT", CHAT),
    "ShareGPT calls": (
        {
            "conversations": turns(
                ("human", Q), ("function_call", json.dumps(CALL)), ("observation", "5"), ("gpt", A)
            ),
            "tools": json.dumps([TOOL]),
        },
        "ShareGPT",
        CALLED,
    ),
    "an empty text beside": ({"text": None, "prompt": Q, "completion": A}, "prompt/completion", CHAT),
    "an empty chat beside": ({"messages": [], "instruction": Q, "output": A}, "Alpaca", CHAT),
    "a question that is null": (
        {"instruction": None, "prompt": Q, "completion": A, "output": None},
        "prompt/completion",
        CHAT,
    ),
    "an empty question beside": ({"question": Q, "prompt": "", "answer": A}, "question/answer", CHAT),
    "an empty answer beside": (
        {"prompt": Q, "response": " ", "output": [], "answer": A},
        "prompt/answer",
        CHAT,
    ),
    "no preference": ({"prompt": Q, "completion": A, "chosen": None, "rejected": None}, PAIR, CHAT),
    "half a preference": ({"prompt": Q, "completion": A, "chosen": [], "rejected": "6"}, PAIR, CHAT),
    "content parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "2?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "2."}]},
            ]
        },
        "messages",
        [{"role": "user", "content": "What is\n2?"}, {"role": "assistant", "content": "2."}],
    ),
    "legacy functions": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "add", "arguments": '{"a": 2}'},
                },
                {"role": "function", "name": "add", "content": "5"},
                ANSWER,
            ],
            "functions": [FUNCTION],
        },
        "messages",
        [*CALLED[:2], {"role": "tool", "name": "add", "content": "5"}, ANSWER],
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", list(ROWS))
def test_every_format_is_a_text_or_a_chat(tmp_path: Path, name: str, kind: str) -> None:
    row, format, messages = ROWS[name]
    file = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(row) + "\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    tally = Tally()
    (document,) = read(file, tally)
    assert (document.format, document.messages) == (format, messages)
    assert document.text == (
        "a text" if messages is None else "\n\n".join(message["content"] for message in messages)
    )
    assert (tally.read, tally.formats) == (1, {format: 1})
    if row.keys() & {"tools", "functions"}:
        assert document.tools == [TOOL]


def test_what_is_read_is_counted_by_format(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row, _, _ in ROWS.values()))
    tally = Tally()
    documents = read(file, tally)
    assert tally.formats == Counter(format for _, format, _ in ROWS.values())
    assert [document.format for document in documents] == [format for _, format, _ in ROWS.values()]


@pytest.mark.parametrize("name", ["human", "user", "User"])
@pytest.mark.parametrize("other", ["gpt", "chatgpt", "bing", "bard", "assistant", "model", "GPT"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_names_of_who_speaks(tmp_path: Path, name: str, other: str, keys: tuple[str, str]) -> None:
    row = {"conversations": turns(("system", S), (name, Q), (other, A), keys=keys)}
    assert read_row(tmp_path, row).messages == [SYSTEM, *CHAT]


@pytest.mark.parametrize(
    "name", ["tool", "function", "observation", "function_response", "function-response"]
)
def test_names_of_what_tools_say(tmp_path: Path, name: str) -> None:
    row = {
        "conversations": turns(("human", Q), ("function-call", json.dumps([CALL])), (name, "5"), ("gpt", A))
    }
    assert read_row(tmp_path, row).messages == CALLED


@pytest.mark.parametrize(
    "call", [CALL, {"function": CALL}, {"id": "1", "type": "function", "function": CALL}]
)
@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_calls_that_a_row_has_keep_their_form(tmp_path: Path, call: dict[str, Any], arguments: Any) -> None:
    given = json.loads(json.dumps(call).replace('{"a": 2}', json.dumps(arguments)))
    asked = {"role": "assistant", "content": "", "tool_calls": [given]}
    row = {"messages": [USER, asked, {"role": "tool", "content": "5"}, ANSWER]}
    assert read_row(tmp_path, row).messages == [USER, {**asked, "tool_calls": [call]}, *row["messages"][2:]]
    shared = turns(("human", Q), ("function_call", json.dumps([given])), ("observation", "5"), ("gpt", A))
    wanted = {"type": "function", "function": CALL} if call == CALL else call
    messages = read_row(tmp_path, {"conversations": shared}).messages
    assert messages is not None
    assert messages[1]["tool_calls"] == [wanted]


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    "picture",
    [
        {"type": "image_url", "image_url": {"url": "DATA"}},
        {"type": "image_url", "image_url": "red.png"},
        {"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}},
        {"type": "image", "image": "red.png"},
        {"type": "image", "path": "red.png"},
    ],
)
def test_images_of_content_parts(tmp_path: Path, picture: dict[str, Any]) -> None:
    (tmp_path / "red.png").write_bytes(png())
    data = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    part = json.loads(json.dumps(picture).replace("DATA", data))
    asked = [{"type": "text", "text": "See "}, part, {"type": "text", "text": "here"}]
    document = read_row(tmp_path, {"messages": [{"role": "user", "content": asked}, ANSWER]})
    assert document.images == (png(),)
    assert document.messages == [{"role": "user", "content": "See <image>\nhere"}, ANSWER]
    assert document.text == f"See here\n\n{A}"


def test_parts_may_leave_their_images_to_the_field(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png())
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": Q}]}
    row = {"messages": [asked, ANSWER], "images": ["red.png"]}
    document = read_row(tmp_path, row, image_field="images")
    assert (document.images, document.format) == ((png(),), "messages")
    assert read_row(tmp_path, row, columns={"image": "images"}).images == (png(),)
    with pytest.raises(TrainingError, match="1 <image> marks in the messages, but 0 images"):
        read_row(tmp_path, row)


@pytest.mark.parametrize("said", [("What is <image>?", A), (Q, "<image>"), ("<image> <image>", "<image>")])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_without_images_may_speak_of_the_mark(tmp_path: Path, said: tuple[str, str], kind: str) -> None:
    row = {"conversations": turns(("human", said[0]), ("gpt", said[1]))}
    file = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(row))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (document,) = read(file)
    assert (document.format, document.images, document.text) == ("ShareGPT", (), "\n\n".join(said))
    for name in ("image", "images"):
        parquet.write_table(
            pyarrow.Table.from_pylist([{**row, name: ["red.png"]}]), tmp_path / f"{name}.parquet"
        )
        with pytest.raises(TrainingError, match=f"{name}.parquet"):
            read(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize("empty", ["", " ", None, [], {}, {"bytes": None, "path": None}])
def test_an_empty_image_is_none(tmp_path: Path, empty: Any) -> None:
    for row in (
        {"messages": CHAT},
        {"conversations": turns(("human", Q), ("gpt", A))},
        {"prompt": Q, "completion": A},
    ):
        document = read_row(tmp_path, {**row, "image": empty})
        assert (document.messages, document.images) == (CHAT, ())
    assert read_row(tmp_path, {"text": "a text", "image": empty}).text == "a text"


def test_an_empty_image_of_a_table_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"prompt,completion,image\n{Q},{A},\n")
    images = [b"", None]
    table = pyarrow.table({"prompt": [Q] * 2, "completion": [A] * 2, "image": images})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert [d.messages for d in read(tmp_path / "x.*")] == [CHAT] * 3


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("columns", "row", "format", "messages"),
    [
        ({"text": "body"}, {"body": "a text", "text": "not this"}, "text", None),
        ({"prompt": "q", "completion": "a", "system": "s"}, {"q": Q, "a": A, "s": S}, PAIR, [SYSTEM, *CHAT]),
        ({"prompt": "q", "completion": "a"}, {"q": Q, "a": A, "system": S, "text": "x"}, PAIR, [SYSTEM, *CHAT]),
        ({"messages": "dialog"}, {"dialog": CHAT, "messages": []}, "messages", CHAT),
        ({"messages": "dialog"}, {"dialog": turns(("human", Q), ("gpt", A))}, "ShareGPT", CHAT),
        ({"instruction": "i", "input": "j", "output": "k"}, {"i": Q, "j": "", "k": A, "text": "x"}, "Alpaca", CHAT),
        ({"tools": "functions_json"}, {"messages": CHAT, "functions_json": json.dumps([TOOL])}, "messages", CHAT),
        ({"messages": "chosen"}, {"chosen": CHAT, "rejected": CHAT}, "messages", CHAT),
        ({"prompt": "prompt", "completion": "chosen"}, {"prompt": Q, "chosen": A, "rejected": "6"}, PAIR, CHAT),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_of_other_names(
    tmp_path: Path, columns: Any, row: Any, format: str, messages: Any, kind: str
) -> None:
    file = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(row))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (document,) = read(file, columns=columns)
    assert (document.format, document.messages) == (format, messages)
    assert document.tools == ([TOOL] if "tools" in columns else None)


def test_rows_without_the_mapped_columns_are_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "a text"}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "another"}))
    documents = read(tmp_path / "*.jsonl", columns={"text": "body"})
    assert [document.text for document in documents] == ["a text", "another"]
    (tmp_path / "d.jsonl").write_text(json.dumps({"bodi": "a text"}))
    with pytest.raises(
        TrainingError, match=r"d.jsonl, line 1: no field 'body' \(data.columns.text\); did you mean 'bodi'"
    ):
        read(tmp_path / "d.jsonl", columns={"text": "body"})
    (tmp_path / "d.jsonl").unlink()
    message = r"data.columns.system: no file has a column 'sytem'; did you mean 'system'\?"
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": Q, "completion": A, "system": S}))
    with pytest.raises(TrainingError, match=message):
        read(tmp_path / "*.jsonl", columns={"text": "body", "system": "sytem"})


@pytest.mark.parametrize(
    ("mapped", "other"),
    [
        ("prompt", "completion"),
        ("instruction", "output"),
        ("completion", "prompt"),
        ("output", "instruction"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_half_a_pair_is_mapped(tmp_path: Path, mapped: str, other: str, kind: str) -> None:
    file = tmp_path / f"x.{kind}"
    row = {"ask": Q, other: A}
    if kind == "jsonl":
        file.write_text(json.dumps(row))
    elif kind == "csv":
        file.write_text(f"ask,{other}\n{Q},{A}\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    with pytest.raises(TrainingError, match=f"data.columns maps {mapped} but no {other}; map it too"):
        read(file, columns={mapped: "ask"})
    columns = {mapped: "ask", other: other}
    assert len(read(file, columns=columns)) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"columns": {"promt": "q"}}, "data.columns.promt: unknown field; did you mean 'prompt'"),
        ({"columns": {"text": "body"}, "text_field": "t"}, "columns.text and text_field name the same thing"),
        ({"columns": {"text": 3}}, "data.columns.text"),
    ],
)
def test_mappings_that_cannot_be(write_config: WriteConfig, data: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load_config(write_config(data=data))


def test_all_that_can_be_mapped_is_looked_at() -> None:
    """Every name of `ColumnsConfig` is one that rows have by themselves."""
    named = {key for row, _, _ in ROWS.values() for key in row}
    assert set(ColumnsConfig.model_fields) - {"image"} <= named


# ------------------------------------------------------------------------------------------------ refused

PART = {"type": "input_audio", "input_audio": {"data": "x"}}
WEB = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "preferences": (
        {"prompt": Q, "chosen": A, "rejected": "6"},
        r"preference data .*set data.columns to \{prompt: prompt, completion: chosen\}",
    ),
    "preferences of whole chats": (
        {"prompt": Q, "chosen": CHAT, "rejected": CHAT},
        r"preference data .*set data.columns to \{messages: chosen\}",
    ),
    "preferences beside an answer": (
        {"prompt": Q, "completion": A, "chosen": A, "rejected": "6"},
        "preference data",
    ),
    "empty preferences": ({"prompt": Q, "chosen": "", "rejected": None}, "no field 'text'"),
    "two empty questions": ({"prompt": "", "question": " ", "answer": A}, "field 'prompt' is empty"),
    "two answers of null": ({"prompt": Q, "completion": None, "answer": None}, "'completion' is not a string"),
    "labels": ({"prompt": Q, "completion": A, "label": False}, "preference data .*'label'"),
    "two answers": (
        {"question": Q, "answer": A, "response": A},
        r"fields 'response' and 'answer' could both be the answer; say which in data.columns",
    ),
    "two questions": ({"question": Q, "prompt": Q, "answer": A}, "'prompt' and 'question' could both be the q"),
    "an answer alone": ({"output": A}, "no field 'text' .*it has output"),
    "an answer of null": ({"prompt": Q, "completion": None}, "field 'completion' is not a string"),
    "an answer that is a number": ({"prompt": Q, "completion": 5}, "field 'completion' is not a string"),
    "a text and a list": ({"prompt": Q, "completion": [ANSWER]}, "'completion' is not a string; .* both lists of"),
    "an empty question": ({"instruction": "", "input": " ", "output": A}, "field 'instruction' is empty"),
    "a completion of the user": ({"prompt": CHAT, "completion": [USER]}, "'completion' has no message of the ass"),
    "history": ({"instruction": Q, "output": A, "history": ["x"]}, "field 'history' is not a list of pairs"),
    "an input that is a list": ({"instruction": Q, "input": [1], "output": A}, "field 'input' is not a string"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "Go on."}, *CHAT], "system": S},
        "field 'system' says something else than the chat's own system message",
    ),
    "a system prompt that is none": ({"prompt": Q, "completion": A, "system": 3}, "field 'system' is not a string"),
    "other parts": (
        {"messages": [{"role": "user", "content": [PART]}, ANSWER]},
        r"message 1: part 1 is neither a text, .* nor an image",
    ),
    "images on the web": (
        {"messages": [{"role": "user", "content": [WEB]}, ANSWER]},
        r"image https://example.org/a.png is on the web, and none is fetched; name a file",
    ),
    "a call that is no JSON": (
        {"conversations": turns(("human", Q), ("function_call", "add(2)"), ("gpt", A))},
        "message 2 calls a function, but is not valid JSON",
    ),
    "functions": ({"messages": CHAT, "functions": "add"}, "field 'functions' is not valid JSON"),
    "an unknown role": ({"conversations": turns(("narrator", Q), ("gpt", A))}, "message 1 is from 'narrator'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_used_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    row, message = REFUSED[name]
    with pytest.raises(TrainingError, match=rf"x\.jsonl, line 1: .*{message}") as caught:
        read_row(tmp_path, row)
    assert "\n" not in str(caught.value)


AS_PYTHON = str(CHAT)
CUT_OFF = json.dumps(CHAT)[:-9]


@pytest.mark.parametrize("broken", [AS_PYTHON, CUT_OFF, f" {CUT_OFF}", "{'role': 'user'}"])
@pytest.mark.parametrize("name", ["messages", "conversations", "prompt", "completion", "history", "tools"])
def test_broken_json_is_no_text(tmp_path: Path, name: str, broken: str) -> None:
    if name in ("prompt", "completion") and broken.startswith("{"):
        return  # a text may begin so
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    row = {name: broken} if name in ("messages", "conversations") else {**row, name: broken}
    if name == "history":
        row |= {"prompt": Q, "completion": A}
    with pytest.raises(TrainingError, match=f"x.jsonl, line 1: field {name!r} is not valid JSON"):
        read_row(tmp_path, row)
    if len(row) == 1:
        assert read_row(tmp_path, row, text_field=name).text == broken


def test_lists_of_messages_in_json(tmp_path: Path) -> None:
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER], indent=1)}
    assert read_row(tmp_path, row).messages == CHAT
    with pytest.raises(TrainingError, match="'completion' have to be strings, or both lists of messages"):
        read_row(tmp_path, {**row, "completion": A})
    with pytest.raises(TrainingError, match="field 'messages' is not a string, nor a list of messages"):
        read_row(tmp_path, {"messages": json.dumps({"messages": CHAT})})


@pytest.mark.parametrize("text", ["[1, 2]", "[x] Done", "{", "[{'a': 1}]", '["role"]', AS_PYTHON, CUT_OFF])
def test_answers_may_begin_with_brackets(tmp_path: Path, text: str) -> None:
    document = read_row(tmp_path, {"instruction": "[Verse 1] Go on.", "output": text})
    assert document.messages == [
        {"role": "user", "content": "[Verse 1] Go on."},
        {"role": "assistant", "content": text},
    ]


def test_empty_answers_are_dropped_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"instruction": Q, "output": A}, {"instruction": Q, "output": " "}]
    rows += [
        {"instruction": Q, "response": None, "output": ""},
        {"instruction": Q, "output": None, "answer": ""},
    ]
    rows += [{"messages": [USER, {**ANSWER, "content": ""}]}, {"messages": CALLED[:2]}]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = Tally()
    assert len(read(file, tally)) == 2
    assert tally.dropped == {UNANSWERED: 4}
    assert tally.formats == {"Alpaca": 3, "instruction/answer": 1, "messages": 2}


def test_parquet_without_any_format_is_refused_once(tmp_path: Path) -> None:
    for name, columns, message in (
        ("a", {"chosen": ["a"], "rejected": ["b"]}, "preference data .*messages: chosen"),
        ("c", {"prompt": ["a"], "chosen": ["a"], "rejected": ["b"]}, "preference data .*completion: chosen"),
        ("b", {"bodies": ["a"]}, "no field 'text' .*it has bodies"),
    ):
        file = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(TrainingError, match=rf"{name}.parquet: {message}"):
            read(file)
