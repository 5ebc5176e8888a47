"""What a row says: a text or a chat, by the fields that it has. Knows the formats people keep data in, no files.

A row is the first of these that it has the fields of, an empty or null text or chat counting as none:

==================  =================================================================================================
text                ``data.text_field``
messages            ``messages``: OpenAI's, content parts, ``tools``, ``functions`` and calls of them included
ShareGPT, LLaVA     ``conversations``; with images LLaVA
prompt/completion   a question (``instruction``, ``prompt``, ``question``, ``query``) and an answer (``output``,
and the like        ``completion``, ``response``, ``answer``), both texts; Alpaca where it is ``instruction`` and
                    ``output``. ``prompt`` and ``completion`` may also be lists of messages (TRL)
==================  =================================================================================================
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decar.router.errors import TrainingError, did_you_mean
from decar.router.images import UnreadableImage, decode_image
from decar.training.config import DataConfig
from decar.training.data.files import BadRow, kind_of, parse_json

Messages = list[dict[str, Any]]
"""One chat: ``{"role": ..., "content": ...}`` each, and what else a chat template reads."""

Tools = list[dict[str, Any]]
"""What a chat's assistant may call, as OpenAI's API describes it."""

MESSAGES_FIELD = "messages"
TOOLS_FIELD = "tools"
IMAGE_MARK = "<image>"
"""Stands in a message where an image belongs."""

TEXT = "text"
"""The format of a row, or a file, that is one text."""

_CONVERSATIONS_FIELD = "conversations"
_FUNCTIONS_FIELD = "functions"  # OpenAI's name for tools before there were others
_QUESTIONS = ("instruction", "prompt", "question", "query")
_ANSWERS = ("output", "completion", "response", "answer")
_OTHER_HALF = {
    "instruction": "output",
    "output": "instruction",
    "prompt": "completion",
    "completion": "prompt",
}
# What else of a task its question needs: Alpaca's name, and Dolly's.
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_PREFERENCE = ("chosen", "rejected")
_BESIDE = (*_SYSTEMS, TOOLS_FIELD, _FUNCTIONS_FIELD)
_MAIN = (TEXT, MESSAGES_FIELD, "prompt", "completion", "instruction", "output")
"""Of `ColumnsConfig`: a row that has one of these is made of the columns that are mapped, and of no others."""

_CALL = "function_call"
# Who speaks, by the names of ShareGPT and its kin.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model", "bot", "ai"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "image", "input_image")
_AS_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""How a list of messages begins, in JSON, and in Python, which is refused."""
_OF_PATH = re.compile(r"path\[(?P<index>-\d+)\]|path\.(?P<what>suffix|name|stem)")


@dataclass(frozen=True)
class Chat:
    """A chat instead of a text, with the ``tools`` that its template is told of and its ``images``, encoded."""

    messages: Messages
    tools: Tools | None = None
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Row:
    """A text or a chat, the ``format`` that it was kept in, and the value of the field that was asked for."""

    given: str | Chat
    format: str
    domain: str | None = None


