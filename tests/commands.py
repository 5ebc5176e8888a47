"""Whether a command that a document gives can be given: programs, commands, flags, targets and files exist. Runs none.

Words in capitals, and those with a $, stand for others.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import typer

from decar.router.errors import DecarError
from decar.server.cli import app as decar_app
from decar.server.vllm_adapter.arguments import parse_flags
from decar.training.cli import app as train_app
from decar.training.config import load_config
from tests.documents import ROOT

OTHERS = {
    "accelerate",
    "aiperf",
    "cat",
    "cd",
    "curl",
    "docker",
    "echo",
    "export",
    "helm",
    "kubectl",
    "llm",
    "lm_eval",
    "rsync",
    "source",
    "ssh",
    "torchrun",
    "vllm",
}
"""Programs of others: their flags are theirs."""
MODULES = {"decar": "decar", "decar.server": "decar", "decar.training": "decar-train"}
"""What `python -m` starts as another command."""

_STANDS_FOR_ANOTHER = re.compile(r"[A-Z][A-Z0-9_]*|.*\$.*", re.DOTALL)


class NoSuchCommand(AssertionError):
    """A command that a document gives cannot be given."""


def check(words: list[str], whole: bool = True) -> None:
    """
    Args:
        words: a simple command.
        whole: whether it has to have all that its program asks for.

    Raises:
        NoSuchCommand: says what does not exist.
    """
    program, arguments = words[0], words[1:]
    _check_paths(words)
    if "-m" in arguments:  # of python, accelerate or torchrun
        module, *arguments = arguments[arguments.index("-m") + 1 :]
        if importlib.util.find_spec(module) is None:
            raise NoSuchCommand(f"there is no module {module}")
        program = MODULES.get(module, "python")
    if program in ("decar", "decar-train"):
        _check_typed(program, arguments, whole)
    elif program == "make":
        _check_make(arguments)
    elif "/" in program:
        _check_script(ROOT / program, arguments)
    elif program not in OTHERS | {"python"}:
        raise NoSuchCommand(f"is {program!r} a program? If so, name it in OTHERS in tests/commands.py")


def _check_paths(words: list[str]) -> None:
    """Paths that begin with one of this repository's folders."""
    for word in words:
        top = word.split("/")[0]
        if (
            "/" in word
            and top in _folders()
            and not re.search(r"[*$?{]", word)
            and not (ROOT / word).exists()
        ):
            raise NoSuchCommand(f"{word} does not exist")


@cache
def _folders() -> set[str]:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    return {path.name for path in ROOT.iterdir() if path.is_dir()} - ignored - {".git"}


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *\?=", makefile, re.MULTILINE))
    for word in arguments:
        name, equals, _ = word.partition("=")
        if name not in (variables if equals else targets):
            raise NoSuchCommand(f"the Makefile has no {'variable' if equals else 'target'} {name!r}")


def _check_script(path: Path, arguments: list[str]) -> None:
    if path.parent.name == "bin" and path.parent.parent.name.startswith(".venv"):
        return  # of an environment that is made before
    if not os.access(path, os.X_OK):
        raise NoSuchCommand(f"{path.relative_to(ROOT)} is no program")
    for word in arguments:  # such as tools/check_gpu.sh's
        if re.fullmatch("[a-z]+", word) and not re.search(rf"\b{word}\b", path.read_text()):
            raise NoSuchCommand(f"{path.relative_to(ROOT)} knows no {word!r}")


def _check_typed(program: str, arguments: list[str], whole: bool) -> None:
    try:
        context = _parsed(program, arguments, whole)
        if context is None:
            return
        if (
            context.command.name == "serve"
            and program == "decar"
            and context.parent.command is _group("decar")
        ):
            parse_flags(
                ["1" if _stands_for_another(word) else word for word in context.args], "model", ["model"]
            )
        if program == "decar-train" and not _stands_for_another(context.params["config"].name):
            load_config(context.params["config"], context.params["set_"])
    except DecarError as error:
        raise NoSuchCommand(f"{program} {' '.join(arguments)}: {error}") from None
    except SystemExit:
        raise NoSuchCommand(f"vLLM does not take {context.args}") from None


def _parsed(program: str, arguments: list[str], whole: bool) -> Any:
    """The context that the command would run in; None where it would print its help or a version, or is not whole."""
    command, context = _group(program), None
    if arguments == ["--install-completion"]:
        return None  # typer's own, and parsing it does it
    try:
        while hasattr(command, "resolve_command") and arguments and not arguments[0].startswith("-"):
            context = typer.Context(command, info_name=command.name, parent=context)
            if _stands_for_another(arguments[0]):
                return None
            _load(command, arguments[0])
            _, command, arguments = command.resolve_command(context, arguments)
        return command.make_context(command.name, list(arguments), parent=context)
    except Exception as error:  # click's own, whichever click typer brings
        if type(error).__name__ in ("Exit", "NoArgsIsHelpError"):
            return None
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "MissingParameter" and not whole:
            return None
        said = error.format_message()
        quoted = re.findall(r"'([^']*)'", said)
        if type(error).__name__ == "BadParameter" and any(map(_stands_for_another, quoted)):
            return None
        raise NoSuchCommand(f"{program}: {said}") from None


@cache
def _group(program: str) -> Any:
    group = typer.main.get_command({"decar": decar_app, "decar-train": train_app}[program])
    group.name = program
    return group


def _load(group: Any, name: str) -> None:
    """Give ``decar`` the command ``name``, as its `main` does, where another part offers it."""
    if group is not _group("decar") or name in group.commands or name not in _offered():
        return
    loaded = EntryPoint(name, _offered()[name], "decar.commands").load()
    if not isinstance(loaded, typer.Typer):
        single = typer.Typer(add_completion=False)
        single.command(name=name)(loaded)
        loaded = single
    group.commands[name] = typer.main.get_command(loaded)
    group.commands[name].name = name


@cache
def _offered() -> dict[str, str]:
    """Commands of other parts, as the source says: what is installed may be older."""
    section = (
        (ROOT / "pyproject.toml")
        .read_text()
        .split('[project.entry-points."decar.commands"]')[1]
        .split("[")[0]
    )
    return dict(re.findall(r"^([\w-]+) = \"(.+)\"", section, re.MULTILINE))


def _stands_for_another(word: str) -> bool:
    return _STANDS_FOR_ANOTHER.fullmatch(word.removesuffix(".yaml")) is not None
