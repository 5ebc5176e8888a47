"""What a user sees of a running server in a terminal: `decar ps`, `decar chat`, and its log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from tests.helpers import Server

pytestmark = pytest.mark.engines

DECAR = [sys.executable, "-m", "decar.server"]
DEADLINE_S = 120
ENTER, CTRL_D = "\r", "\x04"


def test_ps_shows_the_server(duo_server: Server) -> None:
    done = subprocess.run(
        [*DECAR, "ps"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "COLUMNS": "140"},
        check=True,
    )
    [line] = [line for line in done.stdout.splitlines() if f" {duo_server.process.pid} " in line]
    assert re.match(rf" *duo +{re.escape(duo_server.url)}/v1 .* ready +2 of 2 +0 of 32 ", line)


def test_the_log_names_experts_and_the_terminal_says_little(duo_server: Server) -> None:
    """Both are in one file here: what decar says on the terminal begins with "decar: "."""
    lines = duo_server.log.read_text().splitlines()
    said = [line for line in lines if line.startswith("decar: ")]
    assert said[0].startswith("decar: duo: experts code, prose")
    [listens] = [i for i, line in enumerate(said) if line == f"decar: duo listens on {duo_server.url}/v1"]
    assert listens <= 12
    for name in ("code", "prose"):
        assert any(re.match(rf"\({name} pid=\d+\) INFO ", line) for line in lines)


def test_statistics_have_their_experts_names(duo_server: Server) -> None:
    with duo_server.openai() as client:
        client.completions.create(model="duo", prompt="import os", max_tokens=4)
    # vLLM writes them every ten seconds.
    for name in ("code", "prose"):
        assert duo_server.has_logged(rf"\] {name}: Avg prompt throughput")
    assert "Engine 000" not in duo_server.log.read_text()


def test_a_pipe_gets_the_answer_alone(duo_server: Server) -> None:
    command = [*DECAR, "chat", "--base-url", duo_server.url, "--max-tokens", "5", "--temperature", "0"]
    done = subprocess.run(
        command, input="import os", capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    with duo_server.openai() as client:
        answer = client.chat.completions.create(
            model="duo", messages=[{"role": "user", "content": "import os"}], max_tokens=5, temperature=0
        )
    assert done.stdout == f"{answer.choices[0].message.content}\n"
    assert done.stderr == ""


def test_a_conversation_that_becomes_too_long_goes_on(duo_server: Server, tmp_path: Path) -> None:
    child = pexpect.spawn(
        DECAR[0],
        [*DECAR[1:], "chat", "--base-url", duo_server.url, "--max-tokens", "8"],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8",
        timeout=DEADLINE_S,
        dimensions=(50, 120),
    )
    child.expect("/help shows commands")
    child.send("import os" + ENTER)
    child.expect("mean weights: code")
    child.send("word " * 600 + ENTER)
    child.expect("the conversation stays as it was: /forget")
    child.send("/expert prose" + ENTER)
    child.expect("asking duo/prose")
    child.send("and then" + ENTER)
    child.expect(r"prose.* 100\.0%")
    child.send("/why" + ENTER)
    child.expect("leader: .*prose")
    child.send(f"/save {tmp_path}/chat.json" + ENTER)
    child.expect("saved 4 messages")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
