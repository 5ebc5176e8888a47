"""`decar chat`: talk to a running server from a terminal, or in a pipe. Speaks OpenAI's API through OpenAI's client."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from decar.clients.api import (
    DEFAULT_URL,
    Piece,
    api_errors,
    complain,
    connected,
    describe_weights,
    ensemble_of,
    problem,
    streamed,
    v1_of,
)
from decar.clients.conversation import COMMANDS, Conversation, Mistake, parse_weights
from decar.clients.picture import harmless, show

if TYPE_CHECKING:
    import openai
    from prompt_toolkit import PromptSession

NO_ROOM = ("context length", "maximum model length", "max_model_len", "too long", "max_tokens")
"""What a server says of a conversation that has become too long, one of these."""


def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(help="One question; without it, a conversation, or what comes through a pipe."),
    ] = None,
    base_url: Annotated[str, typer.Option(help="The server's address.")] = DEFAULT_URL,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its key, if it has one.")] = "none",
    model: Annotated[str | None, typer.Option(help="A model id; default: the ensemble.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Fixed weights: code=.7, or JSON as '{\"code\": 1}'.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    trace: Annotated[bool, typer.Option(help="Show each expert's mean weight after an answer.")] = True,
) -> None:
    """Chat with a running server. In a pipe, what comes in is one question, and the answer alone goes out."""
    base_url = v1_of(base_url)
    piped = prompt is None and not sys.stdin.isatty()
    with api_errors(base_url):
        client = connected(base_url, api_key)
        ensemble = ensemble_of(client)
        names = [expert["name"] for expert in ensemble["experts"]]
        conversation = Conversation(
            ensemble["name"], names, model or ensemble["name"], {"trace": True} if trace and not piped else {}
        )
        try:
            if weights is not None:
                conversation.weights = parse_weights(weights, names)
        except Mistake as mistake:
            complain(str(mistake))
            raise typer.Exit(1) from None
        talk = _Talk(client, conversation, max_tokens, temperature, base_url)
        if piped:
            talk.answer_alone(sys.stdin.read())
            return
        talk.console.print(f"[bold]{conversation.model}[/bold] ({', '.join(names)})")
        if prompt is not None:
            talk.answer(prompt)
            return
    talk.on()


class _Talk:
    """A conversation on a terminal."""

    def __init__(
        self,
        client: openai.OpenAI,
        conversation: Conversation,
        max_tokens: int,
        temperature: float,
        base_url: str,
    ):
        self.console = Console(highlight=False)
        self._client, self._conversation, self._base_url = client, conversation, base_url
        self._max_tokens, self._temperature = max_tokens, temperature

    def answer_alone(self, question: str) -> None:
        """Print the answer as it is, and nothing else."""
        if not question.strip():
            complain("nothing came through the pipe; give a question")
            raise typer.Exit(1)
        self._conversation.ask(question.removesuffix("\n"))
        for piece in self._pieces():
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")

    def answer(self, question: str) -> None:
        """Print an answer as it comes, and who spoke. Ctrl-C stops it, and what has come of it stays.

        Raises:
            openai.APIError: the server refused the question, or failed on the way; what has come stays.
        """
        said: list[Piece] = []
        self._conversation.ask(question)
        try:
            for piece in self._pieces():
                self.console.print(harmless(piece.text), end="", markup=False, soft_wrap=True)
                said.append(piece)
            self.console.print()
        except KeyboardInterrupt:
            self.console.print("\n(stopped)", style="dim")
        finally:
            self._conversation.answered(said)
        weights = [token for piece in said for token in piece.weights]
        if weights:
            self.console.print(describe_weights(list(self._conversation.names), weights), style="dim")

    def _pieces(self) -> Iterator[Piece]:
        model, decar = self._conversation.request()
        messages = self._conversation.messages
        return streamed(self._client, messages, model, self._max_tokens, self._temperature, decar)

    def on(self) -> None:
        """Ask and answer until the user has enough. What goes wrong is said, and the conversation stays."""
        self.console.print("/help shows commands, Ctrl-D ends", style="dim")
        session = _session(self._conversation.names)
        while True:
            try:
                line = session.prompt("> ")
                if line.strip() == "/quit":
                    return
                self._follow(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                continue  # it clears the line
            except Exception as error:
                said = str(error) if isinstance(error, Mistake) else problem(error, self._base_url)
                if said is None:
                    raise
                self.console.print(said, style="red", markup=False, soft_wrap=True)
                if any(words in said for words in NO_ROOM):
                    self.console.print(
                        "the conversation stays as it was: /forget drops the oldest question and answer, /new begins "
                        "anew, Up brings the question back",
                        style="dim",
                        soft_wrap=True,
                    )

    def _follow(self, line: str) -> None:
        if line.strip() == "/why":
            self._why()
        elif line.startswith("/") and not line.startswith("//"):
            self.console.print(self._conversation.command(line), markup=False, soft_wrap=True)
        elif line.strip():
            self.answer(line[1:] if line.startswith("/") else line)

    def _why(self) -> None:
        conversation = self._conversation
        traced = [piece for piece in conversation.answer if piece.weights]
        if not conversation.answer:
            raise Mistake("there is no answer yet")
        if not traced:
            raise Mistake("nobody knows: the answer came without a trace (--no-trace)")
        show(self.console, conversation.names, f"{conversation.question}\n", traced)


def _session(names: Sequence[str]) -> PromptSession[str]:
    """Line editing: history over sessions, several lines, completion of commands and experts."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what Enter is that was pressed while an answer came
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    commands: dict[str, Any] = {command.split()[0]: None for command in COMMANDS}
    commands["/expert"] = dict.fromkeys(names)
    commands["/weights"] = {f"{name}=": None for name in names}
    history: History
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "decar"
    try:
        state.mkdir(parents=True, exist_ok=True)
        (state / "chat-history").touch(mode=0o600)
        history = FileHistory(str(state / "chat-history"))
    except OSError:  # a home that cannot be written to
        history = InMemoryHistory()
    return PromptSession(
        history=history,
        multiline=True,
        key_bindings=keys,
        completer=NestedCompleter.from_nested_dict(commands),
        complete_while_typing=False,
        prompt_continuation="  ",
    )
