"""`decar chat` as it is used: on a terminal, where keys are pressed, and in a pipe."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest
import typer
from typer.testing import CliRunner

from decar.clients.chat import chat
from tests.clients.fake_server import FakeServer, fake_server

CHAT = ["-m", "decar.server", "chat"]
DEADLINE_S = 30
ENTER, CTRL_C, CTRL_D, UP, ALT_ENTER = "\r", "\x03", "\x04", "\x1b[A", "\x1b\r"
PROMPT = r">[^>]*\x1b\[\?25h"
"""The sign, and then the cursor appears."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@contextmanager
def terminal(server: FakeServer, state: Path, *flags: str) -> Iterator[pexpect.spawn]:
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm"}
    environment["PROMPT_TOOLKIT_NO_CPR"] = "1"  # this terminal does not say where its cursor is
    environment.pop("NO_COLOR", None)
    child = pexpect.spawn(
        sys.executable,
        [*CHAT, "--base-url", server.address, *flags],
        env=environment,
        encoding="utf-8",
        timeout=DEADLINE_S,
        dimensions=(40, 100),
    )
    try:
        child.expect("/help shows commands")
        child.expect(PROMPT)
        yield child
    finally:
        child.close(force=True)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def ask(child: pexpect.spawn, line: str, until: str) -> str:
    """Type a line, and what is shown until a pattern has come, itself included."""
    child.send(line + ENTER)
    child.expect(until)
    return plain(child.before + child.after)


def leave(child: pexpect.spawn) -> None:
    child.send("/quit" + ENTER)
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def test_a_conversation_with_its_commands(server: FakeServer, tmp_path: Path) -> None:
    with terminal(server, tmp_path) as child:
        ask(child, "hello", "you said hello")
        child.expect(r"2 tokens; mean weights: code 55\.0%, prose 45\.0%")
        picture = ask(child, "/why", r"leader: code")
        assert "code" in picture
        assert "weight 90% or more" in picture
        ask(child, "/weights code=.7", r"weights: code 0\.7, prose 0\.3")
        ask(child, "again", "you said again")
        ask(child, "more", "maximum context length is 512 tokens")
        child.expect("the conversation stays as it was: /forget")
        ask(child, "/forget", "forgotten; 1 questions")
        ask(child, "more", "you said more")
        ask(child, "/expert pros", "did you mean 'prose'")
        ask(child, "/expert prose", "asking demo/prose")
        ask(child, f"/save {tmp_path}/chat.md", "saved 4 messages")
        ask(child, "/new", "a new conversation")
        ask(child, "//etc", "you said /etc")
        leave(child)
    assert "**you:** again" in (tmp_path / "chat.md").read_text()
    hello, again, refused, more, etc = server.asked
    assert (hello["model"], hello["decar"]) == ("demo", {"trace": True})
    assert again["decar"]["weights"] == pytest.approx({"code": 0.7, "prose": 0.3})
    assert [said["content"] for said in refused["messages"][2:]] == [
        "again",
        "slowly... you said again",
        "more",
    ]
    assert more["messages"] == refused["messages"][2:]
    assert etc["model"] == "demo/prose"


def test_ctrl_c_stops_the_answer_and_nothing_else(server: FakeServer, tmp_path: Path) -> None:
    with terminal(server, tmp_path) as child:
        ask(child, "slowly", r"slowly\.\.\.")
        child.send(CTRL_C)
        child.expect(r"\(stopped\)")
        child.expect("1 tokens; mean weights")
        assert server.left.wait(DEADLINE_S), "the request goes on"
        child.expect(PROMPT)
        child.send("what I do not send")
        child.send(CTRL_C)
        ask(child, "next", "you said next")
        child.expect(PROMPT)
        child.send(CTRL_D)
        child.expect(pexpect.EOF)
    # What had come of the answer is part of the conversation.
    contents = [said["content"] for said in server.asked[1]["messages"]]
    assert contents == ["slowly", "slowly...", "next"]


def test_lines_are_edited_remembered_and_may_be_several(server: FakeServer, tmp_path: Path) -> None:
    with terminal(server, tmp_path) as child:
        child.send("def f():" + ALT_ENTER + "    pass" + ENTER)
        child.expect("mean weights")
        leave(child)
    with terminal(server, tmp_path) as child:  # another day
        child.send(UP + UP + ENTER)  # /quit, and before that
        child.expect("mean weights")
        leave(child)
    assert [body["messages"][-1]["content"] for body in server.asked] == ["def f():\n    pass"] * 2
    assert (tmp_path / "decar/chat-history").stat().st_mode & 0o077 == 0


def piped(question: str, *flags: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(chat)
    return CliRunner().invoke(app, flags, input=question)


def test_a_pipe_is_one_question_and_gets_the_answer_alone(server: FakeServer) -> None:
    done = piped("two\nlines\n", "--base-url", f"http://{server.address}")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "slowly... you said two\nlines\n", "")
    [body] = server.asked
    assert body["messages"] == [{"role": "user", "content": "two\nlines"}]
    assert "decar" not in body


@pytest.mark.parametrize(
    ("question", "address", "flags", "says"),
    [
        ("", "{}", (), "nothing came through the pipe"),
        ("x", "127.0.0.1:9", (), "no server answers at http://127.0.0.1:9/v1"),
        ("x", "{}/elsewhere", (), "is no decar server"),
        ("x", "{}", ("--weights", "cod=1"), "did you mean 'code'"),
    ],
)
def test_what_is_wrong_is_one_line_on_standard_error(
    server: FakeServer, question: str, address: str, flags: tuple[str, ...], says: str
) -> None:
    done = piped(question, "--base-url", address.format(server.address), *flags)
    assert (done.exit_code, done.stdout) == (1, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
