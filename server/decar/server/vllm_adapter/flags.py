"""vLLM's flags, known in some ms: what is wrong with those that a user gives is told before vLLM is imported.

vLLM makes its parser from its configuration classes, and to import those takes five to ten seconds. So the parser is
described once, in the user's cache. What the description is of is in its file's name: vLLM's version, size and time of
all sources that the parser is made of, and plug-ins. Another vLLM, or a changed one, looks for another file, so none
goes stale. What a description cannot tell it lets pass: vLLM's own parser, which every start asks, has the last word.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from decar.router.errors import StartError, did_you_mean
from decar.server.vllm_adapter.cache import cache_file, keep

SAMPLES = {
    "integer": "1",
    "number": "1.5",
    "size": "1k",
    "none": "None",
    "auto": "auto",
    "true": "true",
    "json": "{}",
    "word": "word",
}
"""A value of each shape. A flag that takes it takes others of that shape, or at least has more to say of them."""


@dataclass(frozen=True)
class Flag:
    """One flag of vLLM's.

    Attributes:
        names: "--dtype", "-tp"; without the "--no-" ones of a switch.
        dest: its name among parsed arguments.
        group, help: as vLLM's own help has them.
        default: as text.
        takes: values: "none", "switch" (none, and its opposite is there as "--no-"), "one", "optional" or "many".
        choices: of its values; empty where there are none, or they cannot be told.
        shapes: of `SAMPLES`, those that it takes; empty where it may take anything.
    """

    names: tuple[str, ...]
    dest: str
    group: str
    help: str
    default: str
    takes: str
    choices: tuple[str, ...]
    shapes: tuple[str, ...]

    @classmethod
    def of(cls, action: argparse.Action, group: str) -> Flag:
        names = tuple(name for name in action.option_strings if not name.startswith("--no-"))
        switch = len(names) < len(action.option_strings) and bool(names)
        counts = {None: "one", 0: "none", "?": "optional"}
        return cls(
            names=names if switch else tuple(action.option_strings),
            dest=action.dest,
            group=group,
            help=(action.help or "").replace("%%", "%"),
            default=str(action.default),
            takes="switch" if switch else counts.get(action.nargs, "many"),
            choices=_choices(action),
            shapes=() if action.nargs == 0 else _shapes(action.type),
        )

    def value(self, text: str) -> str:
        """``text``.

        Raises:
            ArgumentTypeError: the flag takes no such value.
        """
        if self.choices and text not in self.choices:
            near = did_you_mean(text, self.choices)
            raise ArgumentTypeError(f"{text!r} is none of {', '.join(self.choices)}{near}")
        if self.shapes and _shape_of(text) not in self.shapes:
            wanted = [shape for shape in self.shapes if shape not in ("auto", "true", "none")]
            raise ArgumentTypeError(f"{text!r} is no {' or '.join(wanted)}")
        return text


def _choices(action: argparse.Action) -> tuple[str, ...]:
    """Those that are as a user writes them: none where something is made of a value first, unless it is a number."""
    if not action.choices or getattr(action.type, "__name__", "") == "<lambda>":
        return ()
    return tuple(str(choice) for choice in action.choices)


def _shapes(convert: Callable[[str], Any] | argparse.FileType | str | None) -> tuple[str, ...]:
    """Of `SAMPLES`, what ``convert`` takes; empty where that says nothing: it takes words, or no number and no JSON."""
    if convert is None or not callable(convert):
        return ()
    taken = []
    for shape, sample in SAMPLES.items():
        with suppress(Exception):
            convert(sample)
            taken.append(shape)
    return tuple(taken) if "word" not in taken and {"integer", "json"} & {*taken} else ()


def _shape_of(text: str) -> str:
    text = text.strip()
    for shape, pattern in (
        ("integer", r"[+-]?\d+"),
        ("number", r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf|nan"),
        ("size", r"\d+(\.\d+)?[kKmMgGtT]"),
        ("none", r"|[nN]one"),
        ("auto", r"[aA][uU][tT][oO]"),
        ("true", r"true|false|null"),
        ("json", r"[{\[\"'].*"),
    ):
        if re.fullmatch(pattern, text, re.DOTALL):
            return shape
    return "word"


# ---------------------------------------------------------------------------------------------- the description


def known_flags() -> tuple[Flag, ...] | None:
    """vLLM's, if the installed one has been described before."""
    try:
        return _read(cache_file("flags"))
    except (OSError, ValueError, TypeError, LookupError):
        return None


