"""`make demo`: train two experts of a skill each, apart, serve them as one model, and ask what neither knows alone.
Runs the public commands only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from decar.clients.api import connected, ensemble_of, streamed
from decar.clients.child import ServerDidNotStart, end_on_sigterm, serving
from decar.clients.exam import asked, asked_of_checkpoint, read_questions, shares_right
from decar.clients.picture import legend, spoken

if TYPE_CHECKING:
    import openai

CONFIG = Path("configs/demo.yaml")
DATA = Path("data/demo")
WORK_DIR = Path("runs/demo")
EXPERTS = ("roman", "words")
QUESTIONS = ("1987 in Roman numerals?", "1987 in words?", "2026 in Roman numerals?", "640 in words?")


def main() -> None:
    """Run the demo; with a terminal, keep serving until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0, help="of data and training")
    options = parser.parse_args()
    end_on_sigterm()
    console = Console(highlight=False)
    if _answers(options.port):
        raise SystemExit(
            f"something already listens on port {options.port}: stop it, or use `make demo PORT=...`"
        )
    train_experts(console, options.seed)
    ensemble = WORK_DIR / "ensemble"
    with contextlib.ExitStack() as stack:
        twin = decar_train(options.seed, "centralized")
        twin_is_trained = stack.enter_context(meanwhile(console, twin, WORK_DIR / "centralized.log"))
        run(console, decar_train(options.seed, "run"))
        server = demo_server(ensemble, options.port, WORK_DIR / "server.log", console)
        base_url = stack.enter_context(server)
        client = connected(base_url, "none")
        name = ensemble_of(client)["name"]
        for question in QUESTIONS:
            show_answer(console, client, name, question)
        twin_is_trained()
        show_exam(console, client, name)
        console.print(f"\nThe server listens on {base_url} (model {name!r}).")
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("Try `decar chat` in another terminal. Ctrl-C stops the server.")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    console.print(f"Stopped. Start it again with: decar serve {ensemble}")


class Command(NamedTuple):
    """What a user would type, and what is run."""

    shown: str
    words: Sequence[str]


def decar_train(seed: int, *stage: str) -> Command:
    """A stage of the demo's training, as data and training of ``seed`` need it."""
    words = [*stage, str(CONFIG), *(["--set", f"seed={seed}"] if seed else [])]
    return Command(" ".join(["decar-train", *words]), [sys.executable, "-m", "decar.training", *words])


def train_experts(console: Console, seed: int) -> None:
    """Two experts at once, which hear nothing of each other."""
    skills = ["-m", "decar.training.data.skills", str(DATA), *(["--seed", str(seed)] if seed else [])]
    run(console, Command(" ".join(["python", *skills]), [sys.executable, *skills]))
    run(console, decar_train(seed, "partition"))
    run(console, *(decar_train(seed, "expert", name) for name in EXPERTS))


def show_answer(console: Console, client: openai.OpenAI, ensemble: str, question: str) -> None:
    """Stream an answer, each token in its experts' colour."""
    console.print(f"\n[bold]you:[/bold] {question}")
    console.print(f"[bold]{ensemble}:[/bold] ", end="")
    messages = [{"role": "user", "content": question}]
    for piece in streamed(client, messages, ensemble, 48, 0.0, {"trace": True}):
        console.print(spoken(piece), end="", soft_wrap=True)
    console.print()
    console.print(legend(EXPERTS))


def show_exam(console: Console, client: openai.OpenAI, ensemble: str) -> None:
    """Ask what nobody has been taught: each expert, the ensemble, and one model that was taught everything."""
    questions = read_questions(DATA / "questions.jsonl")
    table = Table("who", *EXPERTS, "all", box=box.SIMPLE_HEAD, pad_edge=False)
    with console.status("asking"):
        answers = {f"{name} alone": asked(client, f"{ensemble}/{name}", questions) for name in EXPERTS}
        answers["the ensemble"] = asked(client, ensemble, questions)
        answers["one model, taught everything"] = asked_of_checkpoint(WORK_DIR / "centralized", questions)
    for who, said in answers.items():
        shares = shares_right(questions, said)
        whole = sum(shares.values()) / len(shares)
        table.add_row(who, *(f"{shares[name]:.0%}" for name in EXPERTS), f"{whole:.0%}")
    console.print(f"\n{len(questions)} questions about numbers that nobody was taught, answered right:")
    console.print(table)
    console.print(
        "Nothing of the ensemble has seen both skills; the last model has, in as many steps as both experts together."
    )


@contextlib.contextmanager
def demo_server(directory: Path, port: int, log: Path, console: Console) -> Iterator[str]:
    """Serve ``directory`` until the block ends; give the /v1 address once the server is ready."""
    console.print(f"\n$ decar serve {directory} --port {port}   (log: {log})")
    command = [sys.executable, "-m", "decar.server", "serve", str(directory), "--log-file", str(log)]
    with contextlib.ExitStack() as stack:
        with console.status("starting the experts' engines"):
            try:
                base = stack.enter_context(serving(command, port, log)).base_url
            except ServerDidNotStart as error:
                raise SystemExit(str(error)) from None
        yield f"{base}/v1"


def run(console: Console, *commands: Command) -> None:
    """Run commands at once; several print by lines."""
    console.print(f"\n$ {' & '.join(command.shown for command in commands)}")
    alone = len(commands) == 1
    with contextlib.ExitStack() as stack:
        output = None if alone else subprocess.PIPE
        running = [
            stack.enter_context(
                subprocess.Popen(command.words, env=_one_thread(), stdout=output, text=not alone)
            )
            for command in commands
        ]
        readers = [
            Thread(target=_print_lines, args=(console, child.stdout)) for child in running if child.stdout
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        for command, child in zip(commands, running, strict=True):
            if child.wait():
                for other in running:
                    other.terminate()
                raise SystemExit(f"this failed: {command.shown}")


@contextlib.contextmanager
def meanwhile(console: Console, command: Command, log: Path) -> Iterator[Callable[[], None]]:
    """Run a command in the time that others leave, until the block ends; give what waits for its end."""
    console.print(f"\n$ {command.shown} &   (meanwhile; log: {log})")
    with (
        log.open("wb") as output,
        subprocess.Popen(["nice", *command.words], env=_one_thread(), stdout=output, stderr=output) as child,
    ):

        def wait() -> None:
            with console.status(command.shown):
                if child.wait():
                    raise SystemExit(f"this failed: {command.shown}; see {log}")

        try:
            yield wait
        finally:
            child.terminate()


def _one_thread() -> dict[str, str]:
    """An environment for training: such small models have nothing to do for a second thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _print_lines(console: Console, lines: IO[str]) -> None:
    for line in lines:
        console.print(line.rstrip(), markup=False, soft_wrap=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
