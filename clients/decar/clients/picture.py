"""A picture of an answer on a terminal: who spoke where. Knows pieces of answers, no server.

Shapes: K experts, T tokens.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from decar.clients.api import Piece, describe_weights

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", " .:-=+*#"
SURE, UNSURE = 0.9, 0.6  # from which weight on a token is bold, and below which it is underlined

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """``text`` without what a terminal would obey: a model may say anything."""
    return _CONTROL.sub("\ufffd", text)


def show(console: Console, names: Sequence[str], prompt: str, pieces: Sequence[Piece]) -> None:
    """Print the prompt, the answer by its speakers, each expert's weight over the tokens, and who led."""
    if not pieces:
        console.print("the answer is empty: the first token that was sampled ended it")
        return
    weights = [token_weights for piece in pieces for token_weights in piece.weights]
    leaders = [leader for piece in pieces for leader in piece.leaders]
    if console.no_color or console.color_system is None:
        _print_runs(console, names, prompt, pieces)
    else:
        _print_coloured(console, names, prompt, pieces)
    console.print()
    label = max(map(len, names))
    width = min(len(weights), max(console.width - label - 10, 8))
    for k, name in enumerate(names):
        column = [token_weights[k] for token_weights in weights]
        mean = sum(column) / len(column)
        row = Text.assemble(
            f"{name:<{label}} ", (_sparkline(console, column, width), _colour(k)), f" {mean:6.1%}"
        )
        console.print(row, no_wrap=True)
    active = sum(w > 0 for token_weights in weights for w in token_weights) / len(weights)
    console.print(
        f"{describe_weights(list(names), weights)}; active experts a token: {active:.2f}", soft_wrap=True
    )
    if leaders:
        console.print(f"leader: {_changes(leaders)}", soft_wrap=True)


def show_steps(console: Console, pieces: Sequence[Piece], lines: int = 12) -> None:
    """Print an answer as it is revealed, at no more than so many of its steps, each token in its speaker's colour."""
    steps = sorted({step for piece in pieces for step in piece.revealed_at if step})
    chosen = [steps[len(steps) * (i + 1) // lines - 1] for i in range(lines)] if len(steps) > lines else steps
    masked = "_" if console.options.ascii_only else "░"
    for step in [0, *chosen]:
        shown = [
            (_one_line(piece.text), _style(piece)) if max(piece.revealed_at) <= step else (masked, "dim")
            for piece in pieces
        ]
        label = (f"step {step:>{len(str(steps[-1]))}} " if steps else "", "dim")
        console.print(Text.assemble(label, *shown), soft_wrap=True)
    console.print()


def legend(names: Sequence[str]) -> Text:
    """Which colour is whose in what `spoken` gives."""
    parts = [(f" {name} ", f"reverse {_colour(k)}") for k, name in enumerate(names)]
    return Text.assemble(
        *parts, (f"  bold: weight {SURE:.0%} or more; underlined: below {UNSURE:.0%}", "dim")
    )


def spoken(piece: Piece) -> Text:
    """A piece in its speaker's colour; as it is where there are no weights."""
    return Text(harmless(piece.text), _style(piece) if piece.weights else "")


def _print_coloured(console: Console, names: Sequence[str], prompt: str, pieces: Sequence[Piece]) -> None:
    console.print(legend(names))
    console.print()
    console.print(Text.assemble((prompt, "dim"), *map(spoken, pieces)), soft_wrap=True)


def _print_runs(console: Console, names: Sequence[str], prompt: str, pieces: Sequence[Piece]) -> None:
    """A line for each run of tokens of one speaker: its name, its mean weight there, and the text."""
    label = max(map(len, names))
    console.print(f"{'prompt':<{label}}      | {_one_line(prompt)}", markup=False, soft_wrap=True)
    for speaker, group in itertools.groupby(pieces, key=lambda piece: piece.speaker):
        run = list(group)
        weights = [token_weights[speaker] for piece in run for token_weights in piece.weights]
        text = _one_line("".join(piece.text for piece in run))
        mean = sum(weights) / len(weights)
        console.print(f"{names[speaker]:<{label}} {mean:4.0%} | {text}", markup=False, soft_wrap=True)


def _style(piece: Piece) -> str:
    weight = max(piece.means)
    emphasis = "bold " if weight >= SURE else "underline " if weight < UNSURE else ""
    return emphasis + _colour(piece.speaker)


def _colour(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]


def _one_line(text: str) -> str:
    return harmless(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t"))


def _sparkline(console: Console, values: Sequence[float], width: int) -> str:
    """``values`` of 0 to 1 as bars, means of neighbours where there are more of them than ``width``."""
    ramp = ASCII if console.options.ascii_only else BLOCKS
    bounds = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    return "".join(ramp[min(int(mean * len(ramp)), len(ramp) - 1)] for mean in means)


def _changes(leaders: Sequence[str]) -> str:
    """Who led from which token on, counted from 1."""
    said, position = [], 1
    for name, group in itertools.groupby(leaders):
        said.append(name if position == 1 else f"{name} from token {position} on")
        position += len(list(group))
    return ", ".join(said)
