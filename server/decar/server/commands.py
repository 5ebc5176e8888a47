"""Which commands `decar` has: its own, and those that other parts offer as entry points of group `decar.commands`.

A command is imported when it is asked for, and described from its source: what `decar bench` is made of takes ten
seconds to import, and `decar --help` needs one sentence of it.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "decar.commands"


class Commands(TyperGroup):
    """The group behind `decar`. Help and completion see a description, and who runs a command the command."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_offered()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _offered():
            return super().get_command(ctx, cmd_name)
        return TyperCommand(cmd_name, help=described(_offered()[cmd_name]))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with, its name and what follows. A name that nothing has is told with those
        that it may stand for."""
        name = args[0]
        if name in _offered():
            self.commands[name] = loaded(_offered()[name])
            return name, self.commands[name], args[1:]
        for offered in _offered():
            self.commands.setdefault(offered, self.get_command(ctx, offered))  # to be suggested
        return super().resolve_command(ctx, args)


class ServeCommand(TyperCommand):
    """`decar serve`, whose --help=all lists vLLM's flags as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = with_ray_address(args)
        if "--help=all" not in args:
            return super().parse_args(ctx, args)
        from decar.server.vllm_adapter.arguments import offered_flags
        from decar.server.vllm_adapter.flags import help_text

        super().get_help(ctx)
        print(help_text(offered_flags(), min(shutil.get_terminal_size().columns, 120)))
        ctx.exit()
        return []


class InspectCommand(TyperCommand):
    """`decar inspect`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_ray_address(args))


def with_ray_address(args: list[str]) -> list[str]:
    """``args`` in which --ray has a value: without one it means the cluster that this machine is part of."""
    found = []
    for i, arg in enumerate(args):
        found.append(arg)
        if arg == "--ray" and (args[i + 1 : i + 2] or ["-"])[0].startswith("-"):
            found.append("auto")
    return found


@functools.cache
def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    """By name. One that is installed twice (an older version below another path) is the first one found."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        found.setdefault(entry.name, entry)
    return found


def loaded(entry: importlib.metadata.EntryPoint) -> Any:
    """What an entry point names, a function or a `typer.Typer`, as a command of its name."""
    named = entry.load()
    if isinstance(named, typer.Typer):
        command = typer.main.get_command(named)
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name=entry.name)(named)
        command = typer.main.get_command(app)
    command.name = entry.name
    return command


def described(entry: importlib.metadata.EntryPoint) -> str:
    """The docstring of the function that an entry point names, or else that of its module, from the source."""
    try:
        spec = importlib.util.find_spec(entry.module)
    except ImportError:  # who runs it is told
        spec = None
    if spec is None or spec.origin is None:
        return ""
    module = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            return ast.get_docstring(node) or ""
    return ast.get_docstring(module) or ""
