"""`decar explain`: which expert spoke where in an answer. Speaks OpenAI's API through OpenAI's client.

Shapes: K experts, T tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
from rich.console import Console
from rich.text import Text

from decar.clients.chat import api_errors, describe_weights, ensemble_of
from decar.clients.child import ServerDidNotStart, end_on_sigterm, free_port, serving

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", " .:-=+*#"
SURE, UNSURE = 0.9, 0.6  # from which weight on a token is bold, and below which it is underlined


@dataclass(frozen=True)
class Piece:
    """A part of an answer that came at once: mostly one token, several where only they make up a character.

    Attributes:
        weights: [T][K] that mixed its tokens.
        leaders: [T] who sampled them.
    """

    text: str
    weights: list[list[float]]
    leaders: list[str]

    @property
    def speaker(self) -> int:
        """The expert with the largest weight."""
        means = self.means
        return means.index(max(means))

    @property
    def means(self) -> list[float]:
        return [sum(column) / len(self.weights) for column in zip(*self.weights, strict=True)]


def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[DIR] PROMPT", help="An ensemble directory, unless --base-url is given; a prompt."
        ),
    ],
    base_url: Annotated[
        str | None, typer.Option(help="A running server's /v1 address, in place of DIR.")
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its key, if it has one.")] = "none",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    route: Annotated[str, typer.Option(help="What the weights come from.")] = "posterior",
    prune: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Release experts on the way; under the posterior router the answer's distribution moves by at most "
            "this much, in total variation.",
        ),
    ] = 0.0,
) -> None:
    """Show which expert spoke where: serve DIR (or use a running server), continue PROMPT, and draw the weights."""
    console = Console(highlight=False)
    if len(words) != (2 if base_url is None else 1):
        wanted = "DIR and PROMPT (quoted)" if base_url is None else "PROMPT (quoted) alone, beside --base-url"
        raise typer.BadParameter(f"give {wanted}", param_hint="[DIR] PROMPT")
    prompt = words[-1]
    decar = {"route": route, "prune": prune, "trace": True}
    end_on_sigterm()
    with contextlib.ExitStack() as stack:
        if base_url is None:
            base_url = stack.enter_context(_served(Path(words[0]), console))
        stack.enter_context(api_errors(console, base_url))
        client = openai.OpenAI(base_url=base_url, api_key=api_key)
        ensemble = ensemble_of(client)
        names = [expert["name"] for expert in ensemble["experts"]]
        pieces = list(answer(client, ensemble["name"], prompt, max_tokens, temperature, decar))
        show(console, names, prompt, pieces)


@contextlib.contextmanager
def _served(directory: Path, console: Console) -> Iterator[str]:
    """Serve ``directory`` until the block ends; give the /v1 address."""
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decar-explain-"))) / "server.log"
        command = [sys.executable, "-m", "decar.server", "serve", str(directory), "--log-file", str(log)]
        try:
            with console.status(f"starting the experts of {directory}"):
                server = stack.enter_context(serving(command, free_port(), log))
        except ServerDidNotStart as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None
        yield f"{server.base_url}/v1"


def answer(
    client: openai.OpenAI, model: str, prompt: str, max_tokens: int, temperature: float, decar: dict[str, Any]
) -> Iterator[Piece]:
    """Stream the continuation of ``prompt``; ``decar`` has to ask for a trace.

    Raises:
        openai.APIError: the server refused the request, or failed on the way.
    """
    chunks = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        stream=True,
        extra_body={"decar": decar},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            trace = (choice.model_extra or {})["decar"]
            if trace["weights"]:
                yield Piece(choice.text, trace["weights"], trace["leaders"])


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
    console.print(f"leader: {_changes(leaders)}", soft_wrap=True)


def _print_coloured(console: Console, names: Sequence[str], prompt: str, pieces: Sequence[Piece]) -> None:
    legend = [(f" {name} ", f"reverse {_colour(k)}") for k, name in enumerate(names)]
    console.print(
        Text.assemble(*legend, (f"  bold: weight {SURE:.0%} or more; underlined: below {UNSURE:.0%}", "dim"))
    )
    console.print()
    parts = [(piece.text, _style(piece)) for piece in pieces]
    console.print(Text.assemble((prompt, "dim"), *parts), soft_wrap=True)


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
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


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
