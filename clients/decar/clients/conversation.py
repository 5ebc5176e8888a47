"""What a chat has come to, and what its commands do with it. Knows no terminal and no server: commands are lines, and
what they say is text.

Shapes: K experts.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decar.clients.api import Piece

COMMANDS = {
    "/help": "show this",
    "/weights code=.7": "fix the experts' weights; the others share what is left. /weights alone: back to the router",
    "/expert NAME": "ask one expert alone. /expert alone: the ensemble again",
    "/why": "show which experts spoke in the last answer",
    "/save FILE": "write the conversation to FILE: Markdown, or JSON for .json",
    "/forget": "drop the oldest question and its answer",
    "/new": "begin a new conversation",
    "/quit": "end, as Ctrl-D does",
}
"""What a line may begin with, and what it is for. `/why` and `/quit` are the terminal's."""


class Mistake(Exception):
    """A command that cannot be followed as it is; the message says why."""


def parse_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """Weights as a user writes them: "code=.7 prose=.3", or JSON. Where they add up to less than 1, the experts that
    are not named share the rest equally.

    Raises:
        Mistake: of a name or a number.
    """
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise Mistake(f"the weights are no JSON: {error}") from None
        for name in given:
            check_expert(name, names)
        return dict(given)
    given = {}
    for part in text.replace(",", " ").split():
        name, equals, number = part.partition("=")
        check_expert(name, names)
        try:
            given[name] = float(number)
        except ValueError:
            said = f"{number!r} is no number" if equals else "it has no number"
            raise Mistake(f"{part}: {said}; write it as {name}=.7") from None
        if not 0 <= given[name] < float("inf"):
            raise Mistake(f"{part}: a weight is 0 or more")
    left, others = 1 - sum(given.values()), [name for name in names if name not in given]
    if left > 0 and others:
        given.update({name: left / len(others) for name in others})
    if not any(given.values()):
        raise Mistake("one weight has to be above 0")
    return given


def check_expert(name: str, names: Sequence[str]) -> None:
    """
    Raises:
        Mistake: there is no such expert.
    """
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"the experts are {', '.join(names)}"
        raise Mistake(f"there is no expert {name!r}; {meant}")


@dataclass
class Conversation:
    """One conversation.

    Attributes:
        ensemble: its name.
        names: [K] of its experts.
        model: the id that is asked, unless an expert is.
        decar: of every request, weights excluded.
        weights: by expert; None: the router's.
        expert: who is asked alone.
        messages: as the API has them.
        answer: the last one.
    """

    ensemble: str
    names: Sequence[str]
    model: str
    decar: dict[str, Any]
    weights: dict[str, float] | None = None
    expert: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: list[Piece] = field(default_factory=list)
    _saved: Path | None = None

    def request(self) -> tuple[str, dict[str, Any]]:
        """Who is asked, and the `decar` object."""
        if self.expert is not None:
            return f"{self.ensemble}/{self.expert}", self.decar
        return self.model, {**self.decar, **({"weights": self.weights} if self.weights else {})}

    def ask(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})

    def answered(self, pieces: Sequence[Piece]) -> None:
        """What has come of an answer; where nothing has, the question is taken back."""
        text = "".join(piece.text for piece in pieces)
        if not pieces:
            self.messages.pop()
            return
        self.answer = list(pieces)
        self.messages.append({"role": "assistant", "content": text})

    @property
    def question(self) -> str:
        """The last one that was answered."""
        return next((said["content"] for said in reversed(self.messages) if said["role"] == "user"), "")

    def command(self, line: str) -> str:
        """Follow one of `COMMANDS`; returns what there is to say.

        Raises:
            Mistake: it cannot be followed; nothing has changed.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        known = [command.split()[0] for command in COMMANDS]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else "/help lists what there is"
            raise Mistake(
                f"there is no command {name}; {meant} (a question that begins with / is written //)"
            )
        return str(getattr(self, f"_{name[1:]}")(rest))

    def _help(self, _: str) -> str:
        width = max(map(len, COMMANDS))
        lines = [f"{command:<{width}}  {what}" for command, what in COMMANDS.items()]
        return "\n".join(
            [*lines, "", "Enter sends, Alt-Enter (or Esc, Enter) begins a new line, Up brings back what was asked.",
             "Ctrl-C stops an answer. A question that begins with / is written //."]
        )  # fmt: skip

    def _weights(self, rest: str) -> str:
        if not rest:
            self.weights = self.expert = None
            return "weights: the router's"
        self.weights, self.expert = parse_weights(rest, self.names), None
        return "weights: " + ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items())

    def _expert(self, rest: str) -> str:
        if not rest:
            self.expert = None
            return f"asking {self.model}"
        check_expert(rest, self.names)
        self.expert, self.weights = rest, None
        return f"asking {self.ensemble}/{rest}"

    def _save(self, rest: str) -> str:
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise Mistake(f"/save {rest}: {error}") from None
        if len(words) != 1:
            raise Mistake("give one file: /save FILE")
        file = Path(words[0]).expanduser()
        if file.suffix == ".json":
            text = json.dumps(
                {"model": self.request()[0], "messages": self.messages}, indent=2, ensure_ascii=False
            )
        else:
            who = {"user": "you", "assistant": self.ensemble}
            text = "\n\n".join(f"**{who[said['role']]}:** {said['content']}" for said in self.messages)
        try:
            with file.open("w" if file == self._saved else "x", encoding="utf-8") as written:
                written.write(text + "\n")
        except FileExistsError:
            raise Mistake(f"{file} exists already; choose another name") from None
        except OSError as error:
            raise Mistake(f"cannot write {file}: {error.strerror}") from None
        self._saved = file
        return f"saved {len(self.messages)} messages to {file}"

    def _forget(self, _: str) -> str:
        if not self.messages:
            raise Mistake("there is nothing to forget")
        del self.messages[:2]
        return f"forgotten; {len(self.messages) // 2} questions and answers are left"

    def _new(self, _: str) -> str:
        self.messages.clear()
        self.answer.clear()
        return "a new conversation"
