"""What `decar serve` shows, and where the rest goes."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from decar.router.errors import StartError
from decar.server.terminal import Start, Terminal, default_log, terminal_of

NAMES = ["code", "prose"]
# Speaks as a server does, and as libraries in it and its children do.
SERVER = """
import logging, os, subprocess, sys
from pathlib import Path
from decar.server.terminal import terminal_of
log = Path(sys.argv[1]) if len(sys.argv) > 1 else None
logging.getLogger("decar").setLevel(logging.INFO)
print("before")
with terminal_of(log) as terminal:
    print("a library on stdout")
    os.write(2, b"C code on stderr\\n")
    subprocess.run([sys.executable, "-c", "print('a child')"])
    logging.getLogger("vllm").warning("vLLM warns")
    logging.getLogger("decar").warning("an engine has died")
    with terminal.starting(["code", "prose"]) as start:
        start.heard = lambda: [(1, "Loading weights")]
        start.phase("starting 2 engines", engines=True)
        if terminal.console.is_terminal:
            input()
        start.ready(0)
    terminal.announce("demo listens")
print("after")
"""


def speak(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-u", "-c", SERVER, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def test_others_write_to_the_file_and_decar_to_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "folder/server.log"
    done = speak(str(log))
    assert done.stdout.splitlines() == ["before", "decar: demo listens", "after"]
    assert done.stderr.splitlines() == [
        "decar: an engine has died",
        "decar: starting 2 engines",
        "decar: expert code: its engine is ready after 0 s",
    ]
    written = log.read_text()
    for line in ("a library on stdout", "C code on stderr", "a child", "vLLM warns"):
        assert f"{line}\n" in written
    assert "WARNING" in written.split("an engine has died")[0].splitlines()[-1]
    assert log.stat().st_mode & 0o077 == 0
    speak(str(log))
    assert (tmp_path / "folder/server.log.1").read_text() == written, "the one before is kept"


def test_with_verbose_all_is_on_the_terminal_and_none_of_it_is_signed() -> None:
    done = speak()
    assert "a library on stdout" in done.stdout.splitlines()
    assert {"C code on stderr", "vLLM warns", "decar: an engine has died"} <= {*done.stderr.splitlines()}


def test_on_a_terminal_each_engine_is_shown_while_it_starts(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    child = pexpect.spawn(
        sys.executable,
        [str(script), str(tmp_path / "log")],
        env={**os.environ, "TERM": "xterm"},
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 100),
    )
    child.expect("starting 2 engines")
    child.expect("prose.*Loading weights")
    child.send("\r")
    child.expect("expert code: its engine is ready after 0 s")
    child.expect("demo listens")
    child.expect(pexpect.EOF)


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="--log-file"), terminal_of(tmp_path / "file/server.log"):
        pass


def test_a_log_is_named_by_ensemble_and_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_log("demo", 8000) == tmp_path / "decar/demo-8000.log"


def test_the_end_of_an_engines_log_is_its_own_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [f"({name} pid=1) line {i} of {name}" for i in range(30) for name in NAMES]
    log.write_text("\n".join([*lines, "Traceback of nobody"]))
    shown = io.StringIO()
    Terminal(io.StringIO(), shown, log).show_end_of_log(["prose"])
    said = shown.getvalue().splitlines()
    assert said[0] == "decar: the end of prose's log:"
    assert said[-1] == "  (prose pid=1) line 29 of prose"
    assert "code" not in shown.getvalue()


def test_what_engines_have_said_last_is_cut_to_the_terminal() -> None:
    terminal = Terminal(io.StringIO(), io.StringIO(), Path("log"))
    start = Start(terminal, NAMES)
    start.heard = lambda: [(0, "first"), (0, "x" * 500)]
    start.phase("starting", engines=True)
    terminal.console.width = 60
    terminal.console.print(start.picture())
    shown = terminal.console.file
    assert isinstance(shown, io.StringIO)
    lines = shown.getvalue().splitlines()
    assert any("code" in line and "xxx…" in line for line in lines)
    assert all(len(line) <= 60 for line in lines)


def test_a_message_that_cannot_be_shown_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(sys, "stderr", open(os.devnull))  # noqa: SIM115 - as one that cannot be written to
    with terminal_of(None):
        logging.getLogger("decar").error("said to nobody")