def described_flags() -> tuple[Flag, ...]:
    """The same, described now if they were not: it takes as long as vLLM's import, in a process of its own, which
    may print what it likes.

    Raises:
        StartError: vLLM's parser cannot be made.
    """
    flags = known_flags()
    if flags is not None:
        return flags
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "flags.json"
        command = [sys.executable, "-c", f"import {__name__} as flags; flags.describe({str(written)!r})"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StartError(
                f"vLLM cannot be imported: {(done.stderr.strip() or 'it says nothing').splitlines()[-1]}"
            )
        flags = _read(written)
        keep("flags", written.read_text())
    return flags


def _read(file: Path) -> tuple[Flag, ...]:
    flags: list[dict[str, Any]] = json.loads(file.read_text())
    lists = ("names", "choices", "shapes")
    return tuple(Flag(**{**flag, **{key: tuple(flag[key]) for key in lists}}) for flag in flags)


def describe(file: str) -> None:
    """Write what vLLM's parser knows to ``file``."""
    from decar.server.vllm_adapter.arguments import make_parser, prepare_environment

    prepare_environment()
    parser = make_parser()
    flags = [
        Flag.of(action, str(group.title or ""))
        for group in vars(parser)["_action_groups"]  # argparse has no other way to ask
        for action in vars(group)["_group_actions"]
        if action.option_strings and action.dest != "help"
    ]
    Path(file).write_text(json.dumps([asdict(flag) for flag in flags]))


# ---------------------------------------------------------------------------------------------- checking


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartError(message.removeprefix("argument "))


def check_flags(given: Sequence[str], flags: Sequence[Flag], others: Iterable[str] = ()) -> Namespace:
    """
    Args:
        given: what the user has passed.
        flags: vLLM's.
        others: of `decar serve` itself, which may have been meant.

    Returns:
        by ``dest``, what is set: text, or True or False for a switch.

    Raises:
        StartError: vLLM has no such flag, or one of another value, or takes a value that is not there.
    """
    parser = _Parser(prog="decar serve DIR", add_help=False)
    for flag in flags:
        options: dict[str, Any] = {"dest": flag.dest, "default": argparse.SUPPRESS}
        if flag.takes == "switch":
            options["action"] = argparse.BooleanOptionalAction
        elif flag.takes == "none":
            options["action"] = "store_true"
        else:
            options["type"] = flag.value
            options["nargs"] = {"one": None, "optional": "?", "many": "+"}[flag.takes]
        parser.add_argument(*flag.names, **options)
    parsed, unknown = parser.parse_known_args(list(_plain(given)))
    for argument in unknown:
        if argument.startswith("-") and not re.fullmatch(r"-\d.*", argument):
            name = argument.split("=")[0]
            names = [name for flag in flags for name in flag.names]
            near = did_you_mean(name, names, others)
            raise StartError(
                f"{name} is a flag of neither decar nor vLLM{near or '; `decar serve --help=all` lists them'}"
            )
    if unknown:
        raise StartError(
            f"unexpected argument {unknown[0]!r}: the ensemble directory says which models to serve"
        )
    return parsed


def _plain(given: Sequence[str]) -> Iterable[str]:
    """As vLLM reads it: underscores are dashes, -O3 a level, and "--a.b 1" sets a part of --a."""
    arguments = iter(given)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            head, dot, _ = name.partition(".")
            head = head.replace("_", "-")
            if dot:
                if not equals:
                    next(arguments, None)
                yield f"{head}={{}}"
            else:
                yield head + equals + value
        elif argument.startswith("-O") and argument != "-O":
            yield f"--optimization-level={argument[2:].removeprefix('=')}"
        elif argument.startswith("-") and "." in name and not re.fullmatch(r"-\d.*", argument):
            if not equals:
                next(arguments, None)
            yield from (name.partition(".")[0], "{}")
        else:
            yield argument


def help_text(flags: Sequence[Flag], width: int) -> str:
    """All of vLLM's flags, by group, ``width`` columns wide."""
    lines = []
    for group in dict.fromkeys(flag.group for flag in flags):
        lines += ["", f"{group} (vLLM)"]
        for flag in sorted((flag for flag in flags if flag.group == group), key=lambda flag: flag.names):
            names = [*flag.names, *(f"--no-{name[2:]}" for name in flag.names[-1:] if flag.takes == "switch")]
            values = f" {{{','.join(flag.choices)}}}" if flag.choices else " VALUE"
            said = ", ".join(names) + ("" if flag.takes in ("none", "switch") else values)
            lines += textwrap.wrap(said, width, initial_indent="  ", subsequent_indent="      ")
            text = " ".join(flag.help.split())
            default = (
                ""
                if flag.default in ("None", "==SUPPRESS==")
                else f" [default: {' '.join(flag.default.split())}]"
            )
            lines += textwrap.wrap(text + default, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
