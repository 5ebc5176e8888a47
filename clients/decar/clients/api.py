"""What the clients of a server share: its address, its ensemble, streamed answers, and errors in one line. Speaks
OpenAI's API through OpenAI's client, whose import takes a second and waits until it is needed.

Shapes: K experts, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionChunk

DEFAULT_URL = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Piece:
    """A part of an answer that came at once: mostly one token, several where only they make up a character.

    Attributes:
        weights: [T][K] that mixed its tokens; empty where no trace was asked for.
        leaders: [T] who sampled them.
        revealed_at: [T], the step of a flow ensemble that revealed them, from 1; 0 for what the prompt has.
    """

    text: str
    weights: list[list[float]] = field(default_factory=list)
    leaders: list[str] = field(default_factory=list)
    revealed_at: list[int] = field(default_factory=list)

    @property
    def speaker(self) -> int:
        """The expert with the largest weight."""
        means = self.means
        return means.index(max(means))

    @property
    def means(self) -> list[float]:
        return [sum(column) / len(self.weights) for column in zip(*self.weights, strict=True)]


class NoDecarServer(Exception):
    """Something else answers at an address."""


def v1_of(url: str) -> str:
    """The /v1 address that ``url`` means: "localhost:8000" is enough."""
    url = url.strip().rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    return url if url.endswith("/v1") else f"{url}/v1"


def connected(base_url: str, api_key: str) -> openai.OpenAI:
    """OpenAI's client of the server at ``base_url``, with or without /v1."""
    import openai

    return openai.OpenAI(base_url=v1_of(base_url), api_key=api_key)


def ensemble_of(client: openai.OpenAI) -> dict[str, Any]:
    """What the server says of its ensemble.

    Raises:
        NoDecarServer: it knows of none.
        openai.APIError: it does not answer, or wants a key.
    """
    import openai

    try:
        said = client.get("/ensemble", cast_to=dict)
    except openai.NotFoundError:
        said = None
    if not isinstance(said, dict) or "experts" not in said:
        raise NoDecarServer(f"what answers at {client.base_url} is no decar server")
    return said


def streamed(
    client: openai.OpenAI,
    messages: list[dict[str, str]],
    model: str,
    max_tokens: int,
    temperature: float,
    decar: dict[str, Any] | None = None,
) -> Iterator[Piece]:
    """Stream one answer, with weights if ``decar`` asks for a trace. Whoever stops listening ends the request.

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
    with cast("openai.Stream[ChatCompletionChunk]", chunks) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                extra = getattr(choice, "decar", None) or {}
                yield Piece(choice.delta.content or "", extra.get("weights", []), extra.get("leaders", []))


def problem(error: Exception, base_url: str) -> str | None:
    """``error`` in one line, if it is a server's, or the lack of one; else None."""
    import openai

    if isinstance(error, openai.APIConnectionError):
        return f"no server answers at {base_url}; start one with `decar serve DIR`"
    if isinstance(error, openai.AuthenticationError):
        return f"the server at {base_url} wants its key: --api-key, or OPENAI_API_KEY in the environment"
    if isinstance(error, openai.APIStatusError) and isinstance(error.body, dict) and "message" in error.body:
        return str(error.body["message"])
    if isinstance(error, openai.APIError | NoDecarServer):
        return str(error)
    return None


@contextlib.contextmanager
def api_errors(base_url: str) -> Iterator[None]:
    """Turn what OpenAI's client raises into one line on standard error and exit code 1."""
    try:
        yield
    except Exception as error:
        said = problem(error, base_url)
        if said is None:
            raise
        complain(said)
        raise typer.Exit(1) from None


def complain(text: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False).print(text, style="red", markup=False, soft_wrap=True)


def describe_weights(names: list[str], weights: list[list[float]]) -> str:
    """Each expert's mean weight over the tokens of an answer, in one line."""
    means = [sum(column) / len(weights) for column in zip(*weights, strict=True)]
    shares = ", ".join(f"{name} {mean:.1%}" for name, mean in zip(names, means, strict=True))
    return f"{len(weights)} tokens; mean weights: {shares}"
