"""What every check knows of the server, and how it says what it has seen. Runs in a client's own environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SERVER = os.environ["DECAR_URL"]
URL = f"{SERVER}/v1"
KEY = os.environ["DECAR_KEY"]
MODEL = os.environ["DECAR_MODEL"]
EXPERT = f"{MODEL}/code"
TOKENIZER = os.environ["DECAR_TOKENIZER"]
WORK = Path(os.environ["DECAR_WORK"])
CHAT: list[Any] = [{"role": "user", "content": "How many are 1 and 2?"}]
TRACE = {"decar": {"trace": True}}
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
"""Parameters of a tool."""

_seen: list[str] = []


def seen(what: str) -> None:
    """Note something that has been checked; it becomes part of the table's remark."""
    print(f"seen: {what}", flush=True)
    _seen.append(what)


def remark(*more: str) -> None:
    """The last line: what the table says."""
    print("remark: " + ", ".join([*_seen, *more]), flush=True)


def raises(kinds: type[BaseException] | tuple[type[BaseException], ...], act: Any, *words: str) -> Any:
    """The error that ``act`` ends with, which has all ``words`` in its text."""
    raised: Any = None
    try:
        act()
    except kinds as error:
        raised = error
    assert raised is not None, f"nothing was raised; expected {kinds}"
    assert all(word in str(raised) for word in words), (words, str(raised))
    return raised
