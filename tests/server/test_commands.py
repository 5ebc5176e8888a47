"""The `decar` command itself: what it offers, and what it imports to say so."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from typer.testing import CliRunner

from decar.server.cli import app
from decar.server.commands import described, loaded

HEAVY = {"vllm", "torch", "transformers", "openai", "numpy", "httpx", "matplotlib"}
IMPORTED = """
import sys
from decar.server.cli import main
sys.argv = ["decar", *{arguments!r}]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & {heavy!r}), sep=",")
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["serve", "--help"], ["ps", "--help"]], ids=str
)
def test_help_imports_nothing_that_takes_long(arguments: list[str]) -> None:
    program = IMPORTED.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_help_lists_every_command_with_what_it_is_for() -> None:
    said = CliRunner().invoke(app, ["--help"], terminal_width=200).stdout
    for command in ("serve", "reload", "inspect", "ps", "bench", "chat", "explain", "--install-completion"):
        assert f" {command} " in said
    assert "Measure what serving an ensemble costs." in said
    assert "Chat with a running server." in said


def test_an_unknown_command_is_told_with_the_one_that_was_meant() -> None:
    for wrong, meant in (("chatt", "chat"), ("srve", "serve"), ("explian", "explain")):
        done = CliRunner().invoke(app, [wrong])
        assert done.exit_code == 2
        assert f"Did you mean '{meant}'?" in done.stderr


def test_python_m_decar_is_decar() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "decar", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("decar ")


def test_a_shell_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_DECAR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "decar ch")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = CliRunner().invoke(app, [], prog_name="decar")
    assert done.stdout.split() == ["chat"]


def test_commands_of_other_parts_are_functions_or_groups() -> None:
    chat = EntryPoint("talk", "decar.clients.chat:chat", "decar.commands")
    assert described(chat).startswith("Chat with a running server.")
    command = loaded(chat)
    assert command.name == "talk"
    assert "--base-url" in [name for option in command.params for name in option.opts]
    assert described(EntryPoint("x", "decar.nowhere.at.all:x", "decar.commands")) == ""
