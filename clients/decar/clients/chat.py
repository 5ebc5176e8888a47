"""`decar chat`: talk to a running server from a terminal. Speaks OpenAI's API through OpenAI's client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, cast

import openai
import typer
from openai.types.chat import ChatCompletionChunk
from rich.console import Console

DEFAULT_URL = "http://127.0.0.1:8000/v1"


def stream_chat(
    client: openai.OpenAI,
    messages: list[dict[str, str]],
    model: str,
    max_tokens: int,
    temperature: float,
    decar: dict[str, Any] | None = None,
) -> Iterator[tuple[str, list[list[float]]]]:
    """Stream one answer.

    Yields:
        Text, and the weights [tokens][experts] that mixed it (empty unless ``decar`` asks for a trace).

    Raises:
        openai.APIError: the server refused the request, or failed on the way.
    """
    chunks = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=temperature,
        stream=True,
        extra_body={"decar": decar} if decar else None,
    )
    for chunk in cast(openai.Stream[ChatCompletionChunk], chunks):
        for choice in chunk.choices:
            extra = getattr(choice, "decar", None) or {}
            yield choice.delta.content or "", extra.get("weights", [])


@contextlib.contextmanager
def api_errors(console: Console, base_url: str) -> Iterator[None]:
    """Turn what OpenAI's client raises into one line and exit code 1."""
    try:
        yield
    except openai.APIConnectionError:
        console.print(
            f"no server answers at {base_url}; start one with `decar serve DIR`", style="red", soft_wrap=True
        )
        raise typer.Exit(1) from None
    except openai.APIError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def ensemble_of(client: openai.OpenAI) -> dict[str, Any]:
    """What the server says of its ensemble."""
    return client.get("/ensemble", cast_to=dict)


def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    base_url: Annotated[str, typer.Option(help="The server's /v1 address.")] = DEFAULT_URL,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its key, if it has one.")] = "none",
    model: Annotated[str | None, typer.Option(help="A model id; default: the ensemble.")] = None,
    weights: Annotated[str | None, typer.Option(help="Fixed weights as JSON, e.g. '{\"code\": 1}'.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    trace: Annotated[bool, typer.Option(help="Show each expert's mean weight after an answer.")] = True,
) -> None:
    """Chat with a running server."""
    console = Console(highlight=False)
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    options: dict[str, Any] = {"trace": trace}
    try:
        with api_errors(console, base_url):
            if weights is not None:
                options["weights"] = json.loads(weights)
            ensemble = ensemble_of(client)
            names = [expert["name"] for expert in ensemble["experts"]]
            messages: list[dict[str, str]] = []
            console.print(f"[bold]{model or ensemble['name']}[/bold] ({', '.join(names)})")
            while True:
                question = prompt or console.input("[bold]> [/bold]")
                messages.append({"role": "user", "content": question})
                answer = ""
                seen: list[list[float]] = []
                arguments = (client, messages, model or ensemble["name"], max_tokens, temperature, options)
                for text, token_weights in stream_chat(*arguments):
                    console.print(text, end="", markup=False, soft_wrap=True)
                    answer += text
                    seen += token_weights
                console.print()
                if seen:
                    console.print(describe_weights(names, seen), style="dim")
                messages.append({"role": "assistant", "content": answer})
                if prompt is not None:
                    return
    except (EOFError, KeyboardInterrupt):
        console.print()
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--weights is not JSON ({error})") from None


def describe_weights(names: list[str], weights: list[list[float]]) -> str:
    """Each expert's mean weight over the tokens of an answer, in one line."""
    means = [sum(column) / len(weights) for column in zip(*weights, strict=True)]
    shares = ", ".join(f"{name} {mean:.1%}" for name, mean in zip(names, means, strict=True))
    return f"{len(weights)} tokens; mean weights: {shares}"