@dataclass
class RowReader:
    """Makes texts and chats of rows, as ``data`` says.

    Args:
        domain_field: whose value becomes `Row.domain`; None where nobody asks.
    """

    data: DataConfig
    domain_field: str | None = None
    _seen: dict[str, None] = field(default_factory=dict)

    def columns(self, names: Sequence[str]) -> list[str]:
        """Of a table's columns, those that `__call__` looks at.

        Raises:
            BadRow: they make no text and no chat, or the domain is not among them.
        """
        self._saw(names)
        mapped = self._mapped(dict.fromkeys(names, "not known yet"))  # nor whether it is empty
        is_pair = all(any(name in mapped for name in names_) for names_ in (_QUESTIONS, _ANSWERS))
        if not self._fields(mapped) and not is_pair:
            _refuse_preferences(mapped)
            raise BadRow(self._no_format(names))
        wanted = {
            self.data.text_field,
            MESSAGES_FIELD,
            _CONVERSATIONS_FIELD,
            *_QUESTIONS,
            *_ANSWERS,
            *_INPUTS,
            *_PREFERENCE,
            *_BESIDE,
            "history",
            "label",
            self.data.image_field,
            *self.data.columns.of.values(),
        }
        if _CONVERSATIONS_FIELD in names:
            wanted.update(self._image_fields())
        if self.domain_field is not None and not is_of_path(self.domain_field):
            first = self.domain_field if self.domain_field in names else self.domain_field.partition(".")[0]
            if first not in names:
                raise BadRow(_no_field(self.domain_field, "partition.field", names))
            wanted.add(first)
        return [name for name in names if name in wanted]

    def __call__(self, given: dict[str, Any], source: Path | str) -> Row:
        """
        Args:
            given: the row.
            source: the file that it stands in; images lie relative to its folder.

        Raises:
            BadRow: it cannot be used.
        """
        self._saw(given)
        row = self._mapped(given)
        folder = source.parent if isinstance(source, Path) else None
        used, format, named = self._text_or_chat(row, given, folder)
        domain = None if self.domain_field is None else self._domain(given, source)
        chat = [used.messages, used.tools] if isinstance(used, Chat) else used
        try:
            json.dumps([chat, domain], ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can spell half of a character, which no file can hold
            raise BadRow(f"field {named!r} holds half of a surrogate pair") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRow(f"field {named!r} holds what JSON cannot ({error})") from None
        return Row(used, format, domain)

    def check_mapped(self) -> None:
        """Refuse a column of ``data.columns`` that no row has had.

        Raises:
            TrainingError: there is one.
        """
        for name, column in self.data.columns.of.items():
            if self._seen and column not in self._seen:
                raise TrainingError(
                    f"data.columns.{name}: no file has a column {column!r}{_near(column, self._seen)}"
                )

    def _saw(self, names: Iterable[str]) -> None:
        if self.data.columns.of:
            self._seen.update(dict.fromkeys(names))

    def _mapped(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row`` by the names of ``data.columns``; other columns only where none of those is a text or a chat."""
        mapped = {name: row[column] for name, column in self.data.columns.of.items() if column in row}
        if "image" in mapped:
            mapped[self.data.image_field] = mapped.pop("image")
        if TEXT in mapped:
            mapped[self.data.text_field] = mapped.pop(TEXT)
        if mapped.keys() & {*_MAIN, self.data.text_field}:
            row = {name: row[name] for name in (*_BESIDE, self.data.image_field) if name in row}
        return row | mapped

    def _fields(self, names: Iterable[str]) -> list[str]:
        """Which of ``names`` may hold a row's whole text or chat, the first choice first."""
        wanted = dict.fromkeys((self.data.text_field, MESSAGES_FIELD, _CONVERSATIONS_FIELD))
        return [name for name in wanted if name in names]

    def _image_fields(self) -> tuple[str, ...]:
        """Where LLaVA's images are, and where they are usually, so that a mark says that the setting is missing."""
        return self.data.image_field, "image", "images"

    def _no_format(self, names: Iterable[str]) -> str:
        for name, column in self.data.columns.of.items():
            if name in _MAIN and column not in names:
                return _no_field(column, f"data.columns.{name}", names)
        mapped = self.data.columns.of.keys()
        for ours, theirs in ((_QUESTIONS, _ANSWERS), (_ANSWERS, _QUESTIONS)):
            half = next((name for name in ours if name in mapped), None)
            if half is not None and not mapped & {*theirs}:
                return f"data.columns maps {half} but no {_OTHER_HALF[half]}; map it too"
        return _no_field(self.data.text_field, "data.text_field, data.columns", names)

    def _text_or_chat(
        self, row: dict[str, Any], given: dict[str, Any], folder: Path | None
    ) -> tuple[str | Chat, str, str]:
        """(text or chat, its format, the field that it is in)."""
        fields = self._fields(row)
        # An empty text beside a chat, or an empty chat beside a text, is none.
        name = next((name for name in fields if not _is_nothing(row[name])), None)
        if name is None:
            _refuse_preferences(row)
            pair = _pair(row)
            if pair:
                _refuse_labels(row)
                return self._from_pair(row, *pair, folder), _pair_format(*pair), pair[1]
            if not fields:
                raise BadRow(self._no_format(given))
            name = fields[0]
        value = row[name]
        if isinstance(value, str) and name != self.data.text_field:
            value = _parsed(value, name)
        if isinstance(value, str):
            if not _is_no_image(row.get(self.data.image_field)) and name != self.data.image_field:
                raise BadRow(
                    f"field {self.data.image_field!r} (data.image_field): an image needs a chat to stand in, but "
                    f"{name!r} is a text; give it messages, or name another field in data.image_field"
                )
            return value, TEXT, name
        if not isinstance(value, list):
            also = "" if name == self.data.text_field else ", nor a list of messages"
            raise BadRow(f"field {name!r} is not a string{also}")
        pictures: list[Any] = []
        messages = _messages(value, name, pictures)
        may_have_images = name == _CONVERSATIONS_FIELD and any(key in row for key in self._image_fields())
        chat = self._chat(messages, row, pictures, folder, check_marks=may_have_images)
        if name != _CONVERSATIONS_FIELD and not any("from" in message for message in value):
            return chat, MESSAGES_FIELD, name
        return chat, "LLaVA" if chat.images else "ShareGPT", name

    def _from_pair(self, row: dict[str, Any], asked: str, answered: str, folder: Path | None) -> Chat:
        question, answer = row[asked], row[answered]
        # Tables keep lists of messages as JSON; any other text may begin with a bracket, and answers with a chat.
        if isinstance(question, str) and _AS_MESSAGES.match(question):
            question = _parsed(question, asked)
            if isinstance(answer, str):
                answer = _parsed(answer, answered) if _AS_MESSAGES.match(answer) else answer
        pictures: list[Any] = []
        if isinstance(question, list) and isinstance(answer, list):
            before = [
                _message(m, f"field {asked!r}: message {i}", pictures) for i, m in enumerate(question, 1)
            ]
            # As TRL has it: what is learned is the completion.
            before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in before]
            after = [
                _message(m, f"field {answered!r}: message {i}", pictures) for i, m in enumerate(answer, 1)
            ]
            messages = _check_roles([*before, *after], answered)
            if not any(message["role"] == "assistant" for message in after):
                raise BadRow(f"field {answered!r} has no message of the assistant")
            return self._chat(messages, row, pictures, folder)
        for name, value in ((asked, question), (answered, answer)):
            if not isinstance(value, str):
                also = ", or both lists of messages" if isinstance(value, list) else ""
                raise BadRow(
                    f"field {name!r} is not a string; {asked!r} and {answered!r} have to be strings{also}"
                )
        if asked == "instruction":
            more = next((row[name] for name in _INPUTS if not _is_nothing(row.get(name))), "")
            if not isinstance(more, str):
                raise BadRow("field 'input' is not a string")
            question = "\n\n".join(part for part in (question, more) if part.strip())
        if not question.strip():
            raise BadRow(f"field {asked!r} is empty")
        messages = [
            *_history(row.get("history")),
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return self._chat(messages, row, pictures, folder)

    def _chat(
        self,
        messages: Messages,
        row: dict[str, Any],
        pictures: list[Any],
        folder: Path | None,
        check_marks: bool = False,
    ) -> Chat:
        """A chat with the system prompt, the tools and the images that stand beside its messages in ``row``.

        Args:
            pictures: those that the messages' own parts name, None for each part that names none.
        """
        value = row.get(self.data.image_field)
        beside = [] if _is_no_image(value) else value if isinstance(value, list) else [value]
        own = [picture for picture in pictures if picture is not None]
        if own and (beside or len(own) < len(pictures)):
            raise BadRow(
                f"some images are in the messages and some in field {self.data.image_field!r}, or nowhere; "
                "put all of them into one place"
            )
        images = tuple(self._image(picture, folder) for picture in own or beside)
        # Text that never heard of images may well speak of <image>.
        if images or pictures or check_marks:
            _check_marks(messages, images)
        return Chat(_with_system(messages, row), _tools(row), images)

    def _image(self, given: Any, folder: Path | None) -> bytes:
        encoded = given.get("bytes") or given.get("path") if isinstance(given, dict) else given
        what = f"field {self.data.image_field!r}"
        if isinstance(encoded, str) and encoded.startswith("data:"):
            what, encoded = "an image", _from_data_url(encoded)
        elif isinstance(encoded, str):
            what, encoded = self._file(encoded, folder)
        if not isinstance(encoded, bytes):
            raise BadRow(f"{what} is neither a path nor a list of paths")
        try:
            decode_image(encoded)
        except UnreadableImage as error:
            raise BadRow(f"{what} cannot be decoded ({error})") from None
        return encoded

    def _file(self, name: str, folder: Path | None) -> tuple[str, bytes]:
        """(what it is, its content) of the image file ``name``."""
        if re.match(r"https?://", name):
            raise BadRow(
                f"image {name} is on the web, and none is fetched; name a file, or write it as a data: URL"
            )
        folder = self.data.image_dir or folder
        if folder is None:
            raise BadRow(f"image {name} is a path, and there is no folder it could be in; set data.image_dir")
        path = folder / name.removeprefix("file://")
        try:
            return f"image {path}", path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadRow(
                f"image {path} cannot be read ({reason}); paths are relative to the file's folder, "
                "or to data.image_dir"
            ) from None

    def _domain(self, row: dict[str, Any], source: Path | str) -> str:
        assert self.domain_field is not None
        if is_of_path(self.domain_field):
            return domain_of_path(self.domain_field, source)
        value: Any = row
        if self.domain_field in row:
            value = row[self.domain_field]
        else:
            for name in self.domain_field.split("."):
                value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            raise BadRow(_no_field(self.domain_field, "partition.field", row))
        return str(value)


def is_of_path(domain_field: str) -> bool:
    """Whether ``partition.field`` is a part of files' paths: ``path[-2]``, ``path.suffix``, ``path.name``,
    ``path.stem``."""
    return _OF_PATH.fullmatch(domain_field) is not None


def domain_of_path(domain_field: str, source: Path | str) -> str:
    """The part of the path of ``source`` that ``domain_field`` names; its ending is that without compression.

    Raises:
        TrainingError: ``source`` is no file, or its path is not so long.
    """
    found = _OF_PATH.fullmatch(domain_field)
    assert found is not None
    if not isinstance(source, Path):
        raise TrainingError(f"{source} is no file, so it has no {domain_field} (partition.field)")
    if found["what"]:
        return kind_of(source) if found["what"] == "suffix" else str(getattr(source, found["what"]))
    try:
        return source.absolute().parts[int(found["index"])]
    except IndexError:
        raise TrainingError(
            f"{source} lies in fewer folders than {domain_field} (partition.field) counts"
        ) from None


def _is_nothing(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _is_no_image(value: Any) -> bool:
    """Whether an image's field is empty; in parquet an image is a struct of bytes and path."""
    return _is_nothing(value) or value == b"" or (isinstance(value, dict) and not any(value.values()))


def _parsed(value: str, name: str) -> Any:
    """What a table keeps as JSON in field ``name``; any other text as it is.

    Raises:
        BadRow: it begins as JSON, and is none: cut off, or as Python writes it.
    """
    return parse_json(value, f"field {name!r} is ") if value.lstrip().startswith(("[", "{")) else value


# ------------------------------------------------------------------------------------- a question and its answer


def _pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """(the field of the question, that of the answer), or None where one is missing.

    Raises:
        BadRow: two of a kind say something.
    """
    found: list[str] = []
    for names in (_QUESTIONS, _ANSWERS):
        mine = [name for name in names if name in row]
        if not mine:
            return None
        said = [name for name in mine if not _is_nothing(row[name])]
        if len(said) > 1:
            raise BadRow(
                f"fields {said[0]!r} and {said[1]!r} could both be the {'question' if not found else 'answer'}; "
                "say which in data.columns (prompt, completion)"
            )
        # Where all are empty, one that is a text: an empty answer is counted, and null is an error.
        found.append(said[0] if said else max(mine, key=lambda name: row[name] is not None))
    asked, answered = found
    return asked, answered


def _pair_format(asked: str, answered: str) -> str:
    return "Alpaca" if (asked, answered) == ("instruction", "output") else f"{asked}/{answered}"


def _history(value: Any) -> Messages:
    """Alpaca's earlier questions and answers."""
    value = _parsed(value, "history") if isinstance(value, str) else value
    if _is_nothing(value):
        return []
    messages: Messages = []
    for turn in value if isinstance(value, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise BadRow("field 'history' is not a list of pairs, a question and an answer")
        messages += [
            {"role": role, "content": said} for role, said in zip(("user", "assistant"), turn, strict=True)
        ]
    return messages


def _refuse_preferences(row: Mapping[str, Any]) -> None:
    if any(_is_nothing(row.get(name)) for name in _PREFERENCE):
        return
    chosen = row["chosen"]
    is_whole = isinstance(chosen, list) and any(
        isinstance(message, dict) and message.get("role") == "user" for message in chosen
    )
    mapping = (
        "{messages: chosen}" if is_whole or "prompt" not in row else "{prompt: prompt, completion: chosen}"
    )
    raise BadRow(
        "preference data (fields 'chosen' and 'rejected') is not what experts learn from; "
        f"to learn what was chosen, set data.columns to {mapping}"
    )


def _refuse_labels(row: Mapping[str, Any]) -> None:
    if isinstance(row.get("label"), bool):
        raise BadRow(
            "preference data (field 'label' says whether an answer is good) is not what experts learn from; keep the "
            "rows whose label is true, without it"
        )


# ------------------------------------------------------------------------------------------------------- messages


def _messages(given: list[Any], name: str, pictures: list[Any]) -> Messages:
    is_strict = name == _CONVERSATIONS_FIELD
    return _check_roles(
        [
            _message(message, f"field {name!r}: message {number}", pictures, is_strict)
            for number, message in enumerate(given, start=1)
        ],
        name,
    )


def _check_roles(messages: Messages, name: str) -> Messages:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        shown = roles if len(roles) <= 8 else [*roles[:8], "..."]
        raise BadRow(
            f"field {name!r}: a chat needs an assistant's message after another's; its roles are {shown}"
        )
    return messages


def _message(given: Any, where: str, pictures: list[Any], only_known: bool = False) -> dict[str, Any]:
    """A message as chat templates want it, and as a server makes it of a request.

    Args:
        where: names it in errors.
        pictures: takes the images of its parts.
        only_known: whether a role that ShareGPT has not is refused; else it is the template's concern.
    """
    if not isinstance(given, dict):
        raise BadRow(f"{where} needs a role and a content, both strings")
    # A parquet column has the same keys in every message, null where one has none.
    message = {key: said for key, said in given.items() if said is not None}
    if "from" in message and "role" not in message:
        message, only_known = _from_sharegpt(message, where), True
    _set_role(message, where, only_known)
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], where, pictures)
    if _CALL in message:
        message.setdefault("tool_calls", [_as_tool_call(message.pop(_CALL))])
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if "tool_calls" in message:
        message.setdefault("content", "")
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise BadRow(f"{where} needs a role and a content, both strings")
    if message.get("weight", 1) not in (0, 1):
        raise BadRow(f"{where} has the weight {message['weight']!r}; it is 1, or 0 where it is not learned")
    return message


def _from_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("value"), str | list):
        raise BadRow(f"{where} needs a from and a value, both strings")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    return {"role": message["from"], "content": message["value"], **weight}


def _set_role(message: dict[str, Any], where: str, only_known: bool) -> None:
    """Its role by the name that templates have for it, a call of a function as OpenAI writes it."""
    role = message.get("role")
    if not isinstance(role, str):
        if only_known:
            raise BadRow(f"{where} is from {role!r}, which is none of {', '.join(_ROLES)}")
        return
    known = _ROLES.get(role.lower().replace("-", "_") if only_known else role)
    if known is None and only_known:
        raise BadRow(f"{where} is from {role!r}, which is none of {', '.join(_ROLES)}")
    if known == _CALL:
        calls = message.pop("content", None)
        if isinstance(calls, str):
            calls = parse_json(calls, f"{where} calls a function, but is ")
        message["tool_calls"] = [_as_tool_call(c) for c in (calls if isinstance(calls, list) else [calls])]
        known = "assistant"
    message["role"] = known or role


def _joined(parts: list[Any], where: str, pictures: list[Any]) -> str:
    """The text of content ``parts``: texts a line each, as vLLM joins them, and a mark for each image."""
    content = ""
    was_text = False
    for number, part in enumerate(parts, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            content += "\n" * was_text + part["text"]
            was_text = True
        elif kind in _IMAGE_PARTS:
            pictures.append(_picture(part))
            content += f"{IMAGE_MARK}\n"  # the line end belongs to the mark
            was_text = False
        else:
            raise BadRow(
                f'{where}: part {number} is neither a text, as in {{"type": "text", "text": "..."}}, nor an image'
            )
    return content


def _picture(part: dict[str, Any]) -> Any:
    """What a content part says of its image: a URL, a path, the bytes; None where it says nothing."""
    given = next(
        (part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None
    )
    return given.get("url", given) if isinstance(given, dict) else given


def _from_data_url(url: str) -> bytes:
    start, comma, data = url.partition(",")
    try:
        if not comma or not start.endswith(";base64"):
            raise ValueError("it has to be data:image/...;base64,...")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise BadRow(f"the image in a data: URL cannot be read ({error})") from None


def _with_system(messages: Messages, row: Mapping[str, Any]) -> Messages:
    """``messages`` with the system prompt that stands beside them before them."""
    name = next((name for name in _SYSTEMS if not _is_nothing(row.get(name))), None)
    if name is None:
        return messages
    if not isinstance(row[name], str):
        raise BadRow(f"field {name!r} is not a string")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": row[name]}, *messages]
    if messages[0]["content"] != row[name]:
        raise BadRow(f"field {name!r} says something else than the chat's own system message; drop one")
    return messages


def _check_marks(messages: Messages, images: tuple[bytes, ...]) -> None:
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != len(images):
        raise BadRow(
            f"{marks} {IMAGE_MARK} marks in the messages, but {len(images)} images; each image needs one"
        )
    if any(message["role"] == "assistant" and IMAGE_MARK in message["content"] for message in messages):
        raise BadRow(f"an {IMAGE_MARK} mark in an answer; a model is asked about images and answers in text")


# ---------------------------------------------------------------------------------------------------------- tools


def _as_tool_call(call: Any) -> Any:
    """A call of a function as OpenAI writes it among ``tool_calls``, which is how a server gives it to a template."""
    is_bare = isinstance(call, dict) and "function" not in call
    return {"type": "function", "function": call} if is_bare else call


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """``calls`` with their arguments as objects: OpenAI writes them as JSON, which a template would quote again."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function", call), dict) for call in calls
    ):
        raise BadRow(f"{where} has tool_calls that are not a list of objects, each with a function")
    parsed = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where} calls a tool with arguments that are ")
        if not isinstance(arguments, dict):
            raise BadRow(f"{where} calls a tool with arguments that are not an object")
        function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def _tools(row: Mapping[str, Any]) -> Tools | None:
    """The tools of a row, which may write them as JSON, or as functions."""
    name = TOOLS_FIELD if not _is_nothing(row.get(TOOLS_FIELD)) else _FUNCTIONS_FIELD
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        value = parse_json(value, f"field {name!r} is ")
    if _is_nothing(value):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"field {name!r} is not a list of objects")
    if name == TOOLS_FIELD:
        return value
    return [{"type": "function", "function": function} for function in value]


def _no_field(name: str, setting: str, names: Iterable[str]) -> str:
    return f"no field {name!r} ({setting}){_near(name, names)}"


def _near(name: str, names: Iterable[str]) -> str:
    names = list(map(str, names))
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return did_you_mean(name, names) or f"; it has {shown or 'none'}"
