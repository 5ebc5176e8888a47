"""`decar explain`: which expert spoke where in an answer."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from decar.clients.api import Piece, api_errors, connected, ensemble_of, v1_of
from decar.clients.child import ServerDidNotStart, end_on_sigterm, free_port, serving
from decar.clients.picture import show, show_steps

if TYPE_CHECKING:
    import openai


def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[DIR] PROMPT", help="An ensemble directory, unless --base-url is given; a prompt."
        ),
    ],
    base_url: Annotated[str | None, typer.Option(help="A running server's address, in place of DIR.")] = None,
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
    steps: Annotated[
        bool,
        typer.Option("--steps", help="Of a flow ensemble: also the answer as it is revealed, step by step."),
    ] = False,
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
        base_url = v1_of(base_url)
        stack.enter_context(api_errors(base_url))
        client = connected(base_url, api_key)
        ensemble = ensemble_of(client)
        names = [expert["name"] for expert in ensemble["experts"]]
        flows = ensemble.get("kind") == "flow"
        if steps and not flows:
            raise typer.BadParameter(
                f"{ensemble['name']!r} generates a token after the others: leave it out", param_hint="--steps"
            )
        if flows and not prune:
            del decar["prune"]  # which is refused
        say = revealed if flows else answer
        pieces = list(say(client, ensemble["name"], prompt, max_tokens, temperature, decar))
        if steps:
            show_steps(console, pieces)
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


def revealed(
    client: openai.OpenAI, model: str, prompt: str, max_tokens: int, temperature: float, decar: dict[str, Any]
) -> Iterator[Piece]:
    """The same of a flow ensemble, which says many tokens at once; ``prompt`` may have masks.

    Raises:
        openai.APIError: as `answer`.
    """
    done = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        logprobs=0,
        extra_body={"decar": decar},
    )
    [choice] = done.choices
    tokens = (choice.logprobs and choice.logprobs.tokens) or []
    trace = (choice.model_extra or {})["decar"]
    for text, weights, step in zip(tokens, trace["weights"], trace["revealed_at"], strict=True):
        yield Piece(text, [weights], revealed_at=[step])
