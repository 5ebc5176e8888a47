"""`decar bench startup`: how long help takes, and being told of a typing error. Knows commands, no servers."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

COMMANDS = {
    "decar --version": ["--version"],
    "decar --help": ["--help"],
    "decar serve --help": ["serve", "--help"],
    "decar ps": ["ps"],
    "decar serve DIR --prot 8410": ["serve", "{directory}", "--prot", "8410"],
}
"""As it is shown -> arguments."""


def startup(
    directory: Annotated[
        Path, typer.Argument(help="An ensemble directory, for a wrong flag of `decar serve`.")
    ],
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure how long help and an error of typing take, each in a new process."""
    table = Table("command", "median", "longest", box=box.SIMPLE_HEAD)
    for shown, arguments in COMMANDS.items():
        words = [word.format(directory=directory) for word in arguments]
        times_s = measure(words, repeats)
        table.add_row(shown, f"{statistics.median(times_s):.2f} s", f"{max(times_s):.2f} s")
    Console(highlight=False).print(table)


def measure(arguments: list[str], repeats: int) -> list[float]:
    """Seconds that `decar` takes with ``arguments``, once for each repeat; the first, which may fill caches, is none of
    them."""
    times_s = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "decar", *arguments], capture_output=True, check=False)
        times_s.append(time.perf_counter() - begun)
    return times_s[1:]
